"""Sums by code, k-means and closest rows over the batch of all ranks."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vistok import distributed
from vistok.ops.nearest import nearest_code


@torch.no_grad()
def code_sums(
    rows: Float[Tensor, "n d"], indices: Int[Tensor, " n"], codebook_size: int
) -> tuple[Float[Tensor, " k"], Float[Tensor, "k d"]]:
    """Number and sum of the rows of each code, of this rank only."""
    counts = torch.bincount(indices, minlength=codebook_size).to(rows.dtype)
    return counts, rows.new_zeros(codebook_size, rows.shape[1]).index_add_(0, indices, rows)


@torch.no_grad()
def random_rows(batches: Sequence[Float[Tensor, "_ d"]], count: int, seed: int) -> Float[Tensor, "count d"]:
    """`count` random rows of all batches and ranks, alike on every rank and without repetition if there are enough.

    Args:
        batches: This rank's part of each batch; the number of rows may differ by rank. One process with the joined
            batches draws the same rows.
        count: How many.
        seed: Below 2**32 and the same on every rank; the global random state is not touched.

    Raises:
        ValueError: If no rank has a row.
    """
    sizes = [sum(distributed.row_counts(len(rows), rows.device)) for rows in batches]
    total = sum(sizes)
    if not total:
        raise ValueError(f"cannot draw {count} random rows: no rank has a row")
    generator = torch.Generator().manual_seed(seed)
    if count <= total:
        positions = torch.randperm(total, generator=generator)[:count]
    else:
        positions = torch.randint(total, (count,), generator=generator)
    positions = positions.to(batches[0].device)
    drawn = batches[0].new_empty(count, batches[0].shape[1])
    start = 0
    for rows, size in zip(batches, sizes, strict=True):
        here = (positions >= start) & (positions < start + size)
        drawn[here] = distributed.take_rows(rows, positions[here] - start)
        start += size
    return drawn


@torch.no_grad()
def kmeans(rows: Float[Tensor, "n d"], count: int, iterations: int, seed: int = 0) -> Float[Tensor, "count d"]:
    """Lloyd's algorithm over the rows of all ranks, from random rows; the same centroids on every rank.

    A cluster that loses all its rows keeps its centroid.

    Args:
        rows: This rank's part, finite; the number of rows may differ by rank.
        count: Number of clusters.
        iterations: Assignments and means; 0 returns the random rows.
        seed: The same on every rank; the global random state is not touched.

    Raises:
        ValueError: If the ranks have fewer than `count` rows together.
    """
    total = sum(distributed.row_counts(len(rows), rows.device))
    if total < count:
        raise ValueError(f"k-means of {count} clusters needs at least as many rows, got {total}")
    centroids = random_rows([rows], count, seed)
    for _ in range(iterations):
        counts, sums = code_sums(rows, nearest_code(rows, centroids), count)
        distributed.all_reduce_sum(counts)
        distributed.all_reduce_sum(sums)
        centroids = torch.where(counts.unsqueeze(-1) > 0, sums / counts.clamp(min=1).unsqueeze(-1), centroids)
    # Ranks may run different devices or libraries: the centroids of the first one hold.
    return distributed.broadcast(centroids)


@torch.no_grad()
def closest_rows(
    search_rows: Float[Tensor, "n s"],
    search_codebook: Float[Tensor, "k s"],
    rows: Float[Tensor, "n d"],
    metric: str = "euclidean",
) -> Float[Tensor, "k d"]:
    """For each code the row of all ranks that is closest to it; ties go to the first row of the lowest rank.

    Args:
        search_rows: What is compared with the codes, for instance normalised rows; finite. The number of rows may
            differ by rank.
        search_codebook: What is compared with the rows, the same on every rank.
        rows: What is returned.
        metric: See `nearest_code`.

    Raises:
        ValueError: If no rank has a row.
    """
    if not sum(distributed.row_counts(len(rows), rows.device)):
        raise ValueError("no rank has a row that could be closest to a code")
    chosen = rows.new_zeros(len(search_codebook), rows.shape[1])
    distance = search_codebook.new_full((len(search_codebook),), torch.inf)
    if len(rows):
        closest = nearest_code(search_codebook, search_rows, metric)
        chosen, found = rows[closest], search_rows[closest]
        if metric == "euclidean":
            distance = (found - search_codebook).square().sum(-1)
        else:
            distance = -(found * search_codebook).sum(-1)
    best = distributed.all_reduce_min(distance.clone())
    rank = torch.full_like(best, distributed.rank(), dtype=torch.int64)
    owner = distributed.all_reduce_min(rank.where(distance == best, distributed.world_size()))
    return distributed.all_reduce_sum(chosen.where((owner == rank).unsqueeze(-1), 0))
