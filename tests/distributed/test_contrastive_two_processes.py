"""InfoNCE of two gloo processes, and its gradient after DDP's averaging, equal those of one process."""

import pytest
import torch
import torch.distributed as dist
from two_processes import run_on_two_processes

from vistok import distributed
from vistok.loss import info_nce

DIM = 5
SPLITS = {"equal": (4, 4), "unequal": (3, 5)}


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, DIM, generator=generator), torch.randn(8, DIM, generator=generator)


def loss_and_gradients(images, texts):
    """Loss of ``images * weight`` and ``texts * weight`` with a scale, and its gradients for the three of them."""
    parameters = torch.full((2 * DIM + 1,), 0.5).add(torch.arange(2 * DIM + 1) / 10).requires_grad_()
    value = info_nce(images * parameters[:DIM], texts * parameters[DIM:-1], parameters[-1] * 5, gather=True)
    return value.detach(), torch.autograd.grad(value, parameters)[0]


def worker(rank, folder):
    for name, parts in SPLITS.items():
        value, gradient = loss_and_gradients(*(rows.split(parts)[rank] for rows in batch()))
        dist.all_reduce(gradient)
        torch.save((value, gradient / 2), folder / f"{name}_{rank}.pt")
    rows = torch.arange(10.0).view(5, 2)[: 5 - rank].add(10 * rank).requires_grad_()
    joined, first = distributed.gather_rows(rows)
    (joined * (1 + torch.arange(9.0)[:, None])).sum().backward()
    torch.save((joined.detach(), torch.tensor(first), rows.grad), folder / f"rows_{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_on_two_processes(worker, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", SPLITS)
def test_loss_and_gradient_of_two_processes_equal_those_of_the_joined_batch(name, results):
    value, gradient = loss_and_gradients(*batch())
    for rank in range(2):
        torch.testing.assert_close(results[f"{name}_{rank}"][0], value)
        torch.testing.assert_close(results[f"{name}_{rank}"][1], gradient, rtol=1e-5, atol=1e-6)


def test_rows_are_gathered_rank_by_rank_and_their_gradients_summed(results):
    rows = torch.arange(10.0).view(5, 2)
    factors = (1 + torch.arange(9.0))[:, None].expand(9, 2)
    for rank in range(2):
        joined, first, gradient = results[f"rows_{rank}"]
        assert torch.equal(joined, torch.cat([rows, rows[:4] + 10]))
        assert first == 5 * rank
        assert torch.equal(gradient, 2 * factors.split((5, 4))[rank])


def test_one_process_gathers_its_own_rows():
    rows = torch.randn(3, 2)
    joined, first = distributed.gather_rows(rows)
    assert first == 0
    assert joined is rows
