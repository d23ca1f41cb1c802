"""Every discriminator has a yaml that lists every argument and builds with its losses."""

import inspect
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_class
from omegaconf import OmegaConf

import vistok.discriminator
from vistok.loss import AdversarialLoss
from vistok.training.run import build_adversarial

CONFIGS = Path("configs").resolve()
YAMLS = sorted(path.stem for path in (CONFIGS / "discriminator").glob("*.yaml") if path.stem != "none")


def composed(*overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", overrides=list(overrides))


@pytest.mark.parametrize("name", YAMLS)
def test_every_yaml_lists_every_argument(name):
    node = OmegaConf.load(CONFIGS / "discriminator" / f"{name}.yaml")
    keys = {str(key) for key in node} - {"defaults", "adversarial", "_target_"}
    assert keys == set(inspect.signature(get_class(node._target_)).parameters)


def test_the_losses_list_every_argument_with_its_default():
    node = OmegaConf.to_container(OmegaConf.load(CONFIGS / "discriminator" / "adversarial" / "default.yaml"))
    assert isinstance(node, dict)
    assert node.pop("_target_") == "vistok.loss.AdversarialLoss"
    parameters = dict(inspect.signature(AdversarialLoss).parameters)
    del parameters["discriminator"]
    defaults = {
        name: list(value.default) if isinstance(value.default, tuple) else value.default
        for name, value in parameters.items()
    }
    node["lr"] = float(node["lr"])
    assert node == defaults


def test_every_public_class_has_a_yaml():
    module = vistok.discriminator
    classes = {
        name
        for name in module.__all__
        if inspect.isclass(value := getattr(module, name)) and not inspect.isabstract(value)
    }
    targets = {OmegaConf.load(CONFIGS / "discriminator" / f"{name}.yaml")._target_.rsplit(".")[-1] for name in YAMLS}
    assert targets == classes


@pytest.mark.parametrize("name", [name for name in YAMLS if name != "dino"])
def test_every_yaml_builds_with_its_losses(name):
    adversarial = build_adversarial(composed(f"discriminator={name}", "discriminator.adversarial.start=7"))
    assert isinstance(adversarial, AdversarialLoss)
    assert adversarial.start == 7


def test_channels_and_size_of_the_images_are_those_of_the_data():
    adversarial = build_adversarial(composed("discriminator=stylegan", "data.image_size=64", "data.channels=1"))
    assert adversarial is not None
    assert (adversarial.discriminator.channels, adversarial.discriminator.image_size) == (1, 64)


def test_without_a_discriminator_there_is_none():
    assert build_adversarial(composed()) is None
    assert build_adversarial(composed("discriminator=none")) is None
