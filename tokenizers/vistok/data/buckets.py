"""Aspect-ratio buckets: pictures of about the same shape share a batch, so that little of each is cut off."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from vistok.data.bad_samples import BadSample
from vistok.data.collate import LazySamples, Sample
from vistok.data.decode import ORIENTATION, BadImageError
from vistok.data.pictures import PictureDataset
from vistok.data.sampler import Resumable
from vistok.data.transforms import MAX_RESIZED_PIXELS, check_filter, mix, random_crop, random_flip, resize

logger = logging.getLogger(__name__)
SIDEWAYS = (5, 6, 7, 8)  # values of the EXIF orientation that exchange width and height


def bucket_sizes(area: int, step: int, max_ratio: float) -> list[tuple[int, int]]:
    """Sizes (H, W) whose sides are multiples of `step`, one for each height, with about `area` pixels.

    Args:
        area: Pixels; no size has more, except that none is narrower than one step.
        step: Pixels that both sides are multiples of.
        max_ratio: Of the longer side to the shorter one.

    Raises:
        ValueError: If `step` is above the side of a square of that area, or the ratio is below 1.
    """
    if not isinstance(step, int) or step < 1 or step**2 > area:
        raise ValueError(f"data.bucket_step must be from 1 to {math.isqrt(area)} pixels, got {step}")
    if max_ratio < 1:
        raise ValueError(f"data.max_ratio must be at least 1, got {max_ratio}")
    heights = range(step, area // step + 1, step)
    sizes = [(height, area // height // step * step) for height in heights]
    return [size for size in sizes if max(size) <= max_ratio * min(size)]


def picture_shape(path: Path | BufferedReader) -> tuple[int, int]:
    """Height and width of a picture that stands upright, from its header; of one without, those of a square."""
    try:
        with Image.open(path) as image:
            # Not that of PNG files, which decodes the pixels to look for EXIF behind them.
            turned = Image.Image.getexif(image).get(ORIENTATION, 1) in SIDEWAYS
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception:  # reported as a bad sample when it is read
        return 1, 1


def assign(
    shapes: Sequence[tuple[int, int]] | Int[np.ndarray, "n 2"], sizes: Sequence[tuple[int, int]], smallest: int
) -> list[tuple[tuple[int, int], list[int]]]:
    """Divide pictures among sizes by the nearest aspect ratio, on a logarithmic scale.

    A size that gets fewer than `smallest` pictures is given up, the one with the fewest first, and its pictures go to
    the nearest of the others.

    Args:
        shapes: Height and width of each picture.
        sizes: To choose from.
        smallest: Pictures that a batch of all processes needs.

    Returns:
        The sizes that are used, each with the numbers of its pictures.

    Raises:
        ValueError: If there are fewer than `smallest` pictures.
    """
    if len(shapes) < smallest:
        raise ValueError(f"{len(shapes)} training pictures do not fill one batch of {smallest}: lower data.batch_size")
    left = list(sizes)
    ratios = np.log([width / height for height, width in shapes])
    while True:
        distances = np.abs(ratios[:, None] - np.log([width / height for height, width in left]))
        nearest = distances.argmin(1)
        counts = np.bincount(nearest, minlength=len(left))
        if counts.min() >= smallest:
            break
        height, width = left.pop(int(counts.argmin()))
        logger.info("bucket %dx%d has %d pictures, fewer than a batch: left out", height, width, counts.min())
    return [(size, np.flatnonzero(nearest == number).tolist()) for number, size in enumerate(left)]


@dataclass(frozen=True)
class CoverTransform:
    """Resize a picture, up or down, so that it just covers a size, crop what sticks out at random, and flip.

    Args:
        size: Height and width of the result in pixels.
        resize_filter: One of `vistok.data.transforms.FILTERS`.
        flip: Whether to mirror half of the pictures.
    """

    size: tuple[int, int]
    resize_filter: str = "bicubic"
    flip: bool = True

    def __post_init__(self) -> None:
        check_filter(self.resize_filter)

    def __call__(self, image: UInt8[Tensor, "c h w"], generator: torch.Generator) -> UInt8[Tensor, "c h2 w2"]:
        """Transform one picture.

        Raises:
            BadImageError: If it is so elongated that it would have more than 2**27 pixels before the crop.
        """
        scale = max(wanted / side for wanted, side in zip(self.size, image.shape[1:], strict=True))
        height, width = (max(wanted, round(s * scale)) for wanted, s in zip(self.size, image.shape[1:], strict=True))
        if height * width > MAX_RESIZED_PIXELS:
            raise BadImageError("too large", f"{image.shape[2]}x{image.shape[1]} pixels would become {width}x{height}")
        image = random_crop(resize(image, height, width, self.resize_filter), self.size, generator)
        return random_flip(image, generator) if self.flip else image


class BucketDataset(Dataset):
    """Pictures of several sizes; items are asked for by ``(epoch, index, bucket)``.

    Args:
        buckets: The same pictures, transformed to one size each.
    """

    def __init__(self, buckets: Sequence[PictureDataset]) -> None:
        self.buckets = buckets

    def __len__(self) -> int:
        return len(self.buckets[0])

    def __getitem__(self, item: tuple[int, int, int]) -> Sample | BadSample:
        epoch, index, bucket = item
        return self.buckets[bucket][epoch, index]

    def __getitems__(self, items: Sequence[tuple[int, int, int]]) -> LazySamples:
        """A batch of samples, under the name that a `DataLoader` asks for."""
        return LazySamples(self.__getitem__, items)


class BucketBatchSampler(Resumable, Sampler[list[tuple[int, int, int]]]):
    """Batches of ``(epoch, index, bucket)`` of one bucket each; all ranks have the same bucket at the same time.

    In every epoch the pictures of each bucket are shuffled, the rest that fills no batch of all processes is left out,
    and the batches of all buckets are shuffled: a pure function of the seed and the epoch.

    Args:
        buckets: Numbers of the pictures of each bucket, at least a batch of all processes.
        batch_size: Pictures per batch and process.
        seed: Seed of the order.
        rank: Number of this process.
        world_size: Number of processes.
    """

    def __init__(
        self, buckets: Sequence[Sequence[int]], batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self.buckets = [torch.tensor(bucket) for bucket in buckets]
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        """Number of batches in a whole epoch, whatever `start_at` says."""
        return sum(len(bucket) // (self.batch_size * self.world_size) for bucket in self.buckets)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        # Runs when the first batch is asked for: a DataLoader with workers makes two iterators and uses the second.
        epoch, start, self._start = self._epoch, self._start, 0
        generator = torch.Generator().manual_seed(mix(self.seed, epoch, "order"))
        whole = self.batch_size * self.world_size
        batches = []
        for number, bucket in enumerate(self.buckets):
            shuffled = bucket[torch.randperm(len(bucket), generator=generator)]
            batches += [(number, batch) for batch in shuffled.split(whole) if len(batch) == whole]
        for position in torch.randperm(len(batches), generator=generator)[start:].tolist():
            number, batch = batches[position]
            yield [(epoch, index, number) for index in batch[self.rank :: self.world_size].tolist()]
