"""Losses between images and reconstructions."""

from vistok.loss.adversarial import AdversarialLoss, adaptive_weight
from vistok.loss.backbone import FrozenBackbone
from vistok.loss.contrastive import FeatureContrast, TextContrast, info_nce
from vistok.loss.lpips import LPIPS, LPIPSTrunk
from vistok.loss.perceptual import PerceptualLoss, gram_distance
from vistok.loss.pixel import LogitLaplace, focal_frequency, wavelet
from vistok.loss.reconstruction import ReconstructionLoss
from vistok.loss.schedule import Schedule, make_schedule
from vistok.loss.semantic import FeatureDistillation, LatentAlignment
from vistok.loss.term import LatentTerm, Term
from vistok.loss.text import OpenCLIPText, TextFeatures, TransformersText, text_features
from vistok.loss.tokens import TokenPrediction

__all__ = [
    "LPIPS",
    "AdversarialLoss",
    "FeatureContrast",
    "FeatureDistillation",
    "FrozenBackbone",
    "LPIPSTrunk",
    "LatentAlignment",
    "LatentTerm",
    "LogitLaplace",
    "OpenCLIPText",
    "PerceptualLoss",
    "ReconstructionLoss",
    "Schedule",
    "Term",
    "TextContrast",
    "TextFeatures",
    "TokenPrediction",
    "TransformersText",
    "adaptive_weight",
    "focal_frequency",
    "gram_distance",
    "info_nce",
    "make_schedule",
    "text_features",
    "wavelet",
]
