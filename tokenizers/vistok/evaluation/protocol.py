"""How the numbers of an evaluation were measured, in words that are saved beside them."""

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vistok.metric.image import PSNR_CAP

REQUIRED = ("dataset", "split", "resize", "crop")
PACKAGES = ("vistok", "torch", "torchvision", "torchmetrics", "torch-fidelity", "pillow")


def check_protocol(protocol: Mapping[str, Any]) -> None:
    """Refuse a protocol that does not say where the images come from."""
    lacking = [name for name in REQUIRED if name not in protocol]
    if lacking:
        raise ValueError(
            f"protocol lacks {lacking}, got {sorted(protocol)}: add them, as 'none' where nothing was done"
        )


def describe(shape: Sequence[int], count: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The part of the protocol that `evaluate` fixes or finds.

    Args:
        shape: ``(c, H, W)`` of an image.
        count: Number of images.
        device: Where the tokenizer ran.
        dtype: Of its parameters.
    """
    channels, *size = shape
    autocast = torch.is_autocast_enabled(device.type)
    precision = f"{dtype}".removeprefix("torch.")
    if autocast:
        precision += f" under {torch.get_autocast_dtype(device.type)} autocast".replace("torch.", "")
    return {
        "images": count,
        "size": list(size),
        "channels": channels,
        "value_range": "images in [-1, 1]",
        "rounding": "originals and reconstructions clamped and rounded to 8 bits before every metric",
        "psnr": f"dB, per image over all channels, data range 1, mean over images, at most {PSNR_CAP:.0f}",
        "ssim": "per image, Gaussian window 11x11 with sigma 1.5, data range 1, reflected border, "
        "mean over channels and images (torchmetrics)",
        "ms_ssim": "as ssim, 5 scales",
        "l1": "mean absolute error in [0, 1]",
        "codebook": "exact counts over all images: utilisation = share of codes used at least once, "
        "perplexity = exp of the entropy in nats, expected_uniform_utilisation = 1 - (1 - 1/K)^tokens",
        "bits_per_pixel": "bits of the codes over pixels, without entropy coding",
        "throughput": "median over batches, first run left out, data loading left out",
        "precision": f"tokenizer {precision}; metrics float32",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
