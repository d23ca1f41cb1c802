"""Optimal transport against the dense iteration in double precision."""

import pytest
import torch

from vistok.ops import nearest_code, sinkhorn_code


def dense_plan(rows, codebook, iterations, epsilon):
    cost = (rows.double()[:, None] - codebook.double()).norm(dim=-1)
    cost = (cost - cost.mean()) / (cost.std() + 1e-6)
    plan = torch.exp(-(cost - cost.min()) / epsilon)
    plan = plan / plan.sum()
    for _ in range(iterations):
        plan = plan / ((plan.sum(0, keepdim=True) + 1e-8) * plan.shape[1])
        plan = plan / ((plan.sum(1, keepdim=True) + 1e-8) * plan.shape[0])
    return plan


@pytest.mark.parametrize("max_memory", [2**28, 2**18, 0], ids=["held", "stripes", "smallest stripes"])
@pytest.mark.parametrize(("n", "k"), [(7, 2), (300, 65), (700, 321)])
@pytest.mark.parametrize("iterations", [1, 5])
def test_it_equals_the_dense_iteration_in_double_precision(n, k, iterations, max_memory):
    rows, codebook = torch.randn(n, 6), torch.randn(k, 6)
    plan = dense_plan(rows, codebook, iterations, 0.1)
    indices = sinkhorn_code(rows, codebook, iterations, 0.1, max_memory)
    torch.testing.assert_close(plan.gather(1, indices[:, None])[:, 0], plan.amax(-1), rtol=1e-3, atol=0)
    assert (indices == plan.argmax(-1)).float().mean() > 0.99


def test_it_spreads_rows_that_share_a_nearest_code():
    rows = 0.1 * torch.randn(400, 4)
    codebook = torch.randn(40, 4)
    nearest, balanced = nearest_code(rows, codebook), sinkhorn_code(rows, codebook)
    assert len(balanced.unique()) == 40 > 2 * len(nearest.unique())


def test_rows_that_are_not_finite_take_no_part():
    rows, codebook = torch.randn(50, 4), torch.randn(20, 4)
    expected = sinkhorn_code(rows, codebook)
    broken = torch.cat([rows[:10], torch.full((1, 4), torch.nan), rows[10:], torch.full((1, 4), torch.inf)])
    indices = sinkhorn_code(broken, codebook)
    assert torch.equal(torch.cat([indices[:10], indices[11:-1]]), expected)
    assert indices[10] == indices[-1] == 0
    assert sinkhorn_code(broken[-1:], codebook).tolist() == [0]


def test_a_row_far_from_all_codes_gets_a_code_near_it():
    codebook = torch.eye(8)
    rows = torch.cat([torch.randn(400, 8), 300 * codebook[5:6]])
    assert sinkhorn_code(rows, codebook)[-1] == 5


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        sinkhorn_code(torch.randn(4, 2), torch.randn(4, 2), 0)
    with pytest.raises(ValueError, match="epsilon must be positive, got 0"):
        sinkhorn_code(torch.randn(4, 2), torch.randn(4, 2), 5, 0.0)
