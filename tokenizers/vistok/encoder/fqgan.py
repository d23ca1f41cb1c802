"""Convolutional encoder with a transformer for each of several codes, as in FQGAN.

Z. Bai et al.: Factorized Visual Tokenization and Generation, https://arxiv.org/abs/2411.16681.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from vistok.encoder.cnn import ConvolutionalEncoder
from vistok.layers import (
    AttentionBlock,
    ResidualBlock,
    coarsening_blocks,
    middle_blocks,
    normalisation,
    trunk_widths,
)
from vistok.layers.transformer import LearnedPositions, Transformer, patch_grid


class FQGANEncoder(ConvolutionalEncoder):
    """The trunk of LlamaGen, and behind it side by side a transformer for each code of a position.

    The features of the branches follow one another on the channel axis, `z_channels` of each. Put a
    `vistok.quantizer.GroupedQuantizer` of as many groups behind it; in FQGAN the first one describes visual details and
    the others learn from a teacher.

    Args:
        channels: Channels of an image.
        base_channels: Channels at the first resolution, a multiple of 32.
        channel_multipliers: Channels of each resolution, in units of `base_channels`.
        num_blocks: Residual blocks per resolution.
        stem_channels: Channels of the first convolution; null: those of the first resolution.
        branches: Number of codes of a position: 2 or 3 in FQGAN.
        image_size: Side or ``[H, W]`` of the training images, in pixels; the positions of other sizes are bicubic
            samples of those of this one.
        depth: Blocks of a transformer.
        num_heads: Attention heads of a transformer.
        mlp_ratio: Hidden channels of the perceptrons, in units of the width of the trunk.
        z_channels: Channels of the features of a branch.
        dropout: Dropout rate inside the residual blocks.
        gradient_checkpointing: Compute the activations of each block again in the backward pass.
    """

    def __init__(
        self,
        channels: int = 3,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        num_blocks: int = 2,
        stem_channels: int | None = None,
        branches: int = 2,
        image_size: int | Sequence[int] = 256,
        depth: int = 6,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        z_channels: int = 256,
        dropout: float = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        widths = trunk_widths(channels, base_channels, channel_multipliers, num_blocks, z_channels)
        if branches < 1:
            raise ValueError(f"branches must be a positive number of codes of a position, got {branches}")
        super().__init__(channels, 1, len(widths), gradient_checkpointing)
        width = widths[-1]
        self.dim = branches * z_channels
        block = partial(ResidualBlock, dropout=dropout)
        stem = stem_channels or widths[0]
        self.conv_in = nn.Conv2d(channels, stem, 3, padding=1)
        self.blocks = nn.Sequential(
            *coarsening_blocks(widths, num_blocks, block, levels=[len(widths) - 1], stem_width=stem),
            *middle_blocks(width, block, AttentionBlock, None),
        )
        grid = patch_grid(image_size, self.factor)
        self.branches = nn.ModuleList(
            Branch(
                grid,
                Transformer(width, depth, num_heads, mlp_ratio, gradient_checkpointing=gradient_checkpointing),
                z_channels,
            )
            for _ in range(branches)
        )

    @override
    def forward(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b e h w"]:
        features = self.coarsen(images)
        return torch.cat([branch(features) for branch in self.branches], 1)


class Branch(nn.Module):
    """A transformer over the positions of the grid, and a 3x3 convolution.

    Args:
        grid: Rows and columns in training.
        transformer: What the positions go through.
        out_channels: Channels it returns.
    """

    def __init__(self, grid: tuple[int, int], transformer: Transformer, out_channels: int) -> None:
        super().__init__()
        self.positions = LearnedPositions(grid, transformer.width)
        self.transformer = transformer
        self.norm_out = normalisation(transformer.width)
        self.conv_out = nn.Conv2d(transformer.width, out_channels, 3, padding=1)

    def forward(self, features: Float[Tensor, "b e h w"]) -> Float[Tensor, "b z h w"]:
        """Features of the code of this branch."""
        height, width = features.shape[2:]
        tokens = rearrange(features, "b e h w -> b (h w) e") + self.positions((height, width))
        mixed = rearrange(self.transformer(tokens), "b (h w) e -> b e h w", h=height)
        return self.conv_out(F.silu(self.norm_out(mixed)))
