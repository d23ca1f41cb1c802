"""Composed configs of tiny runs."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict
from tiny_runs import TINY


@pytest.fixture
def compose_run(tmp_path):
    """``compose_run(name, overrides) -> (config, folder)`` as ``train.py`` composes it."""

    # Imported late: the hook that checks shapes has to come before vistok.
    from vistok.cli.hydra_app import configs_folder

    def make(name, overrides):
        folder = tmp_path / name
        with initialize_config_dir(str(configs_folder()), version_base="1.3"):
            config = compose("train", overrides=list(overrides), return_hydra_config=True)
        with open_dict(config):
            config.hydra.runtime.output_dir = str(folder)
        HydraConfig.instance().set_config(config)
        with open_dict(config):
            del config["hydra"]
        OmegaConf.resolve(config)
        return config, folder

    return make


@pytest.fixture
def tiny(compose_run):
    """``tiny(name, *overrides) -> (config, folder)`` of a run that takes seconds."""
    return lambda name, *overrides: compose_run(name, [*TINY, *overrides])
