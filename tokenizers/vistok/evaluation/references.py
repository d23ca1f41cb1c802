"""Trivial codecs on the images a tokenizer is evaluated on: what its numbers must be read against.

A PSNR means little alone. These are measured on the same images in the same pass: the mean colour of each patch at
the same rate, a small picture enlarged, and JPEG at its smallest.
"""

import io
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from statistics import fmean

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vistok.evaluation.result import Reference
from vistok.metric.image import SSIM_MIN_SIDE, from_uint8, psnr, ssim, to_uint8

# More levels than an 8-bit image has are of no use to a mean colour.
MAX_LEVELS = 256


def colour_levels(bits: float, channels: int) -> tuple[int, ...]:
    """Numbers of levels per channel, with a product of at most ``2 ** bits``, of the least quantization error.

    A uniform quantizer with n levels on [0, 1] has the squared error ``1 / (12 n^2)`` for uniform values, so the
    levels minimise the sum of ``1 / n^2``. No channel gets more than 256. The most levels go to the second channel,
    green.

    Args:
        bits: log2 of the number of codes; may be huge.
        channels: 1 to 4.

    Example:
        >>> colour_levels(10.0, 3)
        (10, 10, 10)
    """
    # The margin undoes the rounding of log2: 2 ** log2(1000) is 999.9999.
    if bits >= 8 * channels:
        return (MAX_LEVELS,) * channels
    codes = math.floor(2**bits * (1 + 1e-9))
    best = max(_ascending(codes, channels), key=lambda levels: (-sum(n**-2 for n in levels), levels))
    descending = best[::-1]
    return (descending[1], descending[0], *descending[2:]) if channels >= 3 else descending


def _ascending(codes: int, channels: int, least: int = 1) -> list[tuple[int, ...]]:
    """Ascending level counts with a product of at most `codes`; the last is as large as possible."""
    if channels == 1:
        return [(min(codes, MAX_LEVELS),)]
    top = min(MAX_LEVELS, math.floor(codes ** (1 / channels) + 1e-9))
    # The best counts are nearly equal: the smallest is never below two thirds of the equal share.
    return [
        (count, *rest)
        for count in range(max(least, 2 * top // 3, 1), max(top, least) + 1)
        for rest in _ascending(codes // count, channels - 1, count)
        if rest[-1] >= count
    ]


class Codec(ABC):
    """A trivial codec: images in, reconstructions and bits per pixel out."""

    name: str
    note: str | None = None

    @abstractmethod
    def __call__(self, images: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, " b"]]:
        """Reconstructions of images in [-1, 1], and bits per pixel of each."""


class PatchColour(Codec):
    """Mean colour of each patch, quantized to the number of codes the tokenizer has per position; bicubic upsampling.

    Args:
        bits: log2 of the number of codes of one position.
        grid: Positions ``(h, w)``.
        channels: Channels of the images.
    """

    def __init__(self, bits: float, grid: Sequence[int], channels: int) -> None:
        self.grid = (grid[0], grid[1])
        self.levels = colour_levels(bits, channels)
        spent = math.log2(math.prod(self.levels))
        self.name = f"same-rate patch colour, {'x'.join(map(str, self.levels))} levels"
        if spent < bits - 1:
            self.note = (
                f"spends {spent:.1f} of {bits:.1f} bits per position: {MAX_LEVELS} levels per channel are enough"
            )

    def __call__(self, images: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, " b"]]:
        """See `Codec`."""
        means = F.adaptive_avg_pool2d(images, self.grid).add(1).div(2).clamp(0, 1)
        levels = images.new_tensor(self.levels).view(1, -1, 1, 1)
        bins = (means * levels).floor().minimum(levels - 1)
        rate = math.log2(math.prod(self.levels)) * math.prod(self.grid) / math.prod(images.shape[2:])
        return _enlarge((bins + 0.5) / levels * 2 - 1, images), images.new_full((len(images),), rate)


class Bicubic(Codec):
    """Antialiased bicubic reduction to the grid, 8 bits per channel, bicubic enlargement.

    Args:
        grid: Size ``(h, w)`` of the small picture.
    """

    def __init__(self, grid: Sequence[int]) -> None:
        self.grid = (grid[0], grid[1])
        self.name = f"bicubic {self.grid[0]}x{self.grid[1]}, 8 bits per channel"

    def __call__(self, images: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, " b"]]:
        """See `Codec`."""
        small = from_uint8(to_uint8(F.interpolate(images, self.grid, mode="bicubic", antialias=True)))
        rate = 8 * images.shape[1] * math.prod(self.grid) / math.prod(images.shape[2:])
        return _enlarge(small, images), images.new_full((len(images),), rate)


class JPEG(Codec):
    """JPEG at quality 1, Pillow's smallest, with optimised Huffman tables; the bits are those of the whole file."""

    name = "JPEG, quality 1"

    def __call__(self, images: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, " b"]]:
        """See `Codec`."""
        decoded, rates = [], []
        for pixels in to_uint8(images).cpu():
            picture = Image.fromarray(pixels.squeeze(0).numpy() if len(pixels) == 1 else pixels.movedim(0, -1).numpy())
            file = io.BytesIO()
            picture.save(file, "JPEG", quality=1, optimize=True)
            rates.append(8 * file.tell() / math.prod(pixels.shape[1:]))
            with Image.open(file) as opened:
                decoded.append(
                    torch.frombuffer(bytearray(opened.tobytes()), dtype=torch.uint8).view(*pixels.shape[1:], -1)
                )
        images_back = torch.stack(decoded).movedim(-1, 1).to(images.device)
        return from_uint8(images_back), images.new_tensor(rates)


def _enlarge(small: Tensor, images: Tensor) -> Tensor:
    return F.interpolate(small, images.shape[2:], mode="bicubic", align_corners=False)


class References:
    """Streaming measurement of the codecs that apply.

    Args:
        size: Image size ``(H, W)`` in pixels.
        grid: Grid of the tokenizer for this size; empty for a model that tells none, None for images of several sizes.
        channels: Channels of the images.
        bits_per_pixel: Rate of the tokenizer; infinite for continuous ones.

    Attributes:
        missing: Codecs that do not apply, and why.
    """

    def __init__(self, size: Sequence[int], grid: Sequence[int] | None, channels: int, bits_per_pixel: float) -> None:
        self.codecs: list[Codec] = []
        self.missing: dict[str, str] = {}
        if grid is not None and len(grid) == 2:
            self.codecs.append(Bicubic(grid))
            if math.isfinite(bits_per_pixel):
                # From the rate of the whole image, because a multi-scale tokenizer has more tokens than grid positions.
                bits = bits_per_pixel * math.prod(size) / math.prod(grid)
                self.codecs.insert(0, PatchColour(bits, grid, channels))
            else:
                self.missing["same-rate patch colour"] = "a continuous tokenizer has no rate to match"
        else:
            reason = f"the grid {tuple(grid)} is not two-dimensional" if grid else "this model tells no grid"
            reason = "images have several sizes" if grid is None else reason
            self.missing["same-rate patch colour"] = self.missing["bicubic"] = reason
        if channels in (1, 3):
            self.codecs.append(JPEG())
        else:
            self.missing["JPEG"] = f"JPEG has no images of {channels} channels"
        self._values: list[dict[str, list[float]]] = [{"psnr": [], "ssim": [], "rate": []} for _ in self.codecs]

    def update(self, images: Float[Tensor, "b c h w"]) -> None:
        """Measure every codec on images in [-1, 1]."""
        for codec, values in zip(self.codecs, self._values, strict=True):
            reconstructions, rates = codec(images)
            values["psnr"] += psnr(reconstructions, images).tolist()
            values["rate"] += rates.tolist()
            if min(images.shape[2:]) >= SSIM_MIN_SIDE:
                values["ssim"] += ssim(reconstructions, images).tolist()

    def compute(self) -> list[Reference]:
        """Means over all images."""
        return [
            Reference(
                name=codec.name,
                psnr=fmean(values["psnr"]),
                ssim=fmean(values["ssim"]) if values["ssim"] else None,
                bits_per_pixel=fmean(values["rate"]),
                note=codec.note,
            )
            for codec, values in zip(self.codecs, self._values, strict=True)
        ]
