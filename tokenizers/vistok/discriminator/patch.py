"""PatchGAN: a short convolutional network that judges overlapping patches.

P. Isola et al.: Image-to-Image Translation with Conditional Adversarial Networks, https://arxiv.org/abs/1611.07004; as
VQGAN uses it, https://arxiv.org/abs/2012.09841, and in three dimensions TATS, https://arxiv.org/abs/2204.03638.
"""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from typing_extensions import override

from vistok.discriminator.base import Discriminator
from vistok.layers import normalisation

NORMS = ("batch", "group", "none", "spectral")
MAX_MULTIPLIER = 8  # of the width


class PatchDiscriminator(Discriminator):
    """One logit per patch of an image, ``(b 1 h w)``: 4x4 convolutions, of which the first halve the grid.

    With three layers a logit sees 70x70 pixels, with four 142x142.

    Args:
        channels: Channels of an image.
        base_channels: Width of the first layer; each further one doubles it, up to eightfold.
        num_layers: Layers that halve the grid.
        norm: ``batch`` as published, ``group`` (which does not mix images), ``none``, or ``spectral`` for spectral
            normalisation of the weights, https://arxiv.org/abs/1802.05957.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, channels: int = 3, base_channels: int = 64, num_layers: int = 3, norm: str = "batch") -> None:
        super().__init__()
        self.channels = channels
        strides = [(2, 2)] * num_layers
        self.main = _network(channels, base_channels, strides, kernel_size=4, padding=1, norm=norm)

    @override
    def logits(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b 1 h w"]:
        return self.main(images)


class VideoPatchDiscriminator(Discriminator):
    """One logit per patch of a video, ``(b 1 t h w)``: `PatchDiscriminator` with convolutions in three dimensions.

    Args:
        channels: Channels of a video.
        base_channels: Width of the first layer; each further one doubles it, up to eightfold.
        num_layers: Layers that halve height and width.
        num_time_layers: How many of them, from the first on, halve the frames too.
        kernel_size: 4 as in TATS or 3 as in VidTok, https://arxiv.org/abs/2412.13061. Padding is half of it, so a
            single frame is enough.
        norm: As for `PatchDiscriminator`.

    Raises:
        ValueError: If an argument is out of range.
    """

    layout = "video"

    def __init__(
        self,
        channels: int = 3,
        base_channels: int = 64,
        num_layers: int = 3,
        num_time_layers: int = 3,
        kernel_size: int = 4,
        norm: str = "batch",
    ) -> None:
        super().__init__()
        if not 0 <= num_time_layers <= num_layers:
            raise ValueError(f"num_time_layers must be 0 to num_layers={num_layers}, got {num_time_layers}")
        if kernel_size not in (3, 4):
            raise ValueError(f"kernel_size must be 3 or 4, got {kernel_size}")
        self.channels = channels
        strides = [(2 if layer < num_time_layers else 1, 2, 2) for layer in range(num_layers)]
        self.main = _network(channels, base_channels, strides, kernel_size, padding=kernel_size // 2, norm=norm)

    @override
    def logits(self, images: Float[Tensor, "b c T H W"]) -> Float[Tensor, "b 1 t h w"]:
        return self.main(images)


def _network(
    channels: int, base_channels: int, strides: Sequence[tuple[int, ...]], kernel_size: int, padding: int, norm: str
) -> nn.Sequential:
    """One convolution per stride, one of stride 1, and one to the logits; no norm in the first and the last."""
    if min(channels, base_channels, len(strides)) < 1:
        raise ValueError(
            "channels, base_channels and num_layers must be positive, got "
            f"{channels}, {base_channels} and {len(strides)}"
        )
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    in_three = len(strides[0]) == 3
    convolution: Any = nn.Conv3d if in_three else nn.Conv2d
    batch_norm = nn.BatchNorm3d if in_three else nn.BatchNorm2d
    layers: list[nn.Module] = []
    width = channels
    for depth, stride in enumerate([*strides, (1,) * len(strides[0])]):
        next_width = base_channels * min(2**depth, MAX_MULTIPLIER)
        normalised = depth > 0 and norm in ("batch", "group")
        # Batch normalisation takes the mean out again, so a bias before it would do nothing.
        bias = not (normalised and norm == "batch")
        layers.append(convolution(width, next_width, kernel_size, stride, padding, bias=bias))
        if normalised:
            layers.append(batch_norm(next_width) if norm == "batch" else normalisation(next_width))
        layers.append(nn.LeakyReLU(0.2))
        width = next_width
    layers.append(convolution(width, 1, kernel_size, 1, padding))
    for layer in layers:
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            nn.init.normal_(layer.weight, std=0.02)
            if norm == "spectral":
                spectral_norm(layer)
        elif isinstance(layer, nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.normal_(layer.weight, mean=1.0, std=0.02)
    return nn.Sequential(*layers)
