"""Decoders: features to images."""

from vistok.decoder.base import Decoder
from vistok.decoder.causal3d import Causal3DDecoder
from vistok.decoder.cnn import CNNDecoder
from vistok.decoder.cosmos import CosmosDecoder
from vistok.decoder.dvae import DVAEDecoder
from vistok.decoder.emu3 import Emu3Decoder
from vistok.decoder.features import FeatureDecoder
from vistok.decoder.gsq import GSQDecoder
from vistok.decoder.magvit2 import MAGVIT2Decoder
from vistok.decoder.maskgit import MaskGITDecoder
from vistok.decoder.movq import MoVQDecoder
from vistok.decoder.swin import SwinDecoder
from vistok.decoder.titok import TiTokDecoder
from vistok.decoder.vit import ViTDecoder
from vistok.decoder.vqvae import VQVAEDecoder

__all__ = [
    "CNNDecoder",
    "Causal3DDecoder",
    "CosmosDecoder",
    "DVAEDecoder",
    "Decoder",
    "Emu3Decoder",
    "FeatureDecoder",
    "GSQDecoder",
    "MAGVIT2Decoder",
    "MaskGITDecoder",
    "MoVQDecoder",
    "SwinDecoder",
    "TiTokDecoder",
    "VQVAEDecoder",
    "ViTDecoder",
]
