"""Convolutional decoder: the mirror image of `vistok.encoder.CNNEncoder`."""

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from vistok.decoder.base import Decoder
from vistok.layers import AttentionBlock, ResidualBlock, Upsample, check_trunk, normalisation, unfold_patches


class CNNDecoder(Decoder):
    """Residual blocks from the coarsest resolution to the finest.

    Args:
        channels: Channels of an image.
        patch_size: Side of the patches that the last layer unfolds, in pixels.
        base_channels: Channels at the finest resolution, a multiple of 32.
        channel_multipliers: Channels of each resolution from finest to coarsest, in units of `base_channels`.
        num_blocks: Residual blocks per resolution.
        attention: ``none``, or ``last`` for self-attention in the middle and at the coarsest resolution.
        dropout: Dropout rate inside the residual blocks.
    """

    def __init__(
        self,
        channels: int = 3,
        patch_size: int = 8,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (1,),
        num_blocks: int = 3,
        attention: str = "none",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_trunk(channels, patch_size, channel_multipliers, attention)
        self.channels = channels
        self.patch_size = patch_size
        widths = [base_channels * multiplier for multiplier in channel_multipliers]
        self.factor = patch_size * 2 ** (len(widths) - 1)
        width = self.dim = widths[-1]
        self.conv_in = nn.Conv2d(width, width, 3, padding=1)
        layers: list[nn.Module] = []
        if attention == "last":
            layers += [
                ResidualBlock(width, width, dropout),
                AttentionBlock(width),
                ResidualBlock(width, width, dropout),
            ]
        for level in reversed(range(len(widths))):
            for _ in range(num_blocks):
                layers.append(ResidualBlock(width, widths[level], dropout))
                width = widths[level]
                if attention == "last" and level == len(widths) - 1:
                    layers.append(AttentionBlock(width))
            if level:
                layers.append(Upsample(width))
        self.blocks = nn.Sequential(*layers)
        self.norm_out = normalisation(width)
        self.conv_out = nn.Conv2d(width, channels * patch_size**2, 3, padding=1)

    @override
    def forward(
        self,
        features: Float[Tensor, "b e h w"],
        codes: Float[Tensor, "b d h w"] | None = None,
        size: Sequence[int] | None = None,
    ) -> Float[Tensor, "b c H W"]:
        """Images of the size of the grid times `factor`; `codes` are not needed, `size` is only checked."""
        self.image_size(features.shape[2:], size)
        hidden = self.blocks(self.conv_in(features))
        return unfold_patches(self.conv_out(F.silu(self.norm_out(hidden))), self.patch_size)

    @property
    @override
    def last_layer(self) -> Tensor:
        return self.conv_out.weight
