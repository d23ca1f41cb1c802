"""Convolutional encoder of the first VQ-VAE.

A. van den Oord, O. Vinyals, K. Kavukcuoglu: Neural Discrete Representation Learning, https://arxiv.org/abs/1711.00937,
section 4.1.
"""

from itertools import pairwise

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from vistok.encoder.base import Encoder
from vistok.layers import recompute
from vistok.layers.vqvae import RectifiedResidualBlock, check_sizes


class VQVAEEncoder(Encoder):
    """Strided 4x4 convolutions with rectifiers, a 3x3 convolution, residual blocks, a rectifier; no normalisation.

    Args:
        channels: Channels of an image.
        width: Channels of the features; the first convolution has half of them.
        num_halvings: Strided convolutions; the factor is ``2 ** num_halvings``.
        num_blocks: Residual blocks.
        hidden_channels: Channels within a residual block.
        block_bias: Whether the convolutions of residual blocks have a bias.
        gradient_checkpointing: Compute the activations of each residual block again in the backward pass.
    """

    def __init__(
        self,
        channels: int = 3,
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
        self.dim = width
        self.gradient_checkpointing = gradient_checkpointing
        widths = [channels, width // 2, *([width] * (num_halvings - 1))]
        self.halvings = nn.ModuleList(
            nn.Conv2d(before, after, 4, stride=2, padding=1) for before, after in pairwise(widths)
        )
        self.conv = nn.Conv2d(widths[-1], width, 3, padding=1)
        self.blocks = nn.Sequential(
            *(RectifiedResidualBlock(width, hidden_channels, block_bias) for _ in range(num_blocks))
        )

    @override
    def forward(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b e h w"]:
        """Features of images; the grid is the image size over `factor`."""
        features = images
        for halving in self.halvings:
            features = F.relu(halving(features))
        features = self.conv(features)
        for block in self.blocks:
            features = recompute.call(block, features, gradient_checkpointing=self.gradient_checkpointing)
        return F.relu(features)
