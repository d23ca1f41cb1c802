"""FQGAN: two or three codes of a position, each from a transformer of its own.

Z. Bai et al.: Factorized Visual Tokenization and Generation, https://arxiv.org/abs/2411.16681;
https://github.com/showlab/FQGAN.
"""

import dataclasses

import torch
from torch import Tensor

from vistok.decoder import CNNDecoder
from vistok.encoder import FQGANEncoder
from vistok.hub.importers.base import Checkpoint, Family, Published, codebook, fill, preprocessing, square_root
from vistok.hub.importers.llamagen import LLAMAGEN
from vistok.hub.importers.transformer import CLIP_NAMES, take_renamed
from vistok.hub.importers.trunk import describe, take_trunk
from vistok.quantizer import GroupedQuantizer
from vistok.tokenizer import Tokenizer

# Heads of the encoder in the order in which the decoder takes their codes, and how their other parts are called.
DUAL = {"visual_head": "vis", "semantic_head": "sem"}
TRIPLE = {"visual_head": "vis", "semantic_head_mid": "sem_mid", "semantic_head_high": "sem_high"}
NUM_HEADS = 8  # of every model, whatever its width
ENCODER = dataclasses.replace(LLAMAGEN, out="conv_out_vis")


def convert(checkpoint: Checkpoint) -> Tokenizer:
    """Codes and features have unit length; the last axis of the indices is visual, semantic, or visual, middle, high.

    The original encodes images of 256 pixels only. Options: ``num_heads`` of the transformers, ``unit_norm`` (true).
    """
    # Usage of the codes, and what compares the codes with a teacher.
    checkpoint.drop("*.codebook_used", "feat_pred_head.*", "*_sem_feat_pred.*")
    heads = DUAL if "quant_conv_sem.weight" in checkpoint else TRIPLE
    trunks = [
        describe(checkpoint, dialect, prefix) for dialect, prefix in ((ENCODER, "encoder."), (LLAMAGEN, "decoder."))
    ]
    first = "encoder.visual_head.0."
    cells, width = checkpoint.shape(f"{first}positional_embedding")
    sizes = trunks[0].sizes(stem=True)
    side = square_root(cells, "positions") << trunks[0].resizes
    encoder = FQGANEncoder(
        **sizes,
        branches=len(heads),
        image_size=side,
        depth=checkpoint.count(first + "transformer.{}.ln_1.weight"),
        num_heads=checkpoint.option("num_heads", NUM_HEADS),
        mlp_ratio=checkpoint.shape(f"{first}transformer.0.mlp.c_fc.weight")[0] / width,
    )
    values: dict[str, Tensor] = {}
    projections: list[dict[str, Tensor]] = []
    for number, (head, name) in enumerate(heads.items()):
        names = {rf"^encoder\.{head}\.0\.": f"encoder.branches.{number}.", "positional_embedding": "positions.table"}
        names |= {theirs: ours.replace("trunk.", "") for theirs, ours in CLIP_NAMES.items()}
        values |= take_renamed(checkpoint, names, f"encoder.{head}.0.")
        for layer in ("norm_out", "conv_out"):
            values |= take_renamed(
                checkpoint,
                {rf"^encoder\.{layer}_{name}\.": f"encoder.branches.{number}.{layer}."},
                f"encoder.{layer}_{name}.",
            )
        projections.append({each: checkpoint.take(f"quant_conv_{name}.{each}") for each in ("weight", "bias")})
        values[f"quantizer.quantizers.{number}.table"] = checkpoint.take(f"quantize_{name}.embedding.weight")
    # Each branch has a convolution of its own, which does not see the others.
    values["to_codes.weight"] = torch.block_diag(*(each["weight"].flatten(1) for each in projections))
    values["to_codes.bias"] = torch.cat([each["bias"] for each in projections])
    values |= {f"from_codes.{each}": checkpoint.take(f"post_quant_conv.{each}") for each in ("weight", "bias")}
    decoder = CNNDecoder(**trunks[1].cnn())
    values |= take_trunk(checkpoint, encoder, ENCODER, trunks[0], "encoder.", "encoder.", taken=tuple(values))
    values |= take_trunk(checkpoint, decoder, LLAMAGEN, trunks[1], "decoder.", "decoder.")
    distance = "cosine" if checkpoint.option("unit_norm", True) else "euclidean"
    part = codebook(values["quantizer.quantizers.0.table"], distance=distance)
    # The program halves large pictures by box filters before it resizes them.
    prepared = preprocessing(checkpoint, filter="bicubic", mode="adm", size=side, channels=trunks[0].channels)
    return fill(Tokenizer(encoder, GroupedQuantizer(part, len(heads)), decoder, preprocessing=prepared), values)


FAMILY = Family(
    name="fqgan",
    title="FQGAN, https://github.com/showlab/FQGAN",
    marks=("encoder.conv_blocks.*", "encoder.visual_head.*", "quant_conv_vis.weight", "post_quant_conv.weight"),
    convert=convert,
    published=tuple(
        Published(f"{kind}-f{factor}", "ZechenBai/FQGAN", f"fqgan_{kind}_ds{factor}.pt", None, "CC-BY-NC-4.0")
        for kind in ("dual", "triple")
        for factor in (16, 8)
    ),
)
