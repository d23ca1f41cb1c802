"""Convolutional trunks: one architecture whose parts every program calls something else.

The dialects are those of the table in ``docs/pretrained.md``. What a trunk is made of (levels, widths, blocks, where
there is attention) is read from the names and shapes of its tensors.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vistok.hub.importers.base import Checkpoint
from vistok.layers import AttentionBlock, ResidualBlock
from vistok.layers.modulation import CodeNorm


@dataclass(frozen=True)
class Dialect:
    """How a program names the parts of a trunk.

    Attributes:
        down: Level of the encoder, numbered from the finest.
        up: Level of the decoder.
        residual: Residual block of a level.
        attention: Self-attention of a level.
        downsample: Layer of a level that halves the grid.
        upsample: Layer of a level that doubles the grid.
        entry: Layer that a level of the decoder begins with.
        middle: Blocks in the middle in the order in which they run, or a template of residual blocks.
        coarsest_first: Whether levels of the decoder are numbered as they run, not from the finest.
        qkv: Layers of self-attention that make queries, keys and values.
        out: Last convolution.
        leaves: Regular expressions of our names of layers, and what becomes of them.
    """

    down: str = "down.{}"
    up: str = "up.{}"
    residual: str = "block.{}"
    attention: str = "attn.{}"
    downsample: str = "downsample.conv"
    upsample: str = "upsample.conv"
    entry: str = ""
    middle: str | tuple[str, str, str] = ("mid.block_1", "mid.attn_1", "mid.block_2")
    coarsest_first: bool = False
    qkv: tuple[str, str, str] = ("q", "k", "v")
    out: str = "conv_out"
    leaves: tuple[tuple[str, str], ...] = ((r"\bshortcut\b", "nin_shortcut"), (r"\bprojection\b", "proj_out"))

    def level(self, decoder: bool, number: int, count: int) -> str:
        """Name of a level, numbered from the finest."""
        if not decoder:
            return self.down.format(number)
        return self.up.format(count - 1 - number if self.coarsest_first else number)


@dataclass(frozen=True)
class Trunk:
    """What the tensors of an encoder or a decoder tell.

    Attributes:
        channels: Of an image.
        entry_width: Channels that the first convolution of an encoder, or before the last one of a decoder, has.
        widths: Channels of each level, finest first.
        num_blocks: Residual blocks of each level.
        attention: Levels with self-attention.
        middle: Names of the blocks in the middle.
        middle_attention: Whether one of them is self-attention.
        z_channels: Channels of the features.
        resizes: How many levels change the resolution.
    """

    channels: int
    entry_width: int
    widths: tuple[int, ...]
    num_blocks: int
    attention: tuple[int, ...]
    middle: tuple[str, ...]
    middle_attention: bool
    z_channels: int
    resizes: int

    def sizes(self, stem: bool = False) -> dict[str, Any]:
        """Arguments that all convolutional encoders and decoders share; `stem`: also ``stem_channels`` of encoders."""
        other_entry = self.entry_width != self.widths[0]
        if other_entry and not stem:
            raise ValueError(f"the first level has {self.widths[0]} channels, but begins with {self.entry_width}")
        return {
            "channels": self.channels,
            **self.multipliers(math.gcd(*self.widths)),
            "num_blocks": self.num_blocks,
            "z_channels": self.z_channels,
            **({"stem_channels": self.entry_width} if other_entry else {}),
        }

    def multipliers(self, base: int) -> dict[str, Any]:
        """Channels of the levels, in units of `base`, or of 32 where they are no multiples of it."""
        base = base if all(width % base == 0 for width in self.widths) else 32
        if any(width % base for width in self.widths):
            raise ValueError(f"channels must be multiples of 32 for group normalisation, got {list(self.widths)}")
        return {"base_channels": base, "channel_multipliers": [width // base for width in self.widths]}

    def where_attention_is(self, resolution_name: str = "resolution", patch_size: int = 1) -> dict[str, Any]:
        """Argument ``attention``, and the one that says of which images a list of grids is."""
        if not self.middle_attention:
            if self.attention:
                raise ValueError("there is self-attention in levels, but none in the middle")
            return {"attention": "none"}
        if self.attention in ((), (len(self.widths) - 1,)):
            return {"attention": "last" if self.attention else "middle"}
        # Names the levels; the grids are those of the images that the list is stated for.
        resolution = 2 ** max(8, len(self.widths))
        grids = [resolution >> level for level in self.attention]
        return {"attention": grids, resolution_name: resolution * patch_size}

    def cnn(self, stem: bool = False) -> dict[str, Any]:
        """Arguments of `vistok.encoder.CNNEncoder` (with `stem`) and `vistok.decoder.CNNDecoder`."""
        count = len(self.widths)
        if self.resizes not in (0, count - 1):
            raise ValueError(f"{self.resizes} of {count} levels have a layer that changes the resolution, expected all")
        if self.attention and not self.middle_attention:
            attention = dataclasses.replace(self, middle_attention=True).where_attention_is()
            attention["middle_attention"] = False
        else:
            attention = self.where_attention_is()
        return {
            "patch_size": 1,
            **self.sizes(stem),
            **attention,
            "middle": bool(self.middle),
            "resample_with_conv": self.resizes == count - 1,
        }


def describe(checkpoint: Checkpoint, dialect: Dialect, prefix: str) -> Trunk:
    """Read what a trunk is made of from its tensors; `prefix` is ``encoder.`` or ``decoder.`` with what precedes it."""
    decoder = prefix.endswith("decoder.")
    if not any(name.startswith(prefix) for name in checkpoint.tensors):
        raise ValueError(
            f"the checkpoint has no {prefix[:-1]}, like those of transformers' Chameleon, which only encodes: take the "
            "file of the original program"
        )
    if any(re.search(r"\.attn(_1|\.\d+)\.to_qkv\.", name) for name in checkpoint.tensors):
        raise ValueError("its self-attention is linear (attn_type=linear): only vanilla and none are supported")
    template = prefix + (dialect.up if decoder else dialect.down)
    count = checkpoint.count(f"{template}.{dialect.residual.format(0)}.conv1.weight")
    if not count:
        raise ValueError(f"the checkpoint has no blocks {template}.{dialect.residual}: it is of another family")
    levels = [prefix + dialect.level(decoder, number, count) for number in range(count)]
    blocks = [checkpoint.count(f"{level}.{dialect.residual}.conv1.weight") for level in levels]
    if len(set(blocks)) > 1:
        raise ValueError(f"the levels of {prefix[:-1]} have different numbers of blocks, {blocks}")
    key, query = f".{dialect.attention}", dialect.qkv[0]
    attention = [
        number
        for number, level in enumerate(levels)
        if any(f"{level}{key.format(0)}.{each}.weight" in checkpoint for each in (query, "qkv"))
    ]
    if isinstance(dialect.middle, str):
        count_middle = checkpoint.count(f"{prefix}{dialect.middle}.conv1.weight")
        middle, has_attention = tuple(dialect.middle.format(number) for number in range(count_middle)), False
    else:
        first, second, third = dialect.middle
        has_attention = any(f"{prefix}{second}.{each}.weight" in checkpoint for each in (query, "qkv"))
        has_middle = f"{prefix}{first}.conv1.weight" in checkpoint
        middle = ((first, second, third) if has_attention else (first, third)) if has_middle else ()
    layer = dialect.upsample if decoder else dialect.downsample
    inside, outside = checkpoint.shape(f"{prefix}conv_in.weight"), checkpoint.shape(f"{prefix}{dialect.out}.weight")
    return Trunk(
        channels=outside[0] if decoder else inside[1],
        entry_width=outside[1] if decoder else inside[0],
        widths=tuple(
            checkpoint.shape(f"{level}.{dialect.residual.format(blocks[0] - 1)}.conv2.weight")[0] for level in levels
        ),
        num_blocks=blocks[0],
        attention=tuple(attention),
        middle=middle,
        middle_attention=has_attention,
        z_channels=inside[1] if decoder else outside[0],
        resizes=sum(f"{level}.{layer}.weight" in checkpoint for level in levels),
    )


def take_trunk(
    checkpoint: Checkpoint,
    part: nn.Module,
    dialect: Dialect,
    trunk: Trunk,
    prefix: str,
    ours: str,
    taken: Collection[str] = (),
) -> dict[str, Tensor]:
    """Tensors of a trunk by our names.

    Args:
        checkpoint: They are taken from it.
        part: Encoder or decoder that they are for.
        dialect: Names of the program.
        trunk: Description of the trunk.
        prefix: What their names begin with there, ``encoder.`` or ``decoder.`` last.
        ours: What our names begin with.
        taken: Our names of tensors of the part that are not of the trunk, and taken already.
    """
    assert isinstance(part.blocks, nn.Sequential)
    names = _block_names(list(part.blocks), dialect, trunk, prefix.endswith("decoder."))
    values = {}
    for key in part.state_dict():
        if ours + key in taken:
            continue
        block, leaf = "", key
        if key.startswith("blocks."):
            _, number, leaf = key.split(".", 2)
            block = names[int(number)]
        layer, _, parameter = leaf.rpartition(".")
        module = part.blocks[int(number)] if block else None  # pyright: ignore
        if module is not None and not isinstance(module, ResidualBlock | AttentionBlock | CodeNorm):
            values[ours + key] = checkpoint.take(f"{prefix}{block}.{parameter}")  # of a layer that changes the grid
        elif layer == "qkv" and f"{prefix}{block}.qkv.{parameter}" not in checkpoint:
            values[ours + key] = torch.cat(
                [checkpoint.take(f"{prefix}{block}.{each}.{parameter}") for each in dialect.qkv]
            )
        else:
            for pattern, replacement in dialect.leaves:
                layer = re.sub(pattern, replacement, layer)
            values[ours + key] = checkpoint.take(prefix + ".".join(filter(None, (block, layer, parameter))))
    return values


def _block_names(blocks: Sequence[nn.Module], dialect: Dialect, trunk: Trunk, decoder: bool) -> list[str]:
    """The original name of every block of a trunk, in the order in which ours run."""
    count = len(trunk.middle)
    levels = blocks[count:] if decoder else blocks[: len(blocks) - count]
    last = len(trunk.widths) - 1
    level, step = (last, -1) if decoder else (0, 1)
    found: list[str] = []
    residuals = attentions = 0
    for block in levels:
        name = dialect.level(decoder, level, last + 1)
        if isinstance(block, ResidualBlock):
            found.append(f"{name}.{dialect.residual.format(residuals)}")
            residuals += 1
        elif isinstance(block, AttentionBlock):
            found.append(f"{name}.{dialect.attention.format(attentions)}")
            attentions += 1
        elif isinstance(block, CodeNorm):
            found.append(dialect.entry.format(level))
        else:
            found.append(f"{name}.{dialect.upsample if decoder else dialect.downsample}")
            level, residuals, attentions = level + step, 0, 0
    return [*trunk.middle, *found] if decoder else [*found, *trunk.middle]


def take_projections(
    checkpoint: Checkpoint, before: str = "quant_conv", after: str = "post_quant_conv"
) -> dict[str, Tensor]:
    """Weights and biases of the two convolutions around the quantizer, by our names."""
    return {
        f"{ours}.{parameter}": checkpoint.take(f"{theirs}.{parameter}")
        for ours, theirs in (("to_codes", before), ("from_codes", after))
        for parameter in ("weight", "bias")
    }
