"""Cosmos tokenizers for images, which are published as TorchScript.

NVIDIA: Cosmos World Foundation Model Platform for Physical AI, https://arxiv.org/abs/2501.03575, section 4;
https://github.com/NVIDIA/Cosmos-Tokenizer.
"""

import re
from typing import Any

import torch
from torch import Tensor

from vistok.decoder import CosmosDecoder
from vistok.encoder import CosmosEncoder
from vistok.hub.importers.base import Checkpoint, Family, Published, codebook, fill, square_root
from vistok.hub.importers.convolutional import keep_mean
from vistok.hub.importers.trunk import Dialect, Trunk, describe, take_projections, take_trunk
from vistok.quantizer import FSQ, Identity, Quantizer, ResidualQuantizer
from vistok.tokenizer import Tokenizer

LEVELS = (8, 8, 8, 5, 5, 5)


def convert(checkpoint: Checkpoint) -> Tokenizer:
    """Finite scalars, a codebook, or continuous codes. The archives hold bfloat16; here everything is float32.

    TorchScript also holds the levels of the scalars and the wavelets of the patches. For other files there are the
    options ``levels`` (without it six channels are those of the published models; an empty list for continuous codes)
    and ``patching`` (``haar`` or ``fold``), and for residual scalars ``num_quantizers``.
    """
    patching = checkpoint.option("patching", _patching(checkpoint))
    quantizer, state = _quantizer(checkpoint)
    trunks = [describe(checkpoint, Dialect(), prefix) for prefix in ("encoder.", "decoder.")]
    base = trunks[0].entry_width
    encoder = CosmosEncoder(**_arguments(trunks[0], base, patching))
    decoder = CosmosDecoder(**_arguments(trunks[1], base, patching))
    # Pictures of any size, in the middle of zeros up to multiples of 16 pixels.
    prepared = {"size": checkpoint.size(256), "channels": encoder.channels, "resize": "none", "crop": "none"}
    prepared["range"] = [-1, 1]
    values = state | take_projections(checkpoint)
    for part, trunk, name in zip((encoder, decoder), trunks, ("encoder.", "decoder."), strict=True):
        values |= take_trunk(checkpoint, part, Dialect(), trunk, name, name)
    return fill(Tokenizer(encoder, quantizer, decoder, preprocessing=prepared), values)


def _patching(checkpoint: Checkpoint) -> str:
    """What the constants of the patches tell; the wavelets of the published models if there are none."""
    found = [checkpoint.take(name) for name in list(checkpoint.tensors) if name.endswith("patcher.wavelets")]
    checkpoint.drop("*patcher.*")
    return "fold" if found and torch.equal(found[0], torch.ones(2)) else "haar"


def _quantizer(checkpoint: Checkpoint) -> tuple[Quantizer, dict[str, Tensor]]:
    """The quantizer, and its tensors by our names."""
    if "quantizer.embedding.weight" in checkpoint:
        table = checkpoint.take("quantizer.embedding.weight")
        return codebook(table), {"quantizer.table": table}
    stages = {match[1] for name in checkpoint.tensors if (match := re.search(r"quantizer\.layers\.(\d+)\.", name))}
    constants = [name for name in checkpoint.tensors if re.search(r"quantizer\.(layers\.\d+\.)?_levels$", name)]
    stored = [checkpoint.take(name) for name in constants]
    checkpoint.drop("*quantizer*._basis", "*quantizer*.implicit_codebook")
    dim, z_channels = checkpoint.shape("quant_conv.weight")[:2]
    published = dim == len(LEVELS) and dim != z_channels
    known = stored[0].tolist() if stored else LEVELS if published else None
    variance = checkpoint.shape("post_quant_conv.weight")[1] * 2 == dim
    levels = checkpoint.option("levels", () if variance else known)
    if levels:
        if len(levels) != dim:
            raise ValueError(f"levels={list(levels)} are of {len(levels)} channels, but the codes have {dim}")
        stage = FSQ([int(level) for level in levels], form="atanh")
        depth = checkpoint.option("num_quantizers", len(stages))
        return (ResidualQuantizer(stage, depth, scaled=False) if depth else stage), {}
    if variance:
        return keep_mean(checkpoint), {}
    # Continuous models have as many channels before the convolution as behind it; of six both are possible.
    if levels is None and (dim != z_channels or dim == len(LEVELS)):
        raise ValueError(
            f"its tensors do not tell whether the {dim} channels are finite scalars: pass their numbers of levels as "
            "option levels, or an empty list if they are continuous"
        )
    return Identity(dim), {}


def _arguments(trunk: Trunk, base: int, patching: str) -> dict[str, Any]:
    # Images of three channels, or of one.
    channels = 3 if trunk.channels % 3 == 0 else 1
    patch_size = square_root(trunk.channels // channels, "pixels of a patch")
    return {
        "channels": channels,
        "patch_size": patch_size,
        "patching": patching if patch_size > 1 else "none",
        "factor": patch_size << trunk.resizes,
        **trunk.multipliers(base),
        "num_blocks": trunk.num_blocks,
        **trunk.where_attention_is("image_size", patch_size),
        "z_channels": trunk.z_channels,
    }


FAMILY = Family(
    name="cosmos",
    title="Cosmos tokenizers for images, https://github.com/NVIDIA/Cosmos-Tokenizer",
    marks=("encoder.down.0.block.0.conv1.weight", "encoder.mid.block_1.conv1.weight", "quant_conv.weight"),
    convert=convert,
    published=tuple(
        Published(
            f"{kind}{factor}x{factor}",
            f"nvidia/Cosmos-0.1-Tokenizer-{kind.upper()}{factor}x{factor}",
            "autoencoder.jit",
            millions,
            "NVIDIA Open Model License",
            {"levels": ()} if kind == "ci" else {},
        )
        for kind, factor, millions in (("di", 8, 79.0), ("di", 16, 83.7), ("ci", 8, 76.8), ("ci", 16, 81.5))
    ),
)
