"""Finite scalar quantization.

F. Mentzer, D. Minnen, E. Agustsson, M. Tschannen: Finite Scalar Quantization: VQ-VAE Made Simple,
https://arxiv.org/abs/2309.15505. The bounding function is that of the authors' notebook (``tan`` and ``1 - eps``);
PyTorch ports use ``atanh`` and ``1 + eps``, which gives other indices for about one vector in a hundred.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from vistok.quantizer.base import PositionwiseQuantizer, log2_of_product

MAX_TABLE_ROWS = 2**20


class FSQ(PositionwiseQuantizer):
    """Round each channel to a fixed number of levels; the codebook is their product and has no parameters.

    There is no auxiliary loss: the straight-through estimator through the rounding is all the training needs.

    Args:
        levels: Number of levels of each channel, at least 3 each; ``dim`` is their count. The paper suggests
            ``[8, 6, 5]`` (240 codes), ``[8, 5, 5, 5]`` (1000), ``[7, 5, 5, 5, 5]`` (4375), ``[8, 8, 8, 6, 5]``
            (15360) and ``[8, 8, 8, 5, 5, 5]`` (64000), Table 1. Channel 0 is the fastest digit of the index.
        eps: Margin that keeps ``tanh`` away from the outermost rounding edge, as a share of the range.

    Raises:
        ValueError: If `levels` is empty or has a value below 3 (with two levels the offset of the bounding function
            is as large as its range), or the product does not fit into 62 bits.

    Example:
        >>> FSQ(levels=(8, 5, 5, 5)).codebook_size
        1000
    """

    _half: Tensor
    _offset: Tensor
    _shift: Tensor
    _levels: Tensor
    _basis: Tensor

    def __init__(self, levels: Sequence[int], eps: float = 1e-3) -> None:
        super().__init__()
        levels = tuple(levels)
        if not levels or any(not isinstance(level, int) or isinstance(level, bool) or level < 3 for level in levels):
            raise ValueError(f"levels must be a list of integers of at least 3, such as [8,5,5,5]; got {list(levels)}")
        if not 0 <= eps < 1:
            raise ValueError(f"eps must lie in [0, 1), got {eps}")
        self.levels = levels
        self.eps = eps
        self.dim = len(levels)
        self.bits = log2_of_product(levels)
        if self.bits > 62:
            raise ValueError(
                f"levels {list(levels)} need {self.bits:.1f} bits, an index has at most 62: split them over several FSQ"
            )
        self.codebook_sizes = (math.prod(levels),)
        self.loss_weights = {}
        half = [(level - 1) * (1 - eps) / 2 for level in levels]
        offset = [0.0 if level % 2 else 0.5 for level in levels]
        shift = [math.tan(o / h) for o, h in zip(offset, half, strict=True)]
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        # All of these follow from `levels`, so they stay out of the state dict.
        self.register_buffer("_half", torch.tensor(half), persistent=False)
        self.register_buffer("_offset", torch.tensor(offset), persistent=False)
        self.register_buffer("_shift", torch.tensor(shift), persistent=False)
        self.register_buffer("_levels", torch.tensor(levels), persistent=False)
        self.register_buffer("_basis", torch.tensor(basis), persistent=False)

    @property
    @override
    def codebook(self) -> Float[Tensor, "k d"] | None:
        if self.codebook_size > MAX_TABLE_ROWS:
            return None
        return self.lookup(torch.arange(self.codebook_size, device=self._basis.device))

    def bound(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Squash each channel into the interval whose integers are its levels."""
        return torch.tanh(rows + self._shift) * self._half - self._offset

    @override
    def quantize(self, rows: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n d"], Int[Tensor, " n"], dict[str, Tensor]]:
        bounded = self.bound(rows)
        digits = self._digits(bounded.detach())
        indices = (digits * self._basis).sum(-1)
        codes = self._digits_to_codes(digits)
        if self.training:
            # Value: the code. Gradient: that of the bounded value, scaled like the code.
            scaled = bounded / (self._levels // 2)
            codes = scaled + (codes - scaled).detach()
        return codes, indices, {}

    @override
    def lookup(self, indices: Int[Tensor, "..."]) -> Float[Tensor, "... d"]:
        return self._digits_to_codes(indices.long().unsqueeze(-1) // self._basis % self._levels)

    @override
    def invert(self, codes: Float[Tensor, "... d"]) -> Int[Tensor, "..."]:
        return (self._digits(codes * (self._levels // 2)) * self._basis).sum(-1)

    def _digits(self, bounded: Tensor) -> Tensor:
        digits = bounded.round().long() + self._levels // 2
        # NaN (possible in training only) becomes the smallest int64; the clamp keeps the index inside the codebook.
        return digits.clamp(min=0).minimum(self._levels - 1)

    def _digits_to_codes(self, digits: Tensor) -> Tensor:
        half_width = self._levels // 2
        return (digits - half_width).float() / half_width

    def extra_repr(self) -> str:
        """One line for ``print(quantizer)``."""
        return f"levels={list(self.levels)}, codebook_size={self.codebook_size}, bits={self.bits:.4g}"
