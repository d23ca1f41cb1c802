"""Blocks of the convolutional trunk of VQGAN.

P. Esser, R. Rombach, B. Ommer: Taming Transformers for High-Resolution Image Synthesis, https://arxiv.org/abs/2012.09841.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn


def check_trunk(channels: int, patch_size: int, channel_multipliers: Sequence[int], attention: str) -> None:
    """Refuse settings that no trunk has, with a ValueError that says what is allowed."""
    if channels not in (1, 3, 4):
        raise ValueError(f"channels must be 1, 3 or 4, got {channels}")
    if patch_size < 1:
        raise ValueError(f"patch_size must be a positive number of pixels, got {patch_size}")
    if not channel_multipliers or min(channel_multipliers) < 1:
        raise ValueError(f"channel_multipliers needs a positive integer per level, got {list(channel_multipliers)}")
    if attention not in ("none", "last"):
        raise ValueError(f"attention must be none or last, got {attention!r}")


def normalisation(channels: int) -> nn.GroupNorm:
    """Group normalisation over 32 groups; `channels` must be a multiple of 32."""
    if channels % 32:
        raise ValueError(
            f"channels must be multiples of 32 for group normalisation, got {channels}: change base_channels"
        )
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each after normalisation and swish, around a skip connection."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = normalisation(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = normalisation(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b e h w"]:
        """Same grid, ``out_channels`` channels."""
        hidden = self.conv1(F.silu(self.norm1(features)))
        hidden = self.conv2(self.dropout(F.silu(self.norm2(hidden))))
        return self.shortcut(features) + hidden


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions, around a skip connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = normalisation(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.projection = nn.Conv2d(channels, channels, 1)

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Same shape."""
        query, key, value = rearrange(self.qkv(self.norm(features)), "b (three c) h w -> three b 1 (h w) c", three=3)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return features + self.projection(rearrange(mixed, "b 1 (h w) c -> b c h w", h=features.shape[2]))


class Downsample(nn.Module):
    """Halve the grid by a strided 3x3 convolution, padded at the right and bottom only, as VQGAN does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Half the height and width."""
        return self.conv(F.pad(features, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the grid by nearest neighbours and smooth it by a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Twice the height and width."""
        return self.conv(F.interpolate(features, scale_factor=2.0, mode="nearest"))
