"""Convolutional decoder of GSQ, with a number of blocks for each resolution; sources as in `vistok.encoder.gsq`."""

from collections.abc import Sequence
from functools import partial

from torch import nn

from vistok.decoder.cnn import ConvolutionalDecoder
from vistok.layers import (
    AdaptiveGroupNorm,
    AttentionBlock,
    DepthToSpaceUpsample,
    ResidualBlock,
    Upsample,
    trunk_widths,
)
from vistok.layers.convolution import attended_levels, blocks_per_level, default_normalisation, middle_of

UPSAMPLES = {"depth_to_space": DepthToSpaceUpsample, "nearest": Upsample}


class GSQDecoder(ConvolutionalDecoder):
    """Residual blocks from the coarsest resolution to the finest.

    Args:
        channels: Channels of an image.
        base_channels: Channels at the finest resolution, a multiple of 32.
        channel_multipliers: Channels of each resolution from finest to coarsest, in units of `base_channels`.
        num_blocks: Residual blocks of each resolution from finest to coarsest, besides those that change the number of
            channels.
        middle_blocks: Residual blocks that precede the coarsest resolution.
        attention_factors: Factors by which grids are coarser than the image, such as ``[8]``, where self-attention
            follows every residual block that keeps the number of channels.
        middle_attention: Whether there is self-attention between the blocks in the middle.
        z_channels: Channels of the features; null: those of the coarsest resolution.
        adaptive_norm: Whether every resolution begins with a normalisation that the codes scale and shift.
        upsample: ``depth_to_space``, or ``nearest`` neighbours and a convolution.
        dropout: Dropout rate inside the residual blocks.
        gradient_checkpointing: Compute the activations of each block again in the backward pass.
    """

    def __init__(
        self,
        channels: int = 3,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 2, 2, 4),
        num_blocks: Sequence[int] = (4, 4, 3, 4),
        middle_blocks: int = 3,
        attention_factors: Sequence[int] = (),
        middle_attention: bool = False,
        z_channels: int | None = 64,
        adaptive_norm: bool = True,
        upsample: str = "depth_to_space",
        dropout: float = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        counts = blocks_per_level(num_blocks, middle_blocks, len(channel_multipliers))
        levels = attended_levels(attention_factors, len(channel_multipliers))
        widths = trunk_widths(channels, base_channels, channel_multipliers, 1, z_channels)
        if upsample not in UPSAMPLES:
            raise ValueError(f"upsample must be {' or '.join(UPSAMPLES)}, got {upsample!r}")
        super().__init__(channels, 1, len(widths), gradient_checkpointing)
        width = widths[-1]
        self.dim = z_channels or width
        block = partial(ResidualBlock, dropout=dropout, norm=default_normalisation)
        self.conv_in = nn.Conv2d(self.dim, width, 3, padding=1)
        layers = middle_of(width, middle_blocks, block, middle_attention)
        for level in reversed(range(len(widths))):
            if adaptive_norm:
                layers.append(AdaptiveGroupNorm(width))
            if widths[level] != width:
                layers.append(block(width, widths[level]))
            width = widths[level]
            for _ in range(counts[level]):
                layers.append(block(width, width))
                if level in levels:
                    layers.append(AttentionBlock(width))
            if level:
                layers.append(UPSAMPLES[upsample](width))
        self.blocks = nn.Sequential(*layers)
        self.norm_out = default_normalisation(width)
        self.conv_out = nn.Conv2d(width, channels, 3, padding=1)
