"""VQGAN-LC: a frozen codebook of CLIP features behind a learned projection.

L. Zhu et al.: Scaling the Codebook Size of VQGAN to 100,000 with a Utilization Rate of 99%,
https://arxiv.org/abs/2406.11837; https://github.com/zh460045050/VQGAN-LC.
"""

from vistok.hub.importers.base import Checkpoint, Family, Published
from vistok.hub.importers.convolutional import TAMING, vqgan
from vistok.hub.importers.taming import LOSSES, TRUNK, prepared
from vistok.quantizer import VectorQuantizer
from vistok.tokenizer import Tokenizer


def convert(checkpoint: Checkpoint) -> Tokenizer:
    """The nearest projected code."""
    checkpoint.drop(*LOSSES)
    state = {"table": checkpoint.take("tok_embeddings.weight")}
    state |= {f"projection.{name}": checkpoint.take(f"codebook_projection.{name}") for name in ("weight", "bias")}
    size, width = state["table"].shape
    dim = len(state["projection.bias"])
    quantizer = VectorQuantizer(size, dim, table="frozen", projection="linear", table_dim=width)
    return vqgan(checkpoint, TAMING, quantizer, state, prepared(checkpoint))


FAMILY = Family(
    name="vqgan_lc",
    title="VQGAN-LC, https://github.com/zh460045050/VQGAN-LC",
    marks=(*TRUNK, "tok_embeddings.weight", "codebook_projection.weight"),
    convert=convert,
    published=(
        Published("100k-f16", "https://github.com/zh460045050/VQGAN-LC", "vqgan-lc-100K-f16-dim8.pth", 149.0),
        Published("100k-f8", "https://github.com/zh460045050/VQGAN-LC"),
    ),
)
