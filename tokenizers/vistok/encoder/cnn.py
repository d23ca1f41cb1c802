"""Convolutional encoder: the residual trunk of VQGAN, optionally behind a patch fold.

P. Esser, R. Rombach, B. Ommer: Taming Transformers for High-Resolution Image Synthesis, https://arxiv.org/abs/2012.09841.
Folding patches into channels first (``patch_size`` above 1) makes a step many times cheaper than convolving at full
resolution.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vistok.encoder.base import Encoder
from vistok.layers import AttentionBlock, Downsample, ResidualBlock, check_trunk, fold_patches, normalisation


class CNNEncoder(Encoder):
    """Residual blocks at one or more resolutions; each further resolution halves the grid.

    The factor is ``patch_size * 2 ** (len(channel_multipliers) - 1)``.

    Args:
        channels: Channels of an image.
        patch_size: Side of the patches that are folded into channels first, in pixels; 1 convolves at full resolution.
        base_channels: Channels at the first resolution, a multiple of 32.
        channel_multipliers: Channels of each resolution, in units of `base_channels`.
        num_blocks: Residual blocks per resolution.
        attention: ``none``, or ``last`` for self-attention at the last resolution and in the middle.
        dropout: Dropout rate inside the residual blocks.
    """

    def __init__(
        self,
        channels: int = 3,
        patch_size: int = 8,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (1,),
        num_blocks: int = 2,
        attention: str = "none",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_trunk(channels, patch_size, channel_multipliers, attention)
        self.channels = channels
        self.patch_size = patch_size
        widths = [base_channels * multiplier for multiplier in channel_multipliers]
        self.factor = patch_size * 2 ** (len(widths) - 1)
        self.dim = widths[-1]
        self.conv_in = nn.Conv2d(channels * patch_size**2, widths[0], 3, padding=1)
        layers: list[nn.Module] = []
        width = widths[0]
        for level, next_width in enumerate(widths):
            if level:
                layers.append(Downsample(width))
            for _ in range(num_blocks):
                layers.append(ResidualBlock(width, next_width, dropout))
                width = next_width
                if attention == "last" and level == len(widths) - 1:
                    layers.append(AttentionBlock(width))
        if attention == "last":
            layers += [
                ResidualBlock(width, width, dropout),
                AttentionBlock(width),
                ResidualBlock(width, width, dropout),
            ]
        self.blocks = nn.Sequential(*layers)
        self.norm_out = normalisation(width)

    def forward(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b e h w"]:
        """Features of images; the grid is the image size over `factor`."""
        features = self.conv_in(fold_patches(images, self.patch_size))
        return F.silu(self.norm_out(self.blocks(features)))
