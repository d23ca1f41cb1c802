"""The images of a stream that are kept: worst, best, and a sample that does not depend on their order."""

import hashlib
import heapq
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Highest(Generic[T]):
    """Keeps what has the highest rank, and nothing else.

    Args:
        size: How many entries.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.count = 0
        # A heap of (rank, -number, entry), the entry to give up first. The number makes ties go to the earlier image
        # and keeps comparisons away from the pictures.
        self._heap: list[tuple[float, int, T]] = []

    def offer(self, rank: float, make: Callable[[], T]) -> None:
        """Keep what `make` gives, if its rank is among the highest so far."""
        entry = (rank, -self.count)
        self.count += 1
        if len(self._heap) < self.size:
            heapq.heappush(self._heap, (*entry, make()))
        elif self._heap and entry > self._heap[0][:2]:
            heapq.heapreplace(self._heap, (*entry, make()))

    def ranked(self) -> dict[int, T]:
        """What was kept by its number in the stream, highest rank first."""
        return {-number: kept for _, number, kept in sorted(self._heap, key=lambda entry: entry[:2], reverse=True)}


def draw(key: str) -> float:
    """A number in [0, 1) that looks random and is the same for the same name, in every run and any order of images."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / 2**48
