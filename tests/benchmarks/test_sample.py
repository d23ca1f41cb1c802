"""The benchmark of sampling: both sides have the same size and draw as many tokens."""

import importlib
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")


@pytest.fixture
def sample(monkeypatch):
    monkeypatch.syspath_prepend(str(Path("benchmarks").resolve()))
    return importlib.import_module("sample")


# Of transformers under newer libraries.
@pytest.mark.filterwarnings("ignore")
def test_both_sides_have_the_same_size_and_draw_all_tokens(sample):
    setting = sample.QUICK["quick"]
    arguments = torch.device("cpu"), torch.float32
    # Raises an error if the parameter counts differ.
    result = sample.measure(setting, *arguments, repeats=1)
    assert result["ratio"] > 0
    assert sample.ours(setting, *arguments)[1]().shape == (2, 16)
    assert sample.theirs(setting, *arguments)[1]().shape == (2, 17)
