"""Blocks of causal trunks of videos: what becomes of a frame does not depend on later ones.

Convolutions over three axes may be factorised: one over each frame, then one over time. The tensors ``(b c t h w)`` are
frames ``(b t) c h w`` to the first and have their pixels side by side, ``b c t (h w)``, for the second, so all weights
are those of two-dimensional convolutions.

L. Yu et al.: Language Model Beats Diffusion: Tokenizer is Key to Visual Generation (MAGVIT-v2),
https://arxiv.org/abs/2310.05737; NVIDIA: Cosmos World Foundation Model Platform for Physical AI,
https://arxiv.org/abs/2501.03575.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from vistok.layers.convolution import AttentionBlock
from vistok.layers.wavelet import check_patching, from_patches, halvings, to_patches


def by_frame(function: Callable[[Tensor], Tensor], videos: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b e t h2 w2"]:
    """Apply a function of images ``(n c h w)`` to all frames."""
    frames = function(rearrange(videos, "b c t h w -> (b t) c h w"))
    return rearrange(frames, "(b t) c h w -> b c t h w", b=len(videos))


class FrameConv(nn.Conv2d):
    """Convolution over each frame."""

    @override
    def forward(self, input: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b e t h2 w2"]:
        """Same number of frames."""
        return by_frame(super().forward, input)


class TimeConv(nn.Conv2d):
    """Convolution over a frame and the two before it; before the first frame there are copies of it.

    Args:
        channels: Channels that it takes and returns.
        stride: 2 makes ``1 + n`` frames of ``1 + 2n``.
    """

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__(channels, channels, (3, 1), stride=(stride, 1))

    @override
    def forward(self, input: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b c t2 h w"]:
        """Same height and width."""
        pixels = F.pad(input.flatten(3), (0, 0, 2, 0), mode="replicate")
        return super().forward(pixels).unflatten(3, input.shape[3:])


class FrameNorm(nn.GroupNorm):
    """Normalisation of each frame as one group; statistics of several frames would tell early ones of later ones."""

    def __init__(self, channels: int) -> None:
        super().__init__(1, channels, eps=1e-6)

    @override
    def forward(self, input: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b c t h w"]:
        """Same shape."""
        return by_frame(super().forward, input)


class CausalConv(nn.Conv3d):
    """3x3x3 convolution of a frame and the two before it; before the first frame there are copies of it."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=(0, 1, 1))

    @override
    def forward(self, input: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b e t h w"]:
        """Same grid."""
        return super().forward(F.pad(input, (0, 0, 0, 0, 2, 0), mode="replicate"))


def causal_convolution(in_channels: int, out_channels: int, factorised: bool) -> nn.Sequential:
    """A 3x3x3 convolution, as one, or as 3x3 over each frame and 3 over time."""
    if not factorised:
        return nn.Sequential(CausalConv(in_channels, out_channels))
    return nn.Sequential(FrameConv(in_channels, out_channels, 3, padding=1), TimeConv(out_channels))


class CausalResidualBlock(nn.Module):
    """Two convolutions, each after normalisation and swish, around a skip connection."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0, factorised: bool = True) -> None:
        super().__init__()
        self.norm1 = FrameNorm(in_channels)
        self.conv1 = causal_convolution(in_channels, out_channels, factorised)
        self.norm2 = FrameNorm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = causal_convolution(out_channels, out_channels, factorised)
        self.shortcut = FrameConv(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, features: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b e t h w"]:
        """Same grid, ``out_channels`` channels."""
        hidden = self.conv1(F.silu(self.norm1(features)))
        hidden = self.conv2(self.dropout(F.silu(self.norm2(hidden))))
        return self.shortcut(features) + hidden


class FrameAttention(nn.Module):
    """Single-head self-attention within each frame, around a skip connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = AttentionBlock(channels, partial(nn.GroupNorm, 1, eps=1e-6))

    def forward(self, features: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b c t h w"]:
        """Same shape."""
        return by_frame(self.block, features)


class TimeAttention(nn.Module):
    """Single-head self-attention of each position to itself and to earlier frames, around a skip connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = FrameNorm(channels)
        self.qkv = FrameConv(channels, 3 * channels, 1)
        self.projection = FrameConv(channels, channels, 1)

    def forward(self, features: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b c t h w"]:
        """Same shape."""
        qkv = self.qkv(self.norm(features))
        query, key, value = rearrange(qkv, "b (three c) t h w -> three (b h w) 1 t c", three=3)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        h, w = features.shape[3:]
        return features + self.projection(rearrange(mixed, "(b h w) 1 t c -> b c t h w", h=h, w=w))


def causal_attention(channels: int) -> nn.Sequential:
    """Self-attention within each frame, then over time."""
    return nn.Sequential(FrameAttention(channels), TimeAttention(channels))


class HybridDownsample(nn.Module):
    """Halve height and width, the frames after the first, or both: a strided convolution plus an average.

    Args:
        channels: Channels that it takes and returns.
        space: Whether to halve the height and width.
        time: Whether to make ``1 + n`` frames of ``1 + 2n``.
    """

    def __init__(self, channels: int, space: bool, time: bool) -> None:
        super().__init__()
        self.space = FrameConv(channels, channels, 3, stride=2) if space else None
        self.time = TimeConv(channels, stride=2) if time else None
        self.projection = FrameConv(channels, channels, 1)

    def forward(self, features: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b c t2 h2 w2"]:
        """Same channels."""
        if self.space is not None:
            # Padded at the right and bottom only, as VQGAN does.
            features = self.space(F.pad(features, (0, 1, 0, 1))) + F.avg_pool3d(features, (1, 2, 2))
        if self.time is not None:
            doubled = torch.cat([features[:, :, :1], features], 2)
            features = self.time(features) + F.avg_pool3d(doubled, (2, 1, 1))
        return self.projection(features)


class HybridUpsample(nn.Module):
    """Inverse of `HybridDownsample` in shape: nearest neighbours plus a convolution of them, first over time."""

    def __init__(self, channels: int, space: bool, time: bool) -> None:
        super().__init__()
        self.time = TimeConv(channels) if time else None
        self.space = FrameConv(channels, channels, 3, padding=1) if space else None
        self.projection = FrameConv(channels, channels, 1)

    def forward(self, features: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b c t2 h2 w2"]:
        """Same channels."""
        if self.time is not None:
            features = features.repeat_interleave(2, 2)[:, :, 1:]
            features = features + self.time(features)
        if self.space is not None:
            features = features.repeat_interleave(2, 3).repeat_interleave(2, 4)
            features = features + self.space(features)
        return self.projection(features)


class VideoPatches(nn.Module):
    """Patches of videos and back; the first patch in time holds the first frame only.

    Args:
        patch_size: Side of the patches in pixels, and frames per patch after the first frame if `time` is set.
        patching: ``none``, ``fold`` or ``haar``, see `vistok.layers.wavelet.to_patches`.
        time: Whether the patches extend over time.
    """

    def __init__(self, patch_size: int, patching: str, time: bool) -> None:
        super().__init__()
        check_patching(patch_size, patching)
        self.forwards = partial(to_patches, patch_size=patch_size, patching=patching)
        self.backwards = partial(from_patches, patch_size=patch_size, patching=patching)
        # Copies of the first frame that fill its patch.
        self.copies = patch_size - 1 if time else 0
        self.time = time
        # Of a patch of one channel.
        self.values = patch_size ** (3 if time else 2)

    def forward(self, videos: Float[Tensor, "b c T H W"]) -> Float[Tensor, "b e t h w"]:
        """Patches as the channels of one position."""
        if not self.time:
            return by_frame(self.forwards, videos)
        first = videos[:, :, :1].expand(-1, -1, self.copies, -1, -1)
        return self.forwards(torch.cat([first, videos], 2))

    def inverse(self, patches: Float[Tensor, "b e t h w"]) -> Float[Tensor, "b c T H W"]:
        """Videos of patches."""
        if not self.time:
            return by_frame(self.backwards, patches)
        return self.backwards(patches)[:, :, self.copies :]


def resampling(layer: Callable[[int, bool, bool], nn.Module], width: int, space: bool, time: bool) -> nn.Module:
    """A `layer` that resamples space, time or both; the identity if it is to resample neither."""
    return layer(width, space, time) if space or time else nn.Identity()


def time_halvings(time_factor: int, patch_size: int, num_levels: int) -> int:
    """How often a trunk halves the frames after the first, see `vistok.layers.wavelet.halvings`."""
    return 0 if time_factor == 1 else halvings("time_factor", time_factor, patch_size, num_levels)
