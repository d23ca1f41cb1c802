"""Causal convolutional encoder of videos, the first frame of which is an image.

The form is that of Cosmos (NVIDIA: Cosmos World Foundation Model Platform for Physical AI,
https://arxiv.org/abs/2501.03575, section 4), after MAGVIT-v2 (L. Yu et al.: Language Model Beats Diffusion: Tokenizer
is Key to Visual Generation, https://arxiv.org/abs/2310.05737).
"""

from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from vistok.encoder.base import Encoder
from vistok.layers import attention_levels, coarsening_blocks, middle_blocks, recompute, trunk_widths
from vistok.layers.causal3d import (
    CausalResidualBlock,
    FrameNorm,
    HybridDownsample,
    VideoPatches,
    causal_attention,
    causal_convolution,
    resampling,
    time_halvings,
)
from vistok.layers.wavelet import halvings


class Causal3DEncoder(Encoder):
    """Residual blocks of causal convolutions behind patches of space and time.

    Features of a frame do not depend on later frames, and those of an image are those of the first frame of any video
    that begins with it. The first levels halve the grid, as many of them as `factor` and `time_factor` ask for.

    Args:
        channels: Channels of an image.
        patch_size: Side of the patches in pixels, and frames per patch after the first frame if ``time_factor > 1``.
        patching: ``haar``: means and differences; ``fold``: space to depth; ``none``, with ``patch_size=1``.
        factor: Pixels per feature along each spatial axis, `patch_size` times a power of 2; null: every level but the
            coarsest halves the grid.
        time_factor: Frames per feature after the first frame: 1, or `patch_size` times a power of 2.
        base_channels: Unit of `channel_multipliers`.
        channel_multipliers: Channels of each level, in units of `base_channels`.
        num_blocks: Residual blocks per level.
        attention: Self-attention within each frame and over time: ``none``; ``middle`` of the trunk; or ``last`` for
            the last level and the middle.
        z_channels: Channels of the features.
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
        num_blocks: int = 2,
        attention: str = "middle",
        z_channels: int = 16,
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
        self.dim = z_channels
        self.patches = VideoPatches(patch_size, patching, time=time_factor > 1)
        block = partial(CausalResidualBlock, dropout=dropout, factorised=factorised)
        attend = None if attention == "none" else causal_attention
        steps = iter((step < space, step < time) for step in range(len(widths) - 1))
        layers = coarsening_blocks(
            widths,
            num_blocks,
            block,
            lambda width: resampling(HybridDownsample, width, *next(steps)),
            causal_attention,
            levels,
        )
        layers[0] = block(base_channels, widths[0])
        self.conv_in = causal_convolution(self.patches.values * channels, base_channels, factorised)
        self.blocks = nn.ModuleList([*layers, *middle_blocks(widths[-1], block, attend, middle=True)])
        self.norm_out = FrameNorm(widths[-1])
        self.conv_out = causal_convolution(widths[-1], z_channels, factorised)

    @override
    def forward(self, images: Float[Tensor, "b c *size"]) -> Float[Tensor, "b e *grid"]:
        """Features of images or videos; see `grid` for the sizes."""
        self.grid(images.shape[2:])
        if images.ndim == 4:
            return self(images.unsqueeze(2)).squeeze(2)
        features = self.conv_in(self.patches(images))
        for block in self.blocks:
            features = recompute.call(block, features, gradient_checkpointing=self.gradient_checkpointing)
        return self.conv_out(F.silu(self.norm_out(features)))
