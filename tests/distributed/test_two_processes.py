"""Two gloo processes equal one process on the joined batch."""

import pytest
import torch
from two_processes import run_on_two_processes

from vistok import distributed
from vistok.quantizer import VectorQuantizer

ROWS, DIM, CODES = 60, 3, 24


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(ROWS, DIM, generator=generator) * scale for scale in (1.0, 0.3, 2.0)]


def trained(init, parts, rank=0, **arguments):
    """A codebook after three updates, seeing its rank's part of every batch."""
    quantizer = VectorQuantizer(
        CODES, DIM, table="ema", decay=0.8, init=init, revival="random", revive_below=0.5, **arguments
    ).train()
    for batch in batches():
        # Unequal parts: ranks need not hold the same number of features.
        part = batch.split(parts)[rank]
        quantizer(part.T.unsqueeze(0))
        quantizer.update()
    return quantizer.state_dict()


INITS = ("normal", "batch", "kmeans")


def worker(rank, folder):
    for init in INITS:
        torch.save(trained(init, (25, 35), rank), folder / f"{init}_{rank}.pt")
    rows = torch.arange(10.0).reshape(5, 2) + 10 * rank
    taken = distributed.take_rows(rows[: 5 - rank], torch.tensor([0, 4, 5, 8]))
    torch.save(taken, folder / f"taken_{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the two processes saved; started once for all tests, since a process takes seconds to import torch."""
    return run_on_two_processes(worker, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("init", INITS)
def test_codebooks_of_two_processes_equal_that_of_one_on_the_joined_batch(init, results):
    joined = trained(init, ROWS)
    for name, tensor in joined.items():
        assert torch.equal(results[f"{init}_0"][name], results[f"{init}_1"][name]), name
        torch.testing.assert_close(results[f"{init}_0"][name], tensor, rtol=1e-5, atol=1e-5)


def test_rows_are_numbered_rank_by_rank(results):
    expected = torch.tensor([[0.0, 1.0], [8.0, 9.0], [10.0, 11.0], [16.0, 17.0]])
    for rank in range(2):
        assert torch.equal(results[f"taken_{rank}"], expected)
