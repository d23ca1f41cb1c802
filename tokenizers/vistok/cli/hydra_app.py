"""Running a Hydra application so that a user's mistake is answered by one helpful message instead of a traceback."""

import difflib
import functools
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from vistok.config import import_from_here


def configs_folder() -> Path:
    """Folder of the yaml files: inside the installed package, or at the root of a source tree."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "configs", package.parent.parent / "configs"):
        if (folder / "train.yaml").is_file():
            return folder
    raise FileNotFoundError(
        f"vistok is installed without its configs: looked in {package / 'configs'} and beside {package.parent}"
    )


def run(config_name: str, task: Callable[[DictConfig], Any]) -> None:
    """Compose ``configs/<config_name>.yaml`` with the overrides of the command line and call `task` with it.

    Mistakes of the user (an unknown key, a missing file, an impossible value) end the program with exit code 2 and a
    message; ``VISTOK_TRACEBACK=1`` shows the traceback as well.
    """

    @functools.wraps(task)
    def checked(config: DictConfig) -> Any:
        import_plugins(config.get("plugins") or ())
        refuse_unknown_settings(config, config_name)
        check_settings(config, config_name)
        return task(config)

    # Hydra prints errors itself and hides their type unless it is told to let them through.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        hydra.main(version_base="1.3", config_path=str(configs_folder()), config_name=config_name)(checked)()
    except (HydraException, OmegaConfBaseException, ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("VISTOK_TRACEBACK"):
            raise
        sys.stderr.write(f"error: {explain(error, config_name)}\n(VISTOK_TRACEBACK=1 shows where it was raised)\n")
        sys.exit(2)


def import_plugins(names: Sequence[str]) -> None:
    """Import modules of the user that give classes to `vistok.register`, before anything is built.

    Raises:
        ValueError: If one cannot be imported.
    """
    if isinstance(names, str):
        raise ValueError(f"plugins must be a list of modules, got {names!r}: plugins=[{names}]")
    for name in names:
        try:
            import_from_here(name)
        except ImportError as error:
            raise ValueError(
                f"plugins: {name} cannot be imported ({error}): name a module that is installed or in this folder, "
                "such as my_quantizer for my_quantizer.py"
            ) from error


def command_line(without: str = "") -> str:
    """The command that repeats the running job, as a shell takes it; in a sweep that of the one job.

    Args:
        without: Leave out overrides of this key.
    """
    # Not sys.argv: it has the choices of a whole sweep, and a run folder that exists by now.
    overrides = [item for item in HydraConfig.get().overrides.task if not (without and item.startswith(f"{without}="))]
    script = Path(sys.argv[0])
    started_as = getattr(sys.modules["__main__"].__spec__, "name", "")
    if started_as.startswith("vistok.cli."):
        program = ["vistok", started_as.rpartition(".")[2]]
    else:
        program = ["python", script.name]
    return shlex.join([*program, *overrides])


def explain(error: Exception, config_name: str) -> str:
    """Message for a user: what was got, and what is allowed."""
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        where = re.search(r"full_key: (\S+)", str(error))
        return f"{where[1] + ': ' if where else ''}{error.__cause__}"
    if isinstance(error, MissingMandatoryValue):
        key = getattr(error, "full_key", None) or str(error).rsplit(" ", 1)[-1]
        return f"{key} has no default: set it, for example {key}=..."
    if isinstance(error, OverrideParseException):
        return (
            f"cannot read the override {error.override!r}; write key=value, and quote values with spaces, braces or "
            "commas: 'key=\"...\"'"
        )
    if isinstance(error, ConfigCompositionException):
        return _explain_override(error, config_name)
    if isinstance(error, OmegaConfBaseException):
        return str(error).replace("\n", "; ").strip("; ")
    return str(error)


def _explain_override(error: ConfigCompositionException, config_name: str) -> str:
    text = str(error)
    groups = _groups(config_name)
    if isinstance(error, MissingConfigException):
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        members = sorted(map(str, error.options or ()))
        return f"{group} has no member {name!r}; choose {group}={'|'.join(members)}{similar(name, members)}"
    match = re.search(r"Could not (?:override|append to config|append|delete).*?'([^']+)'", text)
    if match is None:
        return "; ".join(line.strip() for line in text.splitlines() if line.strip())
    key = match[1].split("@")[0]
    if "." not in key and "No match in the defaults list" in text:
        return f"no group {key!r}; groups are {', '.join(groups)}{similar(key, groups)}"
    node, choices = _composed_without(key, config_name)
    walked: list[str] = []
    for part in key.split("."):
        keys = sorted(item for item in node if not item.startswith("_")) if isinstance(node, dict) else []
        if part not in keys:
            where = ".".join(walked) or "the top level"
            hint = _hint(node, where, part, choices) or similar(part, keys)
            return f"no setting {key!r}: {where} has {', '.join(keys) or 'no settings'}{hint}"
        node = node[part]
        walked.append(part)
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())


def _hint(node: Any, where: str, key: str, choices: dict[str, Any]) -> str:
    """What to write in place of a setting that another member of the group has; empty if nothing is known."""
    if key == "codebook_size" and isinstance(node, dict):
        name = str(node.get("_target_")).rpartition(".")[2]
        if "levels" in node:
            return f". {name}'s size is the product of {where}.levels"
        if "bits" in node:
            return f". {name}'s size is 2**bits: set {where}.bits"
    if where == "data":
        files = sorted((configs_folder() / where).glob("*.yaml"))
        members = [file.stem for file in files if key in OmegaConf.load(file)]
        # The plain sets first.
        members.sort(key=lambda name: name not in ("image_folder", "webdataset"))
        if members:
            return f". data={choices.get(where)} has no {key}: add data={' or data='.join(members)}"
    return ""


def _groups(config_name: str) -> list[str]:
    """Groups in the defaults list of a config."""
    defaults = OmegaConf.load(configs_folder() / f"{config_name}.yaml").defaults
    return sorted(str(key) for entry in defaults if isinstance(entry, DictConfig) for key in entry)


def refuse_unknown_settings(config: DictConfig, config_name: str) -> None:
    """Raise a ValueError if a ``+key=value`` added something that nothing reads."""
    known = set(OmegaConf.load(configs_folder() / f"{config_name}.yaml")) | {
        path.name for path in configs_folder().iterdir()
    }
    for key in map(str, config):
        if key not in known:
            allowed = sorted(set(map(str, config)) - {key})
            raise ValueError(f"no setting {key!r}: the top level has {', '.join(allowed)}{similar(key, allowed)}")


def check_settings(config: DictConfig, config_name: str) -> None:
    """Compare a config with the yaml files that it is composed from.

    Raises:
        ValueError: If a setting is text where its default is a number, or no list where it is a list of numbers; or if
            an experiment has settings for another encoder, quantizer or decoder than the chosen one.
    """
    plain = OmegaConf.to_container(config)
    _check_types(plain, OmegaConf.to_container(OmegaConf.load(configs_folder() / f"{config_name}.yaml")))
    settings = HydraConfig.get()
    given = {override.split("=")[0].lstrip("+") for override in settings.overrides.task}
    strangers: list[str] = []
    without: list[str] = []
    for group, member in settings.runtime.choices.items():
        file, node = configs_folder() / group / f"{member}.yaml", plain
        for part in group.split("/"):
            node = node.get(part) if isinstance(node, dict) else None
        if not isinstance(node, dict) or not file.is_file():
            continue
        defaults = OmegaConf.to_container(OmegaConf.load(file))
        assert isinstance(defaults, dict)
        if node.get("_target_") != defaults.get("_target_"):  # another class, with arguments of its own
            continue
        _check_types(node, defaults, f"{group.replace('/', '.')}.")
        keys = [str(key) for key in node if key not in defaults and f"{group}.{key}" not in given]
        if keys and group in ("encoder", "quantizer", "decoder"):
            strangers.append(f"{group}={member} has no {', '.join(keys)}")
            without += [f"~{group}.{key}" for key in keys]
    if strangers:
        raise ValueError(
            f"{'; '.join(strangers)}: experiment={settings.runtime.choices.get('experiment')} sets them for another "
            f"choice. Leave them out by {' '.join(without)}"
        )


def _check_types(values: Any, defaults: Any, prefix: str = "") -> None:
    """Raise a ValueError if a value is text in the place of a number, or no list in the place of one of numbers."""

    def is_number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    def is_text(value: Any) -> bool:
        return isinstance(value, str) and "${" not in value

    for key in values.keys() & defaults.keys():
        value, default = values[key], defaults[key]
        if isinstance(value, dict) and isinstance(default, dict):
            _check_types(value, default, f"{prefix}{key}.")
        elif is_number(default) and is_text(value):
            raise ValueError(f"{prefix}{key} must be a number, such as {default}; got {value!r}")
        elif (isinstance(default, list) and default and all(map(is_number, default))) and (
            is_text(value) or is_number(value) or (isinstance(value, list) and any(map(is_text, value)))
        ):
            example = str(default).replace(" ", "")
            raise ValueError(f"{prefix}{key} must be a list of numbers, such as {example}; got {value!r}")


def similar(name: str, allowed: list[str]) -> str:
    """The end of a message that lists what is allowed: the closest of it, if one is close."""
    close = difflib.get_close_matches(name, allowed, n=1)
    return f". Did you mean {close[0]}?" if close else ""


def _composed_without(key: str, config_name: str) -> tuple[Any, dict[str, Any]]:
    """The config composed from those overrides of the command line that choose groups, and all choices.

    It shows which keys exist.
    """
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    groups = _groups(config_name)
    chosen = []
    for argument in sys.argv[1:]:
        if "=" not in argument or argument.startswith("-"):
            continue
        override = OverridesParser.create().parse_override(argument)
        if override.key_or_group in groups and override.key_or_group != key and not override.is_sweep_override():
            chosen.append(argument)
    with hydra.initialize_config_dir(str(configs_folder()), version_base="1.3"):
        config = hydra.compose(config_name, overrides=chosen, return_hydra_config=True)
    choices = dict(config.hydra.runtime.choices)
    del config.hydra
    return OmegaConf.to_container(config), choices
