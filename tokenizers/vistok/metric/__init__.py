"""Metrics of tokenizers: image distances, rFID and codebook usage."""

from vistok.metric.codebook_usage import CodebookUsage
from vistok.metric.image import l1, ms_ssim, psnr, ssim
from vistok.metric.rfid import RFID
from vistok.metric.weights import WeightsNotFoundError

__all__ = ["RFID", "CodebookUsage", "WeightsNotFoundError", "l1", "ms_ssim", "psnr", "ssim"]
