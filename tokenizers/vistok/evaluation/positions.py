"""Where in an image the codes vary, what codebooks have in common, and how codes lie to each other."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vistok.metric.codebook_usage import entropy_bits
from vistok.quantizer.base import Quantizer

# 512 MiB of int64. Images beyond are left out; the entropy of a position is at most log2 of their number anyway.
MAX_INDICES = 2**26
# Every pair of codebooks sorts its pairs of codes.
MAX_SHARING, MAX_PAIRS = 16, 2**18


class PositionEntropy:
    """Collects indices and measures the entropy of each position, and what codebooks have in common.

    Args:
        num_codebooks: Above 1 the last axis of the indices is that of the codebooks.

    Attributes:
        images: How many were looked at.
        left_out: How many were beyond the limit.
    """

    def __init__(self, num_codebooks: int) -> None:
        self.num_codebooks = num_codebooks
        self.images = self.left_out = 0
        self._indices: list[Tensor] = []

    def update(self, indices: Int[Tensor, "b ..."]) -> None:
        """Look at the indices of a batch."""
        if (self.images + len(indices)) * indices[0].numel() <= MAX_INDICES:
            self._indices.append(indices.cpu())
            self.images += len(indices)
        else:
            self.left_out += len(indices)

    def compute(self) -> Float[Tensor, "..."]:
        """Bits of each position, mean over the codebooks, in the shape of the positions; empty without images."""
        if not self._indices:
            return torch.zeros(0)
        indices = self._joined()
        columns = indices.flatten(1).T.contiguous()
        entropy = torch.stack([entropy_bits(column.unique(return_counts=True)[1]) for column in columns])
        entropy = entropy.float().view(indices.shape[1:])
        return entropy.mean(-1) if self.num_codebooks > 1 else entropy

    def shared_bits(self) -> Float[Tensor, "c c"]:
        """Bits that the codes of two codebooks at one position tell about each other, of the first `MAX_SHARING`.

        This is their mutual information less that of the same codes paired at random, which is not 0 either: with few
        pairs for the number of codes almost every pair of codes is seen once, and would seem to mean something. So it
        is an estimate from below. On the diagonal stands the entropy of each codebook. Empty with one codebook, or
        without images.
        """
        if self.num_codebooks < 2 or not self._indices:
            return torch.zeros(0, 0)
        rows = self._joined().flatten(0, -2)[:, :MAX_SHARING]
        rows = rows[torch.linspace(0, len(rows) - 1, min(len(rows), MAX_PAIRS), dtype=torch.float64).round().long()]
        # Consecutive numbers, so that those of pairs do not overflow.
        codes = [column.unique(return_inverse=True)[1] for column in rows.T.contiguous()]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        shared = torch.diag(torch.stack([_pair_entropy(column, column) for column in codes])).float()
        for i, first in enumerate(codes):
            for j, second in enumerate(codes[:i]):
                bits = _pair_entropy(first, second[order]) - _pair_entropy(first, second)
                shared[i, j] = shared[j, i] = bits.clamp(min=0)
        return shared

    def _joined(self) -> Tensor:
        self._indices = [torch.cat(self._indices)]
        return self._indices[0]


def _pair_entropy(first: Tensor, second: Tensor) -> Tensor:
    return entropy_bits((first * (second.max() + 1) + second).unique(return_counts=True)[1])


def codebook_tables(quantizer: Quantizer) -> list[Tensor | None]:
    """The table of each codebook, in their order; None for one that has none, or none of its own."""
    if quantizer.num_codebooks == 1:
        return [quantizer.codebook]
    tables = [table for part in quantizer.parts() for table in codebook_tables(part)]
    # A part that several stages share occurs once.
    if tables and quantizer.num_codebooks % len(tables) == 0:
        tables *= quantizer.num_codebooks // len(tables)
    sizes = [None if table is None else len(table) for table in tables]
    fits = len(tables) == quantizer.num_codebooks and all(
        size in (None, wanted) for size, wanted in zip(sizes, quantizer.codebook_sizes, strict=True)
    )
    return tables if fits else [None] * quantizer.num_codebooks


def principal_plane(codebook: Float[Tensor, "k d"]) -> Float[Tensor, "k 2"]:
    """Coordinates of codes on their two directions of largest variance."""
    rows = codebook.detach().double().cpu()
    rows = rows - rows.mean(0)
    return (rows @ torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -2:].flip(1)).float()
