"""Originals, reconstructions and their errors as pictures."""

import base64
import io

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from vistok.metric.image import to_uint8

# An error of 64 of 255 is white: small errors show, large ones still differ.
ERROR_GAIN = 4
GRID_FRAMES = 8


def reconstruction_grid(
    originals: Float[Tensor, "b c h w"], reconstructions: Float[Tensor, "b c h w"], min_side: int = 128
) -> Image.Image:
    """One picture of three rows: originals, reconstructions, and `ERROR_GAIN` times the mean absolute error.

    Args:
        originals: In [-1, 1], one column per image; 1, 3 or 4 channels.
        reconstructions: Likewise; values outside [-1, 1] are clamped.
        min_side: Images with a shorter side are magnified by a whole number, without smoothing.

    Raises:
        ValueError: If the shapes differ or there is no image.
    """
    if originals.shape != reconstructions.shape or not len(originals):
        raise ValueError(
            f"originals {tuple(originals.shape)} and reconstructions {tuple(reconstructions.shape)} must be equally "
            "many images of one shape, at least one"
        )
    ours, theirs = to_uint8(reconstructions.detach()).cpu(), to_uint8(originals.detach()).cpu()
    errors = torch.stack([error_map(*pair) for pair in zip(ours, theirs, strict=True)])
    rows = [torch.stack([to_rgb(image) for image in images]) for images in (theirs, ours)]
    rows.append(errors.unsqueeze(1).expand(-1, 3, -1, -1))
    picture = torch.stack(rows)
    factor = max(1, -(-min_side // min(picture.shape[-2:])))
    picture = picture.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    # A gap of two pixels between neighbours: (row image channel h w) -> (row h, image w, channel).
    picture = F.pad(picture, (0, 2, 0, 2), value=255).permute(0, 3, 1, 4, 2)
    picture = picture.flatten(2, 3).flatten(0, 1)[:-2, :-2]
    return Image.fromarray(np.ascontiguousarray(picture.numpy()))


def video_grid(
    originals: Float[Tensor, "b c t h w"], reconstructions: Float[Tensor, "b c t h w"], min_side: int = 128
) -> Image.Image:
    """For every video a `reconstruction_grid` of at most `GRID_FRAMES` of its frames, evenly spread, side by side."""
    length = originals.shape[2]
    wanted = torch.linspace(0, length - 1, min(length, GRID_FRAMES)).round().long()
    theirs, ours = (videos[:, :, wanted].movedim(2, 1) for videos in (originals.cpu(), reconstructions.detach().cpu()))
    grids = [np.asarray(reconstruction_grid(*pair, min_side)) for pair in zip(theirs, ours, strict=True)]
    gap = np.full((8, *grids[0].shape[1:]), 255, np.uint8)
    rows = [row for grid in grids for row in (gap, grid)]
    return Image.fromarray(np.concatenate(rows[1:]))


def to_rgb(image: UInt8[Tensor, "c h w"]) -> UInt8[Tensor, "3 h w"]:
    """A picture to look at: grey is repeated, transparency is laid over mid-grey.

    Raises:
        ValueError: If there are not 1, 3 or 4 channels.
    """
    if len(image) not in (1, 3, 4):
        raise ValueError(f"pictures have 1, 3 or 4 channels, got {len(image)}")
    if len(image) == 4:
        alpha = image[3:].float() / 255
        return (image[:3] * alpha + 128 * (1 - alpha)).round().to(torch.uint8)
    return image.expand(3, -1, -1)


def error_map(reconstruction: UInt8[Tensor, "c h w"], original: UInt8[Tensor, "c h w"]) -> UInt8[Tensor, "h w"]:
    """`ERROR_GAIN` times the absolute error, mean over channels."""
    error = (reconstruction.float() - original.float()).abs().mean(0)
    return (ERROR_GAIN * error).round().clamp(max=255).to(torch.uint8)


def worst_window(error: UInt8[Tensor, "h w"], side: int) -> tuple[int, int]:
    """Top and left of the square window of the largest mean error."""
    means = F.avg_pool2d(error[None].float(), min(side, *error.shape), stride=1)[0]
    return divmod(int(means.argmax()), means.shape[1])


def data_uri(image: UInt8[Tensor, "*channel h w"]) -> str:
    """A PNG of a grey ``(h w)`` or RGB ``(3 h w)`` image for the `src` of an HTML image."""
    file = io.BytesIO()
    pixels = image if image.ndim == 2 else image.movedim(0, -1)
    Image.fromarray(np.ascontiguousarray(pixels.numpy())).save(file, "PNG", optimize=True)
    return png_uri(file.getvalue())


def png_uri(png: bytes) -> str:
    """The bytes of a PNG file as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
