"""Building the parts of composite quantizers from one description."""

import inspect
from collections.abc import Mapping
from typing import Any

from vistok.config import build, config_of, resolve
from vistok.quantizer.base import Quantizer

# A prime; seeds stay below 2**31 because random choices shift them by 32 bits.
SEED_STRIDE = 65599


def from_template(template: Quantizer | Mapping[str, Any], number: int = 0, **arguments: Any) -> Quantizer:
    """Build one part of a composite quantizer.

    Args:
        template: A config (``_target_`` and arguments), or a quantizer whose config is used. It is never used itself:
            every part is new.
        number: Which part this is; parts of other numbers draw other random numbers.
        **arguments: What the composite says about the part. None leaves it to the template.

    Raises:
        ValueError: If the template says something else about an argument than the composite.
    """
    config: dict[str, Any] = dict(config_of(template))
    if "_target_" not in config:
        raise ValueError(f"a template needs _target_, the class of the part; got {config}")
    cls = resolve(config["_target_"], "quantizer")
    if not issubclass(cls, Quantizer):
        raise ValueError(f"a template names a quantizer, got {config['_target_']}")
    for name, value in arguments.items():
        if value is None:
            continue
        value = config_of(value)
        if config.get(name) not in (None, value):
            raise ValueError(
                f"{cls.__name__} has {name}={config[name]} in the template, but its composite says {name}={value}: "
                "leave one of them out"
            )
        config[name] = value
    if "seed" in inspect.signature(cls).parameters:
        config["seed"] = ((config.get("seed") or 0) * SEED_STRIDE + number) % 2**31
    return build(config)
