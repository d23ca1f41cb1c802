"""Open-MAGVIT2: signs of features as bits, and a decoder that the codes modulate; and SimVQ, which has its trunk.

Z. Luo et al.: Open-MAGVIT2: An Open-Source Project Toward Democratizing Auto-regressive Visual Generation,
https://arxiv.org/abs/2409.04410; https://github.com/TencentARC/SEED-Voken. Y. Zhu et al.: Addressing Representation
Collapse in Vector Quantized Models with One Linear Layer, https://arxiv.org/abs/2411.02038;
https://github.com/youngsheen/SimVQ.
"""

from collections.abc import Mapping

from torch import Tensor

from vistok.decoder import MAGVIT2Decoder
from vistok.encoder import MAGVIT2Encoder
from vistok.hub.importers.base import Checkpoint, Family, Published, fill
from vistok.hub.importers.taming import LOSSES, prepared
from vistok.hub.importers.trunk import Dialect, describe, take_trunk
from vistok.quantizer import LFQ, Quantizer, VectorQuantizer
from vistok.tokenizer import Tokenizer

MAGVIT2 = Dialect(
    downsample="downsample",
    upsample="upsample.conv1",
    entry="adaptive.{}",
    middle="mid_block.{}",
    leaves=((r"^shortcut$", "nin_shortcut"), (r"^scale$", "gamma"), (r"^shift$", "beta")),
)


def convert(checkpoint: Checkpoint) -> Tokenizer:
    """The first channel is the least significant bit."""
    # Constants of the bits.
    checkpoint.drop(*LOSSES, "quantize.*mask", "quantize.zero", "quantize.codebook")
    return _between_trunks(checkpoint, LFQ(checkpoint.shape("encoder.conv_out.weight")[0]), {})


def convert_simvq(checkpoint: Checkpoint) -> Tokenizer:
    """The nearest code, of a frozen table behind a linear layer.

    The original's own look-up of indices forgets the layer; here they decode as its training did.
    """
    checkpoint.drop(*LOSSES)
    state = {"table": checkpoint.take("quantize.embedding.weight")}
    projection = {
        name: checkpoint.take(f"quantize.embedding_proj.{name}")
        for name in ("weight", "bias")
        if f"quantize.embedding_proj.{name}" in checkpoint
    }
    state |= {f"projection.{name}": value for name, value in projection.items()}
    quantizer = VectorQuantizer(
        *state["table"].shape,
        table="frozen",
        projection="linear",
        projection_bias="bias" in projection,
        init="scaled_normal",
    )
    return _between_trunks(checkpoint, quantizer, state, size=128)


def _between_trunks(
    checkpoint: Checkpoint, quantizer: Quantizer, state: Mapping[str, Tensor], size: int = 256
) -> Tokenizer:
    trunks = [describe(checkpoint, MAGVIT2, prefix) for prefix in ("encoder.", "decoder.")]
    adaptive = "decoder.adaptive.0.gamma.weight" in checkpoint
    tokenizer = Tokenizer(
        MAGVIT2Encoder(**trunks[0].sizes(stem=True)),
        quantizer,
        MAGVIT2Decoder(**trunks[1].sizes(), adaptive_norm=adaptive),
        projection="none",
        preprocessing=prepared(checkpoint, size=size, channels=trunks[0].channels),
    )
    values = {f"quantizer.{name}": value for name, value in state.items()}
    values |= take_trunk(checkpoint, tokenizer.encoder, MAGVIT2, trunks[0], "encoder.", "encoder.")
    values |= take_trunk(checkpoint, tokenizer.decoder, MAGVIT2, trunks[1], "decoder.", "decoder.")
    return fill(tokenizer, values)


FAMILY = Family(
    name="magvit2",
    title="Open-MAGVIT2 of SEED-Voken, https://github.com/TencentARC/SEED-Voken",
    marks=("encoder.mid_block.0.conv1.weight", "decoder.adaptive.0.gamma.weight"),
    convert=convert,
    published=tuple(
        Published(name, f"TencentARC/Open-MAGVIT2-Tokenizer-{repository}", file, millions, "Apache-2.0", options)
        for name, repository, file, millions, options in (
            ("256", "256-resolution", "imagenet_256_L.ckpt", 115.1, {}),
            ("128", "128-resolution", "imagenet_128_L.ckpt", 112.0, {"size": 128}),
            ("16384-pretrain", "16384-Pretrain", "pretrain256_16384.ckpt", 115.1, {}),
            ("262144-pretrain", "262144-Pretrain", "pretrain256_262144.ckpt", 115.1, {}),
        )
    ),
)
SIMVQ = Family(
    name="simvq",
    title="SimVQ, https://github.com/youngsheen/SimVQ",
    marks=("encoder.mid_block.0.conv1.weight", "quantize.embedding.weight", "quantize.embedding_proj.weight"),
    convert=convert_simvq,
    published=(
        # In the folders vq_log/simvq_8k and vq_log/simvq_65k; of the others the program's own commands name the files.
        *(Published(name, "zyx123/SimVQ", None, None, "MIT") for name in ("8k", "65k")),
        *(
            Published(name, "zyx123/SimVQ", f"vq_log/simvq_{name}/epoch=49-step=250250.ckpt", None, "MIT")
            for name in ("1k", "262k")
        ),
    ),
)
