"""Finite scalar quantization.

F. Mentzer, D. Minnen, E. Agustsson, M. Tschannen: Finite Scalar Quantization: VQ-VAE Made Simple,
https://arxiv.org/abs/2309.15505 (section 3.1 and appendix A.1). Symmetric levels and noise: J. D. Parker et al.:
Scaling Transformers for Low-Bitrate High-Quality Speech Coding, https://arxiv.org/abs/2411.19842 (section 3.2).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from vistok.quantizer.base import PositionwiseQuantizer, log2_of_product

FORMS = ("tan", "atanh", "symmetric")
BOUNDS = ("tanh", "clamp")
MAX_TABLE_ROWS = 2**20
MAX_LEVELS = 2**16


class Constants(NamedTuple):
    """What the arithmetic of each channel needs, ``(d)`` each.

    Attributes:
        amplitudes: ``h``.
        shifts: ``s``.
        widths: Digits per unit of the codes: -1 is digit 0 and zero is where the digit is the width.
        centres: Half a digit where zero is the middle of a digit, that is with an odd number of levels, else 0.
        halves: int64, the digit of position 0.
        last: int64, the largest digit.
        none: int64 zeros, the smallest digit.
    """

    amplitudes: Tensor
    shifts: Tensor
    widths: Tensor
    centres: Tensor
    halves: Tensor
    last: Tensor
    none: Tensor


class FSQ(PositionwiseQuantizer):
    """Round each channel to a fixed number of levels; the codebook is their product and has no parameters.

    With ``L`` levels a feature ``z`` becomes the digit ``floor(h f(z + s) + L / 2)`` between 0 and ``L - 1``. The
    forms differ in the squashing function ``f``, its amplitude ``h``, its shift ``s`` and the codes of the digits:

    ============= ======================== ============================== ===========================
    form          ``h``                    ``s`` (0 for odd ``L``)        code of a digit
    ============= ======================== ============================== ===========================
    ``tan``       ``(1 - eps)(L - 1) / 2`` ``tan(1 / 2h)``                ``digit / (L // 2) - 1``
    ``atanh``     ``(1 + eps)(L - 1) / 2`` ``atanh(1 / 2h)``              ``digit / (L // 2) - 1``
    ``symmetric`` ``(L - 1) / 2``          0                              ``2 digit / (L - 1) - 1``
    ============= ======================== ============================== ===========================

    ``tan`` is the authors' notebook, ``atanh`` its PyTorch ports (Cosmos, VidTok, vector_quantize_pytorch): about one
    vector in a hundred gets another index, so a checkpoint needs the form it was trained with. Both have a level at
    zero, hence with an even ``L`` no level at +1. The levels of ``symmetric`` always include -1 and +1.

    There is no auxiliary loss: the straight-through estimator through the rounding is all the training needs.

    Args:
        levels: Number of levels of each channel, at least 3 each (2 if symmetric); ``dim`` is their count. The paper
            suggests ``[8, 6, 5]`` (240 codes), ``[8, 5, 5, 5]`` (1000), ``[7, 5, 5, 5, 5]`` (4375),
            ``[8, 8, 8, 6, 5]`` (15360) and ``[8, 8, 8, 5, 5, 5]`` (64000), Table 1. Channel 0 is the fastest digit of
            the index.
        form: ``tan``, ``atanh`` or ``symmetric``.
        bound: ``tanh``, or ``clamp`` to [-1, 1] for symmetric levels: the stages of a residual stack, whose features
            are in range already.
        eps: Margin between the squashed range and the outermost levels, as a share of the range, below
            ``1 / (L - 1)``; None means 1e-3. Symmetric levels have none.
        noise_dropout: In training each element of the codes is, with this probability, not quantized: it is the
            squashed feature plus uniform noise of one level spacing, clamped to [-1, 1]. Indices stay those of the
            quantized value. Symmetric levels only.

    Raises:
        ValueError: If an argument is out of range or has no effect with the form, or the product of the levels does not
            fit into 62 bits.

    Example:
        >>> FSQ(levels=(8, 5, 5, 5)).codebook_size
        1000
    """

    _levels: Tensor
    _basis: Tensor

    def __init__(
        self,
        levels: Sequence[int],
        form: str = "tan",
        bound: str = "tanh",
        eps: float | None = None,
        noise_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}; got {form!r}")
        if bound not in BOUNDS:
            raise ValueError(f"bound must be one of {', '.join(BOUNDS)}; got {bound!r}")
        # With two levels the shift of the other forms would be as large as their range.
        fewest = 2 if form == "symmetric" else 3
        listed = isinstance(levels, Sequence) and not isinstance(levels, str)
        if not listed or not levels or any(type(level) is not int or level < fewest for level in levels):
            raise ValueError(
                f"levels must be a list of integers of at least {fewest}, such as [8,5,5,5]; got "
                f"{list(levels) if listed else repr(levels)}"
            )
        levels = tuple(levels)
        if max(levels) > MAX_LEVELS:
            raise ValueError(f"float32 separates at most {MAX_LEVELS} levels of a channel, got {max(levels)}")
        if form == "symmetric":
            if eps is not None:
                raise ValueError(f"symmetric levels have no margin: leave eps out or write eps=null, got {eps}")
        else:
            if bound == "clamp":
                raise ValueError(f"bound=clamp needs form=symmetric, got form={form}")
            if noise_dropout:
                raise ValueError(f"noise_dropout needs form=symmetric, got form={form}")
            eps = 1e-3 if eps is None else eps
            # Beyond it the squashed range ends more than half a level spacing inside or outside of the levels.
            largest = 1 / (max(levels) - 1)
            if not 0 <= eps < largest:
                raise ValueError(f"eps must lie in [0, {largest:.3g}) with {max(levels)} levels, got {eps}")
        if not 0 <= noise_dropout <= 1:
            raise ValueError(f"noise_dropout is a probability, got {noise_dropout}")
        self.levels = levels
        self.form = form
        self.bound = bound
        self.eps = eps
        self.noise_dropout = noise_dropout
        self.dim = len(levels)
        self.bits = log2_of_product(levels)
        if self.bits > 62:
            raise ValueError(
                f"levels {list(levels)} need {self.bits:.1f} bits, an index has at most 62: "
                "split them over several FSQ with vistok.quantizer.GroupedQuantizer"
            )
        self.codebook_sizes = (math.prod(levels),)
        self.loss_weights = {}
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        # Integers only: ``quantizer.to(torch.bfloat16)`` would round the constants that follow from them. They follow
        # from `levels` themselves, so they stay out of the state dict.
        self._cache: tuple[tuple[torch.device, torch.dtype], Constants] | None = None
        self.register_buffer("_levels", torch.tensor(levels), persistent=False)
        self.register_buffer("_basis", torch.tensor(basis), persistent=False)

    @property
    @override
    def codebook(self) -> Float[Tensor, "k d"] | None:
        if self.codebook_size > MAX_TABLE_ROWS:
            return None
        return self.lookup(torch.arange(self.codebook_size, device=self._basis.device))

    @property
    @override
    def stage_limits(self) -> tuple[float, ...]:
        """Half a level spacing beyond -1: up to there the outermost code is as near as the others."""
        return tuple((1 + 0.5 / self._constants(torch.float64).widths).tolist())

    @property
    @override
    def stage_factors(self) -> tuple[float, ...]:
        """Largest ``|feature - code|`` of features within `stage_limits`, as a share of the limit.

        Symmetric levels with ``bound="clamp"`` have exactly ``1 / L``: the next stage sees the full range again. The
        others squash the features with tanh, which moves codes away from them, and refine less per stage.
        """
        amplitudes, shifts, widths, *_ = self._constants(torch.float64)
        factors = []
        for level, amplitude, shift, width, limit in zip(
            self.levels, amplitudes, shifts, widths, self.stage_limits, strict=True
        ):
            # Features where one digit becomes the next.
            digits = torch.arange(level, dtype=width.dtype, device=width.device)
            edges = (digits[1:] - level / 2) / amplitude
            if self.bound == "tanh":
                edges = edges.clamp(-1, 1).atanh() - shift
            ends = edges.new_tensor([-limit, limit])
            edges = torch.cat([ends[:1], edges.clamp(-limit, limit), ends[1:]])
            low, high = edges[:-1], edges[1:]
            codes = (digits - width) / width
            # Digits that no feature within the limits has do not count.
            reach = torch.where(low < high, torch.maximum((low - codes).abs(), (high - codes).abs()), 0).max()
            factors.append(reach.item() / limit)
        return tuple(factors)

    def positions(self, rows: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Squash each channel into the range of its digits, 0 in the middle: ``h f(z + s)``."""
        amplitudes, shifts, *_ = self._constants(rows.dtype)
        squashed = rows.clamp(-1, 1) if self.bound == "clamp" else torch.tanh(rows + shifts)
        return squashed * amplitudes

    def positions_to_codes(self, positions: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Put positions on the scale of the codes, without rounding."""
        constants = self._constants(positions.dtype)
        return (positions + (constants.last / 2 - constants.widths)) / constants.widths

    @override
    def quantize(self, rows: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n d"], Int[Tensor, " n"], dict[str, Tensor]]:
        constants = self._constants(rows.dtype)
        positions = self.positions(rows)
        # Equal to floor(position + L / 2) without the rounding error of a sum with an even L / 2.
        digits = self._inside((positions.detach() + constants.centres).floor_().long().add_(constants.halves))
        codes = self._digits_to_codes(digits)
        if self.training:
            continuous = self.positions_to_codes(positions)
            if self.noise_dropout:
                noisy = (continuous + self.noise_like(continuous)).clamp(-1, 1)
                codes = torch.where(torch.rand_like(codes) < self.noise_dropout, noisy, codes)
            # Value: the code. Gradient: that of the squashed feature.
            codes = continuous + (codes - continuous).detach()
        return codes, self._digits_to_indices(digits), {}

    @override
    def lookup(self, indices: Int[Tensor, "..."]) -> Float[Tensor, "... d"]:
        return self._digits_to_codes(indices.long().unsqueeze(-1) // self._basis % self._levels)

    @override
    def invert(self, codes: Float[Tensor, "... d"]) -> Int[Tensor, "..."]:
        widths = self._constants(codes.dtype).widths
        return self._digits_to_indices(self._inside((codes * widths + widths).round().long()))

    def noise_like(self, codes: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Uniform noise of one level spacing around zero."""
        return (torch.rand_like(codes) - 0.5) / self._constants(codes.dtype).widths

    def _constants(self, dtype: torch.dtype) -> Constants:
        """The constants on the device of the quantizer; those of the last dtype are kept."""
        key = (self._levels.device, dtype)
        if not torch.compiler.is_compiling() and self._cache is not None and self._cache[0] == key:
            return self._cache[1]
        # An inference tensor could not be used in a later backward pass.
        with torch.inference_mode(False):
            constants = self._compute_constants(dtype)
        if not torch.compiler.is_compiling():
            self._cache = (key, constants)
        return constants

    def _compute_constants(self, dtype: torch.dtype) -> Constants:
        levels = self._levels.clone()
        amplitudes = (levels - 1).to(dtype) / 2
        shifts = torch.zeros_like(amplitudes)
        widths = amplitudes if self.form == "symmetric" else (levels // 2).to(dtype)
        if self.eps is not None:
            amplitudes = amplitudes * (1 - self.eps if self.form == "tan" else 1 + self.eps)
            ratios = (1 - levels % 2) / (2 * amplitudes)
            shifts = torch.tan(ratios) if self.form == "tan" else torch.atanh(ratios)
        return Constants(
            amplitudes, shifts, widths, (levels % 2 / 2).to(dtype), levels // 2, levels - 1, torch.zeros_like(levels)
        )

    def _inside(self, digits: Tensor) -> Tensor:
        # NaN (possible in training only) becomes some extreme integer; the index must stay inside the codebook.
        constants = self._constants(torch.float32)
        return digits.clamp_(constants.none, constants.last)

    def _digits_to_codes(self, digits: Tensor) -> Tensor:
        widths = self._constants(torch.float32).widths
        return (digits - widths) / widths

    def _digits_to_indices(self, digits: Tensor) -> Tensor:
        return (digits * self._basis).sum(-1)

    def extra_repr(self) -> str:
        """One line for ``print(quantizer)``."""
        return f"levels={list(self.levels)}, form={self.form}, codebook_size={self.codebook_size}, bits={self.bits:.4g}"
