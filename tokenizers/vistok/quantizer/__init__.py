"""Quantizers: features to integers and back."""

from vistok.quantizer.base import PositionwiseQuantizer, Quantized, Quantizer
from vistok.quantizer.fsq import FSQ
from vistok.quantizer.vq import VectorQuantizer

__all__ = ["FSQ", "PositionwiseQuantizer", "Quantized", "Quantizer", "VectorQuantizer"]
