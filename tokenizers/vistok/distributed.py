"""Every collective the package uses.

All functions work without a process group too. They look the group up when called, because Lightning creates it after
the modules are built.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether there is a process group with more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Rank of this process, 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


@torch.no_grad()
def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place; without gradient."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


@torch.no_grad()
def all_reduce_min(tensor: Tensor) -> Tensor:
    """Smallest value over ranks, in place; without gradient."""
    if is_distributed():
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
    return tensor


@torch.no_grad()
def broadcast(tensor: Tensor, source: int = 0) -> Tensor:
    """Value of rank `source` on every rank, in place."""
    if is_distributed():
        dist.broadcast(tensor, source)
    return tensor


@torch.no_grad()
def row_counts(rows: int, device: torch.device) -> list[int]:
    """Number of rows each rank holds, in rank order."""
    counts = torch.zeros(world_size(), dtype=torch.int64, device=device)
    counts[rank()] = rows
    return all_reduce_sum(counts).tolist()


@torch.no_grad()
def take_rows(rows: Tensor, positions: Tensor) -> Tensor:
    """Rows of the batch that all ranks hold together, numbered rank by rank; the same result on every rank.

    Args:
        rows: ``(n d)``, this rank's part; n may differ by rank.
        positions: int64 ``(m,)`` into the joined batch, the same on every rank.

    Returns:
        ``(m d)``. Only these rows are communicated.
    """
    if not is_distributed():
        return rows[positions]
    before = sum(row_counts(len(rows), rows.device)[: rank()])
    local = positions - before
    mine = (local >= 0) & (local < len(rows))
    taken = rows.new_zeros(len(positions), rows.shape[1])
    taken[mine] = rows[local[mine]]
    return all_reduce_sum(taken)


def mean_over_ranks(local_mean: Tensor, rows: int) -> Tensor:
    """Mean over the rows of all ranks, with the gradient that DDP's averaging turns into that of the joined batch.

    DDP averages the gradients of the ranks, so each rank's own mean counts by its share of the rows times the number
    of ranks; a plain differentiable all-reduce is right only if all ranks hold the same number of rows.

    Args:
        local_mean: float32, any shape, the same on every rank: the mean over this rank's rows.
        rows: How many rows this rank averaged, at least 1.
    """
    if not is_distributed():
        return local_mean
    sums = torch.cat([local_mean.detach().flatten() * rows, local_mean.new_full((1,), rows)])
    all_reduce_sum(sums)
    weighted = local_mean * (world_size() * rows / sums[-1])
    return (sums[:-1] / sums[-1]).view_as(local_mean) + (weighted - weighted.detach())


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """Rows of all ranks, rank by rank, and where this rank's begin; with gradient.

    The gradient of a row is the sum of what reaches it on every rank, so every rank has to run the backward pass.

    Args:
        rows: ``(n ...)``, this rank's part; n may differ by rank.
    """
    if not is_distributed():
        return rows, 0
    counts = row_counts(len(rows), rows.device)
    first = sum(counts[: rank()])
    return _GatherRows.apply(rows, first, sum(counts)), first


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, first: int, total: int) -> Tensor:
        ctx.own = slice(first, first + len(rows))
        joined = rows.new_zeros(total, *rows.shape[1:])
        joined[ctx.own] = rows
        return all_reduce_sum(joined)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return all_reduce_sum(gradients[0].clone(memory_format=torch.contiguous_format))[ctx.own], None, None
