"""Assignment by optimal transport, tile by tile.

B. Zhang et al.: Preventing Local Pitfalls in Vector Quantization via Optimal Transport,
https://arxiv.org/abs/2412.15195.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vistok import distributed
from vistok.ops.nearest import GROUP, group_peaks
from vistok.ops.tile import LOWEST_EXPONENT, MAX_TILE_ROWS, ROW_BLOCK, in_float32, slices, tile_shape

# The constants of the published normalisation.
STD_FLOOR = 1e-6
MARGINAL_FLOOR = 1e-8
# Rows of which the kernel is computed at once when it is not held: 64 MiB for 65536 codes.
MAX_STRIPE_ROWS = 256


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
        max_memory: Bytes. The n x k plan is held if it fits in, and computed again in every iteration if not.

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
        self.held = rows.element_size() * n * k <= max_memory
        affordable = max_memory // (2 * rows.element_size() * k) // ROW_BLOCK * ROW_BLOCK
        stripe_rows = MAX_TILE_ROWS if self.held else min(MAX_STRIPE_ROWS, max(ROW_BLOCK, affordable))
        self.parts = list(slices(n, stripe_rows))
        self.memory = rows.new_empty((n if self.held else min(n, stripe_rows)) * k)
        self.tile_codes = max(1, math.prod(tile_shape(n, k, rows.device)) // stripe_rows)

        sums = torch.zeros(3, dtype=torch.float64, device=rows.device)
        smallest = rows.new_full((n,), torch.inf)
        for part in self.parts:
            for codes in slices(k, self.tile_codes):
                tile = self._squared_distances(part, codes)
                sums[1] += tile.sum()
                sums[0] += tile.sqrt_().sum()
                smallest[part] = torch.minimum(smallest[part], tile.amin(0))
        sums[2] = n
        distance, square, self.row_count = distributed.all_reduce_sum(sums)
        pairs = self.row_count * k
        deviation = ((square - distance.square() / pairs).clamp(min=0) / (pairs - 1)).sqrt()
        factor = (1 / ((deviation + STD_FLOOR) * epsilon)).to(rows.dtype)
        lowest = distributed.all_reduce_min(torch.cat([smallest, smallest.new_full((1,), torch.inf)]).amin())
        self.of_rows = ((lowest - smallest) * factor).exp_()
        self.factor, self.shift = factor, smallest * factor
        if self.held:
            for part in self.parts:
                for codes in slices(k, self.tile_codes):
                    self._to_kernel(self._stripe(part)[codes], part)

    def code_sums(self) -> Tensor:
        """Sum over all rows of ``kernel * of_rows``, ``(k)`` in float64."""
        sums = self.rows.new_zeros(len(self.keys))
        for part in self.parts:
            sums.addmv_(self._kernel(part), self.of_rows[part])
        return distributed.all_reduce_sum(sums.double())

    def normalise_rows(self, of_codes: Tensor) -> Tensor:
        """Scale the rows to equal sums and return the next `code_sums`, in one pass over the kernel."""
        sums = self.rows.new_zeros(len(self.keys))
        for part in self.parts:
            kernel, of_rows = self._kernel(part), self.of_rows[part]
            row_sums = of_rows * torch.mv(kernel.T, of_codes.to(kernel.dtype))
            of_rows /= (row_sums + MARGINAL_FLOOR) * self.row_count.to(kernel.dtype)
            sums.addmv_(kernel, of_rows)
        return distributed.all_reduce_sum(sums.double())

    def best_codes(self, of_codes: Tensor) -> Tensor:
        """The code with the largest share of each row; the lowest index if there are several. Overwrites the kernel."""
        k = len(self.keys)
        indices = torch.empty(len(self.rows), dtype=torch.int64, device=self.rows.device)
        offsets = torch.arange(GROUP, device=self.rows.device).unsqueeze(-1)
        for part in self.parts:
            shares = self._kernel(part).mul_(of_codes.to(self.rows.dtype).unsqueeze(-1))
            peaks = shares.new_full((-(-k // GROUP), shares.shape[1]), -torch.inf)
            group_peaks(shares, peaks)
            candidates = (peaks.argmax(0) * GROUP + offsets).clamp_(max=k - 1)
            indices[part] = candidates.gather(0, shares.gather(0, candidates).argmax(0, keepdim=True)).squeeze(0)
        return indices

    def _stripe(self, part: slice) -> Tensor:
        """The memory of some rows, ``(k r)``."""
        k, rows = len(self.keys), part.stop - part.start
        start = part.start * k if self.held else 0
        return self.memory[start : start + rows * k].view(k, rows)

    def _squared_distances(self, part: slice, codes: slice) -> Tensor:
        return torch.mm(self.keys[codes], self.rows[part].T, out=self._stripe(part)[codes]).clamp_(min=0)

    def _to_kernel(self, distances: Tensor, part: slice) -> None:
        distances.mul_(-self.factor).add_(self.shift[part]).clamp_(min=LOWEST_EXPONENT).exp_()

    def _kernel(self, part: slice) -> Tensor:
        """The kernel of some rows, ``(k r)``."""
        stripe = self._stripe(part)
        if not self.held:
            for codes in slices(len(self.keys), self.tile_codes):
                self._to_kernel(self._squared_distances(part, codes).sqrt_(), part)
        return stripe
