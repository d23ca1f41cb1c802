"""Normalisations that are scaled and shifted by the codes."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from vistok.layers.convolution import normalisation


class CodeNorm(nn.Module, ABC):
    """Group normalisation whose scale and shift are affine functions of the codes.

    The number of channels of the codes is only known when a tokenizer is put together, so `set_code_dim` builds both.
    """

    scale: nn.Module
    shift: nn.Module

    @abstractmethod
    def set_code_dim(self, code_dim: int) -> None:
        """Build `scale` and `shift` for codes of so many channels."""

    @abstractmethod
    def forward(
        self, features: Float[Tensor, "b c h w"], codes: Float[Tensor, "b d h2 w2"]
    ) -> Float[Tensor, "b c h w"]:
        """Same shape as `features`."""


class AdaptiveGroupNorm(CodeNorm):
    """Scaled by the standard deviation of the codes over the image and shifted by their mean.

    Z. Luo et al.: Open-MAGVIT2, https://arxiv.org/abs/2409.04410, after the adaptive group normalisation of MAGVIT-v2,
    https://arxiv.org/abs/2310.05737. So every pixel depends on the whole image, and a tile decodes to other pixels than
    it does as a part of an image.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = normalisation(channels, affine=False)

    @override
    def set_code_dim(self, code_dim: int) -> None:
        self.scale = nn.Linear(code_dim, self.norm.num_channels)
        self.shift = nn.Linear(code_dim, self.norm.num_channels)

    @override
    def forward(
        self, features: Float[Tensor, "b c h w"], codes: Float[Tensor, "b d h2 w2"]
    ) -> Float[Tensor, "b c h w"]:
        if codes.shape[2:].numel() < 2:
            raise ValueError("adaptive normalisation needs the deviation of at least 2 codes: decode a larger image")
        variance, mean = torch.var_mean(codes, (2, 3))
        scale, shift = self.scale((variance + self.norm.eps).sqrt()), self.shift(mean)
        return self.norm(features) * rearrange(scale, "b c -> b c 1 1") + rearrange(shift, "b c -> b c 1 1")


class SpatialNorm(CodeNorm):
    """Scaled and shifted at every position by the code there.

    C. Zheng et al.: MoVQ: Modulating Quantized Vectors for High-Fidelity Image Generation,
    https://arxiv.org/abs/2209.09002 (spatially conditional normalisation). As in SBER-MoVQGAN, the normalisation that
    is modulated has a scale and a shift of its own.
    """

    def __init__(self, channels: int, num_groups: int = 32) -> None:
        super().__init__()
        self.norm = normalisation(channels, num_groups=num_groups)

    @override
    def set_code_dim(self, code_dim: int) -> None:
        self.scale = nn.Conv2d(code_dim, self.norm.num_channels, 1)
        self.shift = nn.Conv2d(code_dim, self.norm.num_channels, 1)

    @override
    def forward(
        self, features: Float[Tensor, "b c h w"], codes: Float[Tensor, "b d h2 w2"]
    ) -> Float[Tensor, "b c h w"]:
        # 1x1 convolutions commute with repeating positions, and before it they have fewer to work on.
        scale, shift = (
            F.interpolate(layer(codes), size=features.shape[2:], mode="nearest") for layer in (self.scale, self.shift)
        )
        return self.norm(features) * scale + shift


def takes_codes(module: nn.Module) -> bool:
    """Whether the forward pass of a module takes codes after the features."""
    return any(isinstance(part, CodeNorm) for part in module.modules())
