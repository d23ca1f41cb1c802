"""Convolutional decoder of Cosmos for images: the mirror image of `vistok.encoder.CosmosEncoder`."""

from collections.abc import Sequence
from functools import partial

from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from vistok.decoder.cnn import ConvolutionalDecoder
from vistok.layers import (
    AttentionBlock,
    ResidualBlock,
    Upsample,
    attention_levels,
    middle_blocks,
    normalisation,
    refining_blocks,
    trunk_widths,
)
from vistok.layers.wavelet import check_patching, from_patches, halvings


class CosmosDecoder(ConvolutionalDecoder):
    """Residual blocks in front of an inverse wavelet transform; the first levels double the grid.

    Args:
        channels: Channels of an image.
        patch_size: Side of the patches, in pixels.
        patching: ``haar``: means and differences; ``fold``: depth to space; ``none``, with ``patch_size=1``.
        factor: Pixels per feature along each axis, `patch_size` times a power of 2; null: every level but the
            coarsest doubles the grid.
        base_channels: Unit of `channel_multipliers`, a multiple of 32.
        channel_multipliers: Channels of each level from finest to coarsest, in units of `base_channels`.
        num_blocks: Residual blocks per level.
        attention: ``none``, ``middle``, ``last`` or a list of resolutions, as for `vistok.encoder.CNNEncoder`.
        image_size: Side of the images that a list of resolutions is stated for, in pixels.
        z_channels: Channels of the features; null: those of the coarsest level.
        dropout: Dropout rate inside the residual blocks.
        gradient_checkpointing: Compute the activations of each block again in the backward pass.
    """

    def __init__(
        self,
        channels: int = 3,
        patch_size: int = 4,
        patching: str = "haar",
        factor: int | None = 16,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (2, 4, 4),
        num_blocks: int = 3,
        attention: str | Sequence[int] = "middle",
        image_size: int | None = None,
        z_channels: int | None = 256,
        dropout: float = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        widths = trunk_widths(channels, base_channels, channel_multipliers, num_blocks, z_channels, patch_size)
        check_patching(patch_size, patching)
        count = halvings("factor", factor, patch_size, len(widths), len(widths))
        levels = attention_levels(attention, len(widths), patch_size, image_size)
        super().__init__(channels, 1, 1, gradient_checkpointing)
        self.factor = patch_size << count
        self.from_patches = partial(from_patches, patch_size=patch_size, patching=patching)
        self.dim = z_channels or widths[-1]
        block = partial(ResidualBlock, dropout=dropout)
        attend = None if attention == "none" else AttentionBlock
        steps = iter([Upsample] * count + [nn.Identity] * (len(widths) - 1 - count))
        self.conv_in = nn.Conv2d(self.dim, widths[-1], 3, padding=1)
        self.blocks = nn.Sequential(
            *middle_blocks(widths[-1], block, attend, middle=True),
            *refining_blocks(widths, num_blocks, block, lambda width: next(steps)(width), levels=levels),
            *([Upsample(widths[0])] if count == len(widths) else []),
        )
        self.norm_out = normalisation(widths[0])
        self.conv_out = nn.Conv2d(widths[0], channels * patch_size**2, 3, padding=1)

    @override
    def forward(
        self,
        features: Float[Tensor, "b e h w"],
        codes: Float[Tensor, "b d h w"] | None = None,
        size: Sequence[int] | None = None,
    ) -> Float[Tensor, "b c H W"]:
        """Images of the size of the grid times `factor`; `codes` are not needed, `size` is only checked."""
        return self.from_patches(super().forward(features, codes, size))
