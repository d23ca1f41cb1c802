"""Assignment by optimal transport, tile by tile.

B. Zhang et al.: Preventing Local Pitfalls in Vector Quantization via Optimal Transport,
https://arxiv.org/abs/2412.15195.
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vistok import distributed
from vistok.ops.nearest import column_argmax
from vistok.ops.tile import LOWEST_EXPONENT, ROW_BLOCK, in_float32, slices, tile_shape

# The constants of the published normalisation.
STD_FLOOR = 1e-6
MARGINAL_FLOOR = 1e-8
# Rows whose kernel is read twice in a row: with 65536 codes 16 MiB, which a third-level cache keeps in between.
# Products of a matrix with a vector are also several times faster for narrow matrices (MKL).
MAX_STRIPE_ROWS = 64
# An accelerator wants larger kernels, and its memory is fast enough.
ACCELERATOR_STRIPE_ROWS = 512


def sinkhorn_code(
    rows: Float[Tensor, "n d"],
    codebook: Float[Tensor, "k d"],
    iterations: int = 5,
    epsilon: float = 0.1,
    max_memory: int = 2**28,
) -> Int[Tensor, " n"]:
    """Index of each row under the transport plan that uses all codes alike.

    The costs are Euclidean distances, less the smallest one and divided by their standard deviation; the plan
    ``exp(-cost / epsilon)`` is scaled to equal sums of the codes, then of the rows, `iterations` times. Statistics and
    sums run over the rows of all ranks, so the result depends on the batch, and on nothing else.

    Args:
        rows: float32. Rows that are not finite take no part and get index 0.
        codebook: float32 table, the same on every rank.
        iterations: At least 1.
        epsilon: Entropic regularisation, positive.
        max_memory: Bytes. So many rows of the n x k plan are held as fit in; the others are computed again in every
            iteration.

    Raises:
        ValueError: If `iterations` or `epsilon` is out of range.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, got {epsilon}")
    return _sinkhorn(rows.detach(), codebook.detach(), iterations, epsilon, max_memory)


@torch.library.custom_op("vistok::sinkhorn", mutates_args=())
@in_float32
def _sinkhorn(rows: Tensor, codebook: Tensor, iterations: int, epsilon: float, max_memory: int) -> Tensor:
    indices = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    finite = rows.isfinite().all(-1).nonzero().squeeze(-1)
    plan = _Plan(rows[finite], codebook, epsilon, max_memory)
    sums = plan.code_sums()
    of_codes = torch.ones_like(sums) / sums.sum()
    for iteration in range(iterations):
        if iteration:
            sums = plan.normalise_rows(of_codes)
        of_codes /= (of_codes * sums + MARGINAL_FLOOR) * len(codebook)
    # The last scaling of the rows would not change which code has the largest share of a row.
    indices[finite] = plan.best_codes(of_codes)
    return indices


@_sinkhorn.register_fake
def _(rows: Tensor, codebook: Tensor, iterations: int, epsilon: float, max_memory: int) -> Tensor:
    return torch.empty(len(rows), dtype=torch.int64, device=rows.device)


class _Plan:
    """The plan ``kernel * of_codes * of_rows``, of which only the two vectors change.

    The kernel is relative to the largest value of each row, so that it does not underflow for rows far from all codes;
    ``of_rows`` starts at that value.
    """

    def __init__(self, rows: Tensor, codebook: Tensor, epsilon: float, max_memory: int) -> None:
        n, k = len(rows), len(codebook)
        # Products of these are squared distances.
        self.rows = torch.cat([-2 * rows, rows.new_ones(n, 1), rows.square().sum(-1, keepdim=True)], -1)
        self.keys = torch.cat([codebook, codebook.square().sum(-1, keepdim=True), codebook.new_ones(k, 1)], -1)
        bytes_per_row = rows.element_size() * k
        stripe_rows = MAX_STRIPE_ROWS if rows.device.type == "cpu" else ACCELERATOR_STRIPE_ROWS
        affordable = (max_memory - self.rows.nbytes - self.keys.nbytes) // bytes_per_row
        # One stripe is left for the rows whose kernel is computed anew, and half of one for what else there is.
        stripe_rows = min(stripe_rows, max(ROW_BLOCK, affordable // 2 // ROW_BLOCK * ROW_BLOCK))
        self.held_rows = n if n <= affordable else max(0, affordable // stripe_rows - 2) * stripe_rows
        self.parts = list(slices(n, stripe_rows))
        self.memory = rows.new_empty(min(n, self.held_rows + stripe_rows) * k)
        self.tile_codes = max(1, math.prod(tile_shape(n, k, rows.device)) // stripe_rows)
        self.tile = rows.new_empty(0 if self.held_rows == n else self.tile_codes * stripe_rows)

        sums = torch.zeros(3, dtype=torch.float64, device=rows.device)
        smallest = rows.new_full((n,), torch.inf)
        for part in self.parts:
            for codes in slices(k, self.tile_codes):
                tile = self._squared_distances(part, codes).sqrt_()
                sums[0] += tile.sum()
                smallest[part] = torch.minimum(smallest[part], tile.amin(0))
        # The sum of all squared distances, from sums over rows and over codes.
        row_norms, code_norms = self.rows[:, -1].double().sum(), self.keys[:, -2].double().sum()
        sums[1] = k * row_norms + n * code_norms - 2 * rows.sum(0).double() @ codebook.sum(0).double()
        sums[2] = n
        distance, square, self.row_count = distributed.all_reduce_sum(sums)
        pairs = self.row_count * k
        deviation = ((square - distance.square() / pairs).clamp(min=0) / (pairs - 1)).sqrt()
        factor = (1 / ((deviation + STD_FLOOR) * epsilon)).to(rows.dtype)
        lowest = distributed.all_reduce_min(torch.cat([smallest, smallest.new_full((1,), torch.inf)]).amin())
        self.of_rows = ((lowest - smallest) * factor).exp_()
        self.factor, self.shift = float(factor), smallest * factor
        for part in filter(self._is_held, self.parts):
            for codes in slices(k, self.tile_codes):
                distances = self._stripe(part)[codes]
                self._to_kernel(distances, part, distances)

    def code_sums(self) -> Tensor:
        """Sum over all rows of ``kernel * of_rows``, ``(k)`` in float64."""
        sums = self.rows.new_zeros(len(self.keys))
        for part in self.parts:
            for codes, kernel in self._tiles(part, keep=False):
                sums[codes].addmv_(kernel, self.of_rows[part])
        return distributed.all_reduce_sum(sums.double())

    def normalise_rows(self, of_codes: Tensor) -> Tensor:
        """Scale the rows to equal sums and return the next `code_sums`, in one pass over the kernel."""
        sums = self.rows.new_zeros(len(self.keys))
        of_codes = of_codes.to(sums.dtype)
        for part in self.parts:
            of_rows = self.of_rows[part]
            row_sums = torch.zeros_like(of_rows)
            # Each tile while it is in the cache.
            for codes, kernel in self._tiles(part):
                row_sums.addmv_(kernel.T, of_codes[codes])
            of_rows /= (row_sums * of_rows + MARGINAL_FLOOR) * self.row_count.to(of_rows.dtype)
            sums.addmv_(self._stripe(part), of_rows)
        return distributed.all_reduce_sum(sums.double())

    def best_codes(self, of_codes: Tensor) -> Tensor:
        """The code with the largest share of each row; the lowest index if there are several. Overwrites the kernel."""
        of_codes = of_codes.to(self.rows.dtype)
        indices = torch.empty(len(self.rows), dtype=torch.int64, device=self.rows.device)
        for part in self.parts:
            for codes, kernel in self._tiles(part):
                kernel.mul_(of_codes[codes].unsqueeze(-1))
            indices[part] = column_argmax(self._stripe(part))
        return indices

    def _is_held(self, part: slice) -> bool:
        return part.stop <= self.held_rows

    def _stripe(self, part: slice) -> Tensor:
        """The memory for the kernel of some rows, ``(k r)``; rows that are not held share one."""
        k, rows = len(self.keys), part.stop - part.start
        start = min(part.start, self.held_rows) * k
        return self.memory[start : start + rows * k].view(k, rows)

    def _squared_distances(self, part: slice, codes: slice) -> Tensor:
        """Squared distances ``(codes r)``: where the kernel will be if it is held, else in the buffer of a tile."""
        keys, rows = self.keys[codes], self.rows[part]
        if self._is_held(part):
            buffer = self._stripe(part)[codes]
        else:
            buffer = self.tile[: len(keys) * len(rows)].view(len(keys), len(rows))
        return torch.mm(keys, rows.T, out=buffer).clamp_(min=0)

    def _to_kernel(self, distances: Tensor, part: slice, out: Tensor) -> Tensor:
        """Write the kernel of distances, which are overwritten."""
        torch.sub(self.shift[part], distances, alpha=self.factor, out=distances).clamp_(min=LOWEST_EXPONENT)
        return torch.exp(distances, out=out)

    def _tiles(self, part: slice, keep: bool = True) -> Iterator[tuple[slice, Tensor]]:
        """The kernel of some rows in pieces ``(codes r)``, computed unless it is held.

        Args:
            part: The rows.
            keep: Whether their stripe has all of it in the end.
        """
        for codes in slices(len(self.keys), self.tile_codes):
            place = self._stripe(part)[codes]
            if self._is_held(part):
                yield codes, place
            else:
                distances = self._squared_distances(part, codes).sqrt_()
                yield codes, self._to_kernel(distances, part, place if keep else distances)
