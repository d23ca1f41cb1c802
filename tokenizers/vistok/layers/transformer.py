"""Transformers over the positions of an image or a video.

A. Dosovitskiy et al.: An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale,
https://arxiv.org/abs/2010.11929.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vistok.layers import recompute

ACTIVATIONS = {"gelu": nn.GELU, "tanh": nn.Tanh}


def check_patches(channels: int, patch_size: int) -> None:
    """Refuse images and patches that no backbone takes, with a ValueError that says what is allowed."""
    if channels not in (1, 3, 4):
        raise ValueError(f"channels must be 1, 3 or 4, got {channels}")
    if patch_size < 1:
        raise ValueError(f"patch_size must be a positive number of pixels, got {patch_size}")


def patch_grid(image_size: int | Sequence[int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of the patches of an image.

    Args:
        image_size: Side of a square, or ``(H, W)``, in pixels.
        patch_size: Side of the patches, in pixels.

    Raises:
        ValueError: If the sides are not positive multiples of `patch_size`.
    """
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2 or any(side < 1 or side % patch_size for side in sides):
        raise ValueError(
            f"image_size must be a side or [H, W] in multiples of {patch_size} pixels (patch_size), got {image_size}"
        )
    return sides[0] // patch_size, sides[1] // patch_size


def initialise(module: nn.Module) -> None:
    """Draw the weights of a linear layer or a convolution as ViT does: normal, of deviation 0.02, biases zero."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def random_tokens(count: int, width: int) -> nn.Parameter:
    """Learned vectors ``(count width)`` of length 1 or so."""
    return nn.Parameter(torch.randn(count, width) * width**-0.5)


class LearnedPositions(nn.Module):
    """A learned vector per cell of the training grid; other grids take bicubic samples of it.

    Args:
        grid: Rows and columns in training.
        width: Channels.
        num_prefix_tokens: Tokens before those of the grid that have positions too, such as a class token.
    """

    def __init__(self, grid: tuple[int, int], width: int, num_prefix_tokens: int = 0) -> None:
        super().__init__()
        self.grid = grid
        self.num_prefix_tokens = num_prefix_tokens
        self.table = random_tokens(num_prefix_tokens + math.prod(grid), width)

    def forward(self, grid: tuple[int, int]) -> Float[Tensor, "n e"]:
        """Positions of the prefix and of a grid in raster order."""
        from timm.layers.pos_embed import resample_abs_pos_embed

        return resample_abs_pos_embed(self.table[None], list(grid), list(self.grid), self.num_prefix_tokens)[0]


def time_samples(table: Float[Tensor, "length e"], frames: int) -> Float[Tensor, "t e"]:
    """Positions of frames: the first ones in the table, or linear samples from its first to its last one for more."""
    if frames <= len(table):
        return table[:frames]
    return F.interpolate(table.T[None], frames, mode="linear", align_corners=True)[0].T


def rotary_angles(grid: Sequence[int], head_dim: int, device: torch.device) -> Float[Tensor, "n pairs"]:
    """Angles by which each pair of channels of each cell is rotated: an equal share of the pairs for each axis.

    B. Heo et al.: Rotary Position Embedding for Vision Transformer, https://arxiv.org/abs/2403.13298, axial form.
    Pairs that are left when the shares are equal are not rotated.
    """
    share = head_dim // 2 // len(grid)
    frequencies = 100.0 ** -(torch.arange(share, device=device) / share)
    axes = torch.meshgrid(*(torch.arange(length, device=device) for length in grid), indexing="ij")
    angles = torch.cat([axis.reshape(-1, 1) * frequencies for axis in axes], 1)
    return F.pad(angles, (0, head_dim // 2 - angles.shape[1]))


def rotate(
    features: Float[Tensor, "b heads n head_dim"], angles: Float[Tensor, "n pairs"]
) -> Float[Tensor, "b heads n head_dim"]:
    """Rotate channel ``i`` and channel ``i + head_dim / 2`` against each other by angle ``i``."""
    first, second = features.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(features.dtype)


class SelfAttention(nn.Module):
    """Multi-head self-attention, causal from frame to frame."""

    def __init__(self, width: int, num_heads: int, qkv_bias: bool = True, head_dim: int | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        mixed = num_heads * head_dim if head_dim else width
        self.qkv = nn.Linear(width, 3 * mixed, bias=qkv_bias)
        self.projection = nn.Linear(mixed, width)

    def forward(
        self, tokens: Float[Tensor, "b n e"], angles: Float[Tensor, "n pairs"] | None, frame_length: int
    ) -> Float[Tensor, "b n e"]:
        """Attend to the tokens of the same frame and of all earlier ones; `frame_length` tokens are a frame."""
        query, key, value = rearrange(
            self.qkv(tokens), "b n (three heads d) -> three b heads n d", three=3, heads=self.num_heads
        )
        if angles is not None:
            query, key = rotate(query, angles), rotate(key, angles)
        # A call per frame takes half the operations of one call with a mask, and no memory for pairs of tokens.
        mixed = [
            F.scaled_dot_product_attention(query[:, :, end - frame_length : end], key[:, :, :end], value[:, :, :end])
            for end in range(frame_length, tokens.shape[1] + 1, frame_length)
        ]
        return self.projection(rearrange(torch.cat(mixed, 2), "b heads n d -> b n (heads d)"))


class TransformerBlock(nn.Module):
    """Self-attention and a two-layer perceptron, each after normalisation and around a skip connection."""

    def __init__(
        self, width: int, num_heads: int, mlp_ratio: float, activation: str, qkv_bias: bool, head_dim: int | None
    ) -> None:
        super().__init__()
        # timm takes seconds to import: only where it is used, not with vistok.
        from timm.layers.mlp import Mlp

        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, num_heads, qkv_bias, head_dim)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, int(mlp_ratio * width), act_layer=ACTIVATIONS[activation])

    def forward(
        self, tokens: Float[Tensor, "b n e"], angles: Float[Tensor, "n pairs"] | None, frame_length: int
    ) -> Float[Tensor, "b n e"]:
        """Same shape."""
        tokens = tokens + self.attention(self.norm1(tokens), angles, frame_length)
        return tokens + self.mlp(self.norm2(tokens))


class Transformer(nn.Module):
    """Blocks between two normalisations.

    Args:
        width: Channels of a token, a multiple of `num_heads` without `head_dim`.
        depth: Number of blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden channels of the perceptrons, in units of `width`.
        activation: Of the perceptrons: ``gelu`` or ``tanh``.
        qkv_bias: Whether queries, keys and values have a bias.
        pre_norm: Whether the tokens are normalised before the first block.
        gradient_checkpointing: Recompute each block in the backward pass.
        head_dim: Channels of a head; None: ``width / num_heads``.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        activation: str = "gelu",
        qkv_bias: bool = True,
        pre_norm: bool = True,
        gradient_checkpointing: bool = False,
        head_dim: int | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or (head_dim is None and width % num_heads):
            raise ValueError(f"width must be a multiple of num_heads, got width {width} and {num_heads} heads")
        if head_dim is not None and head_dim < 1:
            raise ValueError(f"head_dim must be a positive number of channels, or null, got {head_dim}")
        if depth < 1 or mlp_ratio <= 0:
            raise ValueError(f"depth and mlp_ratio must be positive, got {depth} and {mlp_ratio}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be {' or '.join(ACTIVATIONS)}, got {activation!r}")
        self.width = width
        self.head_dim = head_dim or width // num_heads
        self.gradient_checkpointing = gradient_checkpointing
        self.norm_in = nn.LayerNorm(width) if pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            TransformerBlock(width, num_heads, mlp_ratio, activation, qkv_bias, head_dim) for _ in range(depth)
        )
        self.norm_out = nn.LayerNorm(width)

    def forward(
        self,
        tokens: Float[Tensor, "b n e"],
        angles: Float[Tensor, "n pairs"] | None = None,
        frame_length: int | None = None,
    ) -> Float[Tensor, "b n e"]:
        """Same shape.

        Args:
            tokens: With their positions, unless these are rotary.
            angles: Rotary positions, see `rotary_angles`.
            frame_length: Tokens per frame; each attends to its own frame and to earlier ones (default: all are one).
        """
        tokens = self.norm_in(tokens)
        for block in self.blocks:
            tokens = recompute.call(
                block,
                tokens,
                angles,
                frame_length or tokens.shape[1],
                gradient_checkpointing=self.gradient_checkpointing,
            )
        return self.norm_out(tokens)


class GridTransformer(nn.Module):
    """`Transformer` over the patches of images, or of videos with attention that is causal over time.

    Args:
        transformer: What the tokens go through.
        patch_size: Side of the patches, in pixels.
        image_size: Side or ``[H, W]`` of the training images in pixels, for learned positions; None for rotary ones.
        time_patch_size: Frames per patch after the first frame; None for images.
        num_frames: Frames of the training videos, for learned positions of videos; None otherwise.
    """

    def __init__(
        self,
        transformer: Transformer,
        patch_size: int,
        image_size: int | Sequence[int] | None,
        time_patch_size: int | None,
        num_frames: int | None,
    ) -> None:
        super().__init__()
        if time_patch_size is not None and time_patch_size < 1:
            raise ValueError(f"time_patch_size must be a positive number of frames, or null, got {time_patch_size}")
        self.transformer = transformer
        self.num_axes = 2 if time_patch_size is None else 3
        self.space_positions = self.time_positions = None
        got = f"got image_size={image_size}, time_patch_size={time_patch_size}, num_frames={num_frames}"
        if (num_frames is None) != (image_size is None or time_patch_size is None):
            raise ValueError(
                f"num_frames is for the learned positions of videos, so with image_size and time_patch_size, {got}: "
                "set all three; or image_size=null and num_frames=null for rotary positions"
            )
        if image_size is not None:
            self.space_positions = LearnedPositions(patch_grid(image_size, patch_size), transformer.width)
        elif transformer.head_dim % 2 or transformer.head_dim < 2 * self.num_axes:
            raise ValueError(
                f"rotary positions need an even number of channels per head, {2 * self.num_axes} or more, "
                f"got {transformer.head_dim}: change num_heads, or set image_size for learned positions"
            )
        if num_frames is not None and time_patch_size is not None:
            if num_frames < 1 or (num_frames - 1) % time_patch_size:
                raise ValueError(f"num_frames must be one more than a multiple of time_patch_size, {got}")
            # Zeros as in BSQ-ViT: a transformer of images starts as one of videos.
            self.time_positions = nn.Parameter(torch.zeros(1 + (num_frames - 1) // time_patch_size, transformer.width))

    def forward(self, tokens: Float[Tensor, "b t h w e"]) -> Float[Tensor, "b t h w e"]:
        """Same shape; what becomes of a frame does not depend on later ones."""
        frames, height, width = grid = tokens.shape[1:4]
        angles = None
        if self.space_positions is None:
            angles = rotary_angles(grid[-self.num_axes :], self.transformer.head_dim, tokens.device)
        else:
            tokens = tokens + self.space_positions((height, width)).unflatten(0, (height, width))
        if self.time_positions is not None:
            tokens = tokens + time_samples(self.time_positions, frames)[:, None, None]
        return self.transformer(tokens.flatten(1, 3), angles, height * width).unflatten(1, grid)


class LatentTransformer(nn.Module):
    """`Transformer` over the patches of an image and a sequence of latent tokens.

    Q. Yu et al.: An Image is Worth 32 Tokens for Reconstruction and Generation, https://arxiv.org/abs/2406.07550.

    Args:
        transformer: What the tokens go through.
        patch_size: Side of the patches, in pixels.
        image_size: Side or ``[H, W]`` of the training images, in pixels.
        num_tokens: Latent tokens of an image.
    """

    def __init__(
        self, transformer: Transformer, patch_size: int, image_size: int | Sequence[int], num_tokens: int
    ) -> None:
        super().__init__()
        if num_tokens < 1:
            raise ValueError(f"num_tokens must be positive, got {num_tokens}")
        width = transformer.width
        self.transformer = transformer
        self.class_token = random_tokens(1, width)
        self.positions = LearnedPositions(patch_grid(image_size, patch_size), width, num_prefix_tokens=1)
        self.latent_positions = random_tokens(num_tokens, width)

    def forward(
        self,
        patches: Float[Tensor, "b h w e"],
        latents: Float[Tensor, "b n e"],
        context: Float[Tensor, "b m e"] | None = None,
    ) -> tuple[Float[Tensor, "b h w e"], Float[Tensor, "b n e"]]:
        """Patches and latent tokens, after all have attended to all.

        Args:
            patches: Without positions.
            latents: Without positions; may be the first few only.
            context: Further tokens that are attended to, with their positions.
        """
        batch, height, width, _ = patches.shape
        image = torch.cat([self.class_token.expand(batch, 1, -1), patches.flatten(1, 2)], 1)
        image = image + self.positions((height, width))
        latents = latents + self.latent_positions[: latents.shape[1]]
        tokens = self.transformer(torch.cat([image, latents, *([] if context is None else [context])], 1))
        _, patches, latents, _ = tokens.tensor_split([1, image.shape[1], image.shape[1] + latents.shape[1]], 1)
        return patches.unflatten(1, (height, width)), latents
