"""SBER-MoVQGAN: a decoder that the code of every position modulates.

C. Zheng et al.: MoVQ: Modulating Quantized Vectors for High-Fidelity Image Generation,
https://arxiv.org/abs/2209.09002; https://github.com/ai-forever/MoVQGAN.
"""

from vistok.decoder import MoVQDecoder
from vistok.hub.importers.base import Checkpoint, Family, Published, codebook, preprocessing
from vistok.hub.importers.convolutional import vqgan
from vistok.hub.importers.taming import LOSSES, PLAIN
from vistok.hub.importers.trunk import Dialect
from vistok.tokenizer import Tokenizer

SPATIAL = ((r"(norm\w*)\.norm$", r"\1.norm_layer"), (r"\.scale$", ".conv_y"), (r"\.shift$", ".conv_b"))
MOVQ = Dialect(leaves=(*Dialect.leaves, *SPATIAL))


def convert(checkpoint: Checkpoint) -> Tokenizer:
    """The nearest code."""
    checkpoint.drop(*LOSSES)
    table = checkpoint.take("quantize.embedding.weight")
    prepared = preprocessing(checkpoint, filter="bicubic")
    return vqgan(checkpoint, MOVQ, codebook(table), {"table": table}, prepared, MoVQDecoder)


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
