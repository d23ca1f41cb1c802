"""Windowed transformer that encodes images: its cost grows with the number of pixels, not with its square.

S. Cao et al.: Efficient-VQGAN: Towards High-Resolution Image Generation with Efficient Vision Transformers,
https://arxiv.org/abs/2310.05400.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from vistok.encoder.base import Encoder
from vistok.layers import fold_patches, recompute, trunk_widths
from vistok.layers.swin import PatchMerge, check_windows, swin_blocks


class SwinEncoder(Encoder):
    """Linear embedding of patches, and attention within windows at one or more resolutions.

    Each further resolution halves the grid: the factor is ``patch_size * 2 ** (len(channel_multipliers) - 1)``.

    Args:
        channels: Channels of an image.
        patch_size: Side of the patches, in pixels.
        base_channels: Channels at the first resolution, a multiple of `num_heads`.
        channel_multipliers: Channels of each resolution in units of `base_channels`, heads in units of `num_heads`.
        num_blocks: Blocks per resolution, an even number: every other one shifts the windows.
        num_heads: Attention heads at the first resolution.
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
        self.embedding = nn.Linear(channels * patch_size**2, widths[0])
        self.norm_in = nn.LayerNorm(widths[0])
        layers: list[nn.Module] = []
        for level, (width, multiplier) in enumerate(zip(widths, channel_multipliers, strict=True)):
            if level:
                layers.append(PatchMerge(widths[level - 1], width))
            layers += swin_blocks(width, num_blocks, num_heads * multiplier, window_size, mlp_ratio, dropout)
        self.blocks = nn.ModuleList(layers)
        self.norm_out = nn.LayerNorm(self.dim)

    @override
    def forward(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b e h w"]:
        """Features of images; the grid is the image size over `factor`."""
        self.grid(images.shape[2:])
        features = self.norm_in(self.embedding(fold_patches(images, self.patch_size).movedim(1, -1)))
        for block in self.blocks:
            features = recompute.call(block, features, gradient_checkpointing=self.gradient_checkpointing)
        return self.norm_out(features).movedim(-1, 1)
