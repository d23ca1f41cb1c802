"""BSQ-ViT: a transformer over patches, and signs of normalised features as bits.

Y. Zhao, Y. Xiong, P. Kraehenbuehl: Image and Video Tokenization with Binary Spherical Quantization,
https://arxiv.org/abs/2406.07548; https://github.com/zhaoyue-zephyrus/bsq-vit.
"""

from typing import Any

from vistok.decoder import ViTDecoder
from vistok.encoder import ViTEncoder
from vistok.hub.importers.base import Checkpoint, Family, Published, fill, preprocessing, square_root
from vistok.hub.importers.transformer import CLIP_NAMES, head_count, take_renamed
from vistok.quantizer import BSQ
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

    Options: ``num_heads``, and ``index_bits`` (bits of an index).
    """
    side = square_root(checkpoint.shape("encoder.positional_embedding")[0], "positions")
    patch_size = square_root(checkpoint.shape("encoder.conv1.weight")[1] // 3, "pixels of a patch")
    bits = checkpoint.shape("quant_embed.weight")[0]
    group = len(checkpoint.take("quantize.group_basis")) if "quantize.group_basis" in checkpoint else bits
    checkpoint.drop("quantize.*", "loss.*")
    shared: dict[str, Any] = {"patch_size": patch_size, "image_size": side * patch_size}
    encoder = ViTEncoder(**shared, **_sizes(checkpoint, "encoder"))
    decoder = ViTDecoder(
        **shared,
        **_sizes(checkpoint, "decoder"),
        head_width=checkpoint.shape("decoder.ffn.0.weight")[0] if "decoder.ffn.0.weight" in checkpoint else None,
    )
    index_bits = checkpoint.option("index_bits", bits if bits <= MAX_INDEX_BITS else group)
    prepared = preprocessing(checkpoint, filter="lanczos", size=side * patch_size)
    tokenizer = Tokenizer(encoder, BSQ(bits, index_bits=index_bits), decoder, preprocessing=prepared)
    return fill(tokenizer, take_renamed(checkpoint, NAMES))


def _sizes(checkpoint: Checkpoint, part: str) -> dict[str, Any]:
    width = checkpoint.shape(f"{part}.positional_embedding")[1]
    return {
        "width": width,
        "depth": checkpoint.count(part + ".transformer.resblocks.{}.ln_1.weight"),
        "num_heads": head_count(checkpoint, width),
        "mlp_ratio": checkpoint.shape(f"{part}.transformer.resblocks.0.mlp.c_fc.weight")[0] / width,
    }


FAMILY = Family(
    name="bsqvit",
    title="BSQ-ViT, https://github.com/zhaoyue-zephyrus/bsq-vit",
    marks=("encoder.transformer.resblocks.0.ln_1.weight", "quant_embed.weight", "post_quant_embed.weight"),
    convert=convert,
    published=(
        Published("18bit", "https://github.com/zhaoyue-zephyrus/bsq-vit", None, 174.8, "MIT"),
        Published("36bit", "https://github.com/zhaoyue-zephyrus/bsq-vit", None, 174.8, "MIT"),
    ),
)
