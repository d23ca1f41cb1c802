"""Real bits: the size of indices after an adaptive arithmetic coder, which neither `bits` nor the entropy is.

``log2(K)`` bits per token charge for codes that are never used. The entropy of the counts charges nothing for telling
the decoder what the counts are. An adaptive coder starts from equal counts, updates them after every symbol on both
sides, and so pays for both. The model here has no context: one set of counts per codebook and scale, every code
starting at half an occurrence (Krichevsky and Trofimov, "The performance of universal encoding", 1981).

The probability of a whole sequence under that model depends on the final counts only, so the exact ideal code length
follows from a histogram (`adaptive_code_length`), for any number of tokens. `compress` and `decompress` are the coder
itself; it needs less than two bits more than the ideal, and two bits to end.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Int
from torch import Tensor

# Registers of Python's integers. The sum of the counts must stay far below 2**PRECISION, whatever the codebook.
PRECISION = 96
TOP, HALF, QUARTER = 1 << PRECISION, 1 << PRECISION - 1, 1 << PRECISION - 2


def adaptive_code_length(counts: Int[Tensor, " _"], codebook_size: int) -> float:
    """Bits of the ideal adaptive code of a sequence, from how often each code occurs in it.

    ``-log2`` of the product of ``(n_k + 1/2) / (n + K/2)`` over the tokens, where n and n_k count what came before:
    ``log2(G(N + K/2) / G(K/2)) - sum_k log2(G(N_k + 1/2) / G(1/2))`` with G the gamma function.

    Args:
        counts: Occurrences of the codes, in any order; codes that never occur may be left out.
        codebook_size: Number of codes K.

    Example:
        >>> round(adaptive_code_length(torch.tensor([1]), 1024), 6)
        10.0
    """
    used = counts[counts > 0].double()
    total = float(used.sum())
    spread = _log_rising(codebook_size / 2, total)
    gathered = (torch.lgamma(used + 0.5) - math.lgamma(0.5)).sum().item()
    return max(spread - gathered, 0.0) / math.log(2)


def _log_rising(start: float, steps: float) -> float:
    """log(G(start + steps) / G(start)).

    The difference of two huge logarithms loses digits where ``start`` is far larger than ``steps``; there it is
    Stirling's formula, rearranged.
    """
    if start < 1e6:
        return math.lgamma(start + steps) - math.lgamma(start)
    ratio = math.log1p(steps / start)
    return steps * math.log(start) + (start + steps - 0.5) * ratio - steps + (1 / (start + steps) - 1 / start) / 12


def compress(symbols: Iterable[int], codebook_size: int) -> bytes:
    """Adaptive arithmetic code of integers in ``[0, codebook_size)``.

    Witten, Neal and Cleary, "Arithmetic Coding for Data Compression", 1987, with long registers. The number of
    symbols is not in the code.

    Raises:
        ValueError: If a symbol is outside the codebook.
    """
    model, bits, pending = _Counts(codebook_size), [], 0
    low, high = 0, TOP - 1

    def emit(bit: int) -> None:
        nonlocal pending
        bits.append(bit)
        bits.extend([1 - bit] * pending)
        pending = 0

    for symbol in symbols:
        if not 0 <= symbol < codebook_size:
            raise ValueError(f"symbol {symbol} is outside the codebook, which has the indices 0 to {codebook_size - 1}")
        low, high = _narrow(low, high, model, model.below(symbol), symbol)
        model.count(symbol)
        while True:
            if high < HALF:
                emit(0)
            elif low >= HALF:
                emit(1)
                low, high = low - HALF, high - HALF
            elif low >= QUARTER and high < HALF + QUARTER:
                pending += 1
                low, high = low - QUARTER, high - QUARTER
            else:
                break
            low, high = 2 * low, 2 * high + 1
    pending += 1
    emit(int(low >= QUARTER))
    bits.extend([0] * (-len(bits) % 8))
    return int("".join(map(str, bits)), 2).to_bytes(len(bits) // 8, "big")


def decompress(data: bytes, length: int, codebook_size: int) -> list[int]:
    """The `length` integers that `compress` made the bytes of."""
    model, bits = _Counts(codebook_size), _bits(data)
    low, high, value = 0, TOP - 1, 0
    for _ in range(PRECISION):
        value = 2 * value + next(bits)
    symbols = []
    for _ in range(length):
        target = ((value - low + 1) * model.total - 1) // (high - low + 1)
        symbol, below = model.find(target)
        low, high = _narrow(low, high, model, below, symbol)
        model.count(symbol)
        symbols.append(symbol)
        while high < HALF or low >= HALF or (low >= QUARTER and high < HALF + QUARTER):
            shift = 0 if high < HALF else HALF if low >= HALF else QUARTER
            low, high, value = 2 * (low - shift), 2 * (high - shift) + 1, 2 * (value - shift) + next(bits)
    return symbols


def _narrow(low: int, high: int, model: "_Counts", below: int, symbol: int) -> tuple[int, int]:
    width = high - low + 1
    return low + width * below // model.total, low + width * (below + model.weight(symbol)) // model.total - 1


def _bits(data: bytes) -> Iterator[int]:
    for byte in data:
        yield from (byte >> position & 1 for position in range(7, -1, -1))
    while True:  # the decoder looks ahead by its register
        yield 0


class _Counts:
    """Twice the occurrences of each symbol plus one; a Fenwick tree of what occurred sums them up."""

    def __init__(self, size: int) -> None:
        self.size, self.total = size, size
        self._occurrences: dict[int, int] = defaultdict(int)
        self._tree: dict[int, int] = defaultdict(int)

    def weight(self, symbol: int) -> int:
        return 2 * self._occurrences.get(symbol, 0) + 1

    def below(self, symbol: int) -> int:
        """Sum of the weights of the symbols before this one."""
        position, occurrences = symbol, 0
        while position:
            occurrences += self._tree.get(position, 0)
            position &= position - 1
        return symbol + 2 * occurrences

    def find(self, target: int) -> tuple[int, int]:
        """The symbol in whose interval of weights `target` lies, and where that interval begins."""
        symbol, below = 0, 0
        for level in range(self.size.bit_length() - 1, -1, -1):
            step = 1 << level
            if symbol + step <= self.size and below + step + 2 * self._tree.get(symbol + step, 0) <= target:
                symbol += step
                below += step + 2 * self._tree.get(symbol, 0)
        return symbol, below

    def count(self, symbol: int) -> None:
        self._occurrences[symbol] += 1
        self.total += 2
        position = symbol + 1
        while position <= self.size:
            self._tree[position] += 1
            position += position & -position
