"""Metrics are computed in float32, whatever precision the tokenizer runs in."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Leave autocast and switch TF32 convolutions off.

    cuDNN rounds the inputs of float32 convolutions to TF32 (10 bits of mantissa) by default. SSIM takes the
    difference of two such results, E[x^2] - E[x]^2, so the rounding would be as large as its stabilising constants.
    """
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        cudnn = torch.backends.cudnn
        with cudnn.flags(
            enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False
        ):
            yield


def float64_device(device: torch.device) -> torch.device:
    """Where float64 sums of what lies on a device are made: there, but on the CPU for Apple's GPUs, which have none."""
    return torch.device("cpu") if device.type == "mps" else device
