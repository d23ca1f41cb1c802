"""What importers of transformers share: names of blocks in the manner of CLIP, and folding of value ranges."""

import re
from collections.abc import Mapping

from torch import Tensor

from vistok.hub.importers.base import Checkpoint

# Regular expressions of names in programs that build on CLIP's transformer, and ours.
CLIP_NAMES = {
    r"transformer\.(?:resblocks\.)?(\d+)\.": r"trunk.transformer.blocks.\1.",
    r"ln_(\d)\.": r"norm\1.",
    r"attn\.in_proj_": "attention.qkv.",
    r"attn\.out_proj": "attention.projection",
    r"mlp\.c_fc": "mlp.fc1",
    r"mlp\.c_proj": "mlp.fc2",
    r"ln_pre": "trunk.transformer.norm_in",
    r"ln_post": "trunk.transformer.norm_out",
}


def take_renamed(checkpoint: Checkpoint, names: Mapping[str, str], prefix: str = "") -> dict[str, Tensor]:
    """All tensors whose names begin with `prefix`, with regular expressions of their names replaced in order."""
    values = {}
    for name in [name for name in checkpoint.tensors if name.startswith(prefix)]:
        ours = name
        for pattern, replacement in names.items():
            ours = re.sub(pattern, replacement, ours)
        values[ours] = checkpoint.take(name)
    return values


def head_count(checkpoint: Checkpoint, width: int, part: str) -> int:
    """Attention heads of ``encoder`` or ``decoder``, which tensors do not tell.

    They have 64 channels, as in all published models, unless option ``num_heads`` says otherwise, or
    ``num_heads_encoder`` and ``num_heads_decoder``.
    """
    # Several, also in models that are narrower than any published one.
    both = checkpoint.option("num_heads", max(2, width // 64))
    count = checkpoint.option(f"num_heads_{part}", both)
    if width % count:
        raise ValueError(
            f"the {width} channels of the {part} are not {count} heads of one width: pass theirs as option num_heads"
        )
    return count


def from_unit_range(values: dict[str, Tensor], weight: str, bias: str) -> None:
    """Let a layer that takes images in [0, 1], without padding them, take images in [-1, 1]."""
    kernel = values[weight].double()
    values[bias] = (values[bias].double() + kernel.flatten(1).sum(1) / 2).float()
    values[weight] = (kernel / 2).float()


def to_signed_range(values: dict[str, Tensor], weight: str, bias: str) -> None:
    """Let a layer that makes images in [0, 1] make images in [-1, 1]."""
    values[weight] = values[weight] * 2
    values[bias] = values[bias] * 2 - 1
