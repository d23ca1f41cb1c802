"""Modules that remember how they were built, and building them again from that record.

A config is a plain nested dict: ``_target_`` is the import path of a class, the other keys are its arguments. Hydra's
yaml files have the same form, but nothing here needs Hydra, and only classes of vistok are ever built.
"""

import functools
import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

# Subpackages whose classes a config may name.
PARTS = ("encoder", "quantizer", "decoder", "tokenizer")
# Classes that vistok itself exports.
TOKENIZERS = ("vistok.Tokenizer", "vistok.HierarchicalTokenizer")
PLAIN = (str, int, float, bool, type(None))


class Configurable:
    """Mixin that records the arguments of the constructor, so that ``config_of(module)`` can describe the module."""

    _arguments: dict[str, Any]
    # What was built: FSDP gives a module another class later.
    _class: type
    # Arguments that `build` passes on as configs: parts of which the class builds several, or whose sizes it sets.
    TEMPLATES: tuple[str, ...] = ()
    # Arguments that say where first values come from, and what a config records in their place: whoever builds from it
    # has the values themselves.
    SOURCES: Mapping[str, Any] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Wrap the constructor of each subclass; the outermost constructor of an object does the recording."""
        super().__init_subclass__(**kwargs)
        if "__init__" not in cls.__dict__:
            return
        init = cls.__init__

        @functools.wraps(init)
        def recording_init(self: Any, *args: Any, **kwargs: Any) -> None:
            # Python reports a wrong argument better than `bind` does, so a failing `bind` is left to the call.
            try:
                bound = inspect.signature(init).bind(self, *args, **kwargs)
            except TypeError:
                bound = None
            init(self, *args, **kwargs)
            if bound is not None and type(self).__init__ is recording_init:
                # Defaults are recorded too: a bundle must not change when a default does.
                bound.apply_defaults()
                self._arguments = dict(list(bound.arguments.items())[1:])
                self._class = type(self)

        cls.__init__ = recording_init


def config_of(value: Any) -> Any:
    """Config of a module built from `Configurable` parts; plain values are returned as they are.

    Raises:
        TypeError: If an argument is neither plain (numbers, strings, lists, mappings) nor `Configurable`.
    """
    if isinstance(value, Configurable):
        return {
            "_target_": public_path(value._class),
            **{key: config_of(item) for key, item in (value._arguments | dict(value.SOURCES)).items()},
        }
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Mapping):
        return {str(key): config_of(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [config_of(item) for item in value]
    raise TypeError(
        f"{type(value).__name__} cannot be written into a config: derive it from vistok.config.Configurable"
    )


def public_path(cls: type) -> str:
    """Shortest import path of a class: ``vistok.quantizer.FSQ`` rather than ``vistok.quantizer.fsq.FSQ``."""
    parts = cls.__module__.split(".")
    for end in range(1, len(parts) + 1):
        module = ".".join(parts[:end])
        if getattr(importlib.import_module(module), cls.__name__, None) is cls:
            return f"{module}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def build(config: Mapping[str, Any]) -> Any:
    """Build the module a config describes.

    Args:
        config: Nested mapping with ``_target_`` keys.

    Raises:
        ValueError: If a target is not a module class of vistok, or its arguments do not fit. Nothing is executed then.
    """
    refuse_foreign_targets(config)
    return _build(config)


def refuse_foreign_targets(config: Any, where: str = "config") -> None:
    """Raise a ValueError if any ``_target_`` below `config` is not a module class that vistok defines."""
    if isinstance(config, Mapping):
        if "_target_" in config:
            resolve(config["_target_"], where)
        for key, item in config.items():
            refuse_foreign_targets(item, f"{where}.{key}")
    elif isinstance(config, Sequence) and not isinstance(config, str):
        for index, item in enumerate(config):
            refuse_foreign_targets(item, f"{where}[{index}]")


def resolve(target: Any, where: str) -> type[Configurable]:
    """The module class of vistok that a ``_target_`` names; `where` is its place in the config, for the error."""
    if not isinstance(target, str) or not target.startswith("vistok."):
        raise ValueError(
            f"{where}._target_ is {target!r}: only classes of vistok are built from a config; nothing was executed"
        )
    module_name, _, class_name = target.rpartition(".")
    # Checked before the import: importing a module runs it.
    if target not in TOKENIZERS and target.split(".")[1] not in PARTS:
        raise ValueError(
            f"{where}._target_ is {target!r}: vistok has no module class of that name; nothing was executed"
        )
    try:
        cls = getattr(importlib.import_module(module_name), class_name, None)
    except ImportError:
        cls = None
    # `vistok.hub.os.system` would resolve too, so it is the class itself that has to come from vistok.
    if not (
        isinstance(cls, type)
        and issubclass(cls, Configurable)
        and issubclass(cls, nn.Module)
        and cls.__module__.startswith("vistok.")
    ):
        raise ValueError(
            f"{where}._target_ is {target!r}: vistok has no module class of that name; nothing was executed"
        )
    return cls


def _build(config: Any) -> Any:
    if isinstance(config, Mapping):
        if "_target_" not in config:
            return {key: _build(item) for key, item in config.items()}
        cls = resolve(config["_target_"], "config")
        arguments = {
            key: item if key in cls.TEMPLATES else _build(item) for key, item in config.items() if key != "_target_"
        }
        allowed = [name for name in inspect.signature(cls).parameters]
        unknown = sorted(set(arguments) - set(allowed))
        if unknown:
            raise ValueError(f"{cls.__name__} has no argument {', '.join(unknown)}; it takes {', '.join(allowed)}")
        missing = [
            name
            for name, parameter in inspect.signature(cls).parameters.items()
            if parameter.default is inspect.Parameter.empty and name not in arguments
        ]
        if missing:
            raise ValueError(f"{cls.__name__} needs {', '.join(missing)}; it takes {', '.join(allowed)}")
        return cls(**arguments)
    if isinstance(config, Sequence) and not isinstance(config, str):
        return [_build(item) for item in config]
    return config
