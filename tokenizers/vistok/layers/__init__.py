"""Building blocks that encoders and decoders share."""

from vistok.layers.convolution import (
    AttentionBlock,
    Downsample,
    ResidualBlock,
    Upsample,
    check_trunk,
    normalisation,
)
from vistok.layers.patches import fold_patches, unfold_patches

__all__ = [
    "AttentionBlock",
    "Downsample",
    "ResidualBlock",
    "Upsample",
    "check_trunk",
    "fold_patches",
    "normalisation",
    "unfold_patches",
]
