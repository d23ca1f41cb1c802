"""Convolutional decoder of MAGVIT-v2 for images, as in Open-MAGVIT2; sources as in `vistok.encoder.magvit2`."""

from collections.abc import Sequence
from functools import partial

from torch import nn

from vistok.decoder.cnn import ConvolutionalDecoder
from vistok.layers import (
    AdaptiveGroupNorm,
    DepthToSpaceUpsample,
    ResidualBlock,
    normalisation,
    refining_blocks,
    trunk_widths,
)


class MAGVIT2Decoder(ConvolutionalDecoder):
    """Residual blocks without biases, depth to space between resolutions, no attention.

    Every resolution begins with a normalisation that the codes of the whole image scale and shift.

    Args:
        channels: Channels of an image.
        base_channels: Channels at the finest resolution, a multiple of 32.
        channel_multipliers: Channels of each resolution from finest to coarsest, in units of `base_channels`.
        num_blocks: Residual blocks per resolution, and in the middle.
        z_channels: Channels of the features; null: those of the coarsest resolution.
        adaptive_norm: Whether the codes modulate the decoder. SimVQ, which has the same trunk, is without.
        dropout: Dropout rate inside the residual blocks.
        gradient_checkpointing: Compute the activations of each block again in the backward pass.
    """

    def __init__(
        self,
        channels: int = 3,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        num_blocks: int = 4,
        z_channels: int | None = 18,
        adaptive_norm: bool = True,
        dropout: float = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        widths = trunk_widths(channels, base_channels, channel_multipliers, num_blocks, z_channels)
        super().__init__(channels, 1, len(widths), gradient_checkpointing)
        width = widths[-1]
        self.dim = z_channels or width
        block = partial(ResidualBlock, dropout=dropout, bias=False)
        entry = AdaptiveGroupNorm if adaptive_norm else None
        self.conv_in = nn.Conv2d(self.dim, width, 3, padding=1)
        self.blocks = nn.Sequential(
            *(block(width, width) for _ in range(num_blocks)),
            *refining_blocks(widths, num_blocks, block, DepthToSpaceUpsample, entry=entry),
        )
        self.norm_out = normalisation(widths[0])
        self.conv_out = nn.Conv2d(widths[0], channels, 3, padding=1)
