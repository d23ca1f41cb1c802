"""Quantizers: features to integers and back."""

from vistok.quantizer.base import PositionwiseQuantizer, Quantized, Quantizer
from vistok.quantizer.binary import BinaryQuantizer
from vistok.quantizer.bsq import BSQ
from vistok.quantizer.continuous import KL, Identity
from vistok.quantizer.dithered_fsq import DitheredFSQ
from vistok.quantizer.dual import DualVectorQuantizer
from vistok.quantizer.fsq import FSQ
from vistok.quantizer.lfq import LFQ
from vistok.quantizer.vq import VectorQuantizer

__all__ = [
    "BSQ",
    "FSQ",
    "KL",
    "LFQ",
    "BinaryQuantizer",
    "DitheredFSQ",
    "DualVectorQuantizer",
    "Identity",
    "PositionwiseQuantizer",
    "Quantized",
    "Quantizer",
    "VectorQuantizer",
]
