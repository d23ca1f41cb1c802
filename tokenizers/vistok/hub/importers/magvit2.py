"""Open-MAGVIT2: signs of features as bits, and a decoder that the codes modulate.

Z. Luo et al.: Open-MAGVIT2: An Open-Source Project Toward Democratizing Auto-regressive Visual Generation,
https://arxiv.org/abs/2409.04410; https://github.com/TencentARC/SEED-Voken.
"""

from vistok.decoder import MAGVIT2Decoder
from vistok.encoder import MAGVIT2Encoder
from vistok.hub.importers.base import Checkpoint, Family, Published, fill
from vistok.hub.importers.taming import LOSSES, prepared
from vistok.hub.importers.trunk import Dialect, describe, take_trunk
from vistok.quantizer import LFQ
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
    checkpoint.drop(*LOSSES, "quantize.*")
    trunks = [describe(checkpoint, MAGVIT2, prefix) for prefix in ("encoder.", "decoder.")]
    tokenizer = Tokenizer(
        MAGVIT2Encoder(**trunks[0].sizes()),
        LFQ(trunks[0].z_channels),
        MAGVIT2Decoder(**trunks[1].sizes()),
        projection="none",
        preprocessing=prepared(checkpoint),
    )
    values = take_trunk(checkpoint, tokenizer.encoder, MAGVIT2, trunks[0], "encoder.", "encoder.")
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
