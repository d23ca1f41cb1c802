"""From a picture file to a uint8 tensor, whatever the file's mode."""

import contextlib
import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as F

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
KINDS = ("empty", "not an image", "truncated", "too large", "unreadable")
ORIENTATION = 0x0112  # EXIF tag
# Segments of a JPEG file: the frame's header of baseline, extended and progressive coding, and EXIF or XMP.
FRAMES = (b"\xc0", b"\xc1", b"\xc2")
METADATA = b"\xe1"
TRUNCATION_SIGNS = ("truncated", "broken data stream", "unexpected end", "not enough image data", "unrecognized data")


class BadImageError(ValueError):
    """A picture that cannot be decoded.

    Args:
        kind: ``"empty"`` (no bytes), ``"not an image"`` (no format that PIL knows), ``"truncated"`` (ends early),
            ``"too large"`` (more pixels than PIL's limit against decompression bombs) or ``"unreadable"``
            (anything else: damaged, of an unsupported mode, not to be opened).
        reason: One line for a person.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(f"{kind}: {reason}")
        self.kind = kind
        self.reason = reason


def check_background(background: Sequence[float]) -> tuple[int, ...]:
    """`background` as a tuple.

    Raises:
        ValueError: If it is not three integers in [0, 255].
    """
    if len(background) != 3 or not all(isinstance(value, int) and 0 <= value <= 255 for value in background):
        raise ValueError(f"background must be three integers from 0 to 255 such as [255,255,255], got {[*background]}")
    return tuple(map(int, background))


def decode_image(
    source: Path | bytes | Image.Image,
    channels: int = 3,
    background: Sequence[int] = (255, 255, 255),
    reduced_size: int | None = None,
) -> UInt8[Tensor, "c h w"]:
    """Decode a picture as PIL does, upright (EXIF orientation applied), in the number of channels asked for.

    Palettes are resolved, CMYK becomes RGB, 16-bit gray keeps its upper 8 bits (PIL would clip it), and an animation
    gives its first frame.

    Args:
        source: A file, its bytes, or a picture of PIL.
        channels: 3 (RGB; transparency composited on `background`), 1 (luma of the same, ITU-R 601) or 4 (RGBA;
            invisible pixels are black).
        background: RGB in [0, 255], seen through transparent pixels unless `channels` is 4.
        reduced_size: Decode a JPEG file whose short side is at least twice this at a half, a quarter or an eighth of
            its size, by the scaled cosine transform, keeping at least this short side. Several times faster for large
            photographs, and the pixels are not quite those of a full decode, so never used where numbers are compared.
            None: full size.

    Raises:
        BadImageError: If the picture cannot be decoded.
        ValueError: If `channels` is not 1, 3 or 4.
    """
    if channels not in MODES:
        raise ValueError(f"channels must be 1 (gray), 3 (RGB) or 4 (RGBA), got {channels}")
    if isinstance(source, Image.Image):
        return F.pil_to_tensor(_convert(_upright(source), channels, background))
    try:
        data = source if isinstance(source, bytes) else source.read_bytes()
    except OSError as error:
        raise BadImageError("unreadable", f"cannot open {source}: {error.strerror}") from error
    if not data:
        raise BadImageError("empty", "0 bytes")
    try:
        with warnings.catch_warnings():
            # PIL warns of corrupt EXIF blocks and of large pictures; the pixels are read right all the same.
            warnings.simplefilter("ignore")
            if reduced_size is None and channels == 3 and _is_plain_jpeg(data):
                # The same library and pixels as PIL's, by a third faster. What it refuses, PIL names below.
                with contextlib.suppress(RuntimeError):
                    file = torch.frombuffer(data, dtype=torch.uint8)
                    return cast(Tensor, decode_jpeg(file, ImageReadMode.RGB))
            with Image.open(io.BytesIO(data)) as image:
                if reduced_size is not None:
                    _reduce(image, reduced_size)
                return F.pil_to_tensor(_convert(_upright(image), channels, background))
    except BadImageError:
        raise
    except Image.DecompressionBombError as error:
        raise BadImageError("too large", str(error)) from error
    except UnidentifiedImageError as error:
        raise BadImageError("not an image", f"{len(data)} bytes of no picture format that PIL knows") from error
    except Exception as error:  # PIL's readers raise nearly anything on damaged files: struct.error, SyntaxError, ...
        truncated = isinstance(error, EOFError) or any(sign in str(error).lower() for sign in TRUNCATION_SIGNS)
        raise BadImageError("truncated" if truncated else "unreadable", f"{type(error).__name__}: {error}") from error


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether the pixels of a file are JPEG and need neither turning nor PIL's colour conversion or limit of size.

    From the file's segments, since to open it with PIL takes a twentieth of the time of a small picture.
    """
    position = 2 if data.startswith(b"\xff\xd8") else len(data)
    while data.startswith(b"\xff", position):
        marker = data[position + 1 : position + 2]
        if marker in FRAMES:
            height, width = (int.from_bytes(data[start : start + 2], "big") for start in (position + 5, position + 7))
            small = Image.MAX_IMAGE_PIXELS is None or height * width <= Image.MAX_IMAGE_PIXELS
            return small and data[position + 9 : position + 10] in (b"\1", b"\3")  # the number of components
        if marker == METADATA and not _is_upright(data):
            return False
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return False


def _is_upright(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.getexif().get(ORIENTATION, 1) == 1
    except Exception:  # a damaged EXIF block: left to PIL
        return False


def _reduce(image: Image.Image, size: int) -> None:
    """Have the decoder give a JPEG at the smallest of its scales whose short side is at least `size`."""
    # PIL takes the largest scale that keeps both sides at least as long as asked for.
    scale = size / min(image.size)
    if scale <= 0.5:
        image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    # A damaged EXIF block says nothing about the orientation, so the pixels stand as they are.
    with contextlib.suppress(Exception):
        # In place, since the many pictures that are upright already would be copied.
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _convert(image: Image.Image, channels: int, background: Sequence[int]) -> Image.Image:
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise BadImageError("unreadable", "pixels are floating-point numbers of unknown range: convert to 8 or 16 bits")
    if channels == 4:
        image = image.convert("RGBA")
        # Files keep any colour where nothing is seen, and resizing makes it black.
        visible = image.getchannel("A").point([0] + [255] * 255)
        return Image.composite(image, Image.new("RGBA", image.size), visible)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image)
    return image.convert("RGB").convert(MODES[channels])
