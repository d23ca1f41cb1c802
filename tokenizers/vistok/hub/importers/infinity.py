"""The tokenizer of Infinity: a pyramid of maps of bits.

J. Han et al.: Infinity: Scaling Bitwise AutoRegressive Modeling for High-Resolution Image Synthesis,
https://arxiv.org/abs/2412.04431; https://github.com/FoundationVision/Infinity.
"""

import re

from vistok.hub.importers.base import Checkpoint, Family, Published, preprocessing
from vistok.hub.importers.convolutional import TAMING, vqgan
from vistok.quantizer import BSQ, MultiScaleQuantizer
from vistok.tokenizer import Tokenizer

SCALES = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)  # of square images of 1024 pixels


def convert(checkpoint: Checkpoint) -> Tokenizer:
    """Bits of each token on the last axis, scale after scale; the option ``scales`` are the sides of the maps."""
    checkpoint.drop("quantize.*", "quantizer.*", "loss.*")
    for name in list(checkpoint.tensors):
        renamed = re.sub(r"\.(?:conv|norm)\.(weight|bias)$", r".\1", name)
        renamed = re.sub(r"(sample)\.(weight|bias)$", r"\1.conv.\2", renamed)
        checkpoint.tensors[renamed] = checkpoint.tensors.pop(name)
    bits = checkpoint.shape("encoder.conv_out.weight")[0]
    scales = checkpoint.option("scales", SCALES)
    part = BSQ(bits, index_bits=1, inv_temperature=100.0, batch_entropy="bit", gradient_scale="identity")
    quantizer = MultiScaleQuantizer(part, scales, phi=0, up="linear", loss="stage")
    prepared = preprocessing(checkpoint, filter="lanczos", size=1024)
    return vqgan(checkpoint, TAMING, quantizer, {}, prepared, projection="none")


FAMILY = Family(
    name="infinity",
    title="Infinity, https://github.com/FoundationVision/Infinity",
    marks=("encoder.down.0.block.0.conv1.conv.weight", "encoder.mid.block_1.conv1.conv.weight"),
    convert=convert,
    published=tuple(
        Published(f"d{bits}", "FoundationVision/infinity", f"infinity_vae_d{bits}.pth", None, "MIT")
        for bits in (16, 24, 32, 64)
    ),
)
