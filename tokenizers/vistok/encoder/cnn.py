"""Convolutional encoder: the residual trunk of VQGAN, optionally behind a patch fold.

P. Esser, R. Rombach, B. Ommer: Taming Transformers for High-Resolution Image Synthesis, https://arxiv.org/abs/2012.09841.
Latent diffusion, LlamaGen, VAR, RQ-VAE and IBQ have the same trunk. Folding patches into channels first (``patch_size``
above 1) makes a step many times cheaper than convolving at full resolution.
"""

from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from vistok.encoder.base import Encoder
from vistok.layers import (
    AttentionBlock,
    Downsample,
    PoolingDownsample,
    ResidualBlock,
    attends_in_the_middle,
    attention_levels,
    check_feature_patches,
    coarsening_blocks,
    fold_patches,
    middle_blocks,
    normalisation,
    recompute,
    trunk_widths,
)


class ConvolutionalEncoder(Encoder):
    """What convolutional encoders share: a convolution, blocks, normalisation, swish, a convolution.

    Args:
        channels: Channels of an image.
        patch_size: Side of the patches that are folded into channels first, in pixels.
        num_levels: Number of resolutions.
        gradient_checkpointing: Compute the activations of each block again in the backward pass.
    """

    conv_in: nn.Conv2d
    blocks: nn.Sequential
    norm_out: nn.GroupNorm
    conv_out: nn.Module

    def __init__(self, channels: int, patch_size: int, num_levels: int, gradient_checkpointing: bool) -> None:
        super().__init__()
        self.channels = channels
        self.patch_size = patch_size
        self.factor = patch_size * 2 ** (num_levels - 1)
        self.gradient_checkpointing = gradient_checkpointing

    @override
    def forward(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b e h w"]:
        """Features of images; the grid is the image size over `factor`."""
        return self.conv_out(F.silu(self.norm_out(self.coarsen(images))))

    def coarsen(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b e h w"]:
        """What the blocks make of images."""
        features = self.conv_in(fold_patches(images, self.patch_size))
        for block in self.blocks:
            features = recompute.call(block, features, gradient_checkpointing=self.gradient_checkpointing)
        return features


class CNNEncoder(ConvolutionalEncoder):
    """Residual blocks at one or more resolutions; each further resolution halves the grid.

    The factor is ``patch_size * 2 ** (len(channel_multipliers) - 1)``.

    Args:
        channels: Channels of an image.
        patch_size: Side of the patches that are folded into channels first, in pixels; 1 convolves at full resolution.
        base_channels: Channels at the first resolution, a multiple of 32.
        channel_multipliers: Channels of each resolution, in units of `base_channels`.
        num_blocks: Residual blocks per resolution.
        attention: ``none``; ``middle`` for self-attention in the middle, which follows the last resolution; ``last``
            for self-attention at the last resolution too (LlamaGen, VAR); or a list such as ``[16]``, for
            self-attention in the middle and wherever an image of `resolution` pixels has a feature grid of such a side
            (taming, latent diffusion).
        resolution: Side of the images that a list is stated for, in pixels; others are taken too.
        middle: Whether there are residual blocks in the middle; null: if there is attention.
        middle_attention: Whether there is self-attention between them; null: if there is attention anywhere.
        stem_channels: Channels of the first convolution; null: those of the first resolution.
        resample_with_conv: Whether strided convolutions halve the grid; otherwise means of 2x2 positions do.
        num_groups: Groups of the normalisations.
        unit_range: Whether the convolutions see images in [0, 1], whose padding with zeros is black (openMUSE); the
            encoder takes images in [-1, 1] all the same.
        z_channels: Channels of the features, made by a last 3x3 convolution; null: there is none, and they are those of
            the last resolution.
        feature_patch_size: Side of the patches of features that are folded into channels at the end, so that a code
            stands for several of them (RQ-VAE with a code shape below its latent shape).
        dropout: Dropout rate inside the residual blocks.
        gradient_checkpointing: Compute the activations of each block again in the backward pass.
    """

    def __init__(
        self,
        channels: int = 3,
        patch_size: int = 8,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (1,),
        num_blocks: int = 2,
        attention: str | Sequence[int] = "none",
        resolution: int | None = None,
        middle: bool | None = None,
        middle_attention: bool | None = None,
        stem_channels: int | None = None,
        resample_with_conv: bool = True,
        num_groups: int = 32,
        unit_range: bool = False,
        z_channels: int | None = None,
        feature_patch_size: int = 1,
        dropout: float = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        widths = trunk_widths(channels, base_channels, channel_multipliers, num_blocks, z_channels, patch_size)
        levels = attention_levels(attention, len(widths), patch_size, resolution)
        super().__init__(channels, patch_size, len(widths), gradient_checkpointing)
        width = widths[-1]
        check_feature_patches(feature_patch_size)
        self.feature_patch_size = feature_patch_size
        self.factor *= feature_patch_size
        self.dim = (z_channels or width) * feature_patch_size**2
        self.unit_range = unit_range
        in_the_middle = attends_in_the_middle(attention, middle_attention)
        norm = partial(normalisation, num_groups=num_groups)
        block = partial(ResidualBlock, dropout=dropout, norm=norm)
        attend = partial(AttentionBlock, norm=norm)
        halve = Downsample if resample_with_conv else PoolingDownsample
        stem = stem_channels or widths[0]
        self.conv_in = nn.Conv2d(channels * patch_size**2, stem, 3, padding=1)
        self.blocks = nn.Sequential(
            *coarsening_blocks(widths, num_blocks, block, halve, attend, levels, stem),
            *middle_blocks(width, block, attend if in_the_middle else None, middle),
        )
        self.norm_out = norm(width)
        self.conv_out = nn.Conv2d(width, z_channels, 3, padding=1) if z_channels else nn.Identity()

    @override
    def forward(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b e h w"]:
        features = super().forward(images / 2 + 0.5 if self.unit_range else images)
        return features if self.feature_patch_size == 1 else fold_patches(features, self.feature_patch_size)
