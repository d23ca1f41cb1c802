"""Modules that remember how they were built, and building them again from that record.

A config is a plain nested dict: ``_target_`` is the import path of a class, the other keys are its arguments. Hydra's
yaml files have the same form, but nothing here needs Hydra. Only classes of vistok are ever built, and those that the
running program has given to `register`.
"""

import functools
import importlib
import inspect
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

# Subpackages whose classes a config may name.
PARTS = ("encoder", "quantizer", "decoder", "tokenizer")
# Classes that vistok itself exports.
TOKENIZERS = ("vistok.Tokenizer", "vistok.HierarchicalTokenizer")
PLAIN = (str, int, float, bool, type(None))
# Classes of others that may be built, by their import path.
_REGISTERED: dict[str, type["Configurable"]] = {}

C = TypeVar("C", bound=type)


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


def register(cls: C) -> C:
    """Let configs and bundles name an encoder, quantizer or decoder of your own: a decorator of its class.

    A bundle never imports anything of others, so a program that loads one with such a part imports the module of the
    class first; the commands do for ``plugins=[module]``.

    Args:
        cls: Derived from `vistok.encoder.Encoder`, `vistok.quantizer.Quantizer` or `vistok.decoder.Decoder`.

    Raises:
        TypeError: If it is not a module class that records its arguments.
        ValueError: If other programs could not import it.
    """
    if not (issubclass(cls, Configurable) and issubclass(cls, nn.Module)):
        raise TypeError(f"register takes a class derived from vistok's Encoder, Quantizer or Decoder, got {cls!r}")
    if cls.__module__ == "__main__" or "<locals>" in cls.__qualname__:
        raise ValueError(
            f"{cls.__qualname__} of {cls.__module__} cannot be imported by others: define it at the top of a file of "
            "its own, such as my_quantizer.py"
        )
    _REGISTERED[f"{cls.__module__}.{cls.__qualname__}"] = cls
    return cls


def import_from_here(module: str) -> Any:
    """Import a module that is installed or lies in the working folder.

    Raises:
        ImportError: If it is neither, or fails itself.
    """
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return importlib.import_module(module)
    finally:
        # The module may have put something before it. At the end it finds what the module imports when it is used, and
        # hides no installed package.
        sys.path.remove(here)
        if here not in sys.path:
            sys.path.append(here)


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
    if (path := f"{cls.__module__}.{cls.__qualname__}") in _REGISTERED:
        return path
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
        ValueError: If a target is not a module class of vistok or one given to `register`, or its arguments do not fit.
            Nothing is executed then.
    """
    refuse_foreign_targets(config)
    return _build(config)


def refuse_foreign_targets(config: Any, where: str = "config") -> None:
    """Raise a ValueError if any ``_target_`` below `config` names no module class of vistok or of `register`."""
    if isinstance(config, Mapping):
        if "_target_" in config:
            resolve(config["_target_"], where)
        for key, item in config.items():
            refuse_foreign_targets(item, f"{where}.{key}")
    elif isinstance(config, Sequence) and not isinstance(config, str):
        for index, item in enumerate(config):
            refuse_foreign_targets(item, f"{where}[{index}]")


def resolve(target: Any, where: str) -> type[Configurable]:
    """The module class that a ``_target_`` names; `where` is its place in the config, for the error."""
    if isinstance(target, str) and target in _REGISTERED:
        return _REGISTERED[target]
    if not isinstance(target, str) or not target.startswith("vistok."):
        raise ValueError(
            f"{where}._target_ is {target!r}: only classes of vistok are built from a config, and those of your own "
            "that are decorated by vistok.register, once their module is imported (commands: plugins=[module]); "
            "nothing was executed"
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
