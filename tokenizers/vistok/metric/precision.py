"""Metrics are computed in float32, whatever precision the tokenizer runs in."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vistok.ops.tile import full_precision


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Leave autocast and switch TF32 off, in convolutions and in products of matrices.

    cuDNN rounds the inputs of float32 convolutions to TF32 (10 bits of mantissa) by default. SSIM takes the
    difference of two such results, E[x^2] - E[x]^2, so the rounding would be as large as its stabilising constants.
    """
    with torch.autocast(device.type, enabled=False), full_precision():
        if device.type != "cuda":
            yield
            return
        with _exact_convolutions():
            yield


@contextmanager
def _exact_convolutions() -> Iterator[None]:
    cudnn = torch.backends.cudnn
    convolutions: Any = getattr(cudnn, "conv", None)
    if hasattr(convolutions, "fp32_precision"):
        # The older interface below raises an error once a program has used this one.
        before = convolutions.fp32_precision
        try:
            convolutions.fp32_precision = "ieee"
            yield
        finally:
            convolutions.fp32_precision = before
        return
    with cudnn.flags(
        enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False
    ):
        yield


def float64_device(device: torch.device) -> torch.device:
    """Where float64 sums of what lies on a device are made: there, but on the CPU for Apple's GPUs, which have none."""
    return torch.device("cpu") if device.type == "mps" else device
