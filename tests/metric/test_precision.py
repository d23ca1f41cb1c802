"""The precision of the metrics does not follow that of the model."""

import pytest
import torch

from vistok.metric.precision import full_float32

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BY_OPERATION = hasattr(torch.backends.cudnn, "conv")


def exact():
    """Whether products of matrices are those of float32."""
    if BY_OPERATION:
        return {torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision} == {"ieee"}
    return torch.get_float32_matmul_precision() == "highest"


def test_neither_autocast_nor_the_precision_of_products_reaches_a_metric():
    before = torch.get_float32_matmul_precision()
    left, right = torch.randn(2, 64, 64)
    expected = left @ right
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu"), full_float32(CPU):
            assert exact()
            assert torch.equal(left @ right, expected)
        assert not exact()
    finally:
        torch.set_float32_matmul_precision(before)


def test_convolutions_of_a_gpu_are_not_rounded():
    before = torch.backends.cudnn.allow_tf32
    with full_float32(GPU):
        if BY_OPERATION:
            assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        else:
            assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before


@pytest.mark.skipif(not BY_OPERATION, reason="this version of PyTorch has one interface only")
def test_neither_are_those_of_a_program_that_asks_for_tf32_by_the_newer_interface():
    cudnn, cuda, mkldnn = torch.backends.cudnn, torch.backends.cuda, torch.backends.mkldnn
    settings = [torch.backends, cudnn.conv, cuda.matmul, mkldnn.matmul]
    before = [setting.fp32_precision for setting in settings]
    try:
        torch.backends.fp32_precision = "tf32"
        with full_float32(GPU):
            assert cudnn.conv.fp32_precision == "ieee"
            assert exact()
        assert cudnn.conv.fp32_precision == "tf32"
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision
