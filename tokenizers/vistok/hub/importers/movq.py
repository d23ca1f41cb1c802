"""SBER-MoVQGAN: a decoder that the code of every position modulates.

C. Zheng et al.: MoVQ: Modulating Quantized Vectors for High-Fidelity Image Generation,
https://arxiv.org/abs/2209.09002; https://github.com/ai-forever/MoVQGAN.
"""

from vistok.decoder import MoVQDecoder
from vistok.hub.importers.base import Checkpoint, Family, Published, preprocessing
from vistok.hub.importers.convolutional import vqgan
from vistok.hub.importers.taming import LOSSES, PLAIN, nearest
from vistok.hub.importers.trunk import Dialect
from vistok.tokenizer import Tokenizer

SPATIAL = ((r"(norm\w*)\.norm$", r"\1.norm_layer"), (r"\.scale$", ".conv_y"), (r"\.shift$", ".conv_b"))
MOVQ = Dialect(leaves=(*Dialect.leaves, *SPATIAL))


def convert(checkpoint: Checkpoint) -> Tokenizer:
    """The nearest code."""
    checkpoint.drop(*LOSSES)
    if any(name.endswith(("norm1.conv.weight", "norm.conv.weight")) for name in checkpoint.tensors):
        raise ValueError("its normalisations convolve the codes (add_conv=true), which is not supported")
    quantizer, state = nearest(checkpoint)
    prepared = preprocessing(checkpoint, filter="bicubic")
    return vqgan(checkpoint, MOVQ, quantizer, state, prepared, MoVQDecoder)


FAMILY = Family(
    name="movq",
    title="SBER-MoVQGAN, https://github.com/ai-forever/MoVQGAN",
    marks=(*PLAIN, "decoder.up.0.block.0.norm1.conv_y.weight"),
    convert=convert,
    published=tuple(
        Published(name, "ai-forever/MoVQGAN", f"movqgan_{name}.ckpt", millions)
        for name, millions in (("67M", 67.8), ("102M", 101.6), ("270M", 270.7))
    ),
)
