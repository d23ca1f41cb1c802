"""Convolutional encoder of MAGVIT-v2 for images, as in Open-MAGVIT2.

L. Yu et al.: Language Model Beats Diffusion: Tokenizer is Key to Visual Generation, https://arxiv.org/abs/2310.05737;
Z. Luo et al.: Open-MAGVIT2, https://arxiv.org/abs/2409.04410.
"""

from collections.abc import Sequence
from functools import partial

from torch import nn

from vistok.encoder.cnn import ConvolutionalEncoder
from vistok.layers import ResidualBlock, coarsening_blocks, normalisation, trunk_widths


class MAGVIT2Encoder(ConvolutionalEncoder):
    """Residual blocks without biases, strided convolutions between resolutions, no attention.

    Unlike in the trunk of VQGAN the strided convolutions are padded on all sides, and a 1x1 convolution makes the
    features. The factor is ``2 ** (len(channel_multipliers) - 1)``. It was published without projections: with
    ``z_channels`` equal to the channels of the codes use ``tokenizer.projection=none``.

    Args:
        channels: Channels of an image.
        base_channels: Channels at the first resolution, a multiple of 32.
        channel_multipliers: Channels of each resolution, in units of `base_channels`.
        num_blocks: Residual blocks per resolution, and in the middle.
        stem_channels: Channels of the first convolution; null: those of the first resolution.
        z_channels: Channels of the features.
        dropout: Dropout rate inside the residual blocks.
        gradient_checkpointing: Compute the activations of each block again in the backward pass.
    """

    def __init__(
        self,
        channels: int = 3,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        num_blocks: int = 4,
        stem_channels: int | None = None,
        z_channels: int = 18,
        dropout: float = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        widths = trunk_widths(channels, base_channels, channel_multipliers, num_blocks, z_channels)
        super().__init__(channels, 1, len(widths), gradient_checkpointing)
        width = widths[-1]
        self.dim = z_channels
        block = partial(ResidualBlock, dropout=dropout, bias=False)
        stem = stem_channels or widths[0]
        self.conv_in = nn.Conv2d(channels, stem, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(
            *coarsening_blocks(
                widths,
                num_blocks,
                block,
                lambda width: nn.Conv2d(width, width, 3, stride=2, padding=1),
                stem_width=stem,
            ),
            *(block(width, width) for _ in range(num_blocks)),
        )
        self.norm_out = normalisation(width)
        self.conv_out = nn.Conv2d(width, z_channels, 1)
