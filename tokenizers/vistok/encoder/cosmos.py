"""Convolutional encoder of Cosmos for images: the trunk of VQGAN behind a wavelet transform.

NVIDIA: Cosmos World Foundation Model Platform for Physical AI, https://arxiv.org/abs/2501.03575, section 4. That of
videos is `vistok.encoder.Causal3DEncoder`.
"""

from collections.abc import Sequence
from functools import partial

from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from vistok.encoder.cnn import ConvolutionalEncoder
from vistok.layers import (
    AttentionBlock,
    Downsample,
    ResidualBlock,
    attention_levels,
    coarsening_blocks,
    middle_blocks,
    normalisation,
    trunk_widths,
)
from vistok.layers.wavelet import check_patching, halvings, to_patches


class CosmosEncoder(ConvolutionalEncoder):
    """Residual blocks behind patches; only as many levels halve the grid as `factor` asks for, the others keep it.

    With a `factor` of ``patch_size * 2 ** len(channel_multipliers)`` the coarsest level halves it as well.

    Args:
        channels: Channels of an image.
        patch_size: Side of the patches, in pixels.
        patching: ``haar``: means and differences; ``fold``: space to depth; ``none``, with ``patch_size=1``.
        factor: Pixels per feature along each axis, `patch_size` times a power of 2; null: every level but the
            coarsest halves the grid.
        base_channels: Unit of `channel_multipliers`, a multiple of 32.
        channel_multipliers: Channels of each level, in units of `base_channels`.
        num_blocks: Residual blocks per level.
        attention: ``none``, ``middle``, ``last`` or a list of resolutions, as for `vistok.encoder.CNNEncoder`.
        image_size: Side of the images that a list of resolutions is stated for, in pixels.
        z_channels: Channels of the features.
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
        num_blocks: int = 2,
        attention: str | Sequence[int] = "middle",
        image_size: int | None = None,
        z_channels: int = 256,
        dropout: float = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        widths = trunk_widths(channels, base_channels, channel_multipliers, num_blocks, z_channels, patch_size)
        check_patching(patch_size, patching)
        count = halvings("factor", factor, patch_size, len(widths), len(widths))
        levels = attention_levels(attention, len(widths), patch_size, image_size)
        super().__init__(channels, 1, 1, gradient_checkpointing)
        self.factor = patch_size << count
        self.to_patches = partial(to_patches, patch_size=patch_size, patching=patching)
        self.dim = z_channels
        block = partial(ResidualBlock, dropout=dropout)
        attend = None if attention == "none" else AttentionBlock
        steps = iter([Downsample] * count + [nn.Identity] * (len(widths) - 1 - count))
        self.conv_in = nn.Conv2d(channels * patch_size**2, base_channels, 3, padding=1)
        layers = coarsening_blocks(widths, num_blocks, block, lambda width: next(steps)(width), levels=levels)
        layers[0] = block(base_channels, widths[0])
        if count == len(widths):
            layers.append(Downsample(widths[-1]))
        self.blocks = nn.Sequential(*layers, *middle_blocks(widths[-1], block, attend, middle=True))
        self.norm_out = normalisation(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    @override
    def forward(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b e h w"]:
        """Features of images; the grid is the image size over `factor`."""
        return super().forward(self.to_patches(images))
