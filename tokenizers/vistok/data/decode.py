"""From a picture file to a uint8 tensor, whatever the file's mode."""

import io
import warnings
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as F

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
KINDS = ("empty", "not an image", "truncated", "too large", "unreadable")
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


def decode_image(
    source: Path | bytes, channels: int = 3, background: tuple[int, int, int] = (255, 255, 255)
) -> UInt8[Tensor, "c h w"]:
    """Decode a picture by PIL, upright (EXIF orientation applied), in the number of channels asked for.

    Palettes are resolved, CMYK becomes RGB, 16-bit gray keeps its upper 8 bits (PIL would clip it), and an animation
    gives its first frame.

    Args:
        source: A file or its bytes.
        channels: 3 (RGB; transparency composited on `background`), 1 (luma of the same, ITU-R 601) or 4 (RGBA).
        background: RGB in [0, 255], seen through transparent pixels unless `channels` is 4.

    Raises:
        BadImageError: If the picture cannot be decoded.
        ValueError: If `channels` is not 1, 3 or 4.
    """
    if channels not in MODES:
        raise ValueError(f"channels must be 1 (gray), 3 (RGB) or 4 (RGBA), got {channels}")
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
            with Image.open(io.BytesIO(data)) as image:
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


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged EXIF block says nothing about the orientation, so the pixels stand as they are
        return image


def _convert(image: Image.Image, channels: int, background: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise BadImageError("unreadable", "pixels are floating-point numbers of unknown range: convert to 8 or 16 bits")
    if channels == 4:
        return image.convert("RGBA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image)
    return image.convert("RGB").convert(MODES[channels])
