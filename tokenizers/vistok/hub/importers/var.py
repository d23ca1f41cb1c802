"""The tokenizer of VAR: a pyramid of token maps, between two 3x3 convolutions.

K. Tian et al.: Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction,
https://arxiv.org/abs/2404.02905; https://github.com/FoundationVision/VAR.
"""

import re

from vistok.hub.importers.base import Checkpoint, Family, Published, codebook, preprocessing
from vistok.hub.importers.convolutional import TAMING, vqgan
from vistok.hub.importers.taming import PLAIN
from vistok.quantizer import MultiScaleQuantizer
from vistok.quantizer.multiscale import VAR_SCALES, square_schedule
from vistok.tokenizer import Tokenizer

USAGE = "quantize.ema_vocab_hit_SV"
# Convolutions of the quantizer: one for all scales, a few that are spread over the scales, one for each scale.
PHI = r"quantize\.quant_resi\.(?:qresi_ls\.)?(?:qresi|(\d+))\.(weight|bias)"
# By the sizes of the convolutions around the quantizer.
PROJECTIONS = {1: "linear", 3: "conv3x3"}
# The sides of the maps for images of 512 pixels, which the same weights encode.
SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


def convert(checkpoint: Checkpoint) -> Tokenizer:
    """The nearest code of each cell, scale after scale.

    Options: ``scales`` (sides of the maps; without it those of the published models at 256 and 512 pixels),
    ``phi_ratio`` (share of the convolutions), and ``znorm`` (the code of the closest direction).
    """
    chosen = checkpoint.option("scales", None)
    scales = tuple(chosen or VAR_SCALES)
    if USAGE in checkpoint and checkpoint.shape(USAGE)[0] != len(scales):
        raise ValueError(
            f"the checkpoint has {checkpoint.shape(USAGE)[0]} scales, but scales={list(scales)}: pass the sides of its "
            "maps as option scales"
        )
    checkpoint.drop(USAGE)
    table = checkpoint.take("quantize.embedding.weight")
    state = {"quantizers.0.table": table}
    for name in list(checkpoint.tensors):
        if found := re.fullmatch(PHI, name):
            state[f"phi.{found[1] or 0}.{found[2]}"] = checkpoint.take(name)
    phi = len(state) // 2
    ratio = checkpoint.option("phi_ratio", 0.5) if phi else None
    search = {"distance": "cosine", "unit_norm": "none"} if checkpoint.option("znorm", False) else {}
    schedules = None if chosen else [square_schedule(SCALES_512)]
    quantizer = MultiScaleQuantizer(codebook(table, **search), scales, phi, ratio, schedules=schedules)
    side = scales[-1] << (checkpoint.count("encoder.down.{}.block.0.conv1.weight") - 1)
    prepared = preprocessing(checkpoint, filter="lanczos", size=side)
    # The original resizes to a longer side before it crops, in evaluation too.
    prepared["short_side"] = round(1.125 * prepared["size"][0])
    kernel = checkpoint.shape("quant_conv.weight")[-1]
    if kernel not in PROJECTIONS:
        raise ValueError(f"the convolutions around the quantizer are {kernel}x{kernel}, only 1x1 and 3x3 are supported")
    return vqgan(checkpoint, TAMING, quantizer, state, prepared, projection=PROJECTIONS[kernel])


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
