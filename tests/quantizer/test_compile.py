"""torch.compile takes every quantizer whole, in training and in evaluation."""

import subprocess
import sys
from pathlib import Path

import pytest

CONFIGS = sorted(Path("configs/quantizer").glob("*.yaml"))


@pytest.mark.timeout(600)
def test_every_quantizer_compiles_without_a_graph_break():
    # A process of its own: the shape checks of the test run wrap functions in ways the compiler does not follow.
    script = Path(__file__).with_name("compile_all.py")
    result = subprocess.run([sys.executable, str(script), *map(str, CONFIGS)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
