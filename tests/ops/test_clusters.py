"""Clusters on one rank, and everything collective on two ranks against one process."""

from itertools import pairwise

import pytest
import torch
from two_processes import run_on_two_processes

from vistok.ops import closest_rows, code_sums, kmeans, random_rows, sinkhorn_code

PARTS = (25, 35)


def test_sums_equal_a_loop():
    rows, indices = torch.randn(50, 3), torch.randint(6, (50,))
    counts, sums = code_sums(rows, indices, 8)
    for code in range(8):
        assert counts[code] == (indices == code).sum()
        torch.testing.assert_close(sums[code], rows[indices == code].sum(0))


def test_kmeans_finds_separated_clusters_and_lowers_the_distance_in_every_iteration():
    centres = 10 * torch.eye(4)
    rows = centres.repeat(30, 1) + 0.1 * torch.randn(120, 4)
    distances = [torch.cdist(rows, kmeans(rows, 6, count, seed=1)).amin(-1).square().sum() for count in range(6)]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(distances))
    assert distances[-1] < 0.5 * distances[0] or distances[-1] < 10


def test_random_rows_repeat_only_if_there_are_too_few():
    rows = torch.arange(10.0)[:, None]
    assert len(random_rows([rows], 10, 0).unique()) == 10
    assert len(random_rows([rows], 25, 0)) == 25
    assert torch.equal(random_rows([rows], 4, 7), random_rows([rows], 4, 7))


@pytest.mark.parametrize("metric", ["euclidean", "dot"])
def test_closest_rows_equal_a_search_in_double_precision(metric):
    search, codebook, rows = torch.randn(60, 3), torch.randn(9, 3), torch.randn(60, 5)
    distance = torch.cdist(codebook.double(), search.double())
    if metric == "dot":
        distance = -codebook.double() @ search.double().T
    assert torch.equal(closest_rows(search, codebook, rows, metric), rows[distance.argmin(-1)])


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match="at least as many rows, got 3"):
        kmeans(torch.randn(3, 2), 4, 1)
    with pytest.raises(ValueError, match="no rank has a row"):
        random_rows([torch.randn(0, 2)], 4, 0)
    with pytest.raises(ValueError, match="no rank has a row"):
        closest_rows(torch.randn(0, 2), torch.randn(3, 2), torch.randn(0, 2))


def collectives(parts, rank=0):
    """Every collective function on this rank's part of one batch; unequal parts, and a row twice."""
    generator = torch.Generator().manual_seed(1)
    rows, codebook = torch.randn(60, 3, generator=generator), torch.randn(17, 3, generator=generator)
    rows[40] = rows[3]
    part = rows.split(parts)[rank]
    empty = rows[: 60 if rank == 0 else 0] if len(parts) > 1 else rows
    return {
        "kmeans": kmeans(part, 12, 3, seed=2),
        "random": random_rows([part], 30, 5),
        "closest": closest_rows(part, codebook, part),
        "closest_dot": closest_rows(part, codebook, part, "dot"),
        "closest_empty": closest_rows(empty, codebook, empty),
        "sinkhorn": sinkhorn_code(part, codebook),
        "sinkhorn_stripes": sinkhorn_code(part, codebook, max_memory=0),
        "sinkhorn_empty": sinkhorn_code(empty, codebook),
    }


def worker(rank, folder):
    torch.save(collectives(PARTS, rank), folder / f"{rank}.pt")


def test_two_ranks_equal_one_process_on_the_joined_batch(tmp_path):
    results = run_on_two_processes(worker, tmp_path)
    first, second = results["0"], results["1"]
    for name, value in collectives((60,)).items():
        if name.startswith("sinkhorn"):
            assert torch.equal(torch.cat([first[name], second[name]]), value), name
        else:
            assert torch.equal(first[name], second[name]), name
            torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-5)


def test_centroids_of_the_first_rank_hold(monkeypatch):
    monkeypatch.setattr("vistok.distributed.broadcast", lambda tensor: tensor.fill_(7))
    assert (kmeans(torch.randn(30, 2), 4, 3) == 7).all()


@pytest.mark.parametrize("rank", [0, 1])
def test_of_rows_that_are_equally_close_on_two_ranks_one_is_taken(rank, monkeypatch):
    # The other rank holds the same rows; without the sum over ranks the result is what this rank adds to it.
    monkeypatch.setattr("vistok.distributed.world_size", lambda: 2)
    monkeypatch.setattr("vistok.distributed.rank", lambda: rank)
    monkeypatch.setattr(
        "vistok.distributed.all_reduce_min",
        lambda tensor: tensor if tensor.is_floating_point() else tensor.clamp(max=0),
    )
    rows = torch.randn(5, 3)
    assert torch.equal(closest_rows(rows, rows, rows), rows if rank == 0 else torch.zeros(5, 3))
