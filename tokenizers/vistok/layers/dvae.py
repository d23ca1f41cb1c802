"""What the encoder and the decoder of DALL-E's discrete VAE share.

A. Ramesh et al.: Zero-Shot Text-to-Image Generation, https://arxiv.org/abs/2102.12092, appendix A;
https://github.com/openai/DALL-E.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

# Inside, black and white are so far from 0 and 1, which no sigmoid reaches.
MARGIN = 0.1


class BottleneckBlock(nn.Module):
    """Four rectified convolutions of a quarter of the channels, scaled down, around a skip connection.

    Args:
        in_channels: Channels it takes.
        out_channels: Channels it returns, a multiple of 4.
        kernel_sizes: Of the four convolutions.
        gain: Factor of what they add.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_sizes: Sequence[int], gain: float) -> None:
        super().__init__()
        hidden = out_channels // 4
        widths = [in_channels, hidden, hidden, hidden, out_channels]
        self.gain = gain
        self.convs = nn.ModuleList(
            nn.Conv2d(width, next_width, kernel_size, padding=kernel_size // 2)
            for width, next_width, kernel_size in zip(widths, widths[1:], kernel_sizes, strict=False)
        )
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b e h w"]:
        """Same grid, ``out_channels`` channels."""
        hidden = features
        for conv in self.convs:
            hidden = conv(F.relu(hidden))
        return self.shortcut(features) + self.gain * hidden


def level_widths(channels: int, width: int, num_levels: int, num_blocks: int) -> list[int]:
    """Channels of each resolution, finest first; a ValueError refuses settings that no such network has."""
    if channels not in (1, 3, 4):
        raise ValueError(f"channels must be 1, 3 or 4, got {channels}")
    if width < 4 or width % 4:
        raise ValueError(f"width must be a positive multiple of 4, got {width}")
    if num_levels < 1 or num_blocks < 1:
        raise ValueError(f"num_levels and num_blocks must be positive, got {num_levels} and {num_blocks}")
    return [width << level for level in range(num_levels)]
