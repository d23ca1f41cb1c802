"""Building blocks that encoders and decoders share."""

from vistok.layers.convolution import (
    AttentionBlock,
    DepthToSpaceUpsample,
    Downsample,
    MaskGITResidualBlock,
    ResidualBlock,
    Upsample,
    attention_levels,
    coarsening_blocks,
    middle_blocks,
    normalisation,
    refining_blocks,
    trunk_widths,
)
from vistok.layers.modulation import AdaptiveGroupNorm, CodeNorm, SpatialNorm, takes_codes
from vistok.layers.patches import fold_patches, unfold_patches

__all__ = [
    "AdaptiveGroupNorm",
    "AttentionBlock",
    "CodeNorm",
    "DepthToSpaceUpsample",
    "Downsample",
    "MaskGITResidualBlock",
    "ResidualBlock",
    "SpatialNorm",
    "Upsample",
    "attention_levels",
    "coarsening_blocks",
    "fold_patches",
    "middle_blocks",
    "normalisation",
    "refining_blocks",
    "takes_codes",
    "trunk_widths",
    "unfold_patches",
]
