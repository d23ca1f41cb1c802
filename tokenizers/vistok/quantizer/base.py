"""The contract every quantizer keeps: what it takes, what it returns and when it changes.

A quantizer turns each feature vector of a grid into integers and the integers back into a vector. Grids of any rank are
allowed: ``(n,)`` for sequences, ``(h, w)`` for images, ``(t, h, w)`` for videos.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import override

from vistok.config import Configurable


class Quantized(NamedTuple):
    """What a quantizer returns, with the same fields and types in training and in evaluation.

    Attributes:
        codes: ``(b d *grid)``. In training they carry the gradient estimator; in evaluation they are exactly
            ``indices_to_codes(indices)``.
        indices: int64, ``(b *grid)`` with one codebook, ``(b *grid depth)`` with several.
        losses: Unweighted scalars. The keys are those of ``quantizer.loss_weights``, in training and in evaluation.
    """

    codes: Float[Tensor, "b d *grid"]
    indices: Int[Tensor, "..."]
    losses: dict[str, Float[Tensor, ""]]


class Quantizer(Configurable, nn.Module, ABC):
    """Base class of all quantizers.

    ``forward`` never changes a parameter or a buffer: in training it only collects statistics, and `update` applies
    them once per accepted optimiser step. A step that was rejected (a non-finite gradient) calls `discard` instead.

    Attributes:
        dim: Channels it takes and returns.
        codebook_sizes: Number of codes of each codebook, in the order of the last axis of the indices.
        bits: log2 of the number of distinct codes of one position.
        loss_weights: What training multiplies each entry of ``Quantized.losses`` by.
    """

    dim: int
    codebook_sizes: tuple[int, ...]
    bits: float
    loss_weights: dict[str, float]

    @property
    def codebook_size(self) -> int:
        """Size of the largest codebook."""
        return max(self.codebook_sizes)

    @property
    def num_codebooks(self) -> int:
        """Number of integers that describe one position."""
        return len(self.codebook_sizes)

    @property
    def codebook(self) -> Float[Tensor, "k d"] | None:
        """The effective table, one row per index; None where it would have more than 2**20 rows."""
        return None

    def indices_shape(self, grid: Sequence[int]) -> tuple[int, ...]:
        """Shape of the indices of one image on a feature grid, without the batch axis."""
        return (*grid,) if self.num_codebooks == 1 else (*grid, self.num_codebooks)

    @abstractmethod
    def forward(self, features: Float[Tensor, "b d *grid"], labels: Int[Tensor, " b"] | None = None) -> Quantized:
        """Quantize features.

        Args:
            features: Any float dtype; all arithmetic is done in float32, codes come back in the input's dtype.
            labels: Only class-specific quantizers accept them.

        Raises:
            ValueError: If the number of channels is not `dim`, or a feature is not finite in evaluation.
        """

    @abstractmethod
    def indices_to_codes(
        self, indices: Int[Tensor, "..."], grid: Sequence[int] | None = None
    ) -> Float[Tensor, "b d *grid"]:
        """Look up the codes of indices.

        Args:
            indices: As `forward` returns them.
            grid: Only needed where it cannot be inferred from the shape of the indices.

        Raises:
            ValueError: If an index is outside its codebook or the indices are not integers.
        """

    @abstractmethod
    def codes_to_indices(self, codes: Float[Tensor, "b d *grid"]) -> Int[Tensor, "b ..."]:
        """Indices of codes, the inverse of `indices_to_codes`; the lowest index where codes coincide."""

    def update(self) -> None:
        """Apply what `forward` collected since the last call. Collective: every rank calls it alike."""

    def discard(self) -> None:
        """Drop what `forward` collected, because the optimiser step it belongs to was rejected."""

    def extra_repr(self) -> str:
        """One line for ``print(quantizer)``."""
        sizes = self.codebook_sizes[0] if self.num_codebooks == 1 else self.codebook_sizes
        return f"dim={self.dim}, codebook_size={sizes}, bits={self.bits:.4g}"


class PositionwiseQuantizer(Quantizer):
    """A quantizer with one codebook that treats every position on its own: subclasses see rows ``(n d)`` only.

    This class owns the layout: it checks the input, leaves autocast, flattens the grid and restores it.
    """

    @abstractmethod
    def quantize(self, rows: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n d"], Int[Tensor, " n"], dict[str, Tensor]]:
        """Quantize rows in float32: (codes with the gradient estimator in training, indices, losses)."""

    @abstractmethod
    def lookup(self, indices: Int[Tensor, "..."]) -> Float[Tensor, "... d"]:
        """Codes of valid indices, channels last."""

    @abstractmethod
    def invert(self, codes: Float[Tensor, "... d"]) -> Int[Tensor, "..."]:
        """Indices of codes, channels last, float32."""

    @override
    def forward(self, features: Float[Tensor, "b d *grid"], labels: Int[Tensor, " b"] | None = None) -> Quantized:
        if labels is not None:
            raise ValueError(f"{type(self).__name__} has no class-specific codebooks: do not pass labels")
        check_features(features, self.dim, type(self).__name__, finite=not self.training)
        # Distances in bf16 change several per cent of the indices, so autocast of any device ends here.
        with torch.autocast(features.device.type, enabled=False):
            rows = features.movedim(1, -1)
            grid = rows.shape[:-1]
            codes, indices, losses = self.quantize(rows.reshape(-1, self.dim).float())
            codes = codes.reshape(*grid, self.dim).movedim(-1, 1).to(features.dtype)
        return Quantized(codes, indices.reshape(grid), losses)

    @override
    def codes_to_indices(self, codes: Float[Tensor, "b d *grid"]) -> Int[Tensor, "b *grid"]:
        check_features(codes, self.dim, type(self).__name__, finite=True)
        return self.invert(codes.detach().movedim(1, -1).float())

    @override
    def indices_to_codes(
        self, indices: Int[Tensor, "b *grid"], grid: Sequence[int] | None = None
    ) -> Float[Tensor, "b d *grid"]:
        check_indices(indices, self.codebook_size, type(self).__name__)
        return self.lookup(indices).movedim(-1, 1)


def check_features(features: Tensor, dim: int, name: str, *, finite: bool) -> None:
    """Refuse features with a wrong number of channels or, if asked, with a value that is not finite."""
    if features.ndim < 3 or features.shape[1] != dim:
        raise ValueError(f"{name} takes features (b, {dim}, *grid), got {tuple(features.shape)}")
    # In training a non-finite value is left to the training loop, which skips the step: a check here would cost a
    # device synchronisation in every step.
    if finite and not torch.isfinite(features).all():
        bad = (~torch.isfinite(features)).sum().item()
        raise ValueError(f"{name}: features {tuple(features.shape)} hold {bad} values that are NaN or infinite")


def check_indices(indices: Tensor, codebook_size: int, name: str) -> None:
    """Refuse indices that are not integers or lie outside ``[0, codebook_size)``."""
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise ValueError(f"{name} takes integer indices, got {indices.dtype}")
    if indices.numel():
        low, high = indices.aminmax()
        if low < 0 or high >= codebook_size:
            raise ValueError(f"{name} has indices 0 to {codebook_size - 1}, got values from {low} to {high}")


def log2_of_product(sizes: Sequence[int]) -> float:
    """log2 of a product of integers, exact for powers of two and safe for products beyond any integer type."""
    return math.fsum(math.log2(size) for size in sizes)
