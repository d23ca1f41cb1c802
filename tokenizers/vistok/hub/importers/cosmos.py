"""Cosmos tokenizers for images, which are published as TorchScript.

NVIDIA: Cosmos World Foundation Model Platform for Physical AI, https://arxiv.org/abs/2501.03575, section 4;
https://github.com/NVIDIA/Cosmos-Tokenizer.
"""

from typing import Any

from vistok.decoder import CosmosDecoder
from vistok.encoder import CosmosEncoder
from vistok.hub.importers.base import Checkpoint, Family, Published, fill, square_root
from vistok.hub.importers.trunk import Dialect, Trunk, describe, take_projections, take_trunk
from vistok.quantizer import FSQ, Identity
from vistok.tokenizer import Tokenizer

LEVELS = (8, 8, 8, 5, 5, 5)


def convert(checkpoint: Checkpoint) -> Tokenizer:
    """Six channels are those of the published finite scalar quantizer, others are continuous without option ``levels``.

    The option ``patching`` is ``haar`` or ``fold``. The archives hold bfloat16; here everything is float32.
    """
    # Constants of the wavelets and of the quantizer.
    checkpoint.drop("*patcher*", "quantizer.*")
    dim = checkpoint.shape("quant_conv.weight")[0]
    levels = checkpoint.option("levels", LEVELS if dim == len(LEVELS) else None)
    trunks = [describe(checkpoint, Dialect(), prefix) for prefix in ("encoder.", "decoder.")]
    base = trunks[0].entry_width
    patching = checkpoint.option("patching", "haar")
    encoder = CosmosEncoder(**_arguments(trunks[0], base, patching))
    decoder = CosmosDecoder(**_arguments(trunks[1], base, patching))
    # Pictures of any size, in the middle of zeros up to multiples of 16 pixels.
    size = checkpoint.option("size", 256)
    prepared = {"size": [size, size], "channels": 3, "resize": "none", "crop": "none", "range": [-1, 1]}
    quantizer = FSQ(levels, form="atanh") if levels else Identity(dim)
    values = take_projections(checkpoint)
    for part, trunk, name in zip((encoder, decoder), trunks, ("encoder.", "decoder."), strict=True):
        values |= take_trunk(checkpoint, part, Dialect(), trunk, name, name)
    return fill(Tokenizer(encoder, quantizer, decoder, preprocessing=prepared), values)


def _arguments(trunk: Trunk, base: int, patching: str) -> dict[str, Any]:
    patch_size = square_root(trunk.channels // 3, "pixels of a patch")
    return {
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
        )
        for kind, factor, millions in (("di", 8, 79.0), ("di", 16, 83.7), ("ci", 8, 76.8), ("ci", 16, 81.5))
    ),
)
