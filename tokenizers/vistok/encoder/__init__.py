"""Encoders: images to features."""

from vistok.encoder.base import Encoder
from vistok.encoder.cnn import CNNEncoder

__all__ = ["CNNEncoder", "Encoder"]
