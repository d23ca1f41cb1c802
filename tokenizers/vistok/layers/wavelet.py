"""Patches of images and videos: Haar wavelets or space to depth.

NVIDIA: Cosmos World Foundation Model Platform for Physical AI, https://arxiv.org/abs/2501.03575, section 4.
"""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from vistok.layers.patches import fold_patches, unfold_patches

PATCHINGS = ("none", "fold", "haar")
# Axes of height and width, or time, height and width, in the order in which the bands are made.
AXES = {4: (3, 2), 5: (2, 3, 4)}


def check_patching(patch_size: int, patching: str) -> None:
    """Refuse a patching that does not exist, or a patch size that it does not have."""
    if patching not in PATCHINGS:
        raise ValueError(f"patching must be one of {', '.join(PATCHINGS)}; got {patching!r}")
    if (patch_size == 1) != (patching == "none"):
        raise ValueError(
            f"patching={patching} and patch_size={patch_size} do not fit: patching=none has patches of 1 pixel, and "
            "nothing else has"
        )
    if patching == "haar" and patch_size & (patch_size - 1):
        raise ValueError(f"patching=haar halves the sides, so patch_size must be a power of 2, got {patch_size}")


def to_patches(images: Float[Tensor, "b c *size"], patch_size: int, patching: str) -> Float[Tensor, "b e *grid"]:
    """Move every patch of images ``(b c H W)`` or videos ``(b c T H W)`` into the channels of one position.

    Args:
        images: Each axis a multiple of `patch_size`.
        patch_size: Side of the patches, in frames too.
        patching: ``fold`` keeps the values, channel-major; ``haar`` turns them into means and differences along each
            axis, band-major, ``log2(patch_size)`` times over all bands; ``none`` returns the images.
    """
    if patching == "haar":
        while patch_size > 1:
            images, patch_size = haar(images), patch_size // 2
        return images
    if patching == "none":
        return images
    if images.ndim == 4:
        return fold_patches(images, patch_size)
    p = patch_size
    return rearrange(images, "b c (t s) (h p) (w q) -> b (c s p q) t h w", s=p, p=p, q=p)


def from_patches(patches: Float[Tensor, "b e *grid"], patch_size: int, patching: str) -> Float[Tensor, "b c *size"]:
    """Inverse of `to_patches`."""
    if patching == "haar":
        while patch_size > 1:
            patches, patch_size = inverse_haar(patches), patch_size // 2
        return patches
    if patching == "none":
        return patches
    if patches.ndim == 4:
        return unfold_patches(patches, patch_size)
    p = patch_size
    return rearrange(patches, "b (c s p q) t h w -> b c (t s) (h p) (w q)", s=p, p=p, q=p)


def haar(images: Float[Tensor, "b c *size"]) -> Float[Tensor, "b e *half"]:
    """One step of the Haar transform, so scaled that the first band is the mean: half the side of every axis.

    The bands follow one another as channels. Of images: mean, difference along height, along width, along both. Of
    videos the difference along width comes first, then that along height, then that along time.
    """
    bands = [images]
    for axis in AXES[images.ndim]:
        pairs = [band.unflatten(axis, (-1, 2)).unbind(axis + 1) for band in bands]
        bands = [half for first, second in pairs for half in ((first + second) / 2, (first - second) / 2)]
    return torch.cat(bands, 1)


def inverse_haar(bands: Float[Tensor, "b e *half"]) -> Float[Tensor, "b c *size"]:
    """Inverse of `haar`."""
    axes = AXES[bands.ndim]
    parts = list(bands.chunk(2 ** len(axes), 1))
    for axis in reversed(axes):
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [torch.stack((low + high, low - high), axis + 1).flatten(axis, axis + 1) for low, high in pairs]
    return parts[0]


def halvings(name: str, factor: int | None, patch_size: int, num_levels: int, most: int | None = None) -> int:
    """How often a trunk of `num_levels` behind patches halves its grid.

    Args:
        name: What the caller names `factor`.
        factor: Pixels or frames per feature along an axis; None: each level but the last halves the grid.
        patch_size: Pixels or frames per patch.
        num_levels: Resolutions of the trunk; some may be equal.
        most: How often at most; None: all levels but the last can.

    Raises:
        ValueError: If `factor` is not `patch_size` times a power of 2, or there are too few levels.
    """
    if factor is None:
        return num_levels - 1
    ratio, rest = divmod(factor, patch_size)
    if rest or ratio < 1 or ratio & (ratio - 1):
        raise ValueError(
            f"{name} must be patch_size times a power of 2, got {name}={factor} with patch_size={patch_size}"
        )
    count = ratio.bit_length() - 1
    most = num_levels - 1 if most is None else most
    if count > most:
        raise ValueError(
            f"{name}={factor} with patch_size={patch_size} halves the grid {count} times, which needs "
            f"{count + num_levels - most} or more levels, got {num_levels}: give channel_multipliers one entry per "
            "level"
        )
    return count
