"""The VQGAN of MaskGIT, and MaskBit, which has the same blocks.

H. Chang et al.: MaskGIT: Masked Generative Image Transformer, https://arxiv.org/abs/2202.04200;
M. Weber et al.: MaskBit: Embedding-free Image Generation via Bit Tokens, https://arxiv.org/abs/2409.16211.
"""

import dataclasses

from torch import Tensor

from vistok.decoder import MaskGITDecoder
from vistok.encoder import MaskGITEncoder
from vistok.hub.importers.base import Checkpoint, Family, Published, codebook, fill, preprocessing
from vistok.hub.importers.trunk import Dialect, describe, take_trunk
from vistok.quantizer import LFQ, Quantizer
from vistok.tokenizer import Tokenizer

MASKGIT = Dialect(upsample="upsample_conv", middle="mid.{}")
# Besides the names of MaskGIT, those of MaskBit, whose decoder starts at the coarsest level; in its legacy variant not.
MASKBIT = Dialect(
    residual="res_blocks.{}",
    downsample="down_conv",
    upsample="upsample_conv",
    middle="mid.res_blocks.{}",
    coarsest_first=True,
)


def take_decoder(
    checkpoint: Checkpoint, dialect: Dialect, prefix: str, ours: str
) -> tuple[MaskGITDecoder, dict[str, Tensor]]:
    """A decoder and its tensors by our names."""
    trunk = describe(checkpoint, dialect, prefix)
    decoder = MaskGITDecoder(**trunk.sizes())
    return decoder, take_trunk(checkpoint, decoder, dialect, trunk, prefix, ours)


def _convert(checkpoint: Checkpoint, dialect: Dialect, filter: str) -> Tokenizer:
    trunk = describe(checkpoint, dialect, "encoder.")
    encoder = MaskGITEncoder(**trunk.sizes(stem=True), downsample="conv" if trunk.resizes else "pool")
    values = take_trunk(checkpoint, encoder, dialect, trunk, "encoder.", "encoder.")
    decoder, more = take_decoder(checkpoint, dialect, "decoder.", "decoder.")
    values |= more
    # Constants of the bits.
    checkpoint.drop("quantize.bits_to_indices", "quantize.codebook", "loss.*", "discriminator.*")
    quantizer: Quantizer = LFQ(trunk.z_channels)
    if "quantize.embedding.weight" in checkpoint:
        values["quantizer.table"] = checkpoint.take("quantize.embedding.weight")
        distance = "cosine" if checkpoint.option("unit_norm", False) else "euclidean"
        quantizer = codebook(values["quantizer.table"], distance=distance)
    prepared = preprocessing(checkpoint, filter=filter, range=(0, 1), channels=trunk.channels)
    return fill(Tokenizer(encoder, quantizer, decoder, projection="none", preprocessing=prepared), values)


def convert(checkpoint: Checkpoint) -> Tokenizer:
    """No 1x1 convolutions around the quantizer; images in [0, 1] inside."""
    return _convert(checkpoint, MASKGIT, "bicubic")


def convert_maskbit(checkpoint: Checkpoint) -> Tokenizer:
    """Signs of the features as bits, the first channel as the least significant; VQGAN+ has a codebook instead.

    Option ``unit_norm`` (false) of a codebook: whether codes and features have unit length.
    """
    legacy = "decoder.up.0.upsample_conv.weight" not in checkpoint
    return _convert(checkpoint, dataclasses.replace(MASKBIT, coarsest_first=not legacy), "bilinear")


FAMILY = Family(
    name="maskgit",
    title="VQGAN of MaskGIT, https://github.com/google-research/maskgit, also as MaskGitVQGAN of open-muse",
    marks=("encoder.down.0.block.0.conv1.weight", "encoder.mid.0.conv1.weight", "quantize.embedding.weight"),
    convert=convert,
    published=(
        Published("imagenet-f16", "fun-research/TiTok", "maskgit-vqgan-imagenet-f16-256.bin", 54.5, "Apache-2.0"),
        Published("openmuse", "openMUSE/maskgit-vqgan-imagenet-f16-256", "pytorch_model.bin", 54.5),
    ),
)
MASKBIT_FAMILY = Family(
    name="maskbit",
    title="MaskBit and VQGAN+, https://github.com/markweberdev/maskbit",
    marks=("encoder.down.0.res_blocks.0.conv1.weight", "encoder.mid.res_blocks.0.conv1.weight"),
    convert=convert_maskbit,
    published=(
        *(
            Published(f"{bits}bit", f"markweber/maskbit_tokenizer_{bits}bit", f"maskbit_tokenizer_{bits}bit.bin")
            for bits in (10, 12, 14, 16, 18)
        ),
        Published("vqgan-plus-10bit", "markweber/vqgan_plus_paper"),
        Published("vqgan-plus-12bit", "markweber/vqgan_plus_12bit", "vqgan_plus_12bit.bin"),
    ),
)
