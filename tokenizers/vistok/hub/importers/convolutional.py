"""A tokenizer around the trunk of VQGAN: what most families differ in is only their quantizer."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vistok.decoder import CNNDecoder
from vistok.encoder import CNNEncoder
from vistok.hub.importers.base import Checkpoint, fill
from vistok.hub.importers.trunk import Dialect, describe, take_projections, take_trunk
from vistok.quantizer import Identity, Quantizer
from vistok.tokenizer import Tokenizer

TAMING = Dialect()


def vqgan(
    checkpoint: Checkpoint,
    dialect: Dialect,
    quantizer: Quantizer,
    state: Mapping[str, Tensor],
    preprocessing: Mapping[str, Any],
    decoder: type[CNNDecoder] = CNNDecoder,
    projection: str = "linear",
) -> Tokenizer:
    """Build a VQGAN of any dialect and take all that is left in the checkpoint.

    Args:
        checkpoint: Without the tensors of the quantizer.
        dialect: Names of the program.
        quantizer: Of the codes between the two convolutions.
        state: Tensors of the quantizer, by its own names.
        preprocessing: Recorded in the tokenizer.
        decoder: Class of the decoder.
        projection: What these two are, as for `Tokenizer`.
    """
    shapes = [describe(checkpoint, dialect, prefix) for prefix in ("encoder.", "decoder.")]
    tokenizer = Tokenizer(
        CNNEncoder(**shapes[0].cnn()), quantizer, decoder(**shapes[1].cnn()), projection, preprocessing
    )
    values = {f"quantizer.{name}": value for name, value in state.items()}
    if projection != "none":
        values |= take_projections(checkpoint)
    for part, shape, name in zip((tokenizer.encoder, tokenizer.decoder), shapes, ("encoder.", "decoder."), strict=True):
        values |= take_trunk(checkpoint, part, dialect, shape, name, name)
    return fill(tokenizer, values)


def keep_mean(checkpoint: Checkpoint) -> Quantizer:
    """Leave out the half of the last layer of an encoder that makes log-variances, which decoding has no use for.

    Returns:
        The quantizer of the codes that are left, which are continuous.
    """
    layer = "quant_conv" if "quant_conv.weight" in checkpoint else "encoder.conv_out"
    dim = checkpoint.shape(f"{layer}.weight")[0] // 2
    for parameter in ("weight", "bias"):
        checkpoint.tensors[f"{layer}.{parameter}"] = checkpoint.take(f"{layer}.{parameter}")[:dim]
    return Identity(dim)
