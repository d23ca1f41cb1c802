"""A tokenizer around the trunk of VQGAN: what most families differ in is only their quantizer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vistok.decoder import CNNDecoder
from vistok.encoder import CNNEncoder
from vistok.hub.importers.base import Checkpoint, fill
from vistok.hub.importers.transformer import to_signed_range
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
    encoder_options: Mapping[str, Any] = {},
    decoder_options: Mapping[str, Any] = {},
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
        encoder_options: Arguments of the encoder that tensors do not tell.
        decoder_options: Likewise of the decoder.
    """
    shapes = [describe(checkpoint, dialect, prefix) for prefix in ("encoder.", "decoder.")]
    tokenizer = Tokenizer(
        CNNEncoder(**shapes[0].cnn(stem=True), **encoder_options),
        quantizer,
        decoder(**shapes[1].cnn(), **decoder_options),
        projection,
        {**preprocessing, "channels": shapes[0].channels},
    )
    values = {f"quantizer.{name}": value for name, value in state.items()}
    if projection != "none":
        values |= take_projections(checkpoint)
    for part, shape, name in zip((tokenizer.encoder, tokenizer.decoder), shapes, ("encoder.", "decoder."), strict=True):
        values |= take_trunk(checkpoint, part, dialect, shape, name, name)
    return fill(tokenizer, values)


def projection_kind(checkpoint: Checkpoint) -> str:
    """What the two convolutions around the quantizer are, as for `Tokenizer`, in programs that may leave out either.

    Where there is only one of them, an identity takes the place of the other.
    """
    present = [f"{layer}.weight" in checkpoint for layer in ("quant_conv", "post_quant_conv")]
    if not any(present):
        return "none"
    if not all(present):
        layer = "post_quant_conv" if present[0] else "quant_conv"
        inside, outside = checkpoint.shape("decoder.conv_in.weight")[1], checkpoint.shape("encoder.conv_out.weight")[0]
        dim = inside if present[0] else outside
        checkpoint.tensors |= {f"{layer}.weight": torch.eye(dim), f"{layer}.bias": torch.zeros(dim)}
    return "linear"


def to_unit_range(checkpoint: Checkpoint) -> dict[str, Any]:
    """Argument of the encoder for programs whose images are in [0, 1]; the last convolution is turned to [-1, 1]."""
    layer = [f"decoder.conv_out.{parameter}" for parameter in ("weight", "bias")]
    checkpoint.tensors |= {name: checkpoint.take(name) for name in layer}  # in single precision
    to_signed_range(checkpoint.tensors, *layer)
    return {"unit_range": True}


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
