"""Resizing, cropping and flipping uint8 pictures, and the value range of the model.

Pictures are uint8 ``(c h w)`` until they are batched. Resizing is PIL's: its filters are antialiased, and RGBA is
filtered with premultiplied alpha, so that the colour of invisible pixels does not bleed in. OpenCV's filter is there
for protocols that have it. All random draws come from
a `torch.Generator`; `sample_generator` makes it from the seed, the epoch and the sample, so a sample looks the same in
whichever process, and after however many restarts, it is loaded.
"""

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from vistok.data.decode import BadImageError

PIL_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}
FILTERS = (*PIL_FILTERS, "opencv_bilinear")
RESIZE_MODES = ("short_side", "adm")
MAX_RESIZED_PIXELS = 2**27
# The ``size`` in the protocol of pictures that are evaluated as large as they are.
OWN_SIZE = "own"


def mix(seed: int, *parts: int | str) -> int:
    """A 63-bit number that depends on every part: the BLAKE2b hash of them all, the same on every machine."""
    text = os.fsencode("/".join(map(str, (seed, *parts))))  # a part may be a file name that is no UTF-8
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def sample_generator(seed: int, epoch: int, sample: int | str) -> torch.Generator:
    """The source of all random draws for one sample in one epoch, a pure function of the three arguments."""
    return torch.Generator().manual_seed(mix(seed, epoch, sample))


def check_filter(name: str) -> str:
    """`name` if it is a resize filter.

    Raises:
        ValueError: If it is not; the message lists those that are.
    """
    if name not in FILTERS:
        raise ValueError(f"resize_filter must be one of {', '.join(FILTERS)}; got {name!r}")
    return name


def check_resize(resize_mode: str, resize_filter: str) -> None:
    """Check that a way to resize exists.

    Raises:
        ValueError: If mode or filter is unknown, or the mode does not use the filter.
    """
    if resize_mode not in RESIZE_MODES:
        raise ValueError(f"resize_mode must be one of {', '.join(RESIZE_MODES)}; got {resize_mode!r}")
    check_filter(resize_filter)
    if resize_mode == "adm" and resize_filter != "bicubic":
        raise ValueError(f"resize_mode=adm is box and then bicubic: leave out resize_filter={resize_filter}")


def resize(
    image: UInt8[Tensor, "c h w"], height: int, width: int, resize_filter: str = "bicubic"
) -> UInt8[Tensor, "c h2 w2"]:
    """Resize by the filter of that name; a picture that has the size already is returned as it is."""
    check_filter(resize_filter)
    if image.shape[1:] == (height, width):
        return image
    if resize_filter == "opencv_bilinear":
        return resize_as_opencv(image, height, width)
    return F.pil_to_tensor(F.to_pil_image(image).resize((width, height), PIL_FILTERS[resize_filter]))


def resize_as_opencv(image: UInt8[Tensor, "c h w"], height: int, width: int) -> UInt8[Tensor, "c h2 w2"]:
    """Resize as ``cv2.resize`` does by default: bilinear without antialiasing, in its fixed-point arithmetic.

    albumentations' ``SmallestMaxSize`` does the same, and with it taming-transformers and what was derived from that.
    """
    rows = _two_neighbours(image.shape[1], height, weigh_border=True)
    columns = _two_neighbours(image.shape[2], width, weigh_border=False)
    left, right = (image[:, :, position].int() * weight for position, weight in columns)
    wide = (left + right) >> 4
    # OpenCV's integers: 11 bits of each weight, of which four are dropped between the passes and the rest at the end.
    upper, lower = ((wide[:, position] * weight[:, None]) >> 16 for position, weight in rows)
    return ((upper + lower + 2) >> 2).clamp(0, 255).to(torch.uint8)


def _two_neighbours(before: int, after: int, weigh_border: bool) -> list[tuple[Int[Tensor, " n"], Int[Tensor, " n"]]]:
    """Position and weight, in units of 2**-11, of the two pixels that each pixel of a resized side lies between.

    Beyond the border both are the last pixel; OpenCV rounds their weights one by one for rows, and not for columns.
    """
    place = ((np.arange(after) + 0.5) * (before / after) - 0.5).astype(np.float32)
    first = np.floor(place).astype(np.int64)
    inside = (first >= 0) & (first < before - 1)
    share = np.where(inside | weigh_border, place - first, 0).astype(np.float32)
    pairs = (first, 1 - share), (first + 1, share)
    return [
        (torch.from_numpy(position.clip(0, before - 1)), torch.from_numpy(np.rint(weight * 2048).astype(np.int32)))
        for position, weight in pairs
    ]


def resize_short_side(
    image: UInt8[Tensor, "c h w"], size: int, resize_filter: str = "bicubic"
) -> UInt8[Tensor, "c h2 w2"]:
    """Resize, up or down, so that the short side is `size` pixels and the aspect ratio stays.

    Raises:
        BadImageError: If the picture is so elongated that the result would have more than 2**27 pixels.
    """
    short = min(image.shape[1:])
    height, width = (max(size, round(side * size / short)) for side in image.shape[1:])
    if height * width > MAX_RESIZED_PIXELS:
        raise BadImageError("too large", f"{image.shape[2]}x{image.shape[1]} pixels would become {width}x{height}")
    return resize(image, height, width, resize_filter)


def resize_adm(image: UInt8[Tensor, "c h w"], size: int) -> UInt8[Tensor, "c h2 w2"]:
    """Resize as guided diffusion (ADM) does: halve by a box filter while the result fits twice, then bicubic.

    P. Dhariwal and A. Nichol: Diffusion models beat GANs on image synthesis, https://arxiv.org/abs/2105.05233.
    """
    while min(image.shape[1:]) >= 2 * size:
        image = resize(image, image.shape[1] // 2, image.shape[2] // 2, "box")
    return resize_short_side(image, size, "bicubic")


def resize_by_mode(
    image: UInt8[Tensor, "c h w"], size: int, resize_mode: str, resize_filter: str
) -> UInt8[Tensor, "c h2 w2"]:
    """Resize so that the short side is `size`, by one of `RESIZE_MODES`."""
    return resize_adm(image, size) if resize_mode == "adm" else resize_short_side(image, size, resize_filter)


def center_crop(image: UInt8[Tensor, "c h w"], size: int, resize_mode: str = "short_side") -> UInt8[Tensor, "c s s"]:
    """Cut the `size` x `size` pixels in the middle, which the picture must have.

    Where the middle lies between two pixels, torchvision rounds half to even and ADM down.
    """
    if resize_mode != "adm":
        return F.center_crop(image, [size, size])
    top, left = ((side - size) // 2 for side in image.shape[1:])
    return image[:, top : top + size, left : left + size]


def random_crop(
    image: UInt8[Tensor, "c h w"], size: int | tuple[int, int], generator: torch.Generator
) -> UInt8[Tensor, "c h2 w2"]:
    """Cut `size` x `size` pixels, or height x width, which the picture must have, at a uniformly drawn place."""
    height, width = (size, size) if isinstance(size, int) else size
    top = int(torch.randint(image.shape[1] - height + 1, (), generator=generator))
    left = int(torch.randint(image.shape[2] - width + 1, (), generator=generator))
    return image[:, top : top + height, left : left + width]


def random_resized_crop(
    image: UInt8[Tensor, "c h w"],
    size: int,
    scale: Sequence[float],
    generator: torch.Generator,
    resize_filter: str = "bicubic",
) -> UInt8[Tensor, "c s s"]:
    """Cut a square at a random place, of a random share of the largest square's area, and resize it.

    The aspect ratio is never changed: a tokenizer should not learn stretched pictures.

    Args:
        image: Picture of any size.
        size: Side of the result in pixels.
        scale: Smallest and largest share of the area, in (0, 1].
        generator: Source of the random draws.
        resize_filter: One of `FILTERS`.
    """
    low, high = scale
    share = low + (high - low) * torch.rand((), generator=generator).item()
    side = max(1, round(min(image.shape[1:]) * math.sqrt(share)))
    return resize(random_crop(image, side, generator), size, size, resize_filter)


def random_flip(image: UInt8[Tensor, "c h w"], generator: torch.Generator) -> UInt8[Tensor, "c h w"]:
    """Mirror left and right in half of the cases."""
    return image.flip(-1) if torch.rand((), generator=generator) < 0.5 else image


def to_model_range(images: UInt8[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Map 0..255 to float32 in [-1, 1], contiguous: ``x / 127.5 - 1``, with the same bits on every device."""
    # In place, since a batch is large enough for its fresh memory to be what costs time. By a tensor, since a GPU
    # multiplies by the reciprocal of a number, which rounds otherwise.
    scale = torch.full((), 127.5, device=images.device)
    return images.to(torch.float32, memory_format=torch.contiguous_format).div_(scale).sub_(1)


def to_uint8(images: Float[Tensor, "..."]) -> UInt8[Tensor, "..."]:
    """Invert `to_model_range` for any float images: clamp to [-1, 1], round to the nearest integer, half to even."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


@dataclass(frozen=True)
class TrainTransform:
    """Random square crop of a picture, and flip.

    Args:
        size: Side of the result in pixels.
        resize_filter: One of `FILTERS`.
        crop_scale: None resizes the short side to `size` and crops at random; a range such as ``(0.5, 1.0)`` cuts a
            square of that share of the largest square's area and resizes it.
        flip: Whether to mirror half of the pictures.
        short_sides: Smallest and largest short side in pixels that a picture is resized to before the crop, drawn
            uniformly for each (multi-scale; ADM's random crop is ``(size, ceil(size / 0.8))``). None: `size`.
        resize_mode: One of `RESIZE_MODES`.

    Raises:
        ValueError: If filter or mode is unknown, a range is impossible, or a setting would have no effect.
    """

    size: int
    resize_filter: str = "bicubic"
    crop_scale: Sequence[float] | None = None
    flip: bool = True
    short_sides: Sequence[int] | None = None
    resize_mode: str = "short_side"

    def __post_init__(self) -> None:
        check_resize(self.resize_mode, self.resize_filter)
        scale, sides = self.crop_scale, self.short_sides
        if scale is not None and not (len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1):
            raise ValueError(f"crop_scale must be null or two shares of the area such as [0.5,1.0], got {list(scale)}")
        if sides is not None and not (len(sides) == 2 and self.size <= sides[0] <= sides[1]):
            raise ValueError(
                f"short_sides must be null or two lengths of at least {self.size} pixels such as "
                f"[{self.size},{self.size * 3 // 2}], got {list(sides)}"
            )
        if scale is not None and (sides is not None or self.resize_mode != "short_side"):
            raise ValueError("crop_scale resizes the crop itself: leave out short_sides and resize_mode")

    @property
    def needed_size(self) -> int:
        """Short side in pixels that a picture needs for a crop not to be enlarged."""
        if self.short_sides is not None:
            return self.short_sides[1]
        return self.size if self.crop_scale is None else math.ceil(self.size / math.sqrt(self.crop_scale[0]))

    def __call__(self, image: UInt8[Tensor, "c h w"], generator: torch.Generator) -> UInt8[Tensor, "c s s"]:
        """Transform one picture."""
        if self.crop_scale is not None:
            image = random_resized_crop(image, self.size, self.crop_scale, generator, self.resize_filter)
        else:
            side = self.size
            if self.short_sides is not None:
                low, high = self.short_sides
                side = int(torch.randint(low, high + 1, (), generator=generator))
            image = resize_by_mode(image, side, self.resize_mode, self.resize_filter)
            image = random_crop(image, self.size, generator)
        return random_flip(image, generator) if self.flip else image


@dataclass(frozen=True)
class EvalTransform:
    """Resize the short side and cut the centre square: the one view of a picture that evaluation looks at.

    Args:
        size: Side of the result in pixels.
        resize_filter: One of `FILTERS`.
        resize_mode: One of `RESIZE_MODES`.
        scale: Short side before the crop in units of `size`, rounded to pixels; VAR's is 1.125.

    Raises:
        ValueError: If filter or mode is unknown, the mode does not use the filter, or the scale is below 1.
    """

    size: int
    resize_filter: str = "bicubic"
    resize_mode: str = "short_side"
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_resize(self.resize_mode, self.resize_filter)
        if self.scale < 1:
            raise ValueError(f"eval_scale must be at least 1, got {self.scale}: no crop is larger than its picture")

    def __call__(
        self, image: UInt8[Tensor, "c h w"], generator: torch.Generator | None = None
    ) -> UInt8[Tensor, "c s s"]:
        """Transform one picture; nothing is random."""
        image = resize_by_mode(image, round(self.scale * self.size), self.resize_mode, self.resize_filter)
        return center_crop(image, self.size, self.resize_mode)


@dataclass(frozen=True)
class NativeTransform:
    """Leave a picture at its own size; only its border is cut off, until the sides are multiples of a step.

    Args:
        step: Pixels.
    """

    step: int

    def __call__(
        self, image: UInt8[Tensor, "c h w"], generator: torch.Generator | None = None
    ) -> UInt8[Tensor, "c h2 w2"]:
        """Cut the middle out of one picture; nothing is random.

        Raises:
            BadImageError: If a side is shorter than the step.
        """
        height, width = (side // self.step * self.step for side in image.shape[1:])
        if not height * width:
            raise BadImageError(
                "too small", f"{image.shape[2]}x{image.shape[1]} pixels, fewer than data.native={self.step}"
            )
        return F.center_crop(image, [height, width])
