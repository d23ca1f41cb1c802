"""The tokenizer of VAR: a pyramid of token maps, between two 3x3 convolutions.

K. Tian et al.: Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction,
https://arxiv.org/abs/2404.02905; https://github.com/FoundationVision/VAR.
"""

import re

from vistok.hub.importers.base import Checkpoint, Family, Published, codebook, preprocessing
from vistok.hub.importers.convolutional import TAMING, vqgan
from vistok.hub.importers.taming import PLAIN
from vistok.quantizer import MultiScaleQuantizer
from vistok.quantizer.multiscale import VAR_SCALES
from vistok.tokenizer import Tokenizer

USAGE = "quantize.ema_vocab_hit_SV"
# Convolutions of the quantizer: one for all scales, a few that are spread over the scales, one for each scale.
PHI = r"quantize\.quant_resi\.(?:qresi_ls\.)?(?:qresi|(\d+))\.(weight|bias)"
# The sides of the maps for images of 512 pixels, which the same weights encode.
SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


def convert(checkpoint: Checkpoint) -> Tokenizer:
    """The nearest code of each cell, scale after scale.

    Options: ``scales`` (sides of the maps) and ``phi_ratio`` (share of the convolutions).
    """
    scales = tuple(checkpoint.option("scales", VAR_SCALES))
    if USAGE in checkpoint and checkpoint.shape(USAGE)[0] != len(scales):
        raise ValueError(
            f"the checkpoint has {checkpoint.shape(USAGE)[0]} scales, but scales={list(scales)}: pass the sides of its "
            "maps as option scales"
        )
    checkpoint.drop(USAGE, "quantize.beta")
    table = checkpoint.take("quantize.embedding.weight")
    state = {"quantizers.0.table": table}
    for name in list(checkpoint.tensors):
        if found := re.fullmatch(PHI, name):
            state[f"phi.{found[1] or 0}.{found[2]}"] = checkpoint.take(name)
    phi = len(state) // 2
    ratio = checkpoint.option("phi_ratio", 0.5) if phi else None
    quantizer = MultiScaleQuantizer(codebook(table), scales, phi, ratio)
    side = scales[-1] << (checkpoint.count("encoder.down.{}.block.0.conv1.weight") - 1)
    prepared = preprocessing(checkpoint, filter="lanczos", size=side)
    # The original resizes to a longer side before it crops, in evaluation too.
    prepared["short_side"] = round(1.125 * prepared["size"][0])
    return vqgan(checkpoint, TAMING, quantizer, state, prepared, projection="conv3x3")


FAMILY = Family(
    name="var",
    title="VAR, https://github.com/FoundationVision/VAR",
    marks=(*PLAIN, "quantize.quant_resi.*"),
    convert=convert,
    published=(
        Published("vae-f16", "FoundationVision/var", "vae_ch160v4096z32.pth", 109.0, "MIT"),
        Published("vae-f16-512", "FoundationVision/var", "vae_ch160v4096z32.pth", 109.0, "MIT", {"scales": SCALES_512}),
    ),
)
