"""The kernels as operators of torch: registered as documented, and opaque to the compiler."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

from vistok.ops import nearest, sinkhorn, soft


def tensors(grad):
    return [torch.randn(*shape, requires_grad=grad) for shape in ((37, 5), (70, 5))]


@pytest.mark.parametrize(
    "call",
    [
        lambda: (nearest._nearest, (*tensors(False), 3)),
        lambda: (sinkhorn._sinkhorn, (*tensors(False), 3, 0.1, 1000)),
        lambda: (soft._soft, (*tensors(True), torch.randn(70, 4), None, 1.0, 2.0)),
        lambda: (soft._soft, (*tensors(True), torch.randn(70, 4), torch.tensor(3), 1.0, 0.0)),
        lambda: (soft._soft, (*tensors(True), None, None, 0.0, 2.0)),
    ],
    ids=["nearest", "sinkhorn", "both heads", "noise", "entropy"],
)
def test_operators_pass_the_checks_of_torch(call):
    operator, arguments = call()
    with warnings.catch_warnings():
        # The check itself reads gradients of tensors that are no leaves.
        warnings.simplefilter("ignore")
        results = torch.library.opcheck(operator, arguments)
    assert set(results.values()) == {"SUCCESS"}


COMPILED = """
import torch
from vistok.ops import nearest_code, sinkhorn_code, soft_assignment, soft_codes

torch.set_num_threads(1)
seed = torch.tensor(3)

def loss(rows, codebook):
    both = soft_codes(rows, codebook, codebook, 0.7, 0.1, "euclidean", None, seed)
    entropy, probability = soft_assignment(rows, codebook, 0.1)
    picked = codebook[nearest_code(rows, codebook)].sum() + codebook[sinkhorn_code(rows, codebook)].sum()
    return both.codes.sum() + both.sample_entropy + entropy + probability.square().sum() + picked

inputs = [torch.randn(37, 5, requires_grad=True), torch.randn(70, 5, requires_grad=True)]
expected = torch.autograd.grad(loss(*inputs), inputs)
compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
for ours, other in zip(torch.autograd.grad(compiled(*inputs), inputs), expected):
    torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-6)
"""


def test_compiled_kernels_equal_the_eager_ones_forward_and_backward():
    # In a process of its own: the compiler cannot trace the shape checks of the test run.
    paths = os.pathsep.join(path for path in sys.path if path)
    result = subprocess.run(
        [sys.executable, "-c", COMPILED],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        check=False,
    )
    assert result.returncode == 0, result.stderr
