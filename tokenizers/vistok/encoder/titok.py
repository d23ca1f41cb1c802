"""Transformer that encodes an image as a short sequence of tokens.

Q. Yu et al.: An Image is Worth 32 Tokens for Reconstruction and Generation, https://arxiv.org/abs/2406.07550; weights
at https://github.com/bytedance/1d-tokenizer.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from vistok.encoder.base import Encoder
from vistok.layers.transformer import LatentTransformer, Transformer, check_patches, initialise, random_tokens


class TiTokEncoder(Encoder):
    """Learned latent tokens attend to the patches of the image, and only they are kept.

    Args:
        channels: Channels of an image.
        patch_size: Side of the patches, in pixels.
        image_size: Side or ``[H, W]`` of the training images, in pixels; the positions of other sizes are bicubic
            samples of those of this one.
        num_tokens: Length of the sequence.
        width: Channels of a token, a multiple of `num_heads`.
        depth: Number of blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden channels of the perceptrons, in units of `width`.
        legacy: Read the latent tokens ``(n e)`` in memory order as ``(e n)``, which mixes tokens and channels. The
            two-stage models of the paper were trained so; their weights need it.
        gradient_checkpointing: Recompute each block in the backward pass.
    """

    layout = "sequence"

    def __init__(
        self,
        channels: int = 3,
        patch_size: int = 16,
        image_size: int | Sequence[int] = 256,
        num_tokens: int = 64,
        width: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        legacy: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_patches(channels, patch_size)
        self.channels = channels
        self.factor = patch_size
        self.dim = width
        self.num_tokens = num_tokens
        self.legacy = legacy
        transformer = Transformer(width, depth, num_heads, mlp_ratio, gradient_checkpointing=gradient_checkpointing)
        self.trunk = LatentTransformer(transformer, patch_size, image_size, num_tokens)
        self.patch_embedding = nn.Conv2d(channels, width, patch_size, stride=patch_size)
        self.latent_tokens = random_tokens(num_tokens, width)
        self.apply(initialise)

    @override
    def grid(self, size: Sequence[int]) -> tuple[int, ...]:
        """``(num_tokens,)`` for images of every size.

        Raises:
            ValueError: If a side is not a positive multiple of `factor`.
        """
        self._checked_size(size)
        return (self.num_tokens,)

    @override
    def forward(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b e n"]:
        """Features of images, `num_tokens` of them."""
        self.grid(images.shape[2:])
        patches = self.patch_embedding(images).movedim(1, -1)
        _, latents = self.trunk(patches, self.latent_tokens.expand(len(images), -1, -1))
        return latents.reshape(-1, self.dim, self.num_tokens) if self.legacy else latents.mT
