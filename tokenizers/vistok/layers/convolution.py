"""Blocks of the convolutional trunk of VQGAN, and the order in which trunks are made of them.

P. Esser, R. Rombach, B. Ommer: Taming Transformers for High-Resolution Image Synthesis, https://arxiv.org/abs/2012.09841.
"""

from collections.abc import Callable, Collection, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override


class GroupNorm(nn.GroupNorm):
    """Group normalisation that is in evaluation as exact in ``channels_last`` as it is otherwise.

    For that format PyTorch takes the variance on CPUs as a difference of two means, which is wrong by half of it where
    the mean is 300 times the deviation, as it gets in decoders that codes shift. Exactness costs a fifth of the time of
    a VQGAN on a CPU, so training goes without.
    """

    @override
    def forward(self, input: Float[Tensor, "b c *grid"]) -> Float[Tensor, "b c *grid"]:
        if self.training or input.device.type != "cpu" or input.is_contiguous():
            return super().forward(input)
        output = super().forward(input.contiguous())
        # The next convolution sees the format that it would see: numbers then do not depend on who set it.
        last = input.ndim == 4 and input.is_contiguous(memory_format=torch.channels_last)
        return output.contiguous(memory_format=torch.channels_last) if last else output


def normalisation(channels: int, affine: bool = True, num_groups: int = 32) -> nn.GroupNorm:
    """Group normalisation; `channels` must be a multiple of the number of groups."""
    if num_groups < 1:
        raise ValueError(f"num_groups must be a positive number of groups of channels, got {num_groups}")
    if channels % num_groups:
        raise ValueError(
            f"channels must be multiples of {num_groups} for group normalisation, got {channels}: change base_channels"
        )
    return GroupNorm(num_groups, channels, eps=1e-6, affine=affine)


def default_normalisation(channels: int) -> nn.GroupNorm:
    """`normalisation` with the `eps` that PyTorch has by default."""
    norm = normalisation(channels)
    norm.eps = 1e-5
    return norm


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each after normalisation and swish, around a skip connection.

    Args:
        in_channels: Channels it takes.
        out_channels: Channels it returns.
        dropout: Dropout rate before the second convolution.
        bias: Whether the convolutions have one.
        norm: Makes a normalisation of a number of channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dropout: float = 0.0,
        bias: bool = True,
        norm: Callable[[int], nn.Module] = normalisation,
    ) -> None:
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)
        self.norm2 = norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=bias)
        self.shortcut = (
            nn.Conv2d(in_channels, out_channels, 1, bias=bias) if in_channels != out_channels else nn.Identity()
        )

    def residual(
        self, features: Float[Tensor, "b c h w"], *codes: Float[Tensor, "b d h2 w2"]
    ) -> Float[Tensor, "b e h w"]:
        """What the block adds to its input."""
        hidden = self.conv1(F.silu(self.norm1(features, *codes)))
        return self.conv2(self.dropout(F.silu(self.norm2(hidden, *codes))))

    def forward(
        self, features: Float[Tensor, "b c h w"], *codes: Float[Tensor, "b d h2 w2"]
    ) -> Float[Tensor, "b e h w"]:
        """Same grid, ``out_channels`` channels; `codes` are passed on to normalisations that take them."""
        return self.shortcut(features) + self.residual(features, *codes)


class MaskGITResidualBlock(ResidualBlock):
    """A block without biases, and without a skip connection where the number of channels changes.

    H. Chang et al.: MaskGIT: Masked Generative Image Transformer, https://arxiv.org/abs/2202.04200. Its code applies
    the 1x1 convolution to the result of the block instead of its input, and published weights were trained so.
    """

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0) -> None:
        super().__init__(in_channels, out_channels, dropout, bias=False)
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(out_channels, out_channels, 1, bias=False)

    @override
    def forward(
        self, features: Float[Tensor, "b c h w"], *codes: Float[Tensor, "b d h2 w2"]
    ) -> Float[Tensor, "b e h w"]:
        hidden = self.residual(features, *codes)
        return self.shortcut(features if features.shape[1] == hidden.shape[1] else hidden) + hidden


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions, around a skip connection.

    Args:
        channels: Channels it takes and returns.
        norm: Makes a normalisation of a number of channels.
    """

    def __init__(self, channels: int, norm: Callable[[int], nn.Module] = normalisation) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.projection = nn.Conv2d(channels, channels, 1)

    def forward(
        self, features: Float[Tensor, "b c h w"], *codes: Float[Tensor, "b d h2 w2"]
    ) -> Float[Tensor, "b c h w"]:
        """Same shape; `codes` are passed on to a normalisation that takes them."""
        qkv = self.qkv(self.norm(features, *codes))
        query, key, value = rearrange(qkv, "b (three c) h w -> three b 1 (h w) c", three=3)
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


class PoolingDownsample(nn.AvgPool2d):
    """Halve the grid by means of 2x2 positions."""

    def __init__(self, channels: int) -> None:
        super().__init__(2)


class NearestUpsample(nn.Upsample):
    """Double the grid by nearest neighbours."""

    def __init__(self, channels: int) -> None:
        super().__init__(scale_factor=2.0, mode="nearest")


class DepthToSpaceUpsample(nn.Module):
    """Double the grid by a 3x3 convolution that predicts four positions at once.

    Its output channels are ordered as TensorFlow's ``depth_to_space`` does, position first; `torch.nn.PixelShuffle` has
    the channel first.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Twice the height and width."""
        return rearrange(self.conv(features), "b (p q c) h w -> b c (h p) (w q)", p=2, q=2)


def trunk_widths(
    channels: int,
    base_channels: int,
    channel_multipliers: Sequence[int],
    num_blocks: int,
    z_channels: int | None,
    patch_size: int = 1,
) -> list[int]:
    """Channels of each resolution, finest first; a ValueError refuses settings that no trunk has."""
    if channels not in (1, 3, 4):
        raise ValueError(f"channels must be 1, 3 or 4, got {channels}")
    if patch_size < 1:
        raise ValueError(f"patch_size must be a positive number of pixels, got {patch_size}")
    if not channel_multipliers or min(channel_multipliers) < 1:
        raise ValueError(f"channel_multipliers needs a positive integer per level, got {list(channel_multipliers)}")
    if num_blocks < 1:
        raise ValueError(f"num_blocks must be a positive number of residual blocks per resolution, got {num_blocks}")
    if z_channels is not None and z_channels < 1:
        raise ValueError(f"z_channels must be a positive number of channels, got {z_channels}")
    return [base_channels * multiplier for multiplier in channel_multipliers]


def check_feature_patches(feature_patch_size: int) -> None:
    """Refuse patches of features without features."""
    if feature_patch_size < 1:
        raise ValueError(f"feature_patch_size must be a positive number of features, got {feature_patch_size}")


def blocks_per_level(num_blocks: Sequence[int], middle_blocks: int, num_levels: int) -> list[int]:
    """Residual blocks of each resolution; a ValueError refuses lists of another length."""
    counts = list(num_blocks)
    if len(counts) != num_levels or min(counts) < 0:
        raise ValueError(f"num_blocks needs a number for each of the {num_levels} resolutions, got {counts}")
    if middle_blocks < 0:
        raise ValueError(f"middle_blocks must be a number of residual blocks, got {middle_blocks}")
    return counts


def attended_levels(factors: Sequence[int], num_levels: int) -> list[int]:
    """Levels of a trunk whose grids are coarser than the image by one of `factors`; ValueError if there is none."""
    possible = [2**level for level in range(num_levels)]
    if not set(factors) <= set(possible):
        raise ValueError(f"attention_factors={list(factors)} must be chosen from {possible}")
    return [level for level, factor in enumerate(possible) if factor in factors]


def middle_of(width: int, count: int, block: Callable[[int, int], nn.Module], attention: bool) -> list[nn.Module]:
    """Residual blocks of `width` channels, with self-attention between them where `attention` says so."""
    layers: list[nn.Module] = []
    for number in range(count):
        if attention and number:
            layers.append(AttentionBlock(width))
        layers.append(block(width, width))
    return layers


def attention_levels(
    attention: str | Sequence[int], num_levels: int, patch_size: int, resolution: int | None
) -> list[int]:
    """Levels of a trunk whose blocks are followed by self-attention; level 0 is the finest.

    Args:
        attention: ``none``, ``middle``, ``last``, or sides of the feature grids of images of `resolution` pixels.
        num_levels: Number of resolutions.
        patch_size: Pixels per feature along each axis at level 0.
        resolution: Side of the images that a list is stated for, in pixels.

    Raises:
        ValueError: If `attention` is none of these, or `resolution` is missing or without effect.
    """
    if isinstance(attention, str) or not attention:
        if attention not in ("none", "middle", "last"):
            raise ValueError(
                f"attention must be none, middle, last or a list of resolutions such as [16], got {attention!r}"
            )
        if resolution is not None:
            raise ValueError(
                f"resolution={resolution} only says which levels a list of resolutions means; with "
                f"attention={attention} it has no effect: set resolution=null"
            )
        return [num_levels - 1] if attention == "last" else []
    if resolution is None:
        raise ValueError(
            f"attention={list(attention)} are grids of images of one size: set resolution to that size, for example 256"
        )
    grids = [resolution // patch_size // 2**level for level in range(num_levels)]
    if not set(attention) <= set(grids):
        raise ValueError(
            f"attention={list(attention)} must be chosen from {grids}, the grids of images of {resolution} pixels"
        )
    return [level for level, grid in enumerate(grids) if grid in attention]


def coarsening_blocks(
    widths: Sequence[int],
    num_blocks: int,
    block: Callable[[int, int], nn.Module],
    downsample: Callable[[int], nn.Module] = Downsample,
    attention: Callable[[int], nn.Module] = AttentionBlock,
    levels: Collection[int] = (),
    stem_width: int | None = None,
) -> list[nn.Module]:
    """Blocks from the finest resolution to the coarsest.

    Args:
        widths: Channels of each resolution, finest first.
        num_blocks: Residual blocks per resolution.
        block: Makes a residual block of its input and output channels.
        downsample: Makes the layer that halves the grid.
        attention: Makes the layer that follows every residual block of `levels`.
        levels: Indices into `widths`.
        stem_width: Channels that the first block takes; None: those of the first resolution.
    """
    layers: list[nn.Module] = []
    width = stem_width or widths[0]
    for level, next_width in enumerate(widths):
        if level:
            layers.append(downsample(width))
        for _ in range(num_blocks):
            layers.append(block(width, next_width))
            width = next_width
            if level in levels:
                layers.append(attention(width))
    return layers


def refining_blocks(
    widths: Sequence[int],
    num_blocks: int,
    block: Callable[[int, int], nn.Module],
    upsample: Callable[[int], nn.Module] = Upsample,
    attention: Callable[[int], nn.Module] = AttentionBlock,
    levels: Collection[int] = (),
    entry: Callable[[int], nn.Module] | None = None,
) -> list[nn.Module]:
    """Blocks from the coarsest resolution to the finest.

    Args:
        widths: Channels of each resolution, finest first.
        num_blocks: Residual blocks per resolution.
        block: Makes a residual block of its input and output channels.
        upsample: Makes the layer that doubles the grid.
        attention: Makes the layer that follows every residual block of `levels`.
        levels: Indices into `widths`.
        entry: Makes the layer that every resolution begins with.
    """
    layers: list[nn.Module] = []
    width = widths[-1]
    for level in reversed(range(len(widths))):
        if entry is not None:
            layers.append(entry(width))
        for _ in range(num_blocks):
            layers.append(block(width, widths[level]))
            width = widths[level]
            if level in levels:
                layers.append(attention(width))
        if level:
            layers.append(upsample(width))
    return layers


def attends_in_the_middle(attention: str | Sequence[int], middle_attention: bool | None) -> bool:
    """Whether there is self-attention in the middle: a ValueError refuses what `attention` contradicts.

    Args:
        attention: As for `attention_levels`.
        middle_attention: None: if there is attention anywhere.
    """
    if middle_attention is None:
        return attention != "none"
    if attention in ("none", "middle") and middle_attention == (attention == "none"):
        raise ValueError(
            f"middle_attention={middle_attention} contradicts attention={attention}: set middle_attention=null, and "
            "attention=none or attention=middle"
        )
    return middle_attention


def middle_blocks(
    width: int,
    block: Callable[[int, int], nn.Module],
    attention: Callable[[int], nn.Module] | None,
    middle: bool | None,
) -> list[nn.Module]:
    """The blocks at the coarsest resolution, on the side of the quantizer.

    Args:
        width: Channels.
        block: Makes a residual block of its input and output channels.
        attention: Makes the layer between two residual blocks; None: there is none.
        middle: Whether there are any blocks; None: if there is attention.

    Raises:
        ValueError: If `middle` is False although there is attention.
    """
    if attention is None:
        return [block(width, width), block(width, width)] if middle else []
    if middle is False:
        raise ValueError("attention comes with blocks in the middle: set middle=null, or attention=none")
    return [block(width, width), attention(width), block(width, width)]
