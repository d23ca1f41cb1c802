"""What the encoder and the decoder of Emu3 share.

X. Wang et al.: Emu3: Next-Token Prediction is All You Need, https://arxiv.org/abs/2409.18869;
https://github.com/baaivision/Emu3.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class BatchNormBlock(nn.Module):
    """Two 3x3 convolutions, each after batch normalisation and swish, around a skip connection.

    Args:
        channels: Channels it takes and returns.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Same shape."""
        hidden = self.conv1(F.silu(self.norm1(features)))
        return features + self.conv2(F.silu(self.norm2(hidden)))


def time_halvings(frames: int, time_blocks: int) -> int:
    """How often `frames` is halved to reach one; a ValueError refuses settings that no such network has."""
    halvings = max(frames, 1).bit_length() - 1
    if frames < 1 or 2**halvings != frames:
        raise ValueError(f"frames must be a power of 2, got {frames}")
    if time_blocks < 0:
        raise ValueError(f"time_blocks must be a number of residual blocks, got {time_blocks}")
    return halvings
