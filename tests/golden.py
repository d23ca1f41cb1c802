"""Outputs of original programs with random weights."""

import json
import os
from pathlib import Path

import pytest
from safetensors import safe_open


def golden(name):
    """Weights by their original names, inputs and outputs, and the configuration of an original program."""
    if "VISTOK_TEST_DATA" not in os.environ:
        pytest.skip("VISTOK_TEST_DATA")
    path = Path(os.environ["VISTOK_TEST_DATA"]).parent / "golden" / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"VISTOK_TEST_DATA has no {path.name} beside it")
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata().get("config", "{}"))
    weights, io = (
        {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        for prefix in ("weights.", "io.")
    )
    return weights, io, config
