"""Causal convolutional decoder of videos: the mirror image of `vistok.encoder.Causal3DEncoder`."""

from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from vistok.decoder.base import Decoder
from vistok.layers import attention_levels, middle_blocks, recompute, refining_blocks, trunk_widths
from vistok.layers.causal3d import (
    CausalResidualBlock,
    FrameNorm,
    HybridUpsample,
    VideoPatches,
    causal_attention,
    causal_convolution,
    resampling,
    time_halvings,
)
from vistok.layers.wavelet import halvings


class Causal3DDecoder(Decoder):
    """Residual blocks of causal convolutions in front of patches of space and time.

    Frames do not depend on the features of later ones.

    Args:
        channels: Channels of an image.
        patch_size: Side of the patches in pixels, and frames per patch after the first frame if ``time_factor > 1``.
        patching: ``haar``: means and differences; ``fold``: depth to space; ``none``, with ``patch_size=1``.
        factor: Pixels per feature along each spatial axis, `patch_size` times a power of 2; null: every level but the
            coarsest doubles the grid.
        time_factor: Frames per feature after the first frame: 1, or `patch_size` times a power of 2.
        base_channels: Unit of `channel_multipliers`.
        channel_multipliers: Channels of each level from finest to coarsest, in units of `base_channels`.
        num_blocks: Residual blocks per level.
        attention: Self-attention within each frame and over time: ``none``; ``middle`` of the trunk; or ``last`` for
            the middle and the coarsest level.
        z_channels: Channels of the features; null: those of the coarsest level.
        dropout: Dropout rate inside the residual blocks.
        factorised: Whether a convolution is 3x3 over each frame and 3 over time, as in Cosmos; else 3x3x3, as in
            MAGVIT-v2 and VidTok.
        gradient_checkpointing: Compute the activations of each block again in the backward pass.
    """

    layout = "video"

    def __init__(
        self,
        channels: int = 3,
        patch_size: int = 4,
        patching: str = "haar",
        factor: int | None = 8,
        time_factor: int = 4,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (2, 4, 4),
        num_blocks: int = 3,
        attention: str = "middle",
        z_channels: int | None = 16,
        dropout: float = 0.0,
        factorised: bool = True,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        widths = trunk_widths(channels, base_channels, channel_multipliers, num_blocks, z_channels, patch_size)
        levels = attention_levels(attention, len(widths), patch_size, None)
        space = halvings("factor", factor, patch_size, len(widths))
        time = time_halvings(time_factor, patch_size, len(widths))
        self.channels = channels
        self.factor = patch_size << space
        self.time_factor = time_factor
        self.gradient_checkpointing = gradient_checkpointing
        self.dim = z_channels or widths[-1]
        self.patches = VideoPatches(patch_size, patching, time=time_factor > 1)
        block = partial(CausalResidualBlock, dropout=dropout, factorised=factorised)
        attend = None if attention == "none" else causal_attention
        # As in the published weights: time begins at the second step if there are steps enough, and space with it
        # unless it needs more of them.
        last = len(widths) - 1
        time_start = min(1, last - time)
        space_start = 0 if space > time else min(time_start, last - space)
        steps = iter(
            (space_start <= step < space_start + space, time_start <= step < time_start + time) for step in range(last)
        )
        self.conv_in = causal_convolution(self.dim, widths[-1], factorised)
        self.blocks = nn.ModuleList(
            [
                *middle_blocks(widths[-1], block, attend, middle=True),
                *refining_blocks(
                    widths,
                    num_blocks,
                    block,
                    lambda width: resampling(HybridUpsample, width, *next(steps)),
                    causal_attention,
                    levels,
                ),
            ]
        )
        self.norm_out = FrameNorm(widths[0])
        self.conv_out = causal_convolution(widths[0], self.patches.values * channels, factorised)

    @override
    def forward(
        self,
        features: Float[Tensor, "b e *grid"],
        codes: Float[Tensor, "b d *grid"] | None = None,
        size: Sequence[int] | None = None,
    ) -> Float[Tensor, "b c *size"]:
        """Images of features ``(b e h w)`` and videos of ``(b e t h w)``; `size` is only checked."""
        self.image_size(features.shape[2:], size)
        if features.ndim == 4:
            return self(features.unsqueeze(2)).squeeze(2)
        hidden = self.conv_in(features)
        for block in self.blocks:
            hidden = recompute.call(block, hidden, gradient_checkpointing=self.gradient_checkpointing)
        return self.patches.inverse(self.conv_out(F.silu(self.norm_out(hidden))))

    @property
    @override
    def last_layer(self) -> Tensor:
        layer = self.conv_out[-1]
        assert isinstance(layer, nn.Conv2d | nn.Conv3d)
        return layer.weight
