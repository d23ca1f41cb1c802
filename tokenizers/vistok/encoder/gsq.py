"""Convolutional encoder of GSQ, with a number of blocks for each resolution.

J. Wang et al.: Scaling Image Tokenizers with Grouped Spherical Quantization, https://arxiv.org/abs/2412.02632;
https://github.com/HelmholtzAI-FZJ/flex_gen.
"""

from collections.abc import Sequence
from functools import partial

from torch import nn

from vistok.encoder.cnn import ConvolutionalEncoder
from vistok.layers import AttentionBlock, ResidualBlock, trunk_widths
from vistok.layers.convolution import attended_levels, blocks_per_level, default_normalisation, middle_of


class GSQEncoder(ConvolutionalEncoder):
    """Residual blocks and strided convolutions; a block of its own where the number of channels changes.

    A 1x1 convolution makes the features. It was published without projections: with ``z_channels`` equal to the
    channels of the codes use ``tokenizer.projection=none``. The factor is ``2 ** (len(channel_multipliers) - 1)``.

    Args:
        channels: Channels of an image.
        base_channels: Channels at the first resolution, a multiple of 32.
        channel_multipliers: Channels of each resolution, in units of `base_channels`.
        num_blocks: Residual blocks of each resolution, besides those that change the number of channels.
        stem_channels: Channels of the first convolution; null: those of the first resolution.
        middle_blocks: Residual blocks that follow the last resolution.
        attention_factors: Factors by which grids are coarser than the image, such as ``[8]``, where self-attention
            follows every residual block that keeps the number of channels.
        middle_attention: Whether there is self-attention between the blocks in the middle.
        z_channels: Channels of the features.
        dropout: Dropout rate inside the residual blocks.
        gradient_checkpointing: Compute the activations of each block again in the backward pass.
    """

    def __init__(
        self,
        channels: int = 3,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 2, 2, 4),
        num_blocks: Sequence[int] = (4, 3, 4, 3),
        stem_channels: int | None = None,
        middle_blocks: int = 4,
        attention_factors: Sequence[int] = (),
        middle_attention: bool = False,
        z_channels: int = 64,
        dropout: float = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        counts = blocks_per_level(num_blocks, middle_blocks, len(channel_multipliers))
        levels = attended_levels(attention_factors, len(channel_multipliers))
        widths = trunk_widths(channels, base_channels, channel_multipliers, 1, z_channels)
        super().__init__(channels, 1, len(widths), gradient_checkpointing)
        self.dim = z_channels
        block = partial(ResidualBlock, dropout=dropout, norm=default_normalisation)
        stem = stem_channels or widths[0]
        self.conv_in = nn.Conv2d(channels, stem, 3, padding=1)
        layers: list[nn.Module] = []
        width = stem
        for level, (next_width, count) in enumerate(zip(widths, counts, strict=True)):
            if level:
                layers.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
            if next_width != width:
                layers.append(block(width, next_width))
            for _ in range(count):
                layers.append(block(next_width, next_width))
                if level in levels:
                    layers.append(AttentionBlock(next_width))
            width = next_width
        self.blocks = nn.Sequential(*layers, *middle_of(width, middle_blocks, block, middle_attention))
        self.norm_out = default_normalisation(width)
        self.conv_out = nn.Conv2d(width, z_channels, 1)
