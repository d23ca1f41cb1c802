"""Encoders: images to features."""

from vistok.encoder.base import Encoder
from vistok.encoder.causal3d import Causal3DEncoder
from vistok.encoder.cnn import CNNEncoder
from vistok.encoder.cosmos import CosmosEncoder
from vistok.encoder.dvae import DVAEEncoder
from vistok.encoder.emu3 import Emu3Encoder
from vistok.encoder.fqgan import FQGANEncoder
from vistok.encoder.frozen_vit import TimmEncoder
from vistok.encoder.gsq import GSQEncoder
from vistok.encoder.magvit2 import MAGVIT2Encoder
from vistok.encoder.maskgit import MaskGITEncoder
from vistok.encoder.swin import SwinEncoder
from vistok.encoder.titok import TiTokEncoder
from vistok.encoder.vit import ViTEncoder
from vistok.encoder.vqvae import VQVAEEncoder

__all__ = [
    "CNNEncoder",
    "Causal3DEncoder",
    "CosmosEncoder",
    "DVAEEncoder",
    "Emu3Encoder",
    "Encoder",
    "FQGANEncoder",
    "GSQEncoder",
    "MAGVIT2Encoder",
    "MaskGITEncoder",
    "SwinEncoder",
    "TiTokEncoder",
    "TimmEncoder",
    "VQVAEEncoder",
    "ViTEncoder",
]
