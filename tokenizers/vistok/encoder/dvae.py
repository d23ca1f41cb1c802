"""Convolutional encoder of DALL-E's discrete VAE; sources as in `vistok.layers.dvae`."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from vistok.encoder.base import Encoder
from vistok.layers import recompute
from vistok.layers.dvae import MARGIN, BottleneckBlock, level_widths


class DVAEEncoder(Encoder):
    """Rectified bottleneck blocks without normalisation; maxima of 2x2 positions between the resolutions.

    Each resolution has twice the channels of the one before. The factor is ``2 ** (num_levels - 1)``.

    Args:
        channels: Channels of an image.
        width: Channels at the first resolution, a multiple of 4.
        num_levels: Number of resolutions.
        num_blocks: Blocks per resolution.
        gradient_checkpointing: Compute the activations of each block again in the backward pass.
    """

    def __init__(
        self,
        channels: int = 3,
        width: int = 256,
        num_levels: int = 4,
        num_blocks: int = 2,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        widths = level_widths(channels, width, num_levels, num_blocks)
        self.channels = channels
        self.factor = 2 ** (num_levels - 1)
        self.dim = widths[-1]
        self.gradient_checkpointing = gradient_checkpointing
        gain = 1 / (num_levels * num_blocks) ** 2
        self.conv_in = nn.Conv2d(channels, width, 7, padding=3)
        self.blocks = nn.ModuleList()
        for level, next_width in enumerate(widths):
            if level:
                self.blocks.append(nn.MaxPool2d(2))
            for _ in range(num_blocks):
                self.blocks.append(BottleneckBlock(width, next_width, (3, 3, 3, 1), gain))
                width = next_width

    @override
    def forward(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b e h w"]:
        features = self.conv_in(images * (0.5 - MARGIN) + 0.5)
        for block in self.blocks:
            features = recompute.call(block, features, gradient_checkpointing=self.gradient_checkpointing)
        return F.relu(features)
