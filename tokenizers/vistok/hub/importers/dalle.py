"""The discrete VAE of DALL-E, which is published as two pickled modules.

A. Ramesh et al.: Zero-Shot Text-to-Image Generation, https://arxiv.org/abs/2102.12092;
https://github.com/openai/DALL-E.
"""

import re
from typing import Any

import torch
from torch import Tensor

from vistok.decoder import DVAEDecoder
from vistok.encoder import DVAEEncoder
from vistok.hub.importers.base import Checkpoint, Family, Published, codebook, fill, preprocessing
from vistok.tokenizer import Tokenizer

PARTS = {"enc.": "encoder.", "dec.": "decoder."}


def convert(checkpoint: Checkpoint) -> Tokenizer:
    """The best score of the encoder's last layer, without noise; images in [0, 1] inside.

    A code is a column of the decoder's first layer.
    """
    for name in list(checkpoint.tensors):
        checkpoint.tensors[PARTS.get(name[:4], name[:4]) + name[4:]] = checkpoint.tensors.pop(name)
    for part in PARTS.values():
        if not any(name.startswith(part) for name in checkpoint.tensors):
            raise ValueError(
                f"the checkpoint has no {part[:-1]}: put encoder.pkl and decoder.pkl into a folder, and pass it"
            )
    width, channels = checkpoint.shape("encoder.blocks.input.w")[:2]
    sizes = {part: _sizes(checkpoint, part) for part in ("encoder", "decoder")}
    encoder = DVAEEncoder(channels, width, **sizes["encoder"])
    table = checkpoint.take("decoder.blocks.input.w").flatten(1).T
    dim, stem_width = encoder.dim, table.shape[1]
    if stem_width > dim:
        raise ValueError(f"the first layer of the decoder has {stem_width} channels, more than the features, {dim}")
    width = checkpoint.shape("decoder.blocks.output.conv.w")[1]
    decoder = DVAEDecoder(channels, width, **sizes["decoder"], stem_width=stem_width, z_channels=dim)
    # The scores need all channels of the features, and the codes have fewer: they come first, and zeros after them.
    padding = torch.eye(dim, stem_width)
    values: dict[str, Tensor] = {
        "quantizer.table": table,
        "quantizer.projection.weight": padding,
        "quantizer.scores.weight": checkpoint.take("encoder.blocks.output.conv.w").flatten(1),
        "quantizer.scores.bias": checkpoint.take("encoder.blocks.output.conv.b"),
        "encoder.conv_in.weight": checkpoint.take("encoder.blocks.input.w"),
        "encoder.conv_in.bias": checkpoint.take("encoder.blocks.input.b"),
        "decoder.conv_in.weight": padding.T,
        "decoder.conv_in.bias": checkpoint.take("decoder.blocks.input.b"),
        # The other half are the scales of the distributions of pixels.
        "decoder.conv_out.weight": checkpoint.take("decoder.blocks.output.conv.w")[:channels],
        "decoder.conv_out.bias": checkpoint.take("decoder.blocks.output.conv.b")[:channels],
    }
    for name in list(checkpoint.tensors):
        found = re.fullmatch(
            r"(\w+coder)\.blocks\.group_(\d+)\.block_(\d+)\.(?:res_path\.conv_(\d)|id_path)\.(w|b)", name
        )
        if not found:
            continue
        part, group, block, conv, parameter = found.groups()
        # A layer that changes the resolution precedes every group but the first.
        number = (int(group) - 1) * (sizes[part]["num_blocks"] + 1) + int(block) - 1
        layer = f"convs.{int(conv) - 1}" if conv else "shortcut"
        ours = f"{part}.blocks.{number}.{layer}.{'weight' if parameter == 'w' else 'bias'}"
        values[ours] = checkpoint.take(name)
    quantizer = codebook(
        table.new_empty(len(table), dim),
        projection="linear",
        projection_bias=False,
        table_dim=stem_width,
        distance="linear",
        assignment="gumbel",
        gradient="soft",
    )
    prepared = preprocessing(checkpoint, filter="lanczos", range=(0, 1))
    return fill(Tokenizer(encoder, quantizer, decoder, projection="none", preprocessing=prepared), values)


def _sizes(checkpoint: Checkpoint, part: str) -> dict[str, Any]:
    """How many levels a part has, and how many blocks each of them."""
    groups = [re.match(rf"{part}\.blocks\.group_(\d+)\.block_(\d+)\.", name) for name in checkpoint.tensors]
    numbers = [(int(found[1]), int(found[2])) for found in groups if found]
    if not numbers:
        raise ValueError(f"the {part} has no blocks")
    return {"num_levels": max(group for group, _ in numbers), "num_blocks": max(block for _, block in numbers)}


FAMILY = Family(
    name="dalle",
    title="Discrete VAE of DALL-E, https://github.com/openai/DALL-E",
    marks=("enc*.blocks.input.w", "dec*.blocks.input.w"),
    convert=convert,
    published=(Published("dvae", "https://cdn.openai.com/dall-e", "encoder.pkl and decoder.pkl", 97.6),),
)
