"""Convolutional decoder modulated by the codes.

C. Zheng et al.: MoVQ: Modulating Quantized Vectors for High-Fidelity Image Generation, https://arxiv.org/abs/2209.09002.
"""

from vistok.decoder.cnn import CNNDecoder
from vistok.layers import SpatialNorm


class MoVQDecoder(CNNDecoder):
    """A `CNNDecoder` in which the code of every position scales and shifts what each normalisation returns there.

    As in SBER-MoVQGAN and Kandinsky 2 (https://github.com/ai-forever/MoVQGAN), whose encoder is
    `vistok.encoder.CNNEncoder` and whose codes are those of one plain quantizer, not the paper's multichannel ones.
    Arguments as for `CNNDecoder`.
    """

    norm = SpatialNorm
