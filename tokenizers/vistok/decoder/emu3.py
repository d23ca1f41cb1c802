"""Convolutional decoder of Emu3, for images; sources as in `vistok.layers.emu3`."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from vistok.decoder.movq import MoVQDecoder
from vistok.layers.emu3 import BatchNormBlock, time_halvings


class Emu3Decoder(MoVQDecoder):
    """A `MoVQDecoder`, and before it what the first of `frames` frames sees of layers over time.

    Features and codes both pass through these layers. Codes of another number of channels than the features
    pass through a 1x1 convolution first; Emu3 has as many.

    Args:
        channels: Channels of an image.
        base_channels: Channels at the finest resolution, a multiple of 32.
        channel_multipliers: Channels of each resolution from finest to coarsest, in units of `base_channels`.
        num_blocks: Residual blocks per resolution.
        attention: As for `vistok.decoder.CNNDecoder`.
        resolution: As for `vistok.decoder.CNNDecoder`.
        z_channels: Channels of the features; null: those of the coarsest resolution.
        frames: Frames of a video that the layers over time make of one code, a power of 2.
        time_blocks: Residual blocks before the convolutions over time.
        dropout: Dropout rate inside the residual blocks of the trunk.
        gradient_checkpointing: Compute the activations of each block of the trunk again in the backward pass.
    """

    def __init__(
        self,
        channels: int = 3,
        base_channels: int = 256,
        channel_multipliers: Sequence[int] = (1, 2, 2, 4),
        num_blocks: int = 3,
        attention: str | Sequence[int] = "last",
        resolution: int | None = None,
        z_channels: int | None = 4,
        frames: int = 4,
        time_blocks: int = 2,
        dropout: float = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        doublings = time_halvings(frames, time_blocks)
        super().__init__(
            channels,
            1,
            base_channels,
            channel_multipliers,
            num_blocks,
            attention,
            resolution,
            z_channels=z_channels,
            dropout=dropout,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.time_blocks = nn.Sequential(*(BatchNormBlock(self.dim) for _ in range(time_blocks)))
        self.time_convs = nn.ModuleList(nn.Conv2d(self.dim, self.dim, 3, padding=1) for _ in range(doublings))

    @override
    def set_code_dim(self, code_dim: int) -> None:
        super().set_code_dim(self.dim)
        self.from_codes = nn.Identity() if code_dim == self.dim else nn.Conv2d(code_dim, self.dim, 1)

    @override
    def forward(
        self,
        features: Float[Tensor, "b e h w"],
        codes: Float[Tensor, "b d h w"] | None = None,
        size: Sequence[int] | None = None,
    ) -> Float[Tensor, "b c H W"]:
        if codes is not None and self.code_dim is not None:
            both = self.time_blocks(torch.cat([features, self.from_codes(codes)]))
            for conv in self.time_convs:
                both = F.silu(conv(both))
            features, codes = both.chunk(2)
        return super().forward(features, codes, size)
