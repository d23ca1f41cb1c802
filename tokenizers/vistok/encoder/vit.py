"""Patch transformer that encodes images, or videos causally.

ViT-VQGAN (J. Yu et al.: Vector-quantized Image Modeling with Improved VQGAN, https://arxiv.org/abs/2110.04627) and
BSQ-ViT (Y. Zhao et al.: Image and Video Tokenization with Binary Spherical Quantization,
https://arxiv.org/abs/2406.07548).
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from vistok.encoder.base import Encoder
from vistok.layers.transformer import GridTransformer, Transformer, check_patches, initialise


class ViTEncoder(Encoder):
    """Linear embedding of patches and a transformer over all of them.

    For videos, the first frame is an image; of the frames after it, each `time_patch_size` are one. A frame attends to
    itself and to earlier ones, so its features do not depend on what follows, and those of an image are those of the
    first frame of any video that begins with it.

    The defaults are BSQ-ViT. ViT-VQGAN as published for PyTorch (https://github.com/thuanz123/enhancing-transformers)
    has ``activation="tanh"``, ``qkv_bias=False`` and ``pre_norm=False``; its fixed sine positions are one value of the
    learned ones.

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
        pre_norm: Normalise the tokens before the first block, instead of a bias in the embedding of the patches.
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
        time_patch_size: int | None = None,
        num_frames: int | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_patches(channels, patch_size)
        self.channels = channels
        self.factor = patch_size
        self.dim = width
        transformer = Transformer(
            width, depth, num_heads, mlp_ratio, activation, qkv_bias, pre_norm, gradient_checkpointing, head_dim
        )
        self.trunk = GridTransformer(transformer, patch_size, image_size, time_patch_size, num_frames)
        self.patch_embedding = nn.Linear(channels * patch_size**2, width, bias=not pre_norm)
        if time_patch_size is not None:
            self.layout = "video"
            self.time_factor = time_patch_size
        if self.time_factor > 1:
            self.clip_embedding = nn.Linear(channels * self.time_factor * patch_size**2, width, bias=not pre_norm)
        self.apply(initialise)

    @override
    def forward(self, images: Float[Tensor, "b c *size"]) -> Float[Tensor, "b e *grid"]:
        """Features of images, or of videos if `layout` is ``video``; see `grid` for the sizes."""
        self.grid(images.shape[2:])
        if images.ndim == 5:
            return self._encode(images)
        return self._encode(images.unsqueeze(2)).squeeze(2)

    def _encode(self, videos: Float[Tensor, "b c T H W"]) -> Float[Tensor, "b e t h w"]:
        if self.time_factor == 1:
            tokens = self.patch_embedding(self._patches(videos, 1))
        else:
            first = self.patch_embedding(self._patches(videos[:, :, :1], 1))
            clips = self.clip_embedding(self._patches(videos[:, :, 1:], self.time_factor))
            tokens = torch.cat([first, clips], 1)
        return self.trunk(tokens).movedim(-1, 1)

    def _patches(self, videos: Tensor, frames: int) -> Tensor:
        return rearrange(videos, "b c (t s) (h p) (w q) -> b t h w (c s p q)", s=frames, p=self.factor, q=self.factor)
