"""Patch transformer that decodes images and videos: the mirror image of `vistok.encoder.ViTEncoder`."""

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from vistok.decoder.base import Decoder
from vistok.layers.transformer import GridTransformer, Transformer, check_patches, initialise


class ViTDecoder(Decoder):
    """Transformer over all features, and a layer that turns each into a patch.

    For videos, a frame depends on its own features and on those of earlier frames. The defaults are BSQ-ViT; ViT-VQGAN
    as published for PyTorch has ``head_width=None`` besides the options that `vistok.encoder.ViTEncoder` names.

    Args:
        channels: Channels of an image.
        patch_size: Side of the patches, in pixels.
        image_size: Side or ``[H, W]`` of the training images in pixels, for learned positions: other sizes take bicubic
            samples of these. None for rotary positions, which suit every size.
        width: Channels of a token, a multiple of `num_heads` without `head_dim`.
        depth: Number of blocks.
        num_heads: Attention heads.
        head_dim: Channels of a head; None: ``width / num_heads``.
        mlp_ratio: Hidden channels of the perceptrons, in units of `width`.
        activation: Of the perceptrons: ``gelu`` or ``tanh``.
        qkv_bias: Whether queries, keys and values have a bias.
        pre_norm: Normalise the tokens before the first block.
        head_width: Channels of a layer with tanh between the tokens and their pixels; None for a single linear layer.
        time_patch_size: Frames per feature after the first frame; None for images only.
        num_frames: Frames of the training videos, for learned positions of videos: longer ones take linear samples of
            these. None otherwise.
        gradient_checkpointing: Recompute each block in the backward pass.
    """

    def __init__(
        self,
        channels: int = 3,
        patch_size: int = 8,
        image_size: int | Sequence[int] | None = 256,
        width: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        head_dim: int | None = None,
        mlp_ratio: float = 4.0,
        activation: str = "gelu",
        qkv_bias: bool = True,
        pre_norm: bool = True,
        head_width: int | None = 3072,
        time_patch_size: int | None = None,
        num_frames: int | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_patches(channels, patch_size)
        if head_width is not None and head_width < 1:
            raise ValueError(f"head_width must be a positive number of channels, or null, got {head_width}")
        self.channels = channels
        self.factor = patch_size
        self.dim = width
        transformer = Transformer(
            width, depth, num_heads, mlp_ratio, activation, qkv_bias, pre_norm, gradient_checkpointing, head_dim
        )
        self.trunk = GridTransformer(transformer, patch_size, image_size, time_patch_size, num_frames)
        self.head = nn.Sequential(nn.Linear(width, head_width), nn.Tanh()) if head_width else nn.Identity()
        self.to_patch = nn.Linear(head_width or width, channels * patch_size**2)
        if time_patch_size is not None:
            self.layout = "video"
            self.time_factor = time_patch_size
        if self.time_factor > 1:
            self.to_clip = nn.Linear(head_width or width, channels * self.time_factor * patch_size**2)
        self.apply(initialise)

    @override
    def forward(
        self,
        features: Float[Tensor, "b e *grid"],
        codes: Float[Tensor, "b d *grid"] | None = None,
        size: Sequence[int] | None = None,
    ) -> Float[Tensor, "b c *size"]:
        """Images of ``(b e h w)``, videos of ``(b e t h w)``; `codes` are not needed, `size` is only checked."""
        if features.ndim == 5 and self.layout == "image":
            raise ValueError(f"this decoder is for images, got features {tuple(features.shape)}: set time_patch_size")
        self.image_size(features.shape[2:], size)
        if features.ndim == 5:
            return self._decode(features)
        return self._decode(features.unsqueeze(2)).squeeze(2)

    def _decode(self, features: Float[Tensor, "b e t h w"]) -> Float[Tensor, "b c T H W"]:
        hidden = self.head(self.trunk(features.movedim(1, -1)))
        if self.time_factor == 1:
            return self._frames(self.to_patch(hidden), 1)
        first = self._frames(self.to_patch(hidden[:, :1]), 1)
        return torch.cat([first, self._frames(self.to_clip(hidden[:, 1:]), self.time_factor)], 2)

    def _frames(self, patches: Tensor, frames: int) -> Tensor:
        return rearrange(patches, "b t h w (c s p q) -> b c (t s) (h p) (w q)", s=frames, p=self.factor, q=self.factor)

    @property
    @override
    def last_layer(self) -> Tensor:
        """Weight of the layer that makes images and the first frames of videos."""
        return self.to_patch.weight
