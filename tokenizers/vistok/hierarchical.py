"""A tokenizer with several levels of codes, from coarse to fine.

A. Razavi, A. van den Oord, O. Vinyals: Generating Diverse High-Fidelity Images with VQ-VAE-2,
https://arxiv.org/abs/1906.00446.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from math import prod
from random import Random
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import override

from vistok.decoder.base import Decoder
from vistok.encoder.base import Encoder
from vistok.layers import ResidualBlock, Upsample, normalisation
from vistok.quantizer.base import Quantized, check_features
from vistok.quantizer.stages import CompositeQuantizer, Template, check_count, check_length
from vistok.tokenizer import Projection, Size, Tokenizer, refuse_quantized


class LevelQuantizer(CompositeQuantizer):
    """A quantizer for each level of a pyramid; their tokens follow one another, coarse to fine.

    Each level has half the height and width of the next one. Levels have codebooks of their own, but their indices
    share one range, as those of the scales of a pyramid do: `codebook_sizes` are the largest of any level, `bits` too.

    Args:
        quantizer: Template of the quantizer of every level, or a list of one for each, coarse to fine.
        levels: Number of levels.

    Raises:
        ValueError: If the levels differ in `dim` or in their number of codebooks.
    """

    def __init__(self, quantizer: Template | Sequence[Template], levels: int) -> None:
        super().__init__(quantizer, levels, shared=False, shortens=False, seed=0)
        parts = [self.part(level) for level in range(levels)]
        for name in ("dim", "num_codebooks"):
            values = [getattr(part, name) for part in parts]
            if len(set(values)) > 1:
                raise ValueError(f"the quantizers of all levels need the same {name}, got {values}")
        self.dim = parts[0].dim
        self.codebook_sizes = tuple(max(sizes) for sizes in zip(*(part.codebook_sizes for part in parts), strict=True))
        self.bits = max(part.bits for part in parts)
        self.accepts_labels = any(part.accepts_labels for part in parts)
        # The paper adds the losses of the levels, where other composites take their mean.
        self.loss_weights = {
            f"level{level}_{key}": weight
            for level, part in enumerate(parts)
            for key, weight in part.loss_weights.items()
        }

    @override
    def choose(self, rng: Random) -> int:
        return self.count

    @override
    def scale_lengths(self, grid: Sequence[int]) -> tuple[int, ...]:
        """Tokens of each level, where `grid` is that of the finest one."""
        return tuple(prod(grid) // 4**level for level in reversed(range(self.count)))

    @override
    def indices_shape(self, grid: Sequence[int]) -> tuple[int, ...]:
        length = sum(self.scale_lengths(grid))
        return (length,) if self.num_codebooks == 1 else (length, self.num_codebooks)

    @override
    def total_bits(self, grid: Sequence[int]) -> float:
        return sum(self.part(level).bits * length for level, length in enumerate(self.scale_lengths(grid)))

    @override
    def shorten(
        self, indices: Int[Tensor, "b ..."], length: int, grid: Sequence[int] | None = None
    ) -> Int[Tensor, "b ..."]:
        """The first `length` levels; `grid` is as in `split`."""
        maps = self.split(indices, 1, grid)
        check_length(length, len(maps))
        return torch.cat(maps[:length], dim=1)

    @override
    def forward(self, features: Float[Tensor, "b d length"], labels: Int[Tensor, " b"] | None = None) -> Quantized:
        """Quantize the features of all levels, as one sequence."""
        check_features(features, self.dim, type(self).__name__, finite=not self.training)
        return self.join([self.quantize(level, each, labels) for level, each in enumerate(self.split(features, 2))])

    def quantize(self, level: int, features: Float[Tensor, "b d *grid"], labels: Int[Tensor, " b"] | None) -> Quantized:
        """Quantize the features of one level."""
        part = self.part(level)
        return part(features, labels if part.accepts_labels else None)

    def join(self, levels: Sequence[Quantized]) -> Quantized:
        """One sequence of what `quantize` made of each level."""
        return Quantized(
            torch.cat([each.codes.flatten(2) for each in levels], 2),
            torch.cat([each.indices.flatten(1, each.codes.ndim - 2) for each in levels], 1),
            {f"level{level}_{key}": loss for level, each in enumerate(levels) for key, loss in each.losses.items()},
        )

    def split(self, sequence: Tensor, axis: int, grid: Sequence[int] | None = None) -> tuple[Tensor, ...]:
        """The levels of a sequence of tokens along `axis`.

        Args:
            sequence: All levels, or the first of them if there is a grid.
            axis: Axis of the tokens.
            grid: Of the finest level.

        Raises:
            ValueError: If the sequence ends within a level.
        """
        length = sequence.shape[axis]
        # All levels together have 1 + 4 + 16 + ... times the tokens of the coarsest.
        finest = length * 3 * 4 ** (self.count - 1) // (4**self.count - 1)
        lengths = self.scale_lengths((finest,) if grid is None else grid)
        ends = list(accumulate(lengths))
        if length not in ends:
            where = "" if grid is None else f" on the grid {tuple(grid)}"
            raise ValueError(
                f"{self.count} levels end after {', '.join(map(str, ends))} tokens{where}, got "
                f"{tuple(sequence.shape)}: pass the size of the image that they belong to"
            )
        return sequence.split(lengths[: ends.index(length) + 1], axis)

    @override
    def indices_to_codes(
        self, indices: Int[Tensor, "b ..."], grid: Sequence[int] | None = None
    ) -> Float[Tensor, "b d length"]:
        levels = self.split(indices, 1, grid)
        return torch.cat([self.part(level).indices_to_codes(each) for level, each in enumerate(levels)], 2)

    @override
    def codes_to_indices(self, codes: Float[Tensor, "b d length"]) -> Int[Tensor, "b ..."]:
        levels = self.split(codes, 2)
        return torch.cat([self.part(level).codes_to_indices(each) for level, each in enumerate(levels)], 1)


class HierarchicalTokenizer(Tokenizer):
    """Images to several levels of codes and back; the encoder of each level sees what the coarser codes decode to.

    The encoder makes the features of the finest level, and strided convolutions with residual blocks those of the
    others, each with half the height and width. The coarsest features are quantized first. Residual blocks turn the
    codes of a level, and what the coarser ones decoded to, into an input of the next level; the decoder sees the finest
    codes and what all coarser ones decoded to.

    Codes are ``(b d length)`` and indices ``(b length)``, or ``(b length depth)`` with several codebooks: all tokens of
    the coarsest level in raster order, then those of the next one. The first levels alone can be decoded too: absent
    codes are zero.

    Args:
        encoder: Of images, to the features of the finest level.
        quantizer: Template of the quantizer of every level, or a list of one for each, coarse to fine: configs, or
            quantizers of which only the configs are used. All need the same `dim`.
        decoder: Of features like those of the encoder.
        levels: Number of levels; images must be multiples of ``encoder.factor * 2 ** (levels - 1)``.
        width: Channels of the residual blocks between the levels, a multiple of 32.
        num_blocks: Number of residual blocks from one level to the next, in either direction.
        preprocessing: As for `Tokenizer`.

    Raises:
        ValueError: If the parts do not fit together.
    """

    TEMPLATES = ("quantizer",)

    quantizer: LevelQuantizer

    def __init__(
        self,
        encoder: Encoder,
        quantizer: Template | Sequence[Template],
        decoder: Decoder,
        levels: int = 2,
        width: int = 128,
        num_blocks: int = 2,
        preprocessing: Mapping[str, Any] | None = None,
    ) -> None:
        check_count("levels", levels, 2)
        check_count("num_blocks", num_blocks, 1)
        if encoder.layout != "image":
            raise ValueError(
                f"levels are maps (b e h w), but the features of {type(encoder).__name__} are of layout "
                f"{encoder.layout}: choose an encoder of images, or tokenizer=default"
            )
        super().__init__(encoder, LevelQuantizer(quantizer, levels), decoder, preprocessing=preprocessing)
        self.levels = levels
        dim = self.quantizer.dim
        # Fine to coarse: what the encoder sees of the level below. All other lists are coarse to fine.
        self.coarsen = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width if level else encoder.dim, width, 4, stride=2, padding=1),
                *(ResidualBlock(width, width) for _ in range(num_blocks)),
                normalisation(width),
                nn.SiLU(),
            )
            for level in range(levels - 1)
        )
        self.to_codes = nn.ModuleList(
            [
                Projection(width, dim),
                *(Projection(2 * width, dim) for _ in range(levels - 2)),
                Projection(encoder.dim + width, dim),
            ]
        )
        self.refine = nn.ModuleList(
            nn.Sequential(
                Projection(dim + width if level else dim, width),
                *(ResidualBlock(width, width) for _ in range(num_blocks)),
                Upsample(width),
            )
            for level in range(levels - 1)
        )
        self.from_codes = Projection(dim + width, decoder.dim)

    @property
    @override
    def factor(self) -> int:
        """Pixels per token of the coarsest level along each axis; images must be multiples of it."""
        return self.encoder.factor * 2 ** (self.levels - 1)

    @override
    def grid(self, size: Size | None = None) -> tuple[int, ...]:
        """Shape of the feature grid of the finest level for an image of `size` pixels."""
        size = self._size(size)
        grid = super().grid(size)
        if any(side % self.factor for side in size):
            raise ValueError(
                f"image size must be a multiple of {self.factor} pixels with {self.levels} levels, got "
                f"{size[0]}x{size[1]}: crop or resize the images"
            )
        return grid

    @override
    @torch.no_grad()
    def whiten_projection(self, images: Float[Tensor, "b c *size"]) -> None:
        """Whiten the projection of each level in turn, see `Tokenizer.whiten_projection`.

        Features stand in for the codes of coarser levels, whose codebooks may not have started yet.
        """

        def whiten(level: int, features: Tensor) -> Tensor:
            projection = self.to_codes[level]
            assert isinstance(projection, Projection)
            projection.whiten(features)
            return projection(features)

        self._descend(self._encode(images), whiten)

    @override
    def _quantize(self, images: Tensor, labels: Tensor | None) -> tuple[Quantized, Tensor]:
        entered: list[Tensor] = []
        levels: list[Quantized] = []

        def quantize(level: int, features: Tensor) -> Tensor:
            entered.append(self.to_codes[level](features))
            levels.append(self.quantizer.quantize(level, entered[-1], labels))
            return levels[-1].codes

        self._descend(self._encode(images), quantize)
        return self.quantizer.join(levels), torch.cat([each.flatten(2) for each in entered], 2)

    def _descend(self, features: Tensor, code: Callable[[int, Tensor], Tensor]) -> None:
        """Call `code` with the number and the features of each level, coarse to fine; it returns the codes."""
        pyramid = [features]
        for coarsen in self.coarsen:
            pyramid.append(coarsen(pyramid[-1]))
        context: list[Tensor] = []
        for level, features in enumerate(reversed(pyramid)):
            codes = code(level, torch.cat([features, *context], 1))
            if level < self.levels - 1:
                context = [self.refine[level](torch.cat([codes, *context], 1))]

    @override
    def decode(
        self,
        codes: Float[Tensor, "b d length"],
        size: Size | None = None,
        texts: Float[Tensor, "b m t"] | None = None,
    ) -> Float[Tensor, "b c *size"]:
        """Images ``(b c H W)`` of the codes of all or of the first levels, not clamped.

        Args:
            codes: As `encode` returns them.
            size: Image size in pixels (default: the training size).
            texts: As for `Tokenizer.decode`.

        Raises:
            ValueError: If the codes end within a level of an image of this size.
        """
        refuse_quantized(codes, "codes")
        size = self._size(size)
        height, width = grid = self.grid(size)
        present = self.quantizer.split(codes, 2, grid)
        absent = self.scale_lengths(grid)[len(present) :]
        levels = [*present, *(codes.new_zeros(*codes.shape[:2], length) for length in absent)]
        *coarser, finest = (
            each.unflatten(2, (height >> halvings, width >> halvings))
            for each, halvings in zip(levels, reversed(range(self.levels)), strict=True)
        )
        context: list[Tensor] = []
        for refine, each in zip(self.refine, coarser, strict=True):
            context = [refine(torch.cat([each, *context], 1))]
        return self._decode(self.from_codes(torch.cat([finest, *context], 1)), finest, size, texts)
