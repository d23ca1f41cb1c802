"""The tokenizer: encoder, quantizer and decoder, and the two projections between them."""

import logging
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vistok import distributed
from vistok.config import Configurable
from vistok.decoder.base import Decoder
from vistok.encoder.base import Encoder
from vistok.quantizer.base import Quantized, Quantizer
from vistok.quantizer.stages import check_length

log = logging.getLogger(__name__)

PROJECTIONS = ("linear", "conv3x3", "none")
# Lengths that an error lists one by one.
MAX_NAMED = 16
# Images in [-1, 1] overshoot a little; 0 to 255 goes far beyond.
MAX_PIXEL = 10
# Axes of the features of one image, by layout.
AXES = {"sequence": ("n",), "image": ("h", "w"), "video": ("t", "h", "w")}

# Image size in pixels: ``(H, W)``, ``(T, H, W)`` of a video, or the side of a square.
Size = int | Sequence[int]


class Projection(nn.Linear):
    """1x1 convolution for grids of any rank: ``(b e *grid) -> (b d *grid)``."""

    def forward(self, input: Float[Tensor, "b e *grid"]) -> Float[Tensor, "b d *grid"]:
        """Apply the linear map to the channels of every position."""
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)

    @torch.no_grad()
    def whiten(self, features: Float[Tensor, "b e *grid"]) -> None:
        """Start from the whitened principal components of features, see `Tokenizer.whiten_projection`."""
        rows = features.movedim(1, -1).flatten(0, -2).cpu().double()
        rows = rows[rows.isfinite().all(-1)]
        if len(rows) < 2:
            raise ValueError(
                f"whitening needs at least 2 positions in the first batch, got {len(rows)}: raise data.batch_size, or "
                "set module.whiten=false"
            )
        mean = rows.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov(rows.T))
        possible = min(len(values), self.out_features)
        count = min(possible, len(rows) // 2)
        if count < possible:
            log.warning(
                "the first batch has %d positions, enough to whiten %d of the %d channels of the codes; "
                "raise data.batch_size to whiten all",
                len(rows),
                count,
                self.out_features,
            )
        kept = slice(len(values) - count, None)
        weight = (vectors[:, kept] / values[kept].clamp(min=1e-6 * values[-1]).sqrt()).T
        self.weight[: len(weight)] = weight.to(self.weight)
        self.bias[: len(weight)] = (-weight @ mean).to(self.bias)
        distributed.broadcast(self.weight)
        distributed.broadcast(self.bias)


def _projection(kind: str, in_channels: int, out_channels: int) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    if kind == "conv3x3":
        return nn.Conv2d(in_channels, out_channels, 3, padding=1)
    return Projection(in_channels, out_channels)


class Reconstruction(NamedTuple):
    """What `Tokenizer.forward` returns.

    Attributes:
        images: Decoded images, not clamped.
        quantized: What the quantizer made of the features.
        features: ``(b d *grid)``, what entered the quantizer.
    """

    images: Float[Tensor, "b c *size"]
    quantized: Quantized
    features: Float[Tensor, "b d *grid"]


def refuse_quantized(value: Any, field: str) -> None:
    """Raise a ValueError if what `Tokenizer.encode` returns stands in the place of one of its fields."""
    if isinstance(value, Quantized):
        raise ValueError(f"got all that encode returns where its {field} are expected: pass quantized.{field}")


def refuse_unequal(encoder: Encoder, decoder: Decoder) -> None:
    """Raise a ValueError if a decoder cannot turn what an encoder makes into images like those that it took."""
    names = type(encoder).__name__, type(decoder).__name__
    if encoder.layout != decoder.layout:
        axes = {"image": "(b e h w)", "sequence": "(b e n)", "video": "(b e t h w)"}
        raise ValueError(
            f"{names[0]} makes features {axes[encoder.layout]} and {names[1]} takes features {axes[decoder.layout]}: "
            f"choose an encoder and a decoder of the same layout, both {encoder.layout} or both {decoder.layout}"
        )
    if decoder.output == "features":
        return
    # How many pixels a token of a sequence stands for is up to each part.
    compared = ("channels",) if encoder.layout == "sequence" else ("channels", "factor", "time_factor")
    ours, theirs = (
        ", ".join(f"{name.replace('_', ' ')} {getattr(part, name)}" for name in compared) for part in (encoder, decoder)
    )
    if ours != theirs:
        raise ValueError(
            f"{names[0]} ({ours}) and {names[1]} ({theirs}) must agree: give both the same channels, patch_size and "
            "number of channel_multipliers"
        )


class Tokenizer(Configurable, nn.Module):
    """Images to integers and back.

    Args:
        encoder: ``encoder(images) -> features (b encoder.dim *grid)``.
        quantizer: ``quantizer(codes-to-be (b quantizer.dim *grid)) -> Quantized``.
        decoder: ``decoder(features, codes=, size=) -> images``.
        projection: ``linear`` puts a 1x1 projection on both sides of the quantizer, so any parts fit together;
            ``conv3x3`` a 3x3 convolution (VAR), for images only. ``none`` is for parts whose `dim` agree already.
        preprocessing: How images were prepared in training, as plain values: ``size`` ``[H, W]`` in pixels, ``resize``,
            ``crop``, ``range``. Written into the bundle; ``size`` is the default wherever a size cannot be inferred.

    Raises:
        ValueError: If the parts do not fit together.
    """

    def __init__(
        self,
        encoder: Encoder,
        quantizer: Quantizer,
        decoder: Decoder,
        projection: str = "linear",
        preprocessing: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        refuse_unequal(encoder, decoder)
        if projection not in PROJECTIONS:
            raise ValueError(
                f"projection must be {', '.join(PROJECTIONS[:-1])} or {PROJECTIONS[-1]}, got {projection!r}"
            )
        if projection == "conv3x3" and encoder.layout != "image":
            raise ValueError(f"projection=conv3x3 is for images, got features of layout {encoder.layout}: use linear")
        if projection == "none" and not encoder.dim == quantizer.dim == decoder.dim:
            raise ValueError(
                f"projection=none needs equal dims, got encoder {encoder.dim}, quantizer {quantizer.dim}, "
                f"decoder {decoder.dim}: use projection=linear"
            )
        self.encoder = encoder
        self.to_codes = _projection(projection, encoder.dim, quantizer.dim)
        self.quantizer = quantizer
        decoder.set_code_dim(quantizer.dim)
        self.from_codes = _projection(projection, quantizer.dim, decoder.dim)
        self.decoder = decoder
        self.preprocessing = dict(preprocessing or {})

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.encoder.channels

    @property
    def factor(self) -> int:
        """Pixels per token along each spatial axis; images must be multiples of it."""
        return self.encoder.factor

    @property
    def output(self) -> str:
        """What is decoded: ``images``, or ``features`` of a teacher."""
        return self.decoder.output

    @property
    def vocab_size(self) -> int:
        """Number of different raw ids: the size of the largest codebook."""
        self._refuse_continuous("vocab_size")
        return self.quantizer.codebook_size

    @property
    def default_size(self) -> tuple[int, ...] | None:
        """Training size in pixels, used wherever a size is not given."""
        size = self.preprocessing.get("size")
        return tuple(size) if size else None

    def forward(
        self,
        images: Float[Tensor, "b c *size"],
        labels: Int[Tensor, " b"] | None = None,
        texts: Float[Tensor, "b m t"] | None = None,
    ) -> Reconstruction:
        """Encode, quantize and decode images ``(b c H W)`` in [-1, 1]; as for `encode` and `decode`."""
        quantized, features = self._quantize(images, labels)
        return Reconstruction(self.decode(quantized.codes, images.shape[2:], texts), quantized, features)

    def encode(
        self,
        images: Float[Tensor, "b c *size"],
        labels: Int[Tensor, " b"] | None = None,
        length: int | None = None,
    ) -> Quantized:
        """Quantize images.

        Args:
            images: ``(b c H W)`` in [-1, 1]; H and W are multiples of `factor`. In evaluation values far outside are
                refused, in training they are not looked at.
            labels: Only for class-specific quantizers.
            length: Keep only the first parts of each code: tokens of a sequence, depths of a residual stack, groups,
                scales of a pyramid. The losses are those of the whole code.

        Raises:
            ValueError: If the images have another layout, number of channels, dtype, range or size, or `length` is
                given in training mode, for codes of one fixed length, or outside 1 to their number of parts.
        """
        quantized, _ = self._quantize(images, labels)
        if length is None:
            return quantized
        if self.training:
            raise ValueError(
                f"length={length} is for evaluation: call tokenizer.eval() first. In training it is the quantizer "
                "that shortens codes, see its dropout"
            )
        grid = self.grid(images.shape[2:])
        if self._is_cut_by_tokens(grid):
            check_length(length, *grid)
            indices = quantized.indices[:, :length]
        else:
            indices = self.quantizer.shorten(quantized.indices, length, grid)
        codes = self.quantizer.indices_to_codes(indices, grid).to(quantized.codes.dtype)
        return Quantized(codes, indices, quantized.losses)

    def _is_cut_by_tokens(self, grid: Sequence[int]) -> bool:
        """Whether shorter codes are the first tokens of a sequence, not the first parts of every position."""
        return self.encoder.layout == "sequence" and not self.scale_lengths(grid)

    def labels_of(self, batch: Mapping[str, Any]) -> Int[Tensor, " b"] | None:
        """The class labels of a batch, for quantizers that accept them; None for others and where there are none."""
        return batch.get("labels") if self.quantizer.accepts_labels else None

    def _quantize(self, images: Tensor, labels: Tensor | None) -> tuple[Quantized, Tensor]:
        """Codes of images, and the features that entered the quantizer."""
        features = self.to_codes(self._encode(images))
        return self.quantizer(features, labels), features

    def _encode(self, images: Tensor) -> Tensor:
        """What the encoder makes of images, after a check of these."""
        if not images.is_floating_point():
            raise ValueError(
                f"images must be floats in [-1, 1], got {images.dtype}: for 8-bit images use images / 127.5 - 1"
            )
        if images.ndim < 4 or images.shape[1] != self.channels:
            raise ValueError(f"images must be (b, {self.channels}, H, W), got {tuple(images.shape)}")
        self.grid(images.shape[2:])
        # In training it would cost a device synchronisation in every step, and in a compiled graph a break.
        if not self.training and images.numel() and not torch.compiler.is_compiling():
            low, high = images.detach().aminmax()
            if max(-low, high) > MAX_PIXEL:
                raise ValueError(
                    f"images must be floats in [-1, 1], got values from {low:.4g} to {high:.4g}: for images from 0 to "
                    "255 use images / 127.5 - 1"
                )
        return self.encoder(images)

    @torch.no_grad()
    def whiten_projection(self, images: Float[Tensor, "b c *size"]) -> None:
        """Start the projection to codes from the whitened principal components of the encoder's features.

        A random projection gives channels that are copies of each other (mostly brightness), and a quantizer of
        independent channels such as FSQ then uses a fraction of its codes. Data-dependent initialisation as in
        D. Mishkin, J. Matas: All you need is a good init, https://arxiv.org/abs/1511.06422. Every rank ends with the
        weights of rank 0.

        A batch determines half as many directions as it has positions; channels beyond these, or beyond the channels of
        the features, keep their random start.

        Args:
            images: A training batch.

        Raises:
            ValueError: If the projection is not linear, or the batch has fewer than two positions.
        """
        if not isinstance(self.to_codes, Projection):
            raise ValueError("only projection=linear can be whitened: set it, or module.whiten=false")
        self.to_codes.whiten(self.encoder(images))

    def decode(
        self,
        codes: Float[Tensor, "b d *grid"],
        size: Size | None = None,
        texts: Float[Tensor, "b m t"] | None = None,
    ) -> Float[Tensor, "b c *size"]:
        """Images ``(b c H W)`` of codes, not clamped.

        Args:
            codes: As `encode` returns them.
            size: Image size in pixels, an int for a square; default: grid times factor. A sequence of codes does not
                tell the size of its image: there it defaults to the training size.
            texts: Features of a text for each image, for decoders that take them, see `decoder.text_dim`.
        """
        refuse_quantized(codes, "codes")
        if size is not None or self.decoder.layout == "sequence":
            size = self._size(size)
        # A decoder in half precision takes the codes of a codebook that stays in float32.
        codes = codes.to(next(self.decoder.parameters(), codes).dtype)
        return self._decode(self.from_codes(codes), codes, size, texts)

    def _decode(
        self, features: Tensor, codes: Tensor, size: tuple[int, ...] | None, texts: Tensor | None
    ) -> Float[Tensor, "b c *size"]:
        self.decoder.check_texts(texts)
        more = {} if texts is None else {"texts": texts}
        return self.decoder(features, codes=codes, size=size, **more)

    def decode_indices(
        self,
        indices: Int[Tensor, "..."],
        size: Size | None = None,
        texts: Float[Tensor, "b m t"] | None = None,
    ) -> Float[Tensor, "b c *size"]:
        """Images of indices, as `encode` returns them.

        Args:
            indices: ``(b *grid)``, ``(b *grid depth)`` with several codebooks, ``(b length[ depth])`` with several
                scales; or the first depths or scales of them.
            size: Image size in pixels, where it does not follow from the shape of the indices (default: the training
                size).
            texts: As for `decode`.

        Raises:
            ValueError: If an index is outside its codebook, or the indices are flattened (see `unflatten`) or have no
                batch axis.
        """
        self._refuse_continuous("decode_indices")
        return self.decode(self.indices_to_codes(indices, size), size, texts)

    def indices_to_codes(self, indices: Int[Tensor, "..."], size: Size | None = None) -> Float[Tensor, "b d *grid"]:
        """Codes of indices; equal to the codes `encode` returns in evaluation."""
        self._refuse_continuous("indices_to_codes")
        refuse_quantized(indices, "indices")
        self._check_axes(indices)
        # The shape of the indices says the grid, except where the scales of a pyramid follow one another.
        if size is None and self.default_size is not None and self.scale_lengths(self.grid()):
            size = self.default_size
        return self.quantizer.indices_to_codes(indices, self.grid(size) if size is not None else None)

    def grid(self, size: Size | None = None) -> tuple[int, ...]:
        """Shape of the feature grid of an image of `size` pixels; ValueError if the size is not allowed."""
        return self.encoder.grid(self._size(size))

    def sequence_length(self, size: Size | None = None) -> int:
        """Number of integers that describe an image of `size` pixels."""
        self._refuse_continuous("sequence_length")
        return math.prod(self.quantizer.indices_shape(self.grid(size)))

    def bits_per_pixel(self, size: Size | None = None) -> float:
        """Bits of the codes of one image over its number of pixels, without entropy coding."""
        size = self._size(size)
        return self.quantizer.total_bits(self.grid(size)) / math.prod(size)

    def scale_lengths(self, grid: Sequence[int]) -> tuple[int, ...]:
        """Number of tokens of each scale on a feature grid; empty if the quantizer has no scales."""
        return self.quantizer.scale_lengths(grid)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay would harm, the codebooks; timm's optimisers ask for them."""
        return {
            f"{name}.{parameter}"
            for name, module in self.named_modules()
            if isinstance(module, Quantizer)
            for parameter in module.undecayed
        }

    def flatten(self, indices: Int[Tensor, "b ..."], offsets: bool = False) -> Int[Tensor, "b length"]:
        """The sequence an autoregressive model learns: scale by scale, raster order, depth fastest.

        Args:
            indices: As `encode` returns them, whole or shortened.
            offsets: Add the cumulative codebook sizes, so that all codebooks share one joint vocabulary of
                ``sum(codebook_sizes)`` ids. Otherwise ids are raw, per codebook.
        """
        self._refuse_continuous("flatten")
        refuse_quantized(indices, "indices")
        if offsets and self.quantizer.num_codebooks > 1:
            indices = indices + self._offsets(indices)
        return indices.flatten(1)

    def unflatten(
        self, ids: Int[Tensor, "b length"], size: Size | None = None, offsets: bool = False
    ) -> Int[Tensor, "b ..."]:
        """Inverse of `flatten` for images of `size` pixels (default: the training size).

        Shorter sequences are those of shortened codes: first tokens of a sequence, whole depths of each position, or
        whole scales.

        Raises:
            ValueError: If the length does not fit the size.
        """
        self._refuse_continuous("unflatten")
        shapes = self._shapes(self.grid(size))
        shape = next((shape for shape in shapes if ids.ndim == 2 and math.prod(shape) == ids.shape[1]), None)
        if shape is None:
            allowed = [str(math.prod(shape)) for shape in shapes]
            lengths = (
                " or ".join(allowed) if len(allowed) <= MAX_NAMED else f"{allowed[0]}, {allowed[1]}, ... {allowed[-1]}"
            )
            raise ValueError(
                f"ids must be (b, {lengths}) for images of {self._size(size)} pixels, "
                f"got {tuple(ids.shape)}: pass the size"
            )
        indices = ids.unflatten(1, shape)
        return indices - self._offsets(indices) if offsets and self.quantizer.num_codebooks > 1 else indices

    def _shapes(self, grid: Sequence[int]) -> list[tuple[int, ...]]:
        """Shapes of the indices of one image: those of its first parts, from one to all."""
        *positions, last = whole = self.quantizer.indices_shape(grid)
        if self._is_cut_by_tokens(grid):
            return [(length, *whole[1:]) for length in range(1, whole[0] + 1)]
        if scales := self.scale_lengths(grid):
            return [(length, *whole[1:]) for length in accumulate(scales)]
        if self.quantizer.num_codebooks > 1:
            return [(*positions, depth) for depth in range(1, last + 1)]
        return [whole]

    def _offsets(self, indices: Tensor) -> Tensor:
        sizes = torch.tensor((0, *self.quantizer.codebook_sizes[:-1]), device=indices.device)
        return sizes.cumsum(0)[: indices.shape[-1]]

    def _size(self, size: Size | None) -> tuple[int, ...]:
        if isinstance(size, int):
            return size, size
        size = tuple(size) if size is not None else self.default_size
        if size is None:
            raise ValueError("this tokenizer has no training size in its preprocessing: pass size=(H, W)")
        return size

    def _check_axes(self, indices: Tensor) -> None:
        """Raise a ValueError if indices are still flattened, or lack the batch axis."""
        grid, depth = AXES[self.encoder.layout], ("depth",) * (self.quantizer.num_codebooks > 1)
        if len(self.quantizer.indices_shape((2,) * len(grid))) != len(grid) + len(depth):
            grid = ("length",)
        # The first frame of a video alone is an image.
        allowed = [("b", *grid, *depth)] + [("b", *grid[1:], *depth)] * (len(grid) == 3)
        if indices.ndim in map(len, allowed):
            return
        hints = []
        if indices.ndim < len(allowed[-1]):
            if len(allowed[-1]) > 2:
                size = "T, H, W" if self.encoder.layout == "video" else "H, W"
                hints.append(f"call unflatten(ids, size=({size})) first if they are flattened")
            hints.append("add the batch axis by indices[None] if they are of one image")
        raise ValueError(
            f"indices must be {' or '.join('(' + ', '.join(axes) + ')' for axes in allowed)}, got "
            f"{tuple(indices.shape)}" + (": " + ", ".join(hints) if hints else "")
        )

    def _refuse_continuous(self, what: str) -> None:
        if not self.quantizer.codebook_sizes:
            raise ValueError(f"{what}: {type(self.quantizer).__name__} is continuous, it has no integers")
