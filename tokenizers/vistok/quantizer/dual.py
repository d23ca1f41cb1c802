"""Dual codebook: a semantic and a pixel table that share one index.

L. Qu et al.: TokenFlow, https://arxiv.org/abs/2412.03069, section 3.2.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from vistok.quantizer.vq import VectorQuantizer


class DualVectorQuantizer(VectorQuantizer):
    """The first `semantic_dim` channels and the others are two features that choose one code together.

    Both parts of features and codes have unit length. The index minimises
    ``|z_s - e_s|^2 + pixel_weight * |z_p - e_p|^2``.

    Args:
        codebook_size: Number of codes.
        dim: Channels of both parts together.
        semantic_dim: Channels of the semantic part; the others are the pixel part.
        pixel_weight: Weight of the distance of the pixel part.
        gradient: ``straight_through``, ``rotation``, ``rotation_tangential`` or ``none``.
        commitment_weight: Weight of ``mse(features, sg[codes])``.
        codebook_weight: Weight of ``mse(sg[features], codes)``.
        entropy_weight: Weight of the sample entropy minus the batch entropy.
        seed: Seed of the initial table.

    Raises:
        ValueError: If `semantic_dim` is not between 1 and ``dim - 1``, or another argument is out of range.
    """

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        semantic_dim: int,
        pixel_weight: float = 1.0,
        gradient: str = "straight_through",
        commitment_weight: float = 0.25,
        codebook_weight: float = 1.0,
        entropy_weight: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            codebook_size,
            dim,
            distance="cosine",
            gradient=gradient,
            commitment_weight=commitment_weight,
            codebook_weight=codebook_weight,
            entropy_weight=entropy_weight,
            init="uniform",
            seed=seed,
        )
        if not 0 < semantic_dim < dim:
            raise ValueError(f"semantic_dim must lie between 1 and dim - 1 = {dim - 1}, got {semantic_dim}")
        if not pixel_weight > 0:
            raise ValueError(f"pixel_weight must be positive, got {pixel_weight}")
        self.semantic_dim = semantic_dim
        self.pixel_weight = pixel_weight

    @override
    def normalise(self, rows: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        semantic, pixel = self._split(rows)
        return torch.cat([F.normalize(semantic, dim=-1), F.normalize(pixel, dim=-1)], dim=-1)

    @override
    def search_rows(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        semantic, pixel = self._split(rows)
        return torch.cat([semantic, self.pixel_weight**0.5 * pixel], dim=-1)

    def _split(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split([self.semantic_dim, self.dim - self.semantic_dim], dim=-1)
