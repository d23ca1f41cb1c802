"""Distances between images and their reconstructions: one value per image.

Every function takes images in [-1, 1], clamps them, rounds them to 8 bits and measures in [0, 1] (data range 1).
Numbers of papers differ where this is done otherwise: SSIM with data range 2 on images in [0, 1], PSNR of the luma
only, PSNR of a pooled batch, reconstructions cut off instead of rounded or not rounded at all. `rounding`, `window` and
`data_range` are there to reproduce some of them.
"""

import math
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from vistok.metric.precision import full_float32

# Identical images have an infinite PSNR, which would make the mean infinite. One wrong value by one step in a 128x128
# RGB image gives 95 dB, so the cap touches no reconstruction of interest.
PSNR_CAP = 100.0
# torchmetrics reflects 5 pixels at the border, for which the shorter side must be longer than 5.
SSIM_MIN_SIDE = 6
# Four halvings must leave the 11 pixels of the window, 11 * 2**4.
MS_SSIM_MIN_SIDE = 176
ROUNDINGS = ("nearest", "truncate", "none")
_GAUSSIAN = {"sigma": 1.5}
# scikit-image divides variances by 48 instead of 49, which is the same as a smaller constant beside them.
_UNIFORM = {"gaussian_kernel": False, "kernel_size": 7, "k2": 0.03 * math.sqrt(48 / 49)}
# Options of torchmetrics, and how many pixels at the border the mean leaves out.
SSIM_WINDOWS: dict[str, tuple[dict[str, Any], int]] = {
    "gaussian": (_GAUSSIAN, 0),
    "gaussian_valid": (_GAUSSIAN, 5),
    "uniform_valid": (_UNIFORM, 3),
}


def to_pixels(images: Float[Tensor, "b c *size"], rounding: str = "nearest") -> Float[Tensor, "b c *size"]:
    """Values in [0, 255] of images in [-1, 1], float32; values outside are clamped.

    Args:
        images: Images.
        rounding: ``nearest``, ``truncate`` (the integer below, what a bare cast to 8 bits does) or ``none``.

    Raises:
        ValueError: If the rounding is unknown.
    """
    pixels = images.float().mul(127.5).add(127.5).clamp(0, 255)
    if rounding == "nearest":
        return pixels.round()
    if rounding == "truncate":
        return pixels.floor()
    if rounding != "none":
        raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}; got {rounding!r}")
    return pixels


def to_frames(images: Float[Tensor, "b c *size"]) -> Float[Tensor, "n c h w"]:
    """Images ``(b c H W)`` as they are; of videos ``(b c T H W)`` the frames, one video after the other."""
    return images.movedim(2, 1).flatten(0, 1) if images.ndim == 5 else images


def num_frames(images: Float[Tensor, "b c *size"]) -> int:
    """How many images `to_frames` gives."""
    return len(images) * (images.shape[2] if images.ndim == 5 else 1)


def from_pixels(pixels: Float[Tensor, "b c *size"]) -> Float[Tensor, "b c *size"]:
    """Images in [-1, 1] of values in [0, 255]."""
    return pixels.div(127.5).sub(1)


def to_uint8(images: Float[Tensor, "b c *size"]) -> UInt8[Tensor, "b c *size"]:
    """8-bit images of images in [-1, 1]; values outside are clamped."""
    return to_pixels(images).to(torch.uint8)


def from_uint8(images: UInt8[Tensor, "b c *size"]) -> Float[Tensor, "b c *size"]:
    """Images in [-1, 1] of 8-bit images, float32."""
    return from_pixels(images.float())


def psnr(
    reconstructions: Float[Tensor, "b c h w"], originals: Float[Tensor, "b c h w"], rounding: str = "nearest"
) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio in dB over all channels and pixels of each image, at most `PSNR_CAP`.

    Args:
        reconstructions: In [-1, 1].
        originals: In [-1, 1], always rounded to the nearest of 8 bits, which they came from.
        rounding: Of the reconstructions, see `to_pixels`.
    """
    return (-10 * l2(reconstructions, originals, rounding).log10()).clamp(max=PSNR_CAP)


def l1(
    reconstructions: Float[Tensor, "b c h w"], originals: Float[Tensor, "b c h w"], rounding: str = "nearest"
) -> Float[Tensor, " b"]:
    """Mean absolute error of each image, in [0, 1]; arguments of `psnr`."""
    error = _error(reconstructions, originals, rounding)
    return error.div(255).abs().flatten(1).mean(1)


def l2(
    reconstructions: Float[Tensor, "b c h w"], originals: Float[Tensor, "b c h w"], rounding: str = "nearest"
) -> Float[Tensor, " b"]:
    """Mean squared error of each image, in [0, 1]; arguments of `psnr`."""
    error = _error(reconstructions, originals, rounding)
    return error.div(255).square().flatten(1).mean(1)


def ssim(
    reconstructions: Float[Tensor, "b c h w"],
    originals: Float[Tensor, "b c h w"],
    rounding: str = "nearest",
    window: str = "gaussian",
    data_range: float = 1.0,
) -> Float[Tensor, " b"]:
    """Structural similarity of each image, mean over channels.

    Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", 2004.

    Args:
        reconstructions: In [-1, 1].
        originals: In [-1, 1].
        rounding: Of the reconstructions, see `to_pixels`.
        window: ``gaussian``: 11x11, sigma 1.5, the border reflected (torchmetrics). ``gaussian_valid``: the same
            without the 5 pixels at the border (pytorch-msssim). ``uniform_valid``: 7x7, sample variances, without the
            3 pixels at the border (the default of scikit-image).
        data_range: Of the two constants; the images are in [0, 1], so anything but 1 gives other values than the paper
            meant. LlamaGen and those who copied its script have 2.

    Raises:
        ValueError: If a side is shorter than 6 pixels, or leaves nothing inside the border.
    """
    if window not in SSIM_WINDOWS:
        raise ValueError(f"window must be one of {', '.join(SSIM_WINDOWS)}; got {window!r}")
    _check_side(originals, ssim_min_side(window), "SSIM")
    options, border = SSIM_WINDOWS[window]
    with full_float32(originals.device):
        values = structural_similarity_index_measure(
            to_pixels(reconstructions, rounding).div(255),
            to_pixels(originals).div(255),
            data_range=data_range,
            reduction="none",
            return_full_image=border > 0,
            **options,
        )
        if isinstance(values, Tensor):
            return values.reshape(-1)
        return values[1][..., border:-border, border:-border].flatten(1).mean(1)


def ssim_min_side(window: str) -> int:
    """Shortest side in pixels that the SSIM of a window takes."""
    return max(SSIM_MIN_SIDE, 2 * SSIM_WINDOWS[window][1] + 1)


def ms_ssim(
    reconstructions: Float[Tensor, "b c h w"], originals: Float[Tensor, "b c h w"], rounding: str = "nearest"
) -> Float[Tensor, " b"]:
    """Multi-scale structural similarity of each image: five scales, the Gaussian window of `ssim`, border reflected.

    Wang et al., "Multiscale Structural Similarity for Image Quality Assessment", 2003.

    Raises:
        ValueError: If a side is shorter than 176 pixels.
    """
    _check_side(originals, MS_SSIM_MIN_SIDE, "MS-SSIM")
    with full_float32(originals.device):
        return multiscale_structural_similarity_index_measure(
            to_pixels(reconstructions, rounding).div(255),
            to_pixels(originals).div(255),
            sigma=1.5,
            data_range=1.0,
            reduction="none",
        ).reshape(-1)


def _error(reconstructions: Tensor, originals: Tensor, rounding: str) -> Tensor:
    """Differences of values in [0, 255]; float64, except on Apple's GPUs, which have none."""
    dtype = torch.float32 if originals.device.type == "mps" else torch.float64
    return to_pixels(reconstructions, rounding).to(dtype) - to_pixels(originals).to(dtype)


def _check_side(images: Tensor, smallest: int, name: str) -> None:
    if min(images.shape[2:]) < smallest:
        raise ValueError(f"{name} needs sides of at least {smallest} pixels, got {tuple(images.shape[2:])}")
