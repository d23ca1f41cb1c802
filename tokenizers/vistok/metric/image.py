"""Distances between images and their reconstructions: one value per image, on 8-bit-rounded images.

Every function takes images in [-1, 1], clamps them, rounds them to 8 bits and measures in [0, 1] (data range 1).
Numbers of papers differ where this is done otherwise: SSIM with data range 2 on images in [0, 1], PSNR of the luma
only, PSNR of a pooled batch.
"""

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


def to_uint8(images: Float[Tensor, "b c h w"]) -> UInt8[Tensor, "b c h w"]:
    """8-bit images of images in [-1, 1]; values outside are clamped."""
    return images.float().mul(127.5).add(127.5).round().clamp(0, 255).to(torch.uint8)


def from_uint8(images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Images in [-1, 1] of 8-bit images, float32."""
    return images.float().div(127.5).sub(1)


def psnr(reconstructions: Float[Tensor, "b c h w"], originals: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio in dB over all channels and pixels of each image, at most `PSNR_CAP`."""
    error = _error(reconstructions, originals)
    mean_squared_error = error.div(255).square().flatten(1).mean(1)
    return (-10 * mean_squared_error.log10()).clamp(max=PSNR_CAP)


def l1(reconstructions: Float[Tensor, "b c h w"], originals: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Mean absolute error of each image, in [0, 1]."""
    error = _error(reconstructions, originals)
    return error.div(255).abs().flatten(1).mean(1)


def ssim(reconstructions: Float[Tensor, "b c h w"], originals: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Structural similarity of each image: Gaussian 11x11 window, sigma 1.5, data range 1, mean over channels.

    Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", 2004.

    Raises:
        ValueError: If a side is shorter than 6 pixels.
    """
    _check_side(originals, SSIM_MIN_SIDE, "SSIM")
    with full_float32(originals.device):
        values = structural_similarity_index_measure(
            _unit_range(reconstructions), _unit_range(originals), sigma=1.5, data_range=1.0, reduction="none"
        )
    assert isinstance(values, Tensor)  # a pair only where the whole map is asked for
    return values.reshape(-1)


def ms_ssim(reconstructions: Float[Tensor, "b c h w"], originals: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Multi-scale structural similarity of each image: five scales, the window of `ssim`.

    Wang et al., "Multiscale Structural Similarity for Image Quality Assessment", 2003.

    Raises:
        ValueError: If a side is shorter than 176 pixels.
    """
    _check_side(originals, MS_SSIM_MIN_SIDE, "MS-SSIM")
    with full_float32(originals.device):
        return multiscale_structural_similarity_index_measure(
            _unit_range(reconstructions), _unit_range(originals), sigma=1.5, data_range=1.0, reduction="none"
        ).reshape(-1)


def _error(reconstructions: Tensor, originals: Tensor) -> Tensor:
    """Differences of 8-bit values; float64, except on Apple's GPUs, which have none."""
    dtype = torch.float32 if originals.device.type == "mps" else torch.float64
    return to_uint8(reconstructions).to(dtype) - to_uint8(originals).to(dtype)


def _unit_range(images: Tensor) -> Tensor:
    return to_uint8(images).float().div(255)


def _check_side(images: Tensor, smallest: int, name: str) -> None:
    if min(images.shape[2:]) < smallest:
        raise ValueError(f"{name} needs sides of at least {smallest} pixels, got {tuple(images.shape[2:])}")
