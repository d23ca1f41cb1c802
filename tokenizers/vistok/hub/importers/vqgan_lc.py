"""VQGAN-LC: a frozen codebook of CLIP features behind a learned projection.

L. Zhu et al.: Scaling the Codebook Size of VQGAN to 100,000 with a Utilization Rate of 99%,
https://arxiv.org/abs/2406.11837; https://github.com/zh460045050/VQGAN-LC.
"""

from typing import Any

import torch.nn.functional as F

from vistok.hub.importers.base import Checkpoint, Family, Published
from vistok.hub.importers.convolutional import TAMING, vqgan
from vistok.hub.importers.taming import LOSSES, TRUNK, prepared
from vistok.quantizer import VectorQuantizer
from vistok.tokenizer import Tokenizer

# Channels of the features of CLIP ViT-L/14.
CLIP_WIDTH = 768


def convert(checkpoint: Checkpoint) -> Tokenizer:
    """The nearest projected code.

    A projection of two layers is applied once: the table holds what it makes of the codes. Codes of 768 channels are
    compared with features of unit length, unless the codebook was random (``tuning_codebook=-1``): option
    ``unit_features`` (true).
    """
    # Sums of codebooks that moving averages update.
    checkpoint.drop(*LOSSES, "cluster_size", "embed_avg")
    state = {"table": checkpoint.take("tok_embeddings.weight")}
    size, width = state["table"].shape
    dim = checkpoint.shape("quant_conv.weight")[0]
    choices: dict[str, Any] = {}
    if dim == CLIP_WIDTH and checkpoint.option("unit_features", True):
        choices["unit_norm"] = "features"
    if "codebook_projection.weight" in checkpoint:
        state |= {f"projection.{name}": checkpoint.take(f"codebook_projection.{name}") for name in ("weight", "bias")}
        choices |= {"projection": "linear", "table_dim": width}
    elif "codebook_projection.0.weight" in checkpoint:
        for number in (0, 2):
            layer = [checkpoint.take(f"codebook_projection.{number}.{name}") for name in ("weight", "bias")]
            state["table"] = F.linear(state["table"] if number == 0 else state["table"].relu(), *layer)
    quantizer = VectorQuantizer(size, dim, table="frozen", **choices)
    return vqgan(checkpoint, TAMING, quantizer, state, prepared(checkpoint))


FAMILY = Family(
    name="vqgan_lc",
    title="VQGAN-LC, https://github.com/zh460045050/VQGAN-LC",
    marks=(*TRUNK, "tok_embeddings.weight"),
    convert=convert,
    published=(
        Published("100k-f16", "https://github.com/zh460045050/VQGAN-LC", "vqgan-lc-100K-f16-dim8.pth", 149.0),
        Published("100k-f8", "https://github.com/zh460045050/VQGAN-LC", "vqgan-lc-100K-f8-dim4.pth"),
    ),
)
