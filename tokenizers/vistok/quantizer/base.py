"""The contract every quantizer keeps: what it takes, what it returns and when it changes.

A quantizer turns each feature vector of a grid into integers and the integers back into a vector. Grids of any rank are
allowed: ``(n,)`` for sequences, ``(h, w)`` for images, ``(t, h, w)`` for videos.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
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
        indices: int64, ``(b *grid)`` with one codebook, ``(b *grid depth)`` with several; multi-scale quantizers have
            one axis ``length`` in place of the grid, the scales one after the other. Continuous quantizers return an
            empty ``(b *grid 0)``.
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
        codebook_sizes: Number of codes of each codebook, in the order of the last axis of the indices; empty if the
            codes are continuous.
        bits: log2 of the number of distinct codes of one position (of one token of a multi-scale quantizer).
        loss_weights: What training multiplies each entry of ``Quantized.losses`` by. A loss of weight zero is not
            computed and has no entry.
        accepts_labels: Whether `forward` takes class labels.
        undecayed: Names of own parameters that weight decay would harm (codebooks).
    """

    dim: int
    codebook_sizes: tuple[int, ...]
    bits: float
    loss_weights: dict[str, float]
    accepts_labels: bool = False
    undecayed: tuple[str, ...] = ()
    frozen: bool = False

    @property
    def codebook_size(self) -> int:
        """Size of the largest codebook; 0 if the codes are continuous."""
        return max(self.codebook_sizes, default=0)

    @property
    def num_codebooks(self) -> int:
        """Number of integers that describe one position."""
        return len(self.codebook_sizes)

    @property
    def codebook(self) -> Float[Tensor, "k d"] | None:
        """The effective table, one row per index; None with several codebooks or more than 2**20 rows."""
        return None

    @property
    def stage_factors(self) -> tuple[float, ...]:
        """By how much each channel of ``features - codes`` is smaller than the features, 1 where that is learned.

        A residual stack divides the input of each stage by the factors of the stages before, so that quantizers with
        a fixed range (FSQ, LFQ) keep refining.
        """
        return (1.0,) * self.dim

    @property
    def stage_limits(self) -> tuple[float, ...] | None:
        """Largest absolute value of each channel that stays in range through all stages; None if there is no limit."""
        return None

    def parts(self) -> Iterator["Quantizer"]:
        """The quantizers this one is made of, each once; not theirs in turn."""
        seen: set[int] = set()

        def walk(module: nn.Module) -> Iterator[Quantizer]:
            for child in module.children():
                if id(child) in seen:
                    continue
                seen.add(id(child))
                if isinstance(child, Quantizer):
                    yield child
                else:
                    yield from walk(child)

        return walk(self)

    def total_bits(self, grid: Sequence[int]) -> float:
        """Bits of all codes of one feature grid, without entropy coding."""
        return self.bits * math.prod(grid)

    def scale_lengths(self, grid: Sequence[int]) -> tuple[int, ...]:
        """Tokens of each scale of a pyramid, in the order of the indices; empty if the codes have no scales."""
        return ()

    def shorten(
        self, indices: Int[Tensor, "b ..."], length: int, grid: Sequence[int] | None = None
    ) -> Int[Tensor, "b ..."]:
        """The first `length` parts of a code: depths of a residual stack, groups, scales of a pyramid.

        Args:
            indices: As `forward` returns them.
            length: How many parts to keep.
            grid: Only needed where it cannot be inferred from the shape of the indices.

        Raises:
            ValueError: If the codes have one fixed length, or `length` is not between 1 and their number of parts.
        """
        raise ValueError(f"{type(self).__name__} has codes of one fixed length: do not pass length={length}")

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
        for part in self.parts():
            part.update()

    def discard(self) -> None:
        """Drop what `forward` collected, because the optimiser step it belongs to was rejected."""
        for part in self.parts():
            part.discard()

    @property
    def touched_codes(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Learned tables of which the last `update` overwrote rows, with the numbers of these rows.

        The optimiser's moments of these rows belong to the codes that are gone; training clears them.
        """
        return [touched for part in self.parts() for touched in part.touched_codes]

    def freeze(self, frozen: bool = True) -> "Quantizer":
        """Stop every change of the codebook: no gradient, no moving average, no revival; ``frozen=False`` undoes it."""
        self.frozen = frozen
        for parameter in self.parameters(recurse=False):
            parameter.requires_grad_(not frozen)
        for module in self.children():
            if not isinstance(module, Quantizer):
                module.requires_grad_(not frozen)
        for part in self.parts():
            part.freeze(frozen)
        return self

    def refuse_labels(self, labels: Tensor | None) -> None:
        """Raise a ValueError if labels are given to a quantizer that has no use for them."""
        if labels is not None and not self.accepts_labels:
            raise ValueError(f"{type(self).__name__} has no class-specific codebooks: do not pass labels")

    def extra_repr(self) -> str:
        """One line for ``print(quantizer)``."""
        sizes = self.codebook_sizes
        text = f"{len(sizes)} x {sizes[0]}" if len(sizes) > 1 and len(set(sizes)) == 1 else " x ".join(map(str, sizes))
        return f"dim={self.dim}, codebook_size={text or 'continuous'}, bits={self.bits:.4g}"


class PositionwiseQuantizer(Quantizer):
    """A quantizer that treats every position on its own: subclasses see rows ``(n d)`` only.

    This class owns the layout: it checks the input, leaves autocast, flattens the grid and restores it. With several
    codebooks the indices of the rows have a last axis ``c``, one per codebook.
    """

    @abstractmethod
    def quantize(
        self, rows: Float[Tensor, "n d"]
    ) -> tuple[Float[Tensor, "n d"], Int[Tensor, "n *c"], dict[str, Tensor]]:
        """Quantize rows in float32: (codes with the gradient estimator in training, indices, losses)."""

    @abstractmethod
    def lookup(self, indices: Int[Tensor, "..."]) -> Float[Tensor, "... d"]:
        """Codes of valid indices, channels last; differentiable with respect to a learned table."""

    @abstractmethod
    def invert(self, codes: Float[Tensor, "... d"]) -> Int[Tensor, "..."]:
        """Indices of codes, channels last, float32."""

    @override
    def forward(self, features: Float[Tensor, "b d *grid"], labels: Int[Tensor, " b"] | None = None) -> Quantized:
        self.refuse_labels(labels)
        check_features(features, self.dim, type(self).__name__, finite=not self.training)
        # Distances in bf16 change several per cent of the indices, so autocast of any device ends here.
        with torch.autocast(features.device.type, enabled=False):
            rows = features.movedim(1, -1)
            grid = rows.shape[:-1]
            codes, indices, losses = self.quantize(rows.reshape(-1, self.dim).float())
            codes = codes.reshape(*grid, self.dim).movedim(-1, 1).to(features.dtype)
        return Quantized(codes, indices.reshape(*grid, *indices.shape[1:]), losses)

    @override
    def codes_to_indices(self, codes: Float[Tensor, "b d *grid"]) -> Int[Tensor, "b ..."]:
        check_features(codes, self.dim, type(self).__name__, finite=True)
        with torch.autocast(codes.device.type, enabled=False):
            return self.invert(codes.detach().movedim(1, -1).float())

    @override
    def indices_to_codes(
        self, indices: Int[Tensor, "b ..."], grid: Sequence[int] | None = None
    ) -> Float[Tensor, "b d *grid"]:
        check_indices(indices, self.codebook_sizes, type(self).__name__)
        with torch.autocast(indices.device.type, enabled=False):
            return self.lookup(indices).movedim(-1, 1)


def check_features(features: Tensor, dim: int, name: str, *, finite: bool) -> None:
    """Refuse features with a wrong number of channels or, if asked, with a value that is not finite."""
    if features.ndim < 3 or features.shape[1] != dim:
        last = features.ndim > 2 and features.shape[-1] == dim
        raise ValueError(
            f"{name} takes features (b, {dim}, *grid), got {tuple(features.shape)}"
            + (": channels come second here, pass features.movedim(-1, 1)" if last else "")
        )
    # In training a non-finite value is left to the training loop, which skips the step: a check here would cost a
    # device synchronisation in every step.
    # A compiled graph would break at the check, so it is left out there too.
    if finite and not torch.compiler.is_compiling() and not torch.isfinite(features).all():
        bad = (~torch.isfinite(features)).sum().item()
        raise ValueError(f"{name}: features {tuple(features.shape)} hold {bad} values that are NaN or infinite")


def check_indices(indices: Tensor, codebook_sizes: Sequence[int], name: str, *, shorter: bool = False) -> None:
    """Refuse indices that are not integers, lie outside their codebook or have a wrong last axis.

    Args:
        indices: ``(...)`` with one codebook, ``(... c)`` with several.
        codebook_sizes: Number of codes of each codebook.
        name: What the error calls the quantizer.
        shorter: Whether the last axis may leave out the last codebooks.
    """
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise ValueError(f"{name} takes integer indices, got {indices.dtype}")
    count = len(codebook_sizes)
    sizes = codebook_sizes
    if count > 1:
        given = indices.shape[-1] if indices.ndim > 1 else 0
        if not 1 <= given <= count or (given < count and not shorter):
            wanted = f"1 to {count}" if shorter else f"{count}"
            raise ValueError(
                f"{name} takes indices with {wanted} values on the last axis, one per codebook, "
                f"got {tuple(indices.shape)}"
            )
        sizes = codebook_sizes[:given]
    # A compiled graph would break at the check.
    if not indices.numel() or torch.compiler.is_compiling():
        return
    if len(set(sizes)) == 1:
        low, high = indices.aminmax()
        if low < 0 or high >= sizes[0]:
            raise ValueError(f"{name} has indices 0 to {sizes[0] - 1}, got values from {low} to {high}")
        return
    for position, size in enumerate(sizes):
        low, high = indices[..., position].aminmax()
        if low < 0 or high >= size:
            raise ValueError(
                f"{name} has indices 0 to {size - 1} in codebook {position}, got values from {low} to {high}"
            )


def is_recomputation() -> bool:
    """Whether this forward runs inside a backward pass, as activation checkpointing repeats it.

    Its features were collected the first time. A compiled graph has its own recomputation, which has no side effects.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def log2_of_product(sizes: Sequence[int]) -> float:
    """log2 of a product of integers, exact for powers of two and safe for products beyond any integer type."""
    return math.fsum(math.log2(size) for size in sizes)
