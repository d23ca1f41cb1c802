"""Convolutional encoder of MaskGIT, which is also that of MaskBit.

H. Chang et al.: MaskGIT: Masked Generative Image Transformer, https://arxiv.org/abs/2202.04200;
M. Weber et al.: MaskBit: Embedding-free Image Generation via Bit Tokens, https://arxiv.org/abs/2409.16211.
"""

from collections.abc import Sequence
from functools import partial

from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from vistok.encoder.cnn import ConvolutionalEncoder
from vistok.layers import (
    Downsample,
    MaskGITResidualBlock,
    PoolingDownsample,
    coarsening_blocks,
    normalisation,
    trunk_widths,
)


class MaskGITEncoder(ConvolutionalEncoder):
    """Residual blocks without biases, halving between resolutions, no attention.

    The factor is ``2 ** (len(channel_multipliers) - 1)``. As published, its convolutions see images in [0, 1], whose
    padding with zeros is black; it still takes images in [-1, 1]. It was published without projections: with
    ``z_channels`` equal to the channels of the codes use ``tokenizer.projection=none``.

    Args:
        channels: Channels of an image.
        base_channels: Channels at the first resolution, a multiple of 32.
        channel_multipliers: Channels of each resolution, in units of `base_channels`.
        num_blocks: Residual blocks per resolution, and in the middle.
        stem_channels: Channels of the first convolution; null: those of the first resolution.
        downsample: ``pool`` for the mean of 2x2 positions (MaskGIT) | ``conv`` for a strided convolution (MaskBit).
        z_channels: Channels of the features.
        dropout: Dropout rate inside the residual blocks.
        gradient_checkpointing: Compute the activations of each block again in the backward pass.
    """

    def __init__(
        self,
        channels: int = 3,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        num_blocks: int = 2,
        stem_channels: int | None = None,
        downsample: str = "pool",
        z_channels: int = 256,
        dropout: float = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        widths = trunk_widths(channels, base_channels, channel_multipliers, num_blocks, z_channels)
        if downsample not in ("pool", "conv"):
            raise ValueError(f"downsample must be pool or conv, got {downsample!r}")
        super().__init__(channels, 1, len(widths), gradient_checkpointing)
        width = widths[-1]
        self.dim = z_channels
        block = partial(MaskGITResidualBlock, dropout=dropout)
        halve = Downsample if downsample == "conv" else PoolingDownsample
        stem = stem_channels or widths[0]
        self.conv_in = nn.Conv2d(channels, stem, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(
            *coarsening_blocks(widths, num_blocks, block, halve, stem_width=stem),
            *(block(width, width) for _ in range(num_blocks)),
        )
        self.norm_out = normalisation(width)
        self.conv_out = nn.Conv2d(width, z_channels, 1)

    @override
    def forward(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b e h w"]:
        return super().forward(images / 2 + 0.5)
