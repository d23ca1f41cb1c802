"""The residual discriminator of StyleGAN2.

T. Karras et al.: Analyzing and Improving the Image Quality of StyleGAN, https://arxiv.org/abs/1912.04958; in ViT-VQGAN
for tokenizers, https://arxiv.org/abs/2110.04627, and in BSQ, https://arxiv.org/abs/2406.07548.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from typing_extensions import override

from vistok.discriminator.base import Discriminator

FINAL_SIZE = 4
GROUP = 4  # images that the minibatch standard deviation is taken over


class StyleGANDiscriminator(Discriminator):
    """One logit per image, ``(b 1)``: residual blocks that halve the grid down to 4x4, then two linear layers.

    Args:
        channels: Channels of an image.
        image_size: Side of the images in pixels, a power of two from 8 on: the linear layers fit no other.
        channel_base: A block of side s has ``channel_base / s`` channels, but at most `max_channels`. 32768 is the
            larger of the published ones, 16384 the one for 256 pixels.
        max_channels: See above.

    Raises:
        ValueError: If a size is not allowed.
    """

    def __init__(
        self, channels: int = 3, image_size: int = 256, channel_base: int = 16384, max_channels: int = 512
    ) -> None:
        super().__init__()
        if image_size < 2 * FINAL_SIZE or image_size & (image_size - 1):
            raise ValueError(
                f"image_size must be a power of two from {2 * FINAL_SIZE} on, got {image_size}: crop to one, or use "
                "discriminator=patchgan, which takes any size"
            )
        if channel_base < image_size:
            raise ValueError(f"channel_base must be at least image_size={image_size}, got {channel_base}")
        self.channels = channels
        self.image_size = image_size
        sizes = [image_size >> level for level in range(int(math.log2(image_size // FINAL_SIZE)) + 1)]
        widths = [min(channel_base // size, max_channels) for size in sizes]
        self.conv_in = _equalized(nn.Conv2d(channels, widths[0], 1))
        self.blocks = nn.Sequential(*(ResidualDown(*pair) for pair in pairwise(widths)))
        width = widths[-1]
        self.conv_out = _equalized(nn.Conv2d(width + 1, width, 3, padding=1))
        self.hidden = _equalized(nn.Linear(width * FINAL_SIZE**2, width))
        self.output = _equalized(nn.Linear(width, 1))

    @override
    def logits(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b 1"]:
        if images.shape[2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"StyleGANDiscriminator was built for {self.image_size}x{self.image_size} pixels, got "
                f"{tuple(images.shape)}: set discriminator.image_size, or use discriminator=patchgan"
            )
        hidden = self.blocks(activate(self.conv_in(images)))
        hidden = activate(self.conv_out(append_deviation(hidden)))
        return self.output(activate(self.hidden(hidden.flatten(1))))


class ResidualDown(nn.Module):
    """Two 3x3 convolutions around a skip connection; both paths blur and halve the grid."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = _equalized(nn.Conv2d(in_channels, in_channels, 3, padding=1))
        self.conv2 = _equalized(nn.Conv2d(in_channels, out_channels, 3, stride=2))
        self.shortcut = _equalized(nn.Conv2d(in_channels, out_channels, 1, stride=2, bias=False))
        self.blur = Blur()

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b e h2 w2"]:
        """Half the height and width."""
        hidden = activate(self.conv2(self.blur(activate(self.conv1(features)), padding=2)))
        # Of two independent paths, so that the variance stays the same.
        return (self.shortcut(self.blur(features, padding=1)) + hidden) / math.sqrt(2)


class Blur(nn.Module):
    """Low-pass filter (1, 3, 3, 1) along both axes, over a border of zeros."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", torch.outer(taps, taps), persistent=False)

    def forward(self, features: Float[Tensor, "b c h w"], padding: int) -> Float[Tensor, "b c h2 w2"]:
        """Filter every channel; each side grows by twice the padding less 3."""
        channels = features.shape[1]
        return F.conv2d(features, self.kernel.expand(channels, 1, 4, 4), padding=padding, groups=channels)


class _Scale(nn.Module):
    """Multiplies a weight by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor


def _equalized(layer: nn.Conv2d | nn.Linear) -> nn.Module:
    """Equalised learning rate: weights are of unit variance and scaled when used, https://arxiv.org/abs/1710.10196."""
    nn.init.normal_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    register_parametrization(layer, "weight", _Scale(layer.weight[0].numel() ** -0.5))
    return layer


def activate(features: Tensor) -> Tensor:
    """Leaky ReLU, scaled so that it keeps the variance."""
    return F.leaky_relu(features, 0.2) * math.sqrt(2)


def append_deviation(features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c1 h w"]:
    """Append a channel with the standard deviation over groups of images, averaged over channels and positions."""
    size = next(size for size in range(min(GROUP, len(features)), 0, -1) if len(features) % size == 0)
    groups = features.float().unflatten(0, (size, -1))
    deviation = (groups.var(0, correction=0) + 1e-8).sqrt().mean((1, 2, 3))
    channel = deviation.repeat(size).view(-1, 1, 1, 1).expand(-1, 1, *features.shape[2:])
    return torch.cat([features, channel.to(features.dtype)], dim=1)
