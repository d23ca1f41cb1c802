"""The layers of a Llama, with a cache of keys and values.

H. Touvron et al.: LLaMA: Open and Efficient Foundation Language Models, https://arxiv.org/abs/2302.13971.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

Rotation = tuple[Tensor, Tensor]
# Keys and values of earlier tokens, both (b heads length c). Two tensors: a compiled step would copy a common one.
Cache = tuple[Tensor, Tensor]
Product = Callable[[Tensor, Tensor], Tensor]

# Up to here the float32 product from the left is the fastest one: `benchmarks/sample.py` measures them.
FEW_ROWS = 2


def multiply(x: Float[Tensor, "b e"], weight: Float[Tensor, "f e"]) -> Float[Tensor, "b f"]:
    """``F.linear(x, weight)``, fast for one or two rows too.

    A step of sampling is bound by reading its weights. On a CPU, the float32 product of few rows reads them at a
    fraction of the memory's speed when the weights stand on the right, and up to three times as fast on the left.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or len(x) > FEW_ROWS:
        return F.linear(x, weight)
    # Fast are two columns (one would be a product with a vector) whose rows are contiguous.
    rows = x.contiguous() if len(x) > 1 else torch.cat([x, x])
    return (weight @ rows.T).T[: len(x)]


def product_with(weights: Sequence[Tensor], num_rows: int) -> Product:
    """The fastest ``F.linear`` by given weights that a step of sampling can have.

    On a CPU, oneDNN gets copies of the weights in an order of its own. Products of 3 to 32 rows then take about half of
    the time of ``F.linear``, which has the weights as they are.

    Args:
        weights: All of one device and dtype.
        num_rows: For which the order is chosen; products of other numbers of rows are equal, but slower.
    """
    if not weights or weights[0].device.type != "cpu" or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return multiply
    if weights[0].dtype == torch.bfloat16:
        packs = num_rows > 1 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    else:
        packs = num_rows > FEW_ROWS and weights[0].dtype == torch.float32
    if not packs:
        return multiply
    # The operators that torch.compile puts in place of linear layers; there is no public name for them.
    packed = {weight: torch.ops.mkldnn._reorder_linear_weight(weight, num_rows) for weight in weights}
    return lambda x, weight: torch.ops.mkldnn._linear_pointwise(x, packed[weight], None, "none", [], "")


@dataclass(frozen=True)
class Step:
    """Where one new token stands, for layers that keep a cache.

    Args:
        position: int64 ``(1,)``.
        visible: How much of the cache is looked at.
        mask: Of these, what may be seen, bool ``(1 visible)``; None: all.
        multiply: ``F.linear`` of one row for each image.
    """

    position: Int[Tensor, " 1"]
    visible: int
    mask: Tensor | None = None
    multiply: Product = multiply


def rotation(grid: Sequence[int], channels: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (J. Su et al., https://arxiv.org/abs/2104.09864) of a start token and a grid.

    The channels are divided among the axes of the grid, as LlamaGen does for images. Coordinates begin at 1; the start
    token stands at the origin.

    Args:
        grid: Shape of the positions.
        channels: Of a head; a multiple of twice the number of axes.
        base: Of the wavelengths.

    Returns:
        Cosines and signed sines, both ``(1 + positions, channels)``.

    Raises:
        ValueError: If the channels cannot be divided.
    """
    axes = len(grid)
    if channels % (2 * axes):
        raise ValueError(
            f"heads of {channels} channels cannot be divided among the {axes} axes of {tuple(grid)} in pairs: choose "
            f"width / num_heads as a multiple of {2 * axes}"
        )
    pairs = channels // (2 * axes)
    frequencies = base ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    places = torch.cartesian_prod(*(torch.arange(1.0, side + 1, dtype=torch.float64) for side in grid))
    places = torch.cat([torch.zeros(1, axes), places.reshape(-1, axes)])
    angles = (places[:, :, None] * frequencies).flatten(1).float()
    return torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)


def rotate(x: Float[Tensor, "*b n c"], by: Rotation) -> Float[Tensor, "*b n c"]:
    """Rotate pairs of channels, the i-th one of the first half with the i-th one of the second half, in float32.

    What `vistok.layers.transformer.rotate` does with angles, from tables and in three kernels: a step of sampling has
    so little to compute that it takes as long as its kernels take to start.
    """
    cosines, sines = by
    return torch.addcmul(x * cosines, x.roll(x.shape[-1] // 2, -1), sines).to(x.dtype)


class Attention(nn.Module):
    """Causal attention.

    Args:
        width: Channels.
        num_heads: Number of heads.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Float[Tensor, "b n e"], rotation: Rotation | None) -> Float[Tensor, "b n e"]:
        """Each token attends to itself and to those before it."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(attended.transpose(1, 2).flatten(2))

    def step(
        self,
        x: Float[Tensor, "b e"],
        rotation: Rotation | None,
        cache: Cache,
        step: Step,
    ) -> Float[Tensor, "b e"]:
        """One new token attends to itself and to those in the cache of keys and values, which it joins."""
        qkv = step.multiply(x, self.qkv.weight).view(len(x), 3, self.num_heads, 1, -1).transpose(0, 1)
        qk, v = qkv[:2], qkv[2]
        q, k = qk if rotation is None else rotate(qk, rotation)
        keys, values = cache
        keys.index_copy_(2, step.position, k)
        values.index_copy_(2, step.position, v)
        keys, values = keys[:, :, : step.visible], values[:, :, : step.visible]
        attended = F.scaled_dot_product_attention(q, keys, values, attn_mask=step.mask)
        return step.multiply(attended.flatten(1), self.out.weight)


class SwiGLU(nn.Module):
    """Gated feed-forward layer (N. Shazeer, https://arxiv.org/abs/2002.05202) of Llama's hidden size.

    Args:
        width: Channels; two thirds of four times as many are hidden, rounded up to a multiple of 256.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = 256 * math.ceil(8 * width // 3 / 256)
        self.gate_and_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Float[Tensor, "*b e"]) -> Float[Tensor, "*b e"]:
        """Apply the layer."""
        gate, up = self.gate_and_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)

    def step(self, x: Float[Tensor, "b e"], multiply: Product) -> Float[Tensor, "b e"]:
        """The same of one new token."""
        gate, up = multiply(x, self.gate_and_up.weight).chunk(2, -1)
        return multiply(F.silu(gate) * up, self.down.weight)


class Block(nn.Module):
    """Attention and feed-forward layer, each behind a root-mean-square norm and with a residual connection.

    Args:
        width: Channels.
        num_heads: Number of heads.
        dropout: Probability of a channel of either residual branch.
    """

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=1e-5)
        self.attention = Attention(width, num_heads)
        self.mlp_norm = nn.RMSNorm(width, eps=1e-5)
        self.mlp = SwiGLU(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b n e"], rotation: Rotation | None) -> Float[Tensor, "b n e"]:
        """Apply the block, see `Attention`."""
        x = x + self.dropout(self.attention(self.attention_norm(x), rotation))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))

    def step(
        self,
        x: Float[Tensor, "b e"],
        rotation: Rotation | None,
        cache: Cache,
        step: Step,
    ) -> Float[Tensor, "b e"]:
        """The same of one new token, in evaluation mode; see `Attention.step`."""
        x = x + self.attention.step(self.attention_norm(x), rotation, cache, step)
        return x + self.mlp.step(self.mlp_norm(x), step.multiply)
