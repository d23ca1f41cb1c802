"""GSQ: groups of channels that share a spherical codebook.

J. Wang et al.: Scaling Image Tokenizers with Grouped Spherical Quantization, https://arxiv.org/abs/2412.02632;
https://github.com/HelmholtzAI-FZJ/flex_gen.
"""

from dataclasses import dataclass
from itertools import product
from math import gcd
from typing import Any

from vistok.decoder import GSQDecoder
from vistok.encoder import GSQEncoder
from vistok.hub.checkpoint import entries, read_pickle
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
    r"\.qkv_conv\.": ".qkv.",
    r"\.proj_conv\.": ".projection.",
    r"\.gamma\.": ".scale.",
    r"\.beta\.": ".shift.",
    r"\.(?:fianl|final)_layers\.0\.": ".norm_out.",
    r"\.(?:fianl|final)_layers\.2\.": ".conv_out.",
}


def convert(checkpoint: Checkpoint) -> Tokenizer:
    """The code of the closest direction for each group, on the last axis; the codes themselves have any length.

    With ``unit_norm=false`` the nearest code. Without the option it is what the configuration says that the program
    pickles into its checkpoints; where there is none, true, but false for groups of one channel and for codebooks that
    are moving averages. The released checkpoints call the quantizer ``gvq`` or ``vq``, whose tensors have the same
    names.
    """
    table = checkpoint.take("quantizers.codebook.weight")
    averages = "quantizers.ema_count" in checkpoint
    checkpoint.drop("quantizers.ema_count", "quantizers.ema_weight")
    dim = checkpoint.shape("encoder.fianl_layers.2.weight")[0]
    single = table.shape[1] == 1
    config = checkpoint.config
    if "pickled" in config:
        config = entries(read_pickle(config["pickled"]))
    stated = entries(config.get("quantizer_config"))
    if stated.get("use_l1_norm"):
        raise ValueError("it divides codes by the sum of their absolute values (use_l1_norm=true): not supported")
    known = bool(stated.get("use_l2_norm", False)) if stated else not (single or averages)
    unit_norm = checkpoint.option("unit_norm", known)
    clamps = stated.get("force_1d_clip", False) and stated.get("use_uniform_init", False) if stated else True
    if single and (unit_norm or (clamps and table.abs().max() > 1)):
        raise ValueError(
            "codes of groups of one channel are as close as others in direction, or beyond [-1, 1], where the original "
            "clamps them, and draws one of them; only unit_norm=false and codes within [-1, 1] are supported"
        )
    coarsening, refining = (_describe(checkpoint, part) for part in ("encoder", "decoder"))
    encoder = GSQEncoder(**coarsening.sizes(dim))
    decoder = GSQDecoder(
        **refining.sizes(dim),
        adaptive_norm=refining.adaptive,
        upsample="depth_to_space" if refining.multiplies else "nearest",
    )
    values = take_renamed(checkpoint, NAMES)
    choices = {"distance": "cosine", "unit_norm": "features"} if unit_norm else {}
    quantizer: Quantizer = codebook(table, **choices)
    groups = dim // table.shape[1]
    if groups > 1:
        quantizer = GroupedQuantizer(quantizer, groups, shared=True)
    values["quantizer.quantizers.0.table" if groups > 1 else "quantizer.table"] = table
    prepared = preprocessing(checkpoint, filter="bilinear", channels=coarsening.channels)
    return fill(Tokenizer(encoder, quantizer, decoder, projection="none", preprocessing=prepared), values)


@dataclass
class Trunk:
    """What the tensors of an encoder or decoder tell; lists are in the order in which the resolutions run.

    Attributes:
        decoder: Whether the coarsest resolution is the first one.
        channels: Of an image.
        stem: Channels of the first convolution.
        widths: Channels of each resolution.
        attended: For each resolution, whether self-attention follows its residual blocks, besides those that change the
            number of channels.
        middle: The same for the blocks in the middle, where a normalisation divides them from those of a resolution.
        adaptive: Whether the codes modulate it.
        multiplies: Whether the layers between resolutions have more channels than they are given.
    """

    decoder: bool
    channels: int
    stem: int
    widths: list[int]
    attended: list[list[bool]]
    middle: list[bool] | None = None
    adaptive: bool = False
    multiplies: bool = False

    def sizes(self, z_channels: int) -> dict[str, Any]:
        """Arguments of `GSQEncoder` and `GSQDecoder`."""
        step = -1 if self.decoder else 1
        widths, attended = self.widths[::step], self.attended[::step]
        base = gcd(*widths)
        *finer, coarsest = attended
        kinds = [set(each) for each in finer]
        count, middle, coarsest_attends, middle_attends = self._split(coarsest)
        if any(len(kind) > 1 for kind in kinds):
            raise ValueError(f"self-attention follows some blocks of a resolution, not all: {attended}")
        kinds.append({coarsest_attends} if count else set())
        return {
            "channels": self.channels,
            "base_channels": base,
            "channel_multipliers": [width // base for width in widths],
            "num_blocks": [*map(len, finer), count],
            "middle_blocks": middle,
            "attention_factors": [2**level for level, kind in enumerate(kinds) if True in kind],
            "middle_attention": middle_attends,
            "z_channels": z_channels,
            **({} if self.decoder or self.stem == widths[0] else {"stem_channels": self.stem}),
        }

    def _split(self, coarsest: list[bool]) -> tuple[int, int, bool, bool]:
        """Numbers of blocks of the coarsest resolution and in the middle, and which of them attend."""
        blocks = coarsest if self.middle is None else [*self.middle, *coarsest]
        possible = range(len(blocks) + 1) if self.middle is None else [len(self.middle)]
        for middle, middle_attends, coarsest_attends in product(possible, (False, True), (False, True)):
            count = len(blocks) - middle
            first, second = ([middle_attends] * (middle - 1) + [False]) if middle else [], [coarsest_attends] * count
            if blocks == (first + second if self.decoder else second + first):
                return count, middle, coarsest_attends, middle_attends
        raise ValueError(f"self-attention follows some of the blocks at the coarsest resolution, not all: {blocks}")


def _describe(checkpoint: Checkpoint, part: str) -> Trunk:
    width, channels = checkpoint.shape(f"{part}.conv_in.weight")[:2]
    if part == "decoder":
        channels = checkpoint.shape("decoder.final_layers.2.weight")[0]
    trunk = Trunk(part == "decoder", channels, width, [width], [[]])
    for number in range(len(checkpoint.tensors)):
        block = f"{part}.blocks.{number}."
        if block + "net.6.weight" in checkpoint:
            out_channels, in_channels = checkpoint.shape(block + "net.2.weight")[:2]
            trunk.widths[-1] = out_channels
            if out_channels == in_channels:
                trunk.attended[-1].append(False)
        elif block + "qkv_conv.weight" in checkpoint:
            if not trunk.attended[-1]:
                raise ValueError(f"{block[:-1]} is self-attention that follows no residual block")
            trunk.attended[-1][-1] = True
        elif block + "conv.weight" in checkpoint:
            out_channels, in_channels = checkpoint.shape(block + "conv.weight")[:2]
            trunk.multiplies = out_channels > in_channels
            trunk.widths.append(trunk.widths[-1])
            trunk.attended.append([])
        elif block + "gamma.weight" in checkpoint:
            if not trunk.adaptive:
                trunk.middle, trunk.attended[-1] = trunk.attended[-1], []
            trunk.adaptive = True
        else:
            break
    return trunk


FAMILY = Family(
    name="gsq",
    title="GSQ, https://github.com/HelmholtzAI-FZJ/flex_gen",
    marks=("encoder.fianl_layers.2.weight", "quantizers.codebook.weight"),
    convert=convert,
    # Of the many in the collection grouped-spherical-quantization, those that the repository and its issues name.
    published=tuple(
        Published(name.lower(), f"HelmholtzAI-FZJ/GSQ-{name}") for name in ("F8-D8-V64k", "F8-D64-G16-V8k")
    ),
)
