"""The benchmark of a GAN step: both sides are the same architecture, and all three steps run."""

import importlib
from pathlib import Path

import pytest
import torch


@pytest.fixture
def train_step(monkeypatch):
    monkeypatch.syspath_prepend(str(Path("benchmarks").resolve()))
    return importlib.import_module("train_step")


# Of diffusers under newer libraries, and of a trainer that only times.
@pytest.mark.filterwarnings("ignore")
def test_all_three_steps_run_and_change_their_weights(train_step):
    setting = train_step.Setting(
        image_size=32,
        batch_size=1,
        base_channels=32,
        channel_multipliers=[1, 2],
        device="cpu",
        precision="32-true",
        channels_last=True,
        compile=False,
        fused=True,
    )
    # Raises an error if the parameter counts differ.
    steps = {name: train_step.Textbook(setting, rerun=name == "rerun") for name in train_step.REFERENCES}
    before = {name: [value.clone() for value in step.model.parameters()] for name, step in steps.items()}
    times = train_step.fit(setting, 1, steps)
    assert times.keys() == {"ours", "textbook", "rerun"}
    assert min(times.values()) > 0
    for name, step in steps.items():
        assert any(not torch.equal(old, new) for old, new in zip(before[name], step.model.parameters(), strict=True))
