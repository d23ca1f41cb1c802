"""GSQ: groups of channels that share a spherical codebook.

J. Wang et al.: Scaling Image Tokenizers with Grouped Spherical Quantization, https://arxiv.org/abs/2412.02632;
https://github.com/HelmholtzAI-FZJ/flex_gen.
"""

from dataclasses import dataclass
from math import gcd
from typing import Any

from vistok.decoder import GSQDecoder
from vistok.encoder import GSQEncoder
from vistok.hub.importers.base import Checkpoint, Family, Published, codebook, fill, preprocessing
from vistok.hub.importers.transformer import take_renamed
from vistok.quantizer import GroupedQuantizer, Quantizer
from vistok.tokenizer import Tokenizer

NAMES = {
    r"\.net\.0\.": ".norm1.",
    r"\.net\.2\.": ".conv1.",
    r"\.net\.3\.": ".norm2.",
    r"\.net\.6\.": ".conv2.",
    r"^(encoder\.blocks\.\d+)\.conv\.": r"\1.",
    r"\.skip\.": ".shortcut.",
    r"\.gamma\.": ".scale.",
    r"\.beta\.": ".shift.",
    r"\.(?:fianl|final)_layers\.0\.": ".norm_out.",
    r"\.(?:fianl|final)_layers\.2\.": ".conv_out.",
}


def convert(checkpoint: Checkpoint) -> Tokenizer:
    """The code of the closest direction for each group, on the last axis; the codes themselves have any length.

    Without option ``unit_norm`` (false) the nearest code.
    """
    table = checkpoint.take("quantizers.codebook.weight")
    dim = checkpoint.shape("encoder.fianl_layers.2.weight")[0]
    if table.shape[1] == 1:
        raise ValueError("groups of one channel, whose features the original clamps to [-1, 1], are not supported")
    coarsening, refining = (_describe(checkpoint, part) for part in ("encoder", "decoder"))
    encoder = GSQEncoder(**coarsening.sizes(dim))
    decoder = GSQDecoder(
        **refining.sizes(dim, step=-1),
        adaptive_norm=refining.adaptive,
        upsample="depth_to_space" if refining.multiplies else "nearest",
    )
    values = take_renamed(checkpoint, NAMES)
    unit_norm = checkpoint.option("unit_norm", True)
    choices = {"distance": "cosine", "unit_norm": "features"} if unit_norm else {}
    quantizer: Quantizer = codebook(table, **choices)
    groups = dim // table.shape[1]
    if groups > 1:
        quantizer = GroupedQuantizer(quantizer, groups, shared=True)
    values["quantizer.quantizers.0.table" if groups > 1 else "quantizer.table"] = table
    prepared = preprocessing(checkpoint, filter="bilinear")
    return fill(Tokenizer(encoder, quantizer, decoder, projection="none", preprocessing=prepared), values)


@dataclass
class Trunk:
    """What the tensors of an encoder or decoder tell; lists are in the order in which the resolutions run.

    Attributes:
        channels: Of an image.
        widths: Channels of each resolution.
        counts: Residual blocks of each, besides those that change the number of channels.
        middle: Residual blocks that precede the first normalisation.
        adaptive: Whether the codes modulate it.
        multiplies: Whether the layers between resolutions have more channels than they are given.
    """

    channels: int
    widths: list[int]
    counts: list[int]
    middle: int = 0
    adaptive: bool = False
    multiplies: bool = False

    def sizes(self, z_channels: int, step: int = 1) -> dict[str, Any]:
        """Arguments of `GSQEncoder` and `GSQDecoder`; ``step=-1`` where the finest resolution is the last one."""
        base = gcd(*self.widths)
        return {
            "channels": self.channels,
            "base_channels": base,
            "channel_multipliers": [width // base for width in self.widths[::step]],
            "num_blocks": self.counts[::step],
            "middle_blocks": self.middle,
            "z_channels": z_channels,
        }


def _describe(checkpoint: Checkpoint, part: str) -> Trunk:
    width, channels = checkpoint.shape(f"{part}.conv_in.weight")[:2]
    if part == "decoder":
        channels = checkpoint.shape("decoder.final_layers.2.weight")[0]
    trunk = Trunk(channels, [width], [0])
    for number in range(len(checkpoint.tensors)):
        block = f"{part}.blocks.{number}."
        if block + "net.6.weight" in checkpoint:
            out_channels, in_channels = checkpoint.shape(block + "net.2.weight")[:2]
            trunk.widths[-1] = out_channels
            trunk.counts[-1] += out_channels == in_channels
        elif block + "conv.weight" in checkpoint:
            out_channels, in_channels = checkpoint.shape(block + "conv.weight")[:2]
            trunk.multiplies = out_channels > in_channels
            trunk.widths.append(trunk.widths[-1])
            trunk.counts.append(0)
        elif block + "gamma.weight" in checkpoint:
            if not trunk.adaptive:
                trunk.middle, trunk.counts[-1] = trunk.counts[-1], 0
            trunk.adaptive = True
        else:
            break
    return trunk


FAMILY = Family(
    name="gsq",
    title="GSQ, https://github.com/HelmholtzAI-FZJ/flex_gen",
    marks=("encoder.fianl_layers.2.weight", "quantizers.codebook.weight"),
    convert=convert,
    published=tuple(
        Published(name.lower(), f"HelmholtzAI-FZJ/GSQ-{name}", "checkpoint.pt")
        for name in (
            *("F8-D8-V64k", "F8-D16-V64k", "F8-D32-V64k", "F8-D32-V256k", "F8-D64-V16k", "F8-D64-V512k"),
            *("F8-D64-G2-V8k", "F8-D64-G16-V8k", "F8-D64-G4-V256k"),
        )
    ),
)
