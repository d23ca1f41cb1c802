"""Decoders: features to images."""

from vistok.decoder.base import Decoder
from vistok.decoder.cnn import CNNDecoder

__all__ = ["CNNDecoder", "Decoder"]
