"""Blocks of the first VQ-VAE.

A. van den Oord, O. Vinyals, K. Kavukcuoglu: Neural Discrete Representation Learning, https://arxiv.org/abs/1711.00937,
section 4.1, as in the reference of Sonnet: the rectifier of a block also changes what its skip connection carries.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class RectifiedResidualBlock(nn.Module):
    """A 3x3 and a 1x1 convolution, each after a rectifier, around a skip connection of the rectified input.

    Args:
        channels: Channels it takes and returns.
        hidden_channels: Channels between the convolutions.
        bias: Whether the convolutions have one.
    """

    def __init__(self, channels: int, hidden_channels: int, bias: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden_channels, 3, padding=1, bias=bias)
        self.conv2 = nn.Conv2d(hidden_channels, channels, 1, bias=bias)

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Same shape."""
        features = F.relu(features)
        return features + self.conv2(F.relu(self.conv1(features)))


def check_sizes(channels: int, width: int, num_halvings: int, num_blocks: int, hidden_channels: int) -> None:
    """Refuse sizes that no network has, with a ValueError that says what is allowed."""
    if channels not in (1, 3, 4):
        raise ValueError(f"channels must be 1, 3 or 4, got {channels}")
    for name, value in (
        ("num_halvings", num_halvings),
        ("num_blocks", num_blocks),
        ("hidden_channels", hidden_channels),
    ):
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}")
    if width < 2 or width % 2:
        raise ValueError(f"width must be a positive even number of channels, got {width}")
