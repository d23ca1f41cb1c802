"""Configs and code mirror each other: every class has a yaml, every yaml builds and lists every argument."""

import importlib
import inspect
import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class
from omegaconf import OmegaConf

import vistok
from vistok.config import Configurable

CONFIGS = Path("configs").resolve()
MIRRORED = ["encoder", "quantizer", "decoder"]
# These are set by the composition or by training, not by a user.
ELSEWHERE = {
    "Tokenizer": {"preprocessing"},
    "HierarchicalTokenizer": {"preprocessing"},
    # Of the stream that its base class reads.
    "BucketShardData": {"samples_per_epoch", "shuffle_buffer"},
}


def yamls(*groups):
    return [path for group in groups for path in sorted((CONFIGS / group).glob("*.yaml"))]


def composed(name="train", *overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose(name, overrides=list(overrides), return_hydra_config=True)
    OmegaConf.set_struct(config, False)
    OmegaConf.set_readonly(config.hydra, False)
    config.hydra.runtime.output_dir = "runs/test"
    HydraConfig.instance().set_config(config)
    return config


def name_of(path):
    return f"{path.parent.name}/{path.stem}"


@pytest.mark.parametrize("path", yamls(*MIRRORED), ids=name_of)
def test_every_part_builds(path):
    config = composed("train", f"{path.parent.name}={path.stem}")
    plain = OmegaConf.to_container(config[path.parent.name], resolve=True)
    # Files of pretrained weights are not at hand.
    part = vistok.build({**plain, **get_class(plain["_target_"]).SOURCES})
    assert isinstance(part, Configurable)


def arguments_of(cls):
    """Arguments of a constructor; `**options` stands for those of the next one in the order of inheritance."""
    names = set()
    for base in (base for base in cls.__mro__ if "__init__" in vars(base)):
        parameters = inspect.signature(base).parameters
        own = {name for name, parameter in parameters.items() if parameter.kind != inspect.Parameter.VAR_KEYWORD}
        names |= own
        if len(own) == len(parameters):
            break
    return names


@pytest.mark.parametrize("path", yamls(*MIRRORED, "loss", "data", "tokenizer"), ids=name_of)
def test_every_yaml_lists_every_argument(path):
    config = OmegaConf.load(path)
    cls = get_class(config._target_)
    arguments = arguments_of(cls) - ELSEWHERE.get(cls.__name__, set())
    assert {str(key) for key in config if not str(key).startswith("_")} == arguments


@pytest.mark.parametrize("group", MIRRORED)
def test_every_public_class_has_a_yaml(group):
    module = importlib.import_module(f"vistok.{group}")
    public = {name for name in module.__all__ if not inspect.isabstract(getattr(module, name))} - {"Quantized"}
    targets = {OmegaConf.load(path)._target_.rsplit(".", 1)[-1] for path in yamls(group)}
    assert targets == public


@pytest.mark.parametrize("path", yamls("experiment"), ids=name_of)
def test_every_experiment_composes_and_builds(path):
    config = composed("train", f"experiment={path.stem}")
    part = vistok.build(OmegaConf.to_container(config.tokenizer, resolve=True))
    assert isinstance(part, vistok.Tokenizer)
    assert config.name == path.stem


@pytest.mark.parametrize("path", yamls("logger", "trainer", "callbacks", "scheduler", "optimizer", "loss"), ids=name_of)
def test_every_member_of_every_group_composes(path):
    config = composed("train", f"{path.parent.name}={path.stem}")
    targets = [node["_target_"] for node in nodes(OmegaConf.to_container(config[path.parent.name], resolve=True))]
    for target in targets:
        module, _, name = target.rpartition(".")
        assert callable(getattr(importlib.import_module(module), name))
    assert targets or path.stem == "none"


def nodes(value):
    if isinstance(value, dict):
        if "_target_" in value:
            yield value
        for item in value.values():
            yield from nodes(item)


def test_every_group_folder_is_used():
    config = composed()
    groups = {path.name for path in CONFIGS.iterdir() if path.is_dir() and any(path.glob("*.yaml"))}
    assert groups <= set(config) | {"experiment", "protocol"}


@pytest.mark.parametrize("name", ["train", "eval"])
def test_every_example_of_the_help_composes_as_a_shell_would_pass_it(name):
    text = OmegaConf.load(CONFIGS / f"{name}.yaml").hydra.help._get_node("template")._value()
    # The command ends where two spaces begin its explanation.
    commands = re.findall(rf"^ *python {name}\.py (\S+(?: \S+)*)", text, flags=re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        overrides = [word for word in shlex.split(command) if "=" in word and not word.startswith("-")]
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            assert compose(name, overrides=overrides if "-m" not in command.split() else [])
