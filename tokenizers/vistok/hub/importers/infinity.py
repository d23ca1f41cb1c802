"""The tokenizer of Infinity: a pyramid of maps of bits.

J. Han et al.: Infinity: Scaling Bitwise AutoRegressive Modeling for High-Resolution Image Synthesis,
https://arxiv.org/abs/2412.04431; https://github.com/FoundationVision/Infinity.
"""

import re

from vistok.hub.importers.base import Checkpoint, Family, Published, preprocessing
from vistok.hub.importers.convolutional import TAMING, vqgan
from vistok.quantizer import BSQ, MultiScaleQuantizer
from vistok.tokenizer import Tokenizer

SCALES = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)  # of square images of 1024 pixels
# Rows and columns of the maps of images that are taller than wide, for each ratio of the sides: the first 7 of them for
# some 256 x 256 pixels, the first 10 for 512 x 512, all for 1024 x 1024.
ROWS = (
    (1, 2, 3, 5, 10, 15, 20, 25, 30, 35, 45, 55, 70),
    (1, 2, 4, 8, 12, 16, 20, 24, 28, 36, 48, 60, 72),
    (1, 2, 3, 6, 9, 15, 21, 27, 33, 39, 48, 63, 78),
    (1, 2, 3, 7, 11, 14, 21, 28, 35, 42, 56, 70, 84),
    (1, 2, 4, 6, 10, 16, 22, 30, 38, 46, 60, 74, 90),
    (1, 2, 5, 10, 15, 20, 25, 30, 40, 50, 65, 80, 100),
    (1, 2, 6, 9, 15, 21, 27, 36, 45, 54, 72, 90, 111),
)
COLUMNS = (
    (1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 36, 44, 56),
    (1, 2, 3, 6, 9, 12, 15, 18, 21, 27, 36, 45, 54),
    (1, 2, 2, 4, 6, 10, 14, 18, 22, 26, 32, 42, 52),
    (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48),
    (1, 2, 2, 3, 5, 8, 11, 15, 19, 23, 30, 37, 45),
    (1, 2, 2, 4, 6, 8, 10, 12, 16, 20, 26, 32, 40),
    (1, 2, 2, 3, 5, 7, 9, 12, 15, 18, 24, 30, 37),
)
# Pixels per cell of the schedules.
CELL = 16
# Constants of the bits.
CONSTANTS = ("quantize.lfq.*", "quantizer.lfq.*")


def schedules(cells_per_cell: int) -> list[list[list[int]]]:
    """Cells ``[h, w]`` of each scale, square ones first; in each cell of the published ones lie `cells_per_cell`**2."""
    tall = [list(zip(*pair, strict=True)) for pair in zip((SCALES, *ROWS), (SCALES, *COLUMNS), strict=True)]
    wide = [[(columns, rows) for rows, columns in each] for each in tall[1:]]
    return [[[cells_per_cell * rows, cells_per_cell * columns] for rows, columns in each] for each in (*tall, *wide)]


def convert(checkpoint: Checkpoint) -> Tokenizer:
    """Bits of each token on the last axis, scale after scale.

    Options: ``size`` of the images, a side or ``[H, W]`` (1024), and ``scales``, the sides of the maps. Without the
    second the maps are those of the published schedules, for images of all their sizes and ratios of sides.
    """
    checkpoint.drop(*CONSTANTS, "loss.*")
    # Its layers may be wrapped in classes for images and videos, which add a name.
    wrapped = "encoder.conv_in.conv.weight" in checkpoint
    for name in list(checkpoint.tensors) if wrapped else ():
        renamed = re.sub(r"\.(?:conv|norm)\.(weight|bias)$", r".\1", name)
        renamed = re.sub(r"(sample)\.(weight|bias)$", r"\1.conv.\2", renamed)
        checkpoint.tensors[renamed] = checkpoint.tensors.pop(name)
    bits = checkpoint.shape("encoder.conv_out.weight")[0]
    factor = 1 << (checkpoint.count("encoder.down.{}.block.0.conv1.weight") - 1)
    scales = checkpoint.option("scales", None)
    known = None
    if scales is None:
        if CELL % factor:
            raise ValueError(
                f"no schedules are known for {factor} pixels per token: pass the sides of the maps as scales"
            )
        known = schedules(CELL // factor)
        scales = [CELL // factor * scale for scale in SCALES]
    part = BSQ(bits, index_bits=1, inv_temperature=100.0, batch_entropy="bit", gradient_scale="identity")
    quantizer = MultiScaleQuantizer(part, scales, phi=0, up="linear", loss="stage", schedules=known)
    prepared = preprocessing(checkpoint, filter="lanczos", size=1024)
    return vqgan(checkpoint, TAMING, quantizer, {}, prepared, projection="none")


FAMILY = Family(
    name="infinity",
    title="Infinity, https://github.com/FoundationVision/Infinity",
    marks=("encoder.down.0.block.0.conv1.conv.weight", "encoder.mid.block_1.conv1.conv.weight"),
    convert=convert,
    published=tuple(
        Published(name, "FoundationVision/infinity", f"infinity_vae_{file}.pth", None, "MIT")
        for name, file in (
            *((f"d{bits}", f"d{bits}") for bits in (16, 24, 32, 64)),
            ("d32-reg", "d32reg"),
            # Of Infinity-8B, which moves 2x2 of these tokens of 14 bits into one of 56.
            ("d14-f8", "d56_f8_14_patchify"),
        )
    ),
)
