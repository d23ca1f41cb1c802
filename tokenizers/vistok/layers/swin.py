"""Windowed transformer blocks, and what halves or doubles the grid between them.

Z. Liu et al.: Swin Transformer: Hierarchical Vision Transformer using Shifted Windows, https://arxiv.org/abs/2103.14030.
The tensors are channels last.
"""

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn


def swin_blocks(
    width: int, num_blocks: int, num_heads: int, window_size: int, mlp_ratio: float, dropout: float
) -> list[nn.Module]:
    """Blocks ``(b h w c) -> (b h w c)`` of attention within windows; every other one shifts the windows by half.

    Grids that are no multiple of the window are padded at the right and bottom, and no window is shifted along an axis
    that it covers.
    """
    # Imported late: a tokenizer without it loads in a fraction of the time.
    from torchvision.models.swin_transformer import SwinTransformerBlock

    return [
        SwinTransformerBlock(
            width,
            num_heads,
            window_size=[window_size] * 2,
            shift_size=[number % 2 * (window_size // 2)] * 2,
            mlp_ratio=mlp_ratio,
            dropout=dropout,
        )
        for number in range(num_blocks)
    ]


class PatchMerge(nn.Module):
    """Halve the grid: normalise the channels of four positions and project them to those of one."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * in_channels)
        self.projection = nn.Linear(4 * in_channels, out_channels, bias=False)

    def forward(self, features: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h2 w2 e"]:
        """Half the height and width, ``out_channels`` channels."""
        return self.projection(self.norm(rearrange(features, "b (h p) (w q) c -> b h w (p q c)", p=2, q=2)))


class PatchSplit(nn.Module):
    """Double the grid: project the channels of one position to those of four."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_channels)
        self.projection = nn.Linear(in_channels, 4 * out_channels, bias=False)

    def forward(self, features: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h2 w2 e"]:
        """Twice the height and width, ``out_channels`` channels."""
        return rearrange(self.projection(self.norm(features)), "b h w (p q c) -> b (h p) (w q) c", p=2, q=2)


def check_windows(base_channels: int, num_blocks: int, num_heads: int, window_size: int) -> None:
    """Refuse settings that no windowed transformer has, with a ValueError that says what is allowed."""
    if num_heads < 1 or base_channels % num_heads:
        raise ValueError(f"base_channels must be a multiple of num_heads, got {base_channels} and {num_heads} heads")
    if num_blocks % 2:
        raise ValueError(
            f"num_blocks must be even, because every other block shifts the windows of the one before, got {num_blocks}"
        )
    if window_size < 2:
        raise ValueError(f"window_size must be at least 2 features, got {window_size}")
