"""ViT-VQGAN as published for PyTorch.

J. Yu et al.: Vector-quantized Image Modeling with Improved VQGAN, https://arxiv.org/abs/2110.04627;
https://github.com/thuanz123/enhancing-transformers.
"""

from typing import Any

import torch

from vistok.decoder import ViTDecoder
from vistok.encoder import ViTEncoder
from vistok.hub.importers.base import Checkpoint, Family, Published, codebook, fill, preprocessing, square_root
from vistok.hub.importers.taming import LOSSES
from vistok.hub.importers.transformer import from_unit_range, take_renamed, to_signed_range
from vistok.quantizer import Quantizer, ResidualQuantizer
from vistok.tokenizer import Tokenizer

NAMES = {
    r"\b(?:en|de)_pos_embedding": "trunk.space_positions.table",
    r"transformer\.layers\.(\d+)\.0\.norm": r"trunk.transformer.blocks.\1.norm1",
    r"transformer\.layers\.(\d+)\.1\.norm": r"trunk.transformer.blocks.\1.norm2",
    r"transformer\.layers\.(\d+)\.0\.fn\.to_": r"trunk.transformer.blocks.\1.attention.",
    r"attention\.out": "attention.projection",
    r"transformer\.layers\.(\d+)\.1\.fn\.net\.0": r"trunk.transformer.blocks.\1.mlp.fc1",
    r"transformer\.layers\.(\d+)\.1\.fn\.net\.2": r"trunk.transformer.blocks.\1.mlp.fc2",
    # The last normalisation has been a part of the transformer, and later one of encoder and decoder.
    r"coder\.(?:transformer\.)?norm\b": "coder.trunk.transformer.norm_out",
    r"to_patch_embedding\.0": "patch_embedding",
    r"to_pixel\.(?:1|conv_out)": "to_patch",
    r"^pre_quant": "to_codes",
    r"^post_quant": "from_codes",
    r"^quantizer\.embedding\.weight": "quantizer.table",
}
# Of every published model, whatever its width.
HEAD_DIM = 64


def convert(checkpoint: Checkpoint) -> Tokenizer:
    """The closest direction, or with option ``unit_norm=false`` the nearest code; images in [0, 1] inside.

    Further options: ``head_dim`` (64), and ``num_quantizers`` (1), the depth of residual codes of one codebook.
    """
    checkpoint.drop(*LOSSES)
    head_dim = checkpoint.option("head_dim", HEAD_DIM)
    _, channels, patch_size, _ = checkpoint.shape("encoder.to_patch_embedding.0.weight")
    side = square_root(checkpoint.shape("encoder.en_pos_embedding")[1], "positions")
    shared: dict[str, Any] = {
        "channels": channels,
        "patch_size": patch_size,
        "image_size": side * patch_size,
        "head_dim": head_dim,
        "activation": "tanh",
        "qkv_bias": False,
        "pre_norm": False,
    }
    encoder = ViTEncoder(**shared, **_sizes(checkpoint, "encoder", "en", head_dim))
    decoder = ViTDecoder(**shared, **_sizes(checkpoint, "decoder", "de", head_dim), head_width=None)
    for name in [name for name in checkpoint.tensors if name.endswith("0.fn.to_qkv.weight")]:
        out = name.replace("to_qkv.weight", "to_out")
        if f"{out}.weight" not in checkpoint:  # one head as wide as the tokens has no layer there
            width = checkpoint.shape(name)[1]
            checkpoint.tensors |= {f"{out}.weight": torch.eye(width), f"{out}.bias": torch.zeros(width)}
    values = take_renamed(checkpoint, NAMES)
    for part in ("encoder", "decoder"):
        values[f"{part}.trunk.space_positions.table"] = values[f"{part}.trunk.space_positions.table"][0]
    values["encoder.patch_embedding.weight"] = values["encoder.patch_embedding.weight"].flatten(1)
    # A transposed convolution has the features first, and a bias for each channel of an image.
    values["decoder.to_patch.weight"] = values["decoder.to_patch.weight"].flatten(1).T
    values["decoder.to_patch.bias"] = values["decoder.to_patch.bias"].repeat_interleave(patch_size**2)
    from_unit_range(values, "encoder.patch_embedding.weight", "encoder.patch_embedding.bias")
    to_signed_range(values, "decoder.to_patch.weight", "decoder.to_patch.bias")
    distance = "cosine" if checkpoint.option("unit_norm", True) else "euclidean"
    quantizer: Quantizer = codebook(values["quantizer.table"], distance=distance)
    depth = checkpoint.option("num_quantizers", 1)
    if depth > 1:
        quantizer = ResidualQuantizer(quantizer, depth, shared=True)
        values["quantizer.quantizers.0.table"] = values.pop("quantizer.table")
    prepared = preprocessing(checkpoint, filter="bilinear", range=(0, 1), size=side * patch_size)
    return fill(Tokenizer(encoder, quantizer, decoder, preprocessing=prepared), values)


def _sizes(checkpoint: Checkpoint, part: str, prefix: str, head_dim: int) -> dict[str, Any]:
    width = checkpoint.shape(f"{part}.{prefix}_pos_embedding")[2]
    layers = f"{part}.transformer.layers."
    channels = checkpoint.shape(f"{layers}0.0.fn.to_qkv.weight")[0] // 3
    if channels % head_dim:
        raise ValueError(
            f"self-attention has {channels} channels, no heads of {head_dim}: pass theirs as option head_dim"
        )
    return {
        "width": width,
        "depth": checkpoint.count(layers + "{}.0.norm.weight"),
        "num_heads": channels // head_dim,
        "mlp_ratio": checkpoint.shape(f"{layers}0.1.fn.net.0.weight")[0] / width,
    }


FAMILY = Family(
    name="vitvqgan",
    title="ViT-VQGAN, https://github.com/thuanz123/enhancing-transformers",
    marks=("encoder.en_pos_embedding", "decoder.de_pos_embedding", "pre_quant.weight", "quantizer.embedding.weight"),
    convert=convert,
    published=tuple(Published(name, f"thuanz123/vitvqgan-imagenet-{name}") for name in ("base", "small")),
)
