"""Quantizers: features to integers and back."""

from vistok.quantizer.base import PositionwiseQuantizer, Quantized, Quantizer
from vistok.quantizer.binary import BinaryQuantizer
from vistok.quantizer.bsq import BSQ
from vistok.quantizer.class_specific import ClassSpecificQuantizer
from vistok.quantizer.continuous import KL, Identity
from vistok.quantizer.dithered_fsq import DitheredFSQ
from vistok.quantizer.dual import DualVectorQuantizer
from vistok.quantizer.fsq import FSQ
from vistok.quantizer.grouped import GroupedQuantizer
from vistok.quantizer.lfq import LFQ
from vistok.quantizer.multiscale import MultiScaleQuantizer
from vistok.quantizer.residual import ResidualQuantizer
from vistok.quantizer.vq import VectorQuantizer

__all__ = [
    "BSQ",
    "FSQ",
    "KL",
    "LFQ",
    "BinaryQuantizer",
    "ClassSpecificQuantizer",
    "DitheredFSQ",
    "DualVectorQuantizer",
    "GroupedQuantizer",
    "Identity",
    "MultiScaleQuantizer",
    "PositionwiseQuantizer",
    "Quantized",
    "Quantizer",
    "ResidualQuantizer",
    "VectorQuantizer",
]
