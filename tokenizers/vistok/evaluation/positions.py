"""Where in an image the codes vary, and how the codes lie to each other: what two pictures of the report show."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vistok.metric.codebook_usage import entropy_bits

# 512 MiB of int64. Images beyond are left out; the entropy of a position is at most log2 of their number anyway.
MAX_INDICES = 2**26


class PositionEntropy:
    """Collects indices and measures the entropy of each position.

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
        indices = torch.cat(self._indices)
        columns = indices.flatten(1).T.contiguous()
        entropy = torch.stack([entropy_bits(column.unique(return_counts=True)[1]) for column in columns])
        entropy = entropy.float().view(indices.shape[1:])
        return entropy.mean(-1) if self.num_codebooks > 1 else entropy


def principal_plane(codebook: Float[Tensor, "k d"]) -> Float[Tensor, "k 2"]:
    """Coordinates of codes on their two directions of largest variance."""
    rows = codebook.detach().double().cpu()
    rows = rows - rows.mean(0)
    return (rows @ torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -2:].flip(1)).float()
