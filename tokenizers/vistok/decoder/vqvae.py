"""Convolutional decoder of the first VQ-VAE; sources as in `vistok.encoder.vqvae`."""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from vistok.decoder.base import Decoder
from vistok.layers import recompute
from vistok.layers.vqvae import RectifiedResidualBlock, check_sizes


class VQVAEDecoder(Decoder):
    """A 3x3 convolution, residual blocks and a rectifier, transposed 4x4 convolutions with rectifiers between them.

    Args:
        channels: Channels of an image.
        z_channels: Channels of the features; null: those of the residual blocks.
        width: Channels of the residual blocks; the last convolution, if there are several, has half of them.
        num_halvings: Transposed convolutions; the factor is ``2 ** num_halvings``.
        num_blocks: Residual blocks.
        hidden_channels: Channels within a residual block.
        block_bias: Whether the convolutions of residual blocks have a bias.
        gradient_checkpointing: Compute the activations of each residual block again in the backward pass.
    """

    def __init__(
        self,
        channels: int = 3,
        z_channels: int | None = None,
        width: int = 128,
        num_halvings: int = 2,
        num_blocks: int = 2,
        hidden_channels: int = 32,
        block_bias: bool = True,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(channels, width, num_halvings, num_blocks, hidden_channels)
        self.channels = channels
        self.factor = 2**num_halvings
        self.dim = z_channels or width
        self.gradient_checkpointing = gradient_checkpointing
        widths = [*([width] * (num_halvings - 1)), width // 2 if num_halvings > 1 else width, channels]
        self.conv = nn.Conv2d(self.dim, width, 3, padding=1)
        self.blocks = nn.Sequential(
            *(RectifiedResidualBlock(width, hidden_channels, block_bias) for _ in range(num_blocks))
        )
        self.doublings = nn.ModuleList(
            nn.ConvTranspose2d(before, after, 4, stride=2, padding=1) for before, after in pairwise(widths)
        )

    @override
    def forward(
        self,
        features: Float[Tensor, "b e h w"],
        codes: Float[Tensor, "b d h w"] | None = None,
        size: Sequence[int] | None = None,
    ) -> Float[Tensor, "b c H W"]:
        """Images of the size of the grid times `factor`; `codes` are not needed, `size` is only checked."""
        self.image_size(features.shape[2:], size)
        hidden = self.conv(features)
        for block in self.blocks:
            hidden = recompute.call(block, hidden, gradient_checkpointing=self.gradient_checkpointing)
        for doubling in self.doublings:
            hidden = doubling(F.relu(hidden))
        return hidden

    @property
    @override
    def last_layer(self) -> Tensor:
        last = self.doublings[-1]
        assert isinstance(last, nn.ConvTranspose2d)
        return last.weight
