"""VQBridge: a small vision transformer that turns a table of free vectors into the codebook.

Y. Chang et al.: Scalable Training for Vector-Quantized Networks with 100% Codebook Utilization,
https://arxiv.org/abs/2509.10140, section 3.
"""

import math
from typing import Any

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override


class PlainNorm(nn.LayerNorm):
    """Layer normalisation without parameters."""

    def __init__(self, width: int, **where: Any) -> None:
        super().__init__(width, eps=1e-6, elementwise_affine=False, **where)


class VQBridge(nn.Module):
    """Map all codes at once: the table is laid out as an image, cut into patches and passed through a transformer.

    Every code depends on all entries of the table, so codes that are never chosen still move. The last layer starts at
    zero, so before the first step all codes are zero, as published.

    Args:
        codebook_size: Number of codes K. K must be a rectangle of whole patches; the squarest one is taken.
        dim: Channels of a code.
        patch: Codes along each side of a patch.
        width: Channels of the transformer.
        depth: Number of transformer blocks.
        heads: Attention heads.

    Raises:
        ValueError: If the codes do not fill a rectangle of patches.
    """

    def __init__(
        self, codebook_size: int, dim: int, patch: int = 4, width: int = 256, depth: int = 2, heads: int = 4
    ) -> None:
        super().__init__()
        # timm takes seconds to import, and only this quantizer needs it.
        from timm.layers import GELUTanh
        from timm.models.vision_transformer import Block

        if codebook_size % patch**2:
            raise ValueError(
                f"codebook_size {codebook_size} is no multiple of bridge_patch ** 2 = {patch**2}: change one of them"
            )
        if width % heads:
            raise ValueError(f"bridge_width {width} must be a multiple of bridge_heads {heads}")
        patches = codebook_size // patch**2
        self.rows = max(rows for rows in range(1, math.isqrt(patches) + 1) if patches % rows == 0)
        self.patch = patch
        self.embed = nn.Linear(patch**2 * dim, width)
        self.blocks = nn.Sequential(
            *(
                Block(
                    width,
                    heads,
                    mlp_ratio=2,
                    qkv_bias=True,
                    norm_layer=PlainNorm,
                    act_layer=GELUTanh,
                )
                for _ in range(depth)
            )
        )
        self.norm = PlainNorm(width)
        self.head = nn.Linear(width, patch**2 * dim)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @override
    def forward(self, table: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
        layout = {"h": self.rows, "p": self.patch, "q": self.patch}
        patches = rearrange(table, "(h p w q) d -> 1 (h w) (p q d)", **layout)
        patches = self.head(self.norm(self.blocks(self.embed(patches))))
        return rearrange(patches, "1 (h w) (p q d) -> (h p w q) d", **layout)
