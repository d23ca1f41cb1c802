"""The worst and the best reconstructions of a stream of images."""

import heapq
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from vistok.evaluation.result import Example
from vistok.metric.image import to_uint8


class Extremes:
    """Keeps the images of the lowest and of the highest PSNR, and no others.

    Args:
        size: How many of each.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.count = 0
        # Heaps of (rank, -number, example), the entry to give up first. The number makes ties go to the earlier image
        # and keeps comparisons away from the pictures.
        self._lowest: list[tuple[float, int, Example]] = []
        self._highest: list[tuple[float, int, Example]] = []

    def update(
        self,
        keys: Sequence[str],
        psnr: Sequence[float],
        originals: Float[Tensor, "b c h w"],
        reconstructions: Float[Tensor, "b c h w"],
    ) -> None:
        """Look at images in [-1, 1] and their PSNR in dB."""
        for position, (key, value) in enumerate(zip(keys, psnr, strict=True)):
            for heap, rank in ((self._lowest, -value), (self._highest, value)):
                entry = (rank, -self.count)
                if len(heap) < self.size or (heap and entry > heap[0][:2]):
                    pictures = (
                        to_uint8(images[position : position + 1])[0].cpu() for images in (originals, reconstructions)
                    )
                    push = heapq.heappush if len(heap) < self.size else heapq.heapreplace
                    push(heap, (*entry, Example(key, value, *pictures)))
            self.count += 1

    def worst(self) -> list[Example]:
        """Lowest PSNR first."""
        return [example for _, _, example in sorted(self._lowest, key=lambda entry: entry[:2], reverse=True)]

    def best(self) -> list[Example]:
        """Highest PSNR first, without the images that are among the worst."""
        shown = {number for _, number, _ in self._lowest}
        ranked = sorted(self._highest, key=lambda entry: entry[:2], reverse=True)
        return [example for _, number, example in ranked if number not in shown]
