"""BSQ-ViT: a transformer over patches, and signs of normalised features as bits.

Y. Zhao, Y. Xiong, P. Kraehenbuehl: Image and Video Tokenization with Binary Spherical Quantization,
https://arxiv.org/abs/2406.07548; https://github.com/zhaoyue-zephyrus/bsq-vit.
"""

import re
from typing import Any

import torch
from torch import Tensor

from vistok.decoder import ViTDecoder
from vistok.encoder import ViTEncoder
from vistok.hub.importers.base import Checkpoint, Family, Published, codebook, fill, preprocessing, square_root
from vistok.hub.importers.transformer import CLIP_NAMES, head_count, take_renamed
from vistok.quantizer import BSQ, Quantizer
from vistok.tokenizer import Tokenizer

NAMES = {
    **CLIP_NAMES,
    r"positional_embedding": "trunk.space_positions.table",
    r"conv1\b": "patch_embedding",
    r"decoder\.ffn": "decoder.head",
    r"decoder\.conv_out": "decoder.to_patch",
    r"^quant_embed": "to_codes",
    r"^post_quant_embed": "from_codes",
}
# The original computes larger indices through float32 and loses bits: there its groups are right.
MAX_INDEX_BITS = 24


def convert(checkpoint: Checkpoint) -> Tokenizer:
    """The first channel is the most significant bit; above 24 bits an index holds a group of channels.

    Checkpoints of the same program with a codebook have the nearest code, or the closest direction. Options:
    ``num_heads``, ``index_bits`` (bits of an index), and ``unit_norm`` (codes of unit length; without it true for bits,
    and for codebooks whose rows have one length).
    """
    for part in ("encoder", "decoder"):
        if f"{part}.temporal_positional_embedding" in checkpoint:
            raise ValueError("it is a checkpoint for videos (num_frames above 1), only those for images are supported")
    side = square_root(checkpoint.shape("encoder.positional_embedding")[0], "positions")
    patch_size = square_root(checkpoint.shape("encoder.conv1.weight")[1] // 3, "pixels of a patch")
    if checkpoint.shape("decoder.conv_out.weight")[0] == 6 * patch_size**2:
        raise ValueError("its decoder makes distributions of pixels (logit_laplace=true), which is not supported")
    if "decoder.ln_post.weight" not in checkpoint:
        raise ValueError("its decoder ends without a normalisation (ln_post=false), which is not supported")
    shared: dict[str, Any] = {"patch_size": patch_size, "image_size": side * patch_size}
    encoder = ViTEncoder(**shared, **_sizes(checkpoint, "encoder"))
    decoder = ViTDecoder(
        **shared,
        **_sizes(checkpoint, "decoder"),
        head_width=checkpoint.shape("decoder.ffn.0.weight")[0] if "decoder.ffn.0.weight" in checkpoint else None,
    )
    quantizer, state = _quantizer(checkpoint)
    checkpoint.drop("loss.*")
    _fold_layer_scales(checkpoint)
    prepared = preprocessing(checkpoint, filter="lanczos", size=side * patch_size)
    tokenizer = Tokenizer(encoder, quantizer, decoder, preprocessing=prepared)
    return fill(tokenizer, take_renamed(checkpoint, NAMES) | state)


def _quantizer(checkpoint: Checkpoint) -> tuple[Quantizer, dict[str, Tensor]]:
    """The quantizer, and its tensors by our names."""
    if "quantize.embedding.weight" in checkpoint:
        table = checkpoint.take("quantize.embedding.weight")
        lengths = table.norm(dim=1)
        unit_norm = checkpoint.option("unit_norm", True if torch.allclose(lengths, lengths[0], rtol=1e-3) else None)
        if unit_norm is None:
            raise ValueError("its tensors do not tell whether codes have unit length: pass l2_norm as option unit_norm")
        return codebook(table, distance="cosine" if unit_norm else "euclidean"), {"quantizer.table": table}
    bits = checkpoint.shape("quant_embed.weight")[0]
    group = len(checkpoint.take("quantize.group_basis")) if "quantize.group_basis" in checkpoint else bits
    checkpoint.drop("quantize.*")
    if not checkpoint.option("unit_norm", True):
        # Codes of ones instead of 1 / sqrt(bits): the layer behind them scales them.
        weight = checkpoint.take("post_quant_embed.weight").double() * bits**0.5
        checkpoint.tensors["post_quant_embed.weight"] = weight.float()
    return BSQ(bits, index_bits=checkpoint.option("index_bits", bits if bits <= MAX_INDEX_BITS else group)), {}


def _fold_layer_scales(checkpoint: Checkpoint) -> None:
    """Multiply the last layer of each branch by the scales of its channels, where a model has some."""
    for name in [name for name in checkpoint.tensors if re.search(r"\.ls_[12]\.gamma$", name)]:
        scale = checkpoint.take(name)
        layer = re.sub(r"ls_1\.gamma$", "attn.out_proj", re.sub(r"ls_2\.gamma$", "mlp.c_proj", name))
        weight, bias = (checkpoint.take(f"{layer}.{parameter}") for parameter in ("weight", "bias"))
        checkpoint.tensors |= {f"{layer}.weight": weight * scale[:, None], f"{layer}.bias": bias * scale}


def _sizes(checkpoint: Checkpoint, part: str) -> dict[str, Any]:
    width = checkpoint.shape(f"{part}.positional_embedding")[1]
    return {
        "width": width,
        "depth": checkpoint.count(part + ".transformer.resblocks.{}.ln_1.weight"),
        "num_heads": head_count(checkpoint, width, part),
        "mlp_ratio": checkpoint.shape(f"{part}.transformer.resblocks.0.mlp.c_fc.weight")[0] / width,
        "pre_norm": f"{part}.ln_pre.weight" in checkpoint,
    }


FAMILY = Family(
    name="bsqvit",
    title="BSQ-ViT, https://github.com/zhaoyue-zephyrus/bsq-vit",
    marks=("encoder.transformer.resblocks.0.ln_1.weight", "quant_embed.weight", "post_quant_embed.weight"),
    convert=convert,
    # The program takes the moving averages where a file has some.
    published=tuple(
        Published(name, f"https://utexas.box.com/s/{share}", None, 174.8, "MIT", {"weights": "ema"})
        for name, share in (
            ("18bit", "k5249jg1c6iznslsl89lwqqg6woqg27o"),
            ("18bit-approx", "nt9g741b1cu4nidygd3a3e26clpemr0n"),
            ("36bit", "a7w3lw5q4dzxun3ai9uthhc3y8ade0pw"),
        )
    ),
)
