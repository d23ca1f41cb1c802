"""Metrics of tokenizers: image distances, distances of features such as rFID, codebook usage and real bits."""

from vistok.metric.codebook_usage import CodebookUsage
from vistok.metric.distances import FeatureDistances
from vistok.metric.extractor import BackboneFeatures, Features, Inception
from vistok.metric.fvd import I3D
from vistok.metric.image import l1, l2, ms_ssim, psnr, ssim
from vistok.metric.rate import adaptive_code_length, compress, decompress
from vistok.metric.weights import WeightsNotFoundError

__all__ = [
    "I3D",
    "BackboneFeatures",
    "CodebookUsage",
    "FeatureDistances",
    "Features",
    "Inception",
    "WeightsNotFoundError",
    "adaptive_code_length",
    "compress",
    "decompress",
    "l1",
    "l2",
    "ms_ssim",
    "psnr",
    "ssim",
]
