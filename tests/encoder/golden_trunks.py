"""Outputs of original programs, and the names of our trunks in their weights."""

from typing import NamedTuple

import torch

from vistok.layers import AttentionBlock, ResidualBlock

RENAMED = {"shortcut": "nin_shortcut", "projection": "proj_out"}


class Names(NamedTuple):
    """How an original program names the parts of a trunk."""

    finer: str = "up.{}"  # levels of the decoder
    coarser: str = "down.{}"  # levels of the encoder
    residual: str = "block.{}"
    attention: str = "attn.{}"
    upsample: str = "upsample.conv"
    downsample: str = "downsample.conv"
    middle: tuple[str, ...] = ("mid.block_1", "mid.attn_1", "mid.block_2")
    in_order: bool = False  # levels of the decoder are numbered as they are run, not from the finest


TAMING = Names()
LLAMAGEN = Names("conv_blocks.{}", "conv_blocks.{}", "res.{}", middle=("mid.0", "mid.1", "mid.2"), in_order=True)
MASKGIT = Names(upsample="upsample_conv", middle=("mid.0",))
MASKBIT = Names(
    residual="res_blocks.{}",
    upsample="upsample_conv",
    downsample="down_conv",
    middle=("mid.res_blocks.0",),
    in_order=True,
)


def original_names(blocks, names, decoder):
    """The original name of every block of a trunk."""
    count = len(names.middle)
    levels = blocks[count:] if decoder else blocks[:-count]
    resized = sum(not isinstance(block, ResidualBlock | AttentionBlock) for block in levels)
    ascending = names.in_order or not decoder
    level, step = (0, 1) if ascending else (resized, -1)
    found, seen = [], {ResidualBlock: 0, AttentionBlock: 0}
    for block in levels:
        prefix = (names.finer if decoder else names.coarser).format(level)
        kind = next((kind for kind in seen if isinstance(block, kind)), None)
        if kind is None:
            found.append(f"{prefix}.{names.upsample if decoder else names.downsample}")
            level, seen = level + step, dict.fromkeys(seen, 0)
        else:
            found.append(
                f"{prefix}.{(names.residual if kind is ResidualBlock else names.attention).format(seen[kind])}"
            )
            seen[kind] += 1
    return [*names.middle, *found] if decoder else [*found, *names.middle]


def load_trunk(part, weights, names, prefix):
    """Load all of an original program's ``encoder.*`` or ``decoder.*`` weights into our part."""
    theirs = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    blocks = original_names(list(part.blocks), names, prefix == "decoder.")
    ours = {}
    for key in part.state_dict():
        if not key.startswith("blocks."):
            ours[key] = theirs.pop(key)
            continue
        _, number, leaf = key.split(".", 2)
        block, (module, parameter) = blocks[int(number)], leaf.rsplit(".", 1)
        if module == "conv":  # of a layer that changes the resolution
            ours[key] = theirs.pop(f"{block}.{parameter}")
        elif module == "qkv" and f"{block}.q.{parameter}" in theirs:
            ours[key] = torch.cat([theirs.pop(f"{block}.{each}.{parameter}") for each in "qkv"])
        else:
            ours[key] = theirs.pop(f"{block}.{RENAMED.get(module, module)}.{parameter}")
    assert not theirs
    part.load_state_dict(ours)


def load_projections(tokenizer, weights):
    """Load the 1x1 convolutions around the quantizer."""
    for ours, theirs in ((tokenizer.to_codes, "quant_conv"), (tokenizer.from_codes, "post_quant_conv")):
        ours.load_state_dict({"weight": weights[f"{theirs}.weight"].flatten(1), "bias": weights[f"{theirs}.bias"]})
