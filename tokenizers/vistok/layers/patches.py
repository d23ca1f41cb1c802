"""Space to depth and back."""

from einops import rearrange
from jaxtyping import Float
from torch import Tensor


def fold_patches(images: Float[Tensor, "b c H W"], patch_size: int) -> Float[Tensor, "b e h w"]:
    """Move every patch of ``patch_size`` x ``patch_size`` pixels into the channels of one position, channel-major."""
    return rearrange(images, "b c (h p) (w q) -> b (c p q) h w", p=patch_size, q=patch_size)


def unfold_patches(features: Float[Tensor, "b e h w"], patch_size: int) -> Float[Tensor, "b c H W"]:
    """Inverse of `fold_patches`."""
    return rearrange(features, "b (c p q) h w -> b c (h p) (w q)", p=patch_size, q=patch_size)
