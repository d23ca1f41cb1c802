"""Curves of logged numbers."""

import importlib
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def curves(monkeypatch):
    monkeypatch.syspath_prepend(str(Path("benchmarks").resolve()))
    return importlib.import_module("curves")


@pytest.fixture
def run(tmp_path):
    rows = [f"{step},{step / 10},{step if step % 4 == 0 else ''}" for step in range(12)]
    (tmp_path / "metrics.csv").write_text("\n".join(["step,train/l2,val/psnr", *rows]) + "\n")
    return tmp_path


def test_training_is_drawn_as_running_means_and_validation_as_it_is(curves, run):
    steps, values = curves.curve(run, "train/l2")
    np.testing.assert_allclose(steps, np.arange(2, 10))
    np.testing.assert_allclose(values, steps / 10)
    np.testing.assert_allclose(curves.curve(run, "val/psnr"), [[0, 4, 8], [0, 4, 8]])


def test_runs_are_drawn_side_by_side_and_what_none_has_logged_stays_empty(curves, run, tmp_path):
    output = tmp_path / "curves.png"
    curves.main([str(output), f"one={run}", f"two={run}", "--mark", "3"])
    assert output.stat().st_size > 0
    assert len(curves.curve(run, "train/adaptive_weight")[0]) == 0
