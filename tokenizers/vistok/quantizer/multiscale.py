"""Multi-scale residual quantization: coarse token maps first, each finer one quantizes what the coarser ones left over.

K. Tian et al.: Visual Autoregressive Modeling (VAR), https://arxiv.org/abs/2404.02905, algorithms 1 and 2. With binary
spherical codes: J. Han et al.: Infinity, https://arxiv.org/abs/2412.04431.
"""

import random
from collections.abc import Callable, Sequence
from itertools import accumulate
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import override

from vistok.quantizer.base import PositionwiseQuantizer, Quantized, Quantizer, check_features, check_indices
from vistok.quantizer.gradient import straight_through
from vistok.quantizer.stages import (
    CompositeQuantizer,
    Template,
    check_choice,
    check_count,
    check_dropout,
    check_length,
    keep_prefix,
)

UPS = ("bicubic", "linear")
LOSSES = ("cumulative", "stage")
VAR_SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


class MultiScaleQuantizer(CompositeQuantizer):
    """A pyramid of token maps, all quantized by one quantizer; the codes are the sum of the enlarged maps.

    Scale ``k`` averages the rest over the areas of its cells, quantizes the cells, enlarges their codes to the grid and
    passes them through a convolution ``phi(h) = (1 - phi_ratio) h + phi_ratio conv3x3(h)`` before they are added to the
    codes and taken from the rest. A scale as large as the grid is not resized.

    A grid axis of length g has ``max(1, round(g * scales[k] / scales[-1]))`` cells at scale k, so a square grid of
    ``scales[-1]`` has exactly `scales`; `schedules` say it for other grids. A sequence ``(n,)`` is an image of one row.
    A video ``(t, h, w)`` is resized frame by frame, and along time by areas and linear interpolation.

    With ``loss="cumulative"`` the loss ``commitment`` is ``mse(features, sg[codes])`` and ``codebook`` is
    ``mse(sg[features], codes)``, of the codes summed up to each scale, mean over the scales that ran; they replace
    the losses of the same name of the part, and keep its weights. All other losses are the mean of those of the part.

    Training gives the codes the gradient of the features (straight-through): no gradient of the codes reaches the part
    or the convolutions, which learn by the codebook loss alone. A part should not start from the batch
    (``init="batch"``, ``"kmeans"``): the first scale has one cell per image.

    Args:
        quantizer: Template of the part: a config or a quantizer, of which only the config is used.
        scales: Cells along an axis at each scale, not decreasing.
        phi: Number of convolutions: 0 for none, else they are spread over the scales as in VAR (4: 0, 0, 1, 1, 1, 2, 2,
            3, 3, 3 for ten scales; 1: the same for all).
        phi_ratio: See above; None means 0.5, without convolutions it has no effect.
        up: ``bicubic`` (VAR) or ``linear`` (Infinity) interpolation.
        loss: ``cumulative`` (VAR), or ``stage``: the mean of the losses of the part at each scale.
        dropout: Probability that a training step keeps only the first scales, a number uniform from `min_scales` to
            all.
        min_scales: See `dropout`.
        codebook_size: Of the part; like the three below it is passed down and None leaves it to the template.
        dim: Channels.
        bits: Of the part.
        levels: Of the part.
        seed: Seed of the part, the convolutions and the dropout.
        schedules: Lists of the cells ``[h, w]`` of each scale. A grid ``(h, w)`` in one of them has the scales up to
            itself, whatever `scales` are; the first list that has it counts.

    Raises:
        ValueError: If an argument is out of range, has no effect, or contradicts the template.
    """

    def __init__(
        self,
        quantizer: Template,
        scales: Sequence[int] = VAR_SCALES,
        phi: int = 4,
        phi_ratio: float | None = None,
        up: str = "bicubic",
        loss: str = "cumulative",
        dropout: float = 0.0,
        min_scales: int = 1,
        codebook_size: int | None = None,
        dim: int | None = None,
        bits: int | None = None,
        levels: Sequence[int] | None = None,
        seed: int = 0,
        schedules: Sequence[Sequence[Sequence[int]]] | None = None,
    ) -> None:
        scales = tuple(scales) if isinstance(scales, Sequence) else (scales,)
        if not scales or any(type(scale) is not int or scale < 1 for scale in scales) or list(scales) != sorted(scales):
            raise ValueError(f"scales must be positive integers that do not decrease, got {list(scales)}")
        self._schedules = _scales_of_grids(schedules or ())
        count = max(len(scales), *map(len, self._schedules.values()), 0)
        check_count("phi", phi, 0)
        check_choice("up", up, UPS)
        check_choice("loss", loss, LOSSES)
        check_dropout(dropout, "min_scales", min_scales, count)
        sizes: dict[str, Any] = {"codebook_size": codebook_size, "dim": dim, "bits": bits, "levels": levels}
        super().__init__(quantizer, count, shared=True, shortens=dropout > 0, seed=seed, **sizes)
        part = self.part(0)
        cumulative = ("commitment", "codebook") if loss == "cumulative" else ()
        self._cumulative = [key for key in cumulative if key in part.loss_weights]
        if loss == "cumulative" and not self._cumulative:
            raise ValueError(f"{type(part).__name__} has neither commitment nor codebook loss: write loss=stage")
        if phi and "codebook" not in self._cumulative:
            raise ValueError(
                "the phi convolutions learn by the cumulative codebook loss: write phi=0, or use loss=cumulative and a "
                "part with a codebook loss, such as VectorQuantizer(table=learned)"
            )
        if phi_ratio is not None and not phi:
            raise ValueError(f"phi_ratio={phi_ratio} has no effect without convolutions: write phi_ratio=null")
        phi_ratio = 0.5 if phi_ratio is None else phi_ratio
        if not 0 < phi_ratio <= 1:
            raise ValueError(f"phi_ratio must lie in (0, 1], got {phi_ratio}")
        self.scales = scales
        self.phi_ratio = phi_ratio
        self.up = up
        self.dropout = dropout
        self.min_scales = min_scales
        self.dim = part.dim
        self.codebook_sizes = part.codebook_sizes
        self.bits = part.bits
        if phi and len(set(spread(phi, len(scales)))) < phi:
            raise ValueError(f"{phi} convolutions are too many for {len(scales)} scales, some would never be used")
        # A seeded start without touching the global random state.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.phi = nn.ModuleList(nn.Conv2d(self.dim, self.dim, 3, padding=1) for _ in range(phi))

    @property
    @override
    def codebook(self) -> Float[Tensor, "k d"] | None:
        """The table of the cells, before they are enlarged."""
        return self.part(0).codebook

    @override
    def choose(self, rng: random.Random) -> int:
        return keep_prefix(rng, self.dropout, self.min_scales, self.count)

    @override
    def scale_lengths(self, grid: Sequence[int]) -> tuple[int, ...]:
        return tuple(prod(size) for size in self.scale_sizes(_frames(grid)))

    @override
    def indices_shape(self, grid: Sequence[int]) -> tuple[int, ...]:
        length = sum(self.scale_lengths(grid))
        return (length,) if self.num_codebooks == 1 else (length, self.num_codebooks)

    @override
    def total_bits(self, grid: Sequence[int]) -> float:
        return self.bits * sum(self.scale_lengths(grid))

    @override
    def shorten(
        self, indices: Int[Tensor, "b ..."], length: int, grid: Sequence[int] | None = None
    ) -> Int[Tensor, "b ..."]:
        """The first `length` scales; `grid` is as in `indices_to_codes`."""
        maps = self._split(indices, self._grid(grid))
        check_length(length, len(maps))
        return torch.cat(maps[:length], dim=1)

    @override
    def forward(self, features: Float[Tensor, "b d *grid"], labels: Int[Tensor, " b"] | None = None) -> Quantized:
        self.refuse_labels(labels)
        check_features(features, self.dim, type(self).__name__, finite=not self.training)
        grid = _frames(features.shape[2:])
        part = self.part(0)
        with torch.autocast(features.device.type, enabled=False):
            # Contiguous, because averages of other layouts are summed in another order.
            inputs = features.float().reshape(*features.shape[:2], *grid).contiguous()
            rest, codes = inputs, torch.zeros_like(inputs)
            indices, losses = [], []
            for number, size in enumerate(self.scale_sizes(grid)[: self.begin()]):
                quantized = part(average(rest, size).flatten(2))
                cells = quantized.codes
                if self.training:
                    # The codes themselves, with a gradient for the codebook only.
                    cells = _lookup(part, quantized.indices)
                    cells = cells if "codebook" in self._cumulative else cells.detach()
                enlarged = self.enlarge(cells, number, grid)
                codes = codes + enlarged
                rest = rest - enlarged.detach()
                indices.append(quantized.indices)
                cumulative = {
                    "commitment": (inputs, codes.detach()),
                    "codebook": (codes, inputs.detach()),
                }
                losses.append({**quantized.losses, **{key: F.mse_loss(*cumulative[key]) for key in self._cumulative}})
            if self.training:
                codes = self.keep_in_graph(straight_through(inputs, codes))
        return Quantized(
            codes.view_as(features).to(features.dtype), torch.cat(indices, dim=1), self.mean_losses(losses)
        )

    @override
    def indices_to_codes(
        self, indices: Int[Tensor, "b ..."], grid: Sequence[int] | None = None
    ) -> Float[Tensor, "b d *grid"]:
        """Sum of the enlarged maps of the first scales, as many as there are indices.

        Args:
            indices: ``(b length)``, with several codebooks ``(b length c)``.
            grid: The feature grid. None is the square of ``scales[-1]``.
        """
        grid = self._grid(grid)
        frames = _frames(grid)
        maps = self._split(indices, grid)
        with torch.autocast(indices.device.type, enabled=False):
            # The same sums as in `forward`: the codes of evaluation are exactly those of their indices.
            cells = [self.part(0).indices_to_codes(each) for each in maps]
            codes = cells[0].new_zeros(len(indices), self.dim, *frames)
            for number, each in enumerate(cells):
                codes = codes + self.enlarge(each, number, frames)
        return codes.reshape(len(indices), self.dim, *grid)

    @override
    def codes_to_indices(self, codes: Float[Tensor, "b d *grid"]) -> Int[Tensor, "b ..."]:
        """Scale by scale the codes nearest to the rest.

        Sums of maps have no exact inverse: the result is the encoding of the codes, close to the indices they came
        from but not always equal.
        """
        check_features(codes, self.dim, type(self).__name__, finite=True)
        grid = _frames(codes.shape[2:])
        part = self.part(0)
        indices = []
        with torch.autocast(codes.device.type, enabled=False):
            rest = codes.detach().float().reshape(*codes.shape[:2], *grid).contiguous()
            for number, size in enumerate(self.scale_sizes(grid)):
                indices.append(part.codes_to_indices(average(rest, size).flatten(2)))
                rest = rest - self.enlarge(part.indices_to_codes(indices[-1]), number, grid).detach()
        return torch.cat(indices, dim=1)

    def scale_sizes(self, grid: Sequence[int]) -> list[tuple[int, ...]]:
        """Cells along each axis of a grid at each scale; halves are rounded up."""
        *time, height, width = (1, *grid)
        if set(time) == {1} and (known := self._schedules.get((height, width))):
            return [(*grid[:-2], *cells) for cells in known]
        last = self.scales[-1]
        return [tuple(max(1, (2 * length * scale + last) // (2 * last)) for length in grid) for scale in self.scales]

    def enlarge(
        self, cells: Float[Tensor, "b d *cells"], number: int, grid: Sequence[int]
    ) -> Float[Tensor, "b d *grid"]:
        """What scale `number` adds to the codes.

        Args:
            cells: Codes of the scale, in its shape or flat.
            number: Of the scale, from 0.
            grid: Of the codes.
        """
        frames = _frames(grid)
        sizes = self.scale_sizes(frames)
        enlarged = enlarge(cells.reshape(*cells.shape[:2], *sizes[number]), frames, self.up)
        if self.phi:
            phi = self.phi[spread(len(self.phi), len(sizes))[number]]
            assert isinstance(phi, nn.Conv2d)
            ratio = self.phi_ratio
            enlarged = (1 - ratio) * enlarged + ratio * _by_frame(enlarged, lambda each: self._convolve(phi, each))
        return enlarged.reshape(*cells.shape[:2], *grid)

    def reduce(self, codes: Float[Tensor, "b d *grid"], number: int) -> Float[Tensor, "b d *cells"]:
        """Means of codes over the cells of scale `number`."""
        grid = codes.shape[2:]
        cells = average(codes.reshape(*codes.shape[:2], *_frames(grid)), self.scale_sizes(_frames(grid))[number])
        return cells.reshape(*codes.shape[:2], *self.scale_sizes(grid)[number])

    def _grid(self, grid: Sequence[int] | None) -> tuple[int, ...]:
        return (self.scales[-1],) * 2 if grid is None else tuple(grid)

    def _split(self, indices: Tensor, grid: Sequence[int]) -> list[Tensor]:
        """The indices of each scale."""
        check_indices(indices, self.codebook_sizes, type(self).__name__)
        lengths = self.scale_lengths(grid)
        ends = list(accumulate(lengths))
        if indices.ndim != 1 + len(self.indices_shape(grid)) or indices.shape[1] not in ends:
            raise ValueError(
                f"{type(self).__name__} takes the indices of whole scales, {', '.join(map(str, ends))} tokens on the "
                f"grid {tuple(grid)}; got {tuple(indices.shape)}: shorten them, or pass their grid"
            )
        return list(indices.split(lengths[: ends.index(indices.shape[1]) + 1], dim=1))

    def _convolve(self, phi: nn.Conv2d, frames: Tensor) -> Tensor:
        if self.training or frames.device.type == "mps":
            return phi(frames)
        # Libraries convolve in another order for another batch size. Sums in float64 that are rounded once do not
        # show it, so an image has the same indices alone and in a batch (MPS has no float64).
        bias = None if phi.bias is None else phi.bias.double()
        return F.conv2d(frames.double(), phi.weight.double(), bias, padding=1).float()


def spread(count: int, scales: int) -> tuple[int, ...]:
    """Which of `count` convolutions each scale uses: the one whose tick is closest.

    The ticks and the positions of the scales are those of VAR: with 4 convolutions ticks from 1/12 to 11/12, otherwise
    in the middle of equal intervals; scales from 0 to 1. Many scales lie in the middle of two ticks, where weights were
    trained with what rounding of float64 decides.
    """
    if count == 1:
        return (0,) * scales
    first = 1 / 3 / count if count == 4 else 1 / 2 / count
    # As numpy.linspace rounds; without numpy, so that torch.compile sees plain numbers.
    step = (1 - first - first) / (count - 1)
    ticks = [number * step + first for number in range(count - 1)] + [1 - first]
    chosen = []
    for number in range(scales):
        distances = [abs(tick - number / max(scales - 1, 1)) for tick in ticks]
        chosen.append(distances.index(min(distances)))
    return tuple(chosen)


def square_schedule(scales: Sequence[int]) -> list[list[int]]:
    """Cells ``[h, w]`` of each scale of a square grid, as in `MultiScaleQuantizer.schedules`."""
    return [[scale, scale] for scale in scales]


def _scales_of_grids(schedules: Sequence[Sequence[Sequence[int]]]) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Cells at each scale of every grid in the lists; a ValueError refuses what is no pyramid."""
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for schedule in schedules:
        if any(len(each) != 2 or min(each) < 1 for each in schedule) or any(
            sorted(sides) != list(sides) for sides in zip(*schedule, strict=True)
        ):
            raise ValueError(f"schedules must be lists of cells [h, w] that do not decrease, got {schedule}")
        cells = [(height, width) for height, width in schedule]
        found = {each: cells[: number + 1] for number, each in enumerate(cells)} | found
    return found


def average(features: Float[Tensor, "b d t h w"], size: Sequence[int]) -> Float[Tensor, "b d t2 h2 w2"]:
    """Means over the areas of `size` cells along ``(t, h, w)``."""
    if features.shape[3:] != tuple(size[1:]):
        features = _by_frame(features, lambda frames: F.interpolate(frames, tuple(size[1:]), mode="area"))
    if features.shape[2] != size[0]:
        features = _along_time(features, lambda time: F.interpolate(time, size[0], mode="area"))
    return features


def enlarge(cells: Float[Tensor, "b d t h w"], size: Sequence[int], mode: str) -> Float[Tensor, "b d t2 h2 w2"]:
    """Interpolate cells to `size` along ``(t, h, w)``: linear along time, ``bicubic`` or ``linear`` inside a frame."""
    if cells.shape[2] != size[0]:
        cells = _along_time(cells, lambda time: F.interpolate(time, size[0], mode="linear"))
    if cells.shape[3:] != tuple(size[1:]):
        spatial = "bilinear" if mode == "linear" else mode
        cells = _by_frame(cells, lambda frames: F.interpolate(frames, tuple(size[1:]), mode=spatial))
    return cells


def _by_frame(features: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function of images ``(n d h w)`` to each frame of ``(b d t h w)``."""
    frames = function(features.transpose(1, 2).flatten(0, 1))
    return frames.unflatten(0, (len(features), features.shape[2])).transpose(1, 2)


def _along_time(features: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function of sequences ``(n c t)`` to the time axis of ``(b d t h w)``."""
    b, d, t, h, w = features.shape
    sequences = function(features.permute(0, 1, 3, 4, 2).reshape(b, d * h * w, t))
    return sequences.unflatten(1, (d, h, w)).permute(0, 1, 4, 2, 3)


def _frames(grid: Sequence[int]) -> tuple[int, ...]:
    """``(t, h, w)`` of a grid: an image is one frame, a sequence is one row of it."""
    if not 1 <= len(grid) <= 3:
        raise ValueError(f"a pyramid needs a grid (n,), (h, w) or (t, h, w), got {tuple(grid)}")
    return (*[1] * (3 - len(grid)), *grid)


def _lookup(part: Quantizer, indices: Tensor) -> Float[Tensor, "b d n"]:
    """Codes of indices that need no check, which would make a GPU wait."""
    if isinstance(part, PositionwiseQuantizer):
        return part.lookup(indices).movedim(-1, 1)
    return part.indices_to_codes(indices)
