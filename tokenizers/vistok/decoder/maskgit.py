"""Convolutional decoder of MaskGIT and MaskBit; sources as in `vistok.encoder.maskgit`."""

from collections.abc import Sequence
from functools import partial

from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from vistok.decoder.cnn import ConvolutionalDecoder
from vistok.layers import MaskGITResidualBlock, normalisation, refining_blocks, trunk_widths


class MaskGITDecoder(ConvolutionalDecoder):
    """Residual blocks without biases, nearest neighbours and a convolution between resolutions, no attention.

    As published, its last convolution makes images in [0, 1]; they are returned in [-1, 1].

    Args:
        channels: Channels of an image.
        base_channels: Channels at the finest resolution, a multiple of 32.
        channel_multipliers: Channels of each resolution from finest to coarsest, in units of `base_channels`.
        num_blocks: Residual blocks per resolution, and in the middle.
        z_channels: Channels of the features; null: those of the coarsest resolution.
        dropout: Dropout rate inside the residual blocks.
        gradient_checkpointing: Compute the activations of each block again in the backward pass.
    """

    def __init__(
        self,
        channels: int = 3,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        num_blocks: int = 2,
        z_channels: int | None = 256,
        dropout: float = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        widths = trunk_widths(channels, base_channels, channel_multipliers, num_blocks, z_channels)
        super().__init__(channels, 1, len(widths), gradient_checkpointing)
        width = widths[-1]
        self.dim = z_channels or width
        block = partial(MaskGITResidualBlock, dropout=dropout)
        self.conv_in = nn.Conv2d(self.dim, width, 3, padding=1)
        self.blocks = nn.Sequential(
            *(block(width, width) for _ in range(num_blocks)), *refining_blocks(widths, num_blocks, block)
        )
        self.norm_out = normalisation(widths[0])
        self.conv_out = nn.Conv2d(widths[0], channels, 3, padding=1)

    @override
    def forward(
        self,
        features: Float[Tensor, "b e h w"],
        codes: Float[Tensor, "b d h w"] | None = None,
        size: Sequence[int] | None = None,
    ) -> Float[Tensor, "b c H W"]:
        return super().forward(features, codes, size) * 2 - 1
