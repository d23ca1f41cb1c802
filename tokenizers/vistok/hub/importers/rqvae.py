"""RQ-VAE: a stack of codes at every position.

D. Lee et al.: Autoregressive Image Generation using Residual Quantization, https://arxiv.org/abs/2203.01941;
https://github.com/kakaobrain/rq-vae-transformer.
"""

import torch

from vistok.hub.importers.base import Checkpoint, Family, Published, preprocessing
from vistok.hub.importers.convolutional import TAMING, vqgan
from vistok.hub.importers.taming import LOSSES, TRUNK
from vistok.quantizer import ResidualQuantizer, VectorQuantizer
from vistok.tokenizer import Tokenizer

REPOSITORY = "https://github.com/kakaobrain/rq-vae-transformer"


def convert(checkpoint: Checkpoint) -> Tokenizer:
    """The codebook that all depths share is stored once for each; its last row is padding and never chosen."""
    checkpoint.drop(*LOSSES)
    depth = checkpoint.count("quantizer.codebooks.{}.weight")
    stages = [
        {
            ours: checkpoint.take(f"quantizer.codebooks.{number}.{theirs}")
            for ours, theirs in (("table", "weight"), ("table_sum", "embed_ema"), ("cluster_size", "cluster_size_ema"))
        }
        for number in range(depth)
    ]
    shared = all(torch.equal(stage["table"], stages[0]["table"]) for stage in stages)
    size, dim = stages[0]["table_sum"].shape
    if checkpoint.shape("quant_conv.weight")[0] != dim:
        raise ValueError(
            f"the codes have {dim} channels and the features {checkpoint.shape('quant_conv.weight')[0]}: checkpoints "
            "that move patches of features into channels are not supported"
        )
    part = VectorQuantizer(size, dim, table="ema", revival="random")
    quantizer = ResidualQuantizer(part, depth, shared=shared, commitment="cumulative")
    state = {
        f"quantizers.{number}.{name}": value[:size]
        for number, stage in enumerate(stages[:1] if shared else stages)
        for name, value in stage.items()
    }
    return vqgan(checkpoint, TAMING, quantizer, state, preprocessing(checkpoint, filter="bilinear"))


FAMILY = Family(
    name="rqvae",
    title=f"RQ-VAE, {REPOSITORY}",
    marks=(*TRUNK, "quantizer.codebooks.0.weight"),
    convert=convert,
    published=tuple(
        Published(name, REPOSITORY, None, 133.8 if name == "imagenet" else None)
        for name in ("imagenet", "lsun-church", "lsun-cat", "lsun-bedroom", "cc3m", "ffhq")
    ),
)
