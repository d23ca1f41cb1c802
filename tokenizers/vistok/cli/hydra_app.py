"""Running a Hydra application so that a user's mistake is answered by one helpful message instead of a traceback."""

import difflib
import functools
import os
import re
import shlex
import sys
from collections.abc import Callable
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
    message;
    ``VISTOK_TRACEBACK=1`` shows the traceback as well.
    """

    @functools.wraps(task)
    def checked(config: DictConfig) -> Any:
        refuse_unknown_settings(config, config_name)
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
        return f"{group} has no member {name!r}; choose {group}={'|'.join(members)}{_similar(name, members)}"
    match = re.search(r"Could not (?:override|append to config|append|delete).*?'([^']+)'", text)
    if match is None:
        return "; ".join(line.strip() for line in text.splitlines() if line.strip())
    key = match[1].split("@")[0]
    if "." not in key and "No match in the defaults list" in text:
        return f"no group {key!r}; groups are {', '.join(groups)}{_similar(key, groups)}"
    node, walked = _composed_without(key, config_name), []
    for part in key.split("."):
        keys = sorted(item for item in node if not item.startswith("_")) if isinstance(node, dict) else []
        if part not in keys:
            where = ".".join(walked) or "the top level"
            return f"no setting {key!r}: {where} has {', '.join(keys) or 'no settings'}{_similar(part, keys)}"
        node = node[part]
        walked.append(part)
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())


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
            raise ValueError(f"no setting {key!r}: the top level has {', '.join(allowed)}{_similar(key, allowed)}")


def _similar(name: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(name, allowed, n=1)
    return f". Did you mean {close[0]}?" if close else ""


def _composed_without(key: str, config_name: str) -> Any:
    """The config composed from those overrides of the command line that choose groups, to see which keys exist."""
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
        return OmegaConf.to_container(hydra.compose(config_name, overrides=chosen))
