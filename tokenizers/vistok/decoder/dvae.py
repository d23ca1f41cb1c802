"""Convolutional decoder of DALL-E's discrete VAE; sources as in `vistok.layers.dvae`."""

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from vistok.decoder.base import Decoder
from vistok.layers import recompute
from vistok.layers.dvae import MARGIN, BottleneckBlock, level_widths


class DVAEDecoder(Decoder):
    """The mirror image of `vistok.encoder.DVAEEncoder`, behind a 1x1 convolution; pixels are sigmoids.

    Args:
        channels: Channels of an image.
        width: Channels at the finest resolution, a multiple of 4.
        num_levels: Number of resolutions.
        num_blocks: Blocks per resolution.
        stem_width: Channels behind the first convolution.
        z_channels: Channels of the features; null: `stem_width`.
        gradient_checkpointing: Compute the activations of each block again in the backward pass.
    """

    def __init__(
        self,
        channels: int = 3,
        width: int = 256,
        num_levels: int = 4,
        num_blocks: int = 2,
        stem_width: int = 128,
        z_channels: int | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        widths = level_widths(channels, width, num_levels, num_blocks)
        if stem_width < 1 or (z_channels is not None and z_channels < 1):
            raise ValueError(
                f"stem_width and z_channels are positive numbers of channels, got {stem_width}, {z_channels}"
            )
        self.channels = channels
        self.factor = 2 ** (num_levels - 1)
        self.dim = z_channels or stem_width
        self.gradient_checkpointing = gradient_checkpointing
        gain = 1 / (num_levels * num_blocks) ** 2
        self.conv_in = nn.Conv2d(self.dim, stem_width, 1)
        self.blocks = nn.ModuleList()
        width = stem_width
        for level, next_width in enumerate(reversed(widths)):
            if level:
                self.blocks.append(nn.Upsample(scale_factor=2, mode="nearest"))
            for _ in range(num_blocks):
                self.blocks.append(BottleneckBlock(width, next_width, (1, 3, 3, 3), gain))
                width = next_width
        self.conv_out = nn.Conv2d(width, channels, 1)

    @override
    def forward(
        self,
        features: Float[Tensor, "b e h w"],
        codes: Float[Tensor, "b d h w"] | None = None,
        size: Sequence[int] | None = None,
    ) -> Float[Tensor, "b c H W"]:
        """Images of the size of the grid times `factor`, in [-1.25, 1.25]; `codes` are unused, `size` is checked."""
        self.image_size(features.shape[2:], size)
        hidden = self.conv_in(features)
        for block in self.blocks:
            hidden = recompute.call(block, hidden, gradient_checkpointing=self.gradient_checkpointing)
        return (self.conv_out(F.relu(hidden)).sigmoid() - 0.5) / (0.5 - MARGIN)

    @property
    @override
    def last_layer(self) -> Tensor:
        return self.conv_out.weight
