"""Convolutional encoder of Emu3, for images; sources as in `vistok.layers.emu3`."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from vistok.encoder.cnn import CNNEncoder
from vistok.layers.emu3 import BatchNormBlock, time_halvings


class Emu3Encoder(CNNEncoder):
    """A `CNNEncoder`, and behind it what becomes of an image in layers over time that see it as a video.

    The video are `frames` copies of the image. Each convolution over time sees four frames, and halves their number;
    before the first frame there are zeros.

    Args:
        channels: Channels of an image.
        base_channels: Channels at the first resolution, a multiple of 32.
        channel_multipliers: Channels of each resolution, in units of `base_channels`.
        num_blocks: Residual blocks per resolution.
        attention: As for `CNNEncoder`.
        resolution: As for `CNNEncoder`.
        stem_channels: As for `CNNEncoder`.
        z_channels: Channels of the features.
        frames: Copies of the image, a power of 2.
        time_blocks: Residual blocks behind the convolutions over time.
        dropout: Dropout rate inside the residual blocks of the trunk.
        gradient_checkpointing: Compute the activations of each block of the trunk again in the backward pass.
    """

    def __init__(
        self,
        channels: int = 3,
        base_channels: int = 256,
        channel_multipliers: Sequence[int] = (1, 2, 2, 4),
        num_blocks: int = 2,
        attention: str | Sequence[int] = "last",
        resolution: int | None = None,
        stem_channels: int | None = None,
        z_channels: int = 4,
        frames: int = 4,
        time_blocks: int = 2,
        dropout: float = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        halvings = time_halvings(frames, time_blocks)
        super().__init__(
            channels,
            1,
            base_channels,
            channel_multipliers,
            num_blocks,
            attention,
            resolution,
            stem_channels=stem_channels,
            z_channels=z_channels,
            dropout=dropout,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.frames = frames
        self.time_convs = nn.ModuleList(nn.Conv2d(4 * z_channels, z_channels, 3, padding=1) for _ in range(halvings))
        self.time_blocks = nn.Sequential(*(BatchNormBlock(z_channels) for _ in range(time_blocks)))

    @override
    def forward(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b e h w"]:
        frames = [super().forward(images)] * self.frames
        for conv in self.time_convs:
            padded = [torch.zeros_like(frames[0])] * 2 + frames
            frames = [F.silu(conv(torch.cat(padded[first : first + 4], 1))) for first in range(0, len(padded) - 3, 2)]
        return self.time_blocks(frames[0])
