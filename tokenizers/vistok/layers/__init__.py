"""Building blocks that encoders and decoders share."""

from vistok.layers.convolution import (
    AttentionBlock,
    DepthToSpaceUpsample,
    Downsample,
    MaskGITResidualBlock,
    NearestUpsample,
    PoolingDownsample,
    ResidualBlock,
    Upsample,
    attends_in_the_middle,
    attention_levels,
    check_feature_patches,
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
    "NearestUpsample",
    "PoolingDownsample",
    "ResidualBlock",
    "SpatialNorm",
    "Upsample",
    "attends_in_the_middle",
    "attention_levels",
    "check_feature_patches",
    "coarsening_blocks",
    "fold_patches",
    "middle_blocks",
    "normalisation",
    "refining_blocks",
    "takes_codes",
    "trunk_widths",
    "unfold_patches",
]
