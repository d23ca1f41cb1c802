"""How much of its codebooks a tokenizer uses: exact counts over a whole data set, on all ranks."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

# Up to here a codebook has one counter per code (128 MiB). Above, the indices themselves are kept, which takes 8
# bytes per token instead of 8 bytes per code, and the counts are as exact.
MAX_COUNTERS = 2**24


class CodebookUsage(Metric):
    """Utilisation, perplexity and entropy of the codes of a tokenizer.

    Counts are int64 and exact; nothing is a window or a batch mean, so results depend neither on the batch size nor
    on the number of ranks. `compute` returns float64 scalars and, under the name with ``_per_codebook``, one value
    per codebook:

    - ``utilisation``: share of codes used at least once.
    - ``entropy_bits``: entropy of the code frequencies in bits.
    - ``perplexity``: exp of the entropy in nats, which is ``2 ** entropy_bits``.
    - ``dead_codes``: number of codes never used.
    - ``tokens``: number of indices counted.
    - ``expected_uniform_utilisation``: ``1 - (1 - 1/K) ** tokens``, the utilisation of that many uniform draws. Below
      it lies what is due to the codebook, above it what is due to a small data set.

    With several codebooks the scalars are: utilisations over all codes of all codebooks, sums of dead codes and
    tokens, the mean entropy, and the perplexity of that mean (the geometric mean of the perplexities).

    Args:
        codebook_sizes: Number of codes of each codebook, in the order of the last axis of the indices.
        **kwargs: Passed to `torchmetrics.Metric`.

    Raises:
        ValueError: If there is no codebook, as in continuous tokenizers.

    Example:
        >>> usage = CodebookUsage((4,))
        >>> usage.update(torch.tensor([[0, 1, 1, 0]]))
        >>> usage.compute()["utilisation"].item(), usage.compute()["perplexity"].item()
        (0.5, 2.0)
    """

    is_differentiable = False
    full_state_update = False

    def __init__(self, codebook_sizes: Sequence[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.codebook_sizes = tuple(codebook_sizes)
        if not self.codebook_sizes or min(self.codebook_sizes) < 1:
            raise ValueError(
                f"codebook_sizes must name at least one codebook of at least one code, got {self.codebook_sizes}: "
                "continuous tokenizers have no codes to count"
            )
        for position, size in enumerate(self.codebook_sizes):
            if size <= MAX_COUNTERS:
                self.add_state(f"counts_{position}", torch.zeros(size, dtype=torch.int64), dist_reduce_fx="sum")
            else:
                self.add_state(f"indices_{position}", [], dist_reduce_fx="cat")

    def update(self, indices: Int[Tensor, "..."]) -> None:
        """Count indices.

        Args:
            indices: ``(b *grid)`` with one codebook, ``(b *grid depth)`` with several. A shorter last axis leaves the
                last codebooks out.

        Raises:
            ValueError: If an index is outside its codebook or the last axis is longer than the number of codebooks.
        """
        depth = len(self.codebook_sizes)
        columns = indices.unsqueeze(-1) if depth == 1 else indices
        if columns.shape[-1] > depth:
            raise ValueError(
                f"indices {tuple(indices.shape)} have {columns.shape[-1]} values on the last axis, "
                f"but there are {depth} codebooks"
            )
        for position in range(columns.shape[-1]):
            self._count(position, columns[..., position].flatten())

    def compute(self) -> dict[str, Tensor]:
        """Statistics of everything counted; see the class."""
        counts = self.counts()
        sizes = torch.tensor(self.codebook_sizes, dtype=torch.float64)
        tokens = torch.stack([count.sum() for count in counts]).double()
        used = torch.stack([(count > 0).sum() for count in counts]).double()
        entropy = torch.stack([_entropy_bits(count) for count in counts])
        expected = -torch.expm1(torch.special.xlog1py(tokens, -1 / sizes))
        values = {
            "utilisation": (used / sizes, used.sum() / sizes.sum()),
            "entropy_bits": (entropy, entropy.mean()),
            "perplexity": (entropy.exp2(), entropy.mean().exp2()),
            "dead_codes": (sizes - used, (sizes - used).sum()),
            "tokens": (tokens, tokens.sum()),
            "expected_uniform_utilisation": (expected, (expected * sizes).sum() / sizes.sum()),
        }
        overall = {name: value for name, (_, value) in values.items()}
        return overall | {f"{name}_per_codebook": value for name, (value, _) in values.items()}

    def counts(self) -> list[Int[Tensor, " _"]]:
        """Occurrences of each code, one int64 tensor on the CPU per codebook.

        A codebook above 2**24 codes lists only the codes that occur, in the order of their indices.
        """
        return [self._counts(position) for position in range(len(self.codebook_sizes))]

    def _counts(self, position: int) -> Tensor:
        if self.codebook_sizes[position] <= MAX_COUNTERS:
            return getattr(self, f"counts_{position}").cpu()
        seen = getattr(self, f"indices_{position}")
        if not len(seen):
            return torch.zeros(0, dtype=torch.int64)
        return dim_zero_cat(seen).unique(return_counts=True)[1].cpu()

    def _count(self, position: int, indices: Tensor) -> None:
        size = self.codebook_sizes[position]
        if not indices.numel():
            return
        low, high = indices.aminmax()
        if low < 0 or high >= size:
            wrong = int(low if low < 0 else high)
            raise ValueError(f"index {wrong} is outside codebook {position}, which has the indices 0 to {size - 1}")
        if size <= MAX_COUNTERS:
            getattr(self, f"counts_{position}").add_(torch.bincount(indices, minlength=size))
        else:
            getattr(self, f"indices_{position}").append(indices)


def _entropy_bits(counts: Tensor) -> Float[Tensor, ""]:
    used = counts[counts > 0].double()
    share = used / used.sum()
    # + 0.0 turns the -0.0 of a single used code into 0.
    return -(share * share.log2()).sum() + 0.0
