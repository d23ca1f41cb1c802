"""The tokenizer of Emu3, by the names of its authors or of transformers.

X. Wang et al.: Emu3: Next-Token Prediction is All You Need, https://arxiv.org/abs/2409.18869;
https://github.com/baaivision/Emu3.
"""

import re
from typing import Any

from torch import Tensor

from vistok.decoder import Emu3Decoder
from vistok.encoder import Emu3Encoder
from vistok.hub.checkpoint import entries
from vistok.hub.importers.base import Checkpoint, Family, Published, codebook, fill, preprocessing
from vistok.hub.importers.movq import MOVQ
from vistok.hub.importers.trunk import Trunk, describe, take_trunk
from vistok.tokenizer import Tokenizer

# Names in transformers, and those of the authors.
TRANSFORMERS = {
    r"\bmiddle_block\.attn_norm\.": "mid.attn_1.norm.",
    r"\bmiddle_block\.": "mid.",
    r"\b(?:down|up)_block\.": "",
    r"\battn_norms\.(\d+)\.": r"attn.\1.norm.",
    r"\b([qkv])_proj\b": r"\1",
    r"\bout_proj\b": "proj_out",
}


def convert(checkpoint: Checkpoint) -> Tokenizer:
    """The nearest code, of images. Kernels over time are reduced to what an image sees of them."""
    config = entries(checkpoint.config.get("vq_config")) or checkpoint.config
    heads = config.get("num_attention_heads", 1)
    if heads != 1:
        raise ValueError(f"config.json has num_attention_heads={heads}, only 1 is supported")
    for name in list(checkpoint.tensors):
        renamed = name
        for pattern, replacement in TRANSFORMERS.items():
            renamed = re.sub(pattern, replacement, renamed)
        checkpoint.tensors[renamed] = checkpoint.tensors.pop(name)
    values: dict[str, Tensor] = {}
    for ours, theirs in (("to_codes", "quant_conv.conv"), ("from_codes", "post_quant_conv.conv")):
        # Before the first frame there are zeros.
        values[f"{ours}.weight"] = checkpoint.take(f"{theirs}.weight")[:, :, -1]
        values[f"{ours}.bias"] = checkpoint.take(f"{theirs}.bias")
    trunks = [describe(checkpoint, MOVQ, prefix) for prefix in ("encoder.", "decoder.")]
    encoder = Emu3Encoder(**_sizes(checkpoint, trunks[0], "encoder"))
    decoder = Emu3Decoder(**_sizes(checkpoint, trunks[1], "decoder"))
    values["quantizer.table"] = checkpoint.take("quantize.embedding.weight")
    for part in ("encoder", "decoder"):
        values |= _layers_over_time(checkpoint, part)
    prepared = preprocessing(checkpoint, filter="bicubic", size=512)
    tokenizer = Tokenizer(encoder, codebook(values["quantizer.table"]), decoder, preprocessing=prepared)
    for part, trunk, name in zip((encoder, decoder), trunks, ("encoder.", "decoder."), strict=True):
        values |= take_trunk(checkpoint, part, MOVQ, trunk, name, name, taken=tuple(values))
    return fill(tokenizer, values)


def _sizes(checkpoint: Checkpoint, trunk: Trunk, part: str) -> dict[str, Any]:
    return {
        **trunk.sizes(stem=part == "encoder"),
        **trunk.where_attention_is(),
        "frames": 2 ** checkpoint.count(part + ".time_conv.{}.conv.conv.weight"),
        "time_blocks": checkpoint.count(part + ".time_res_stack.{}.conv1.conv.weight"),
    }


def _layers_over_time(checkpoint: Checkpoint, part: str) -> dict[str, Tensor]:
    values = {}
    for name in [name for name in checkpoint.tensors if name.startswith(f"{part}.time_")]:
        ours = re.sub(r"\.conv\.(weight|bias)$", r".\1", name.replace("time_res_stack", "time_blocks"))
        ours = re.sub(r"time_conv\.(\d+)\.conv", r"time_convs.\1", ours)
        value = checkpoint.take(name)
        if value.ndim == 5 and value.shape[2] == 4:
            value = value.transpose(1, 2).flatten(1, 2)  # all four frames, one after another on the channel axis
        elif value.ndim == 5:
            value = value[:, :, -1]
        values[ours] = value
    return values


FAMILY = Family(
    name="emu3",
    title="Emu3, https://github.com/baaivision/Emu3",
    marks=("encoder.time_conv.*", "decoder.time_conv.*", "quantize.embedding.weight"),
    convert=convert,
    published=(Published("vision-tokenizer", "BAAI/Emu3-VisionTokenizer", None, 270.7),),
)
