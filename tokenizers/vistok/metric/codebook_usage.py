"""How much of its codebooks a tokenizer uses: exact counts over a whole data set, on all ranks."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from vistok.metric.rate import adaptive_code_length
from vistok.quantizer.base import Quantizer

# Up to here a codebook has one counter per code (128 MiB). Above, the indices themselves are kept, which takes 8
# bytes per token instead of 8 bytes per code, and the counts are as exact.
MAX_COUNTERS = 2**24
BIT_ORDERS = ("lsb_first", "msb_first")


class Tally(NamedTuple):
    """The codes of one codebook that occur, in the order of their indices, and how often."""

    codes: Int[Tensor, " n"]
    counts: Int[Tensor, " n"]


class CodebookUsage(Metric):
    """Utilisation, perplexity and entropy of the codes of a tokenizer.

    Counts are int64 and exact; nothing is a window or a batch mean, so results depend neither on the batch size nor
    on the number of ranks. `compute` returns float64 scalars and, under the name with ``_per_codebook``, one value
    per codebook:

    - ``utilisation``: share of codes used at least once.
    - ``entropy_bits``: entropy of the code frequencies in bits.
    - ``perplexity``: exp of the entropy in nats, which is ``2 ** entropy_bits``.
    - ``dead_codes``: number of codes never used.
    - ``distinct_codes``: number of codes used at least once, which tells more of a codebook that is far larger than
      the data than its utilisation does.
    - ``tokens``: number of indices counted.
    - ``expected_uniform_utilisation``: ``1 - (1 - 1/K) ** tokens``, the utilisation of that many uniform draws. Below
      it lies what is due to the codebook, above it what is due to a small data set.

    With several codebooks the scalars are: utilisations over all codes of all codebooks, sums of dead and distinct
    codes and of tokens, the mean entropy, and the perplexity of that mean (the geometric mean of the perplexities).

    With `scale_lengths` each scale is also counted alone: the same values under the name with ``_per_scale``. With
    `bit_order` each bit is: ``ones_per_bit``, the share of ones, ``entropy_bits_per_bit``, and the scalar
    ``dead_bits``, the number of bits that never change. The bits of all codebooks follow one another as the channels
    do.

    Args:
        codebook_sizes: Number of codes of each codebook, in the order of the last axis of the indices.
        scale_lengths: Number of tokens of each scale, for multi-scale tokenizers.
        bit_order: ``lsb_first`` if the first channel is the lowest bit of an index, ``msb_first`` if it is the highest;
            None if the codes are not binary.
        **kwargs: Passed to `torchmetrics.Metric`.

    Raises:
        ValueError: If there is no codebook, as in continuous tokenizers, or a binary codebook has not ``2**n`` codes.

    Example:
        >>> usage = CodebookUsage((4,))
        >>> usage.update(torch.tensor([[0, 1, 1, 0]]))
        >>> usage.compute()["utilisation"].item(), usage.compute()["perplexity"].item()
        (0.5, 2.0)
    """

    is_differentiable = False
    full_state_update = False

    def __init__(
        self,
        codebook_sizes: Sequence[int],
        scale_lengths: Sequence[int] = (),
        bit_order: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.codebook_sizes = tuple(codebook_sizes)
        self.scale_lengths = tuple(scale_lengths)
        self.bit_order = bit_order
        if not self.codebook_sizes or min(self.codebook_sizes) < 1:
            raise ValueError(
                f"codebook_sizes must name at least one codebook of at least one code, got {self.codebook_sizes}: "
                "continuous tokenizers have no codes to count"
            )
        if bit_order not in (None, *BIT_ORDERS):
            raise ValueError(f"bit_order must be one of {', '.join(BIT_ORDERS)}, or None; got {bit_order!r}")
        if bit_order is not None and any(size & (size - 1) for size in self.codebook_sizes):
            raise ValueError(f"binary codebooks have 2**n codes, got {self.codebook_sizes}: leave out bit_order")
        self.num_scales = len(self.scale_lengths) or 1
        # One counter per code of each scale, or the indices of each scale.
        self.counted = tuple(size * self.num_scales <= MAX_COUNTERS for size in self.codebook_sizes)
        for position, (size, counted) in enumerate(zip(self.codebook_sizes, self.counted, strict=True)):
            if counted:
                zeros = torch.zeros(self.num_scales, size, dtype=torch.int64)
                self.add_state(f"counts_{position}", zeros, dist_reduce_fx="sum")
                continue
            for scale in range(self.num_scales):
                self.add_state(f"indices_{position}_{scale}", [], dist_reduce_fx="cat")

    @classmethod
    def of(cls, quantizer: Quantizer, scale_lengths: Sequence[int] = (), **kwargs: Any) -> "CodebookUsage | None":
        """What counts the codes of a quantizer; None if they are continuous.

        Args:
            quantizer: Its codes are counted per bit if it, or every part of it, packs bits in one order.
            scale_lengths: Number of tokens of each scale on the grid that is counted.
            **kwargs: Passed to `torchmetrics.Metric`.
        """
        if not quantizer.codebook_sizes:
            return None
        orders = {
            getattr(module, "bit_order", None)
            for module in quantizer.modules()
            if isinstance(module, Quantizer) and not any(module.parts())
        }
        return cls(quantizer.codebook_sizes, scale_lengths, orders.pop() if len(orders) == 1 else None, **kwargs)

    def update(self, indices: Int[Tensor, "..."]) -> None:
        """Count indices.

        Args:
            indices: ``(b *grid)`` with one codebook, ``(b *grid depth)`` with several; multi-scale ``(b length)`` or
                ``(b length depth)``. A shorter last axis leaves the last codebooks out, a shorter axis `length` the
                last scales.

        Raises:
            ValueError: If an index is outside its codebook or an axis is longer than codebooks or scales are.
        """
        depth = len(self.codebook_sizes)
        columns = indices.unsqueeze(-1) if depth == 1 else indices
        if columns.shape[-1] > depth:
            raise ValueError(
                f"indices {tuple(indices.shape)} have {columns.shape[-1]} values on the last axis, "
                f"but there are {depth} codebooks"
            )
        if not self.scale_lengths:
            scales = [columns]
        elif columns.ndim == 3 and columns.shape[1] <= sum(self.scale_lengths):
            ends = [sum(self.scale_lengths[: scale + 1]) for scale in range(self.num_scales - 1)]
            scales = columns.tensor_split(ends, 1)
        else:
            raise ValueError(
                f"indices of {self.num_scales} scales are (b, {sum(self.scale_lengths)}) or shorter, with several "
                f"codebooks a last axis follows; got {tuple(indices.shape)}"
            )
        for scale, part in enumerate(scales):
            for position in range(columns.shape[-1]):
                self._count(position, scale, part[..., position].flatten())

    def compute(self) -> dict[str, Tensor]:
        """Statistics of everything counted; see the class."""
        positions = range(len(self.codebook_sizes))
        overall, per_codebook = self._statistics([self._tally(position) for position in positions])
        values = overall | {f"{name}_per_codebook": value for name, value in per_codebook.items()}
        if self.scale_lengths:
            scales = [
                self._statistics([self._tally(position, scale) for position in positions])[0]
                for scale in range(self.num_scales)
            ]
            values |= {f"{name}_per_scale": torch.stack([scale[name] for scale in scales]) for name in overall}
        if self.bit_order is not None:
            ones = torch.cat([self._ones(position) for position in positions])
            values["ones_per_bit"] = ones
            values["entropy_bits_per_bit"] = entropy_bits(torch.stack([ones, 1 - ones], -1))
            values["dead_bits"] = ((ones == 0) | (ones == 1)).sum().double()
        return values

    def counts(self) -> list[Int[Tensor, " _"]]:
        """Occurrences of each code, one int64 tensor on the CPU per codebook.

        A codebook above 2**24 codes lists only the codes that occur, in the order of their indices.
        """
        return [
            getattr(self, f"counts_{position}").sum(0).cpu() if counted else self._tally(position).counts
            for position, counted in enumerate(self.counted)
        ]

    def coded_bits(self) -> float:
        """Bits of all indices counted after an adaptive arithmetic coder, one model per codebook and scale.

        See `vistok.metric.rate`.
        """
        return sum(
            adaptive_code_length(self._tally(position, scale).counts, size)
            for position, size in enumerate(self.codebook_sizes)
            for scale in range(self.num_scales)
        )

    def _statistics(self, tallies: Sequence[Tally]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Overall values and those of each codebook."""
        sizes = torch.tensor(self.codebook_sizes, dtype=torch.float64)
        tokens = torch.stack([tally.counts.sum() for tally in tallies]).double()
        used = torch.tensor([len(tally.codes) for tally in tallies], dtype=torch.float64)
        entropy = torch.stack([entropy_bits(tally.counts) for tally in tallies])
        expected = -torch.expm1(torch.special.xlog1py(tokens, -1 / sizes))
        values = {
            "utilisation": (used / sizes, used.sum() / sizes.sum()),
            "entropy_bits": (entropy, entropy.mean()),
            "perplexity": (entropy.exp2(), entropy.mean().exp2()),
            "dead_codes": (sizes - used, (sizes - used).sum()),
            "distinct_codes": (used, used.sum()),
            "tokens": (tokens, tokens.sum()),
            "expected_uniform_utilisation": (expected, (expected * sizes).sum() / sizes.sum()),
        }
        overall = {name: value for name, (_, value) in values.items()}
        return overall, {name: value for name, (value, _) in values.items()}

    def _tally(self, position: int, scale: int | None = None) -> Tally:
        """What occurs of a codebook, in one scale or in all."""
        scales = slice(scale, None if scale is None else scale + 1)
        if self.counted[position]:
            counts = getattr(self, f"counts_{position}")[scales].sum(0).cpu()
            codes = counts.nonzero().squeeze(-1)
            return Tally(codes, counts[codes])
        seen = [getattr(self, f"indices_{position}_{scale}") for scale in range(self.num_scales)[scales]]
        # After a synchronisation a state is one tensor instead of a list.
        seen = [dim_zero_cat(indices) for indices in seen if len(indices)]
        if not seen:
            return Tally(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
        return Tally(*(value.cpu() for value in torch.cat(seen).unique(return_counts=True)))

    def _ones(self, position: int) -> Float[Tensor, " bits"]:
        """Share of ones of each bit of a codebook, in the order of the channels."""
        bits = torch.arange(self.codebook_sizes[position].bit_length() - 1)
        if self.bit_order == "msb_first":
            bits = bits.flip(0)
        codes, counts = self._tally(position)
        # Integer sums: a float of all tokens of a large data set would not be exact.
        ones = [counts[(codes >> bit & 1).bool()].sum() for bit in bits]
        return torch.stack(ones).double() / counts.sum().clamp(min=1)

    def _count(self, position: int, scale: int, indices: Tensor) -> None:
        size = self.codebook_sizes[position]
        if not indices.numel():
            return
        low, high = indices.aminmax()
        if low < 0 or high >= size:
            wrong = int(low if low < 0 else high)
            raise ValueError(f"index {wrong} is outside codebook {position}, which has the indices 0 to {size - 1}")
        if self.counted[position]:
            getattr(self, f"counts_{position}")[scale] += torch.bincount(indices, minlength=size)
        else:
            getattr(self, f"indices_{position}_{scale}").append(indices)


def entropy_bits(weights: Tensor) -> Float[Tensor, " *n"]:
    """Entropy of the last axis in bits; 0 where all weights are 0."""
    smallest = torch.finfo(torch.float64).tiny
    weights = weights.double()
    share = weights / weights.sum(-1, keepdim=True).clamp(min=smallest)
    # A share of 0 counts 0 times a finite number; + 0.0 turns the -0.0 of a single used code into 0.
    return -(share * share.clamp(min=smallest).log2()).sum(-1) + 0.0
