"""RQ-VAE: a stack of codes at every position.

D. Lee et al.: Autoregressive Image Generation using Residual Quantization, https://arxiv.org/abs/2203.01941;
https://github.com/kakaobrain/rq-vae-transformer.
"""

import torch
from torch import Tensor

from vistok.hub.importers.base import Checkpoint, Family, Published, preprocessing, square_root
from vistok.hub.importers.convolutional import TAMING, vqgan
from vistok.hub.importers.taming import LOSSES, TRUNK
from vistok.quantizer import ResidualQuantizer, VectorQuantizer
from vistok.tokenizer import Tokenizer

REPOSITORY = "https://github.com/kakaobrain/rq-vae-transformer"
# Each archive also holds a generator.
ARCHIVES = "https://twg.kakaocdn.net/brainrepo/models/RQVAE/"
LICENCE = "CC-BY-NC-SA-4.0"


def convert(checkpoint: Checkpoint) -> Tokenizer:
    """The codebook that all depths share is stored once for each; its last row is padding and never chosen.

    Codes of more channels than the features stand for square patches of these.
    """
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
    parts = [VectorQuantizer(*stage["table_sum"].shape, table="ema", revival="random") for stage in stages]
    same = len({part.codebook_size for part in parts}) == 1
    quantizer = ResidualQuantizer(parts[0] if same else parts, depth, shared=shared, commitment="cumulative")
    state = {
        f"quantizers.{number}.{name}": value[: len(stage["cluster_size"])]
        for number, stage in enumerate(stages[:1] if shared else stages)
        for name, value in stage.items()
    }
    patch_size = _move_patches_into_channels(checkpoint, quantizer.dim)
    options = {"feature_patch_size": patch_size} if patch_size > 1 else {}
    return vqgan(
        checkpoint,
        TAMING,
        quantizer,
        state,
        preprocessing(checkpoint, filter="bilinear"),
        encoder_options=options,
        decoder_options=options,
    )


def _move_patches_into_channels(checkpoint: Checkpoint, dim: int) -> int:
    """Let the 1x1 convolutions make codes of whole patches of features, whose side is returned.

    The original moves patches of what the first convolution makes into channels, positions before channels, and back
    before the second one. The same numbers come from a convolution of whole patches that mixes no positions.
    """
    features = checkpoint.shape("quant_conv.weight")[0]
    if dim % features:
        raise ValueError(f"the codes have {dim} channels, which are no patches of features of {features} channels")
    side = square_root(dim // features, "the features of a code")
    if side == 1:
        return 1
    weights = {name: checkpoint.take(f"{name}.weight") for name in ("quant_conv", "post_quant_conv")}
    checkpoint.tensors["quant_conv.weight"] = _by_position(weights["quant_conv"], side).flatten(3).flatten(0, 2)
    checkpoint.tensors["quant_conv.bias"] = checkpoint.take("quant_conv.bias").repeat(side**2)
    # The second one has positions and channels the other way around.
    transposed = _by_position(weights["post_quant_conv"].transpose(0, 1), side)
    checkpoint.tensors["post_quant_conv.weight"] = transposed.flatten(3).flatten(0, 2).T
    checkpoint.tensors["post_quant_conv.bias"] = checkpoint.take("post_quant_conv.bias").repeat_interleave(side**2)
    return side


def _by_position(weight: Tensor, side: int) -> Tensor:
    """Weights ``(p q e, c p q)`` that apply those of a 1x1 convolution ``(e c 1 1)`` to each position of a patch."""
    positions = torch.eye(side**2).view(side, side, side, side)
    return torch.einsum("ec,pqrs->pqecrs", weight.flatten(1), positions)


FAMILY = Family(
    name="rqvae",
    title=f"RQ-VAE, {REPOSITORY}",
    marks=(*TRUNK, "quantizer.codebooks.0.weight"),
    convert=convert,
    published=tuple(
        Published(
            name, f"{ARCHIVES}{archive}.tar.gz", "stage1/model.pt", 133.8 if "imagenet" in name else None, LICENCE
        )
        for name, archive in (
            ("imagenet", "7518a004fe39120fcffbba76005dc6c3/imagenet_480M"),
            ("imagenet-50-epochs", "6714b47bb9382076923590eff08b1ee5/imagenet_1.4B_rqvae_50e"),
            ("lsun-church", "deeb3e0ac6e09923754e3e594ede7b01/church"),
            ("lsun-cat", "92b4e6a9ace09c9ab8ff9d3b3e688367/cat"),
            ("lsun-bedroom", "06b72c164cd2fe64fc8ebd6b42b0040f/bedroom"),
            ("cc3m", "dcd95e8f08408e113aab6451fae895f5/cc3m"),
            ("ffhq", "d47570aeff6ba300735606a806f54663/ffhq"),
        )
    ),
)
