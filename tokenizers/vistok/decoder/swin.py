"""Windowed transformer that decodes images: the mirror image of `vistok.encoder.SwinEncoder`."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from vistok.decoder.base import Decoder
from vistok.layers import recompute, trunk_widths, unfold_patches
from vistok.layers.swin import PatchSplit, check_windows, swin_blocks


class SwinDecoder(Decoder):
    """Attention within windows from the coarsest resolution to the finest, and a linear layer that makes the patches.

    Args:
        channels: Channels of an image.
        patch_size: Side of the patches, in pixels.
        base_channels: Channels at the finest resolution, a multiple of `num_heads`.
        channel_multipliers: Channels of each resolution from finest to coarsest, in units of `base_channels`, and heads
            in units of `num_heads`.
        num_blocks: Blocks per resolution, an even number: every other one shifts the windows.
        num_heads: Attention heads at the finest resolution.
        window_size: Side of the windows, in features.
        mlp_ratio: Hidden channels of the perceptrons, in units of the channels.
        dropout: Dropout rate inside the blocks.
        gradient_checkpointing: Compute the activations of each block again in the backward pass.
    """

    def __init__(
        self,
        channels: int = 3,
        patch_size: int = 4,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 2, 4),
        num_blocks: int = 2,
        num_heads: int = 4,
        window_size: int = 8,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        widths = trunk_widths(channels, base_channels, channel_multipliers, num_blocks, None, patch_size)
        check_windows(base_channels, num_blocks, num_heads, window_size)
        self.channels = channels
        self.patch_size = patch_size
        self.factor = patch_size * 2 ** (len(widths) - 1)
        self.dim = widths[-1]
        self.gradient_checkpointing = gradient_checkpointing
        layers: list[nn.Module] = []
        for level in reversed(range(len(widths))):
            heads = num_heads * channel_multipliers[level]
            layers += swin_blocks(widths[level], num_blocks, heads, window_size, mlp_ratio, dropout)
            if level:
                layers.append(PatchSplit(widths[level], widths[level - 1]))
        self.blocks = nn.ModuleList(layers)
        self.norm_out = nn.LayerNorm(widths[0])
        self.head = nn.Linear(widths[0], channels * patch_size**2)

    @override
    def forward(
        self,
        features: Float[Tensor, "b e h w"],
        codes: Float[Tensor, "b d h w"] | None = None,
        size: Sequence[int] | None = None,
    ) -> Float[Tensor, "b c H W"]:
        """Images of the size of the grid times `factor`; `codes` are not needed, `size` is only checked."""
        self.image_size(features.shape[2:], size)
        hidden = features.movedim(1, -1)
        for block in self.blocks:
            hidden = recompute.call(block, hidden, gradient_checkpointing=self.gradient_checkpointing)
        return unfold_patches(self.head(self.norm_out(hidden)).movedim(-1, 1), self.patch_size)

    @property
    @override
    def last_layer(self) -> Tensor:
        return self.head.weight
