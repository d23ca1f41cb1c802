"""Lightning data modules of pictures that keep their aspect ratio."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int
from lightning import Trainer

from vistok.data.buckets import (
    BucketBatchSampler,
    BucketDataset,
    CoverTransform,
    assign,
    bucket_sizes,
    picture_shape,
)
from vistok.data.loader import TrainLoader
from vistok.data.module import ImageFolderData, PictureData, WebDatasetData
from vistok.data.tar_pictures import TarPictures
from vistok.data.webdataset import is_remote


class BucketData(PictureData):
    """Pictures that keep their aspect ratio: every training batch has one of several sizes.

    A picture is resized, up or down, to cover the size with the nearest ratio, and cropped at random. Sizes with too
    few pictures for a batch are given up; within the others the rest of an epoch that fills no batch is left out.
    Evaluation has squares of `eval_size`, as everywhere.

    Args:
        buckets: Sizes ``[[H, W], ...]`` in pixels; None: those of ``image_size ** 2`` pixels or a little
            less.
        bucket_step: Pixels that the sides are multiples of, without `buckets`; the tokenizer must take them.
        max_ratio: Largest ratio of the longer side to the shorter one, without `buckets`.
        **options: Arguments of `PictureData`; its ways to crop are left alone.

    Raises:
        ValueError: If a size is impossible, or a setting has no effect.
    """

    def __init__(
        self,
        buckets: Sequence[Sequence[int]] | None = None,
        bucket_step: int = 32,
        max_ratio: float = 2.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        for name, unset in (("crop_scale", None), ("short_sides", None), ("resize_mode", "short_side")):
            if options.get(name, unset) != unset:
                raise ValueError(f"data.{name}={options[name]} has no effect on buckets, which a picture just covers")
        given = [tuple(size) if isinstance(size, Sequence) else (size,) for size in buckets or ()]
        if any(len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size) for size in given):
            raise ValueError(f"data.buckets must be sizes in pixels such as [[256,256],[192,320]], got {buckets}")
        if given and (bucket_step, max_ratio) != (32, 2.0):
            raise ValueError("data.bucket_step and data.max_ratio have no effect with data.buckets: leave them out")
        self.sizes = [(size[0], size[-1]) for size in given] or bucket_sizes(self.image_size**2, bucket_step, max_ratio)

    @property
    def train_sizes(self) -> list[tuple[int, ...]]:
        """Every size that a training batch may have."""
        return [*self.sizes]

    @abstractmethod
    def _shapes(self) -> Int[np.ndarray, "n 2"]:
        """Height and width of every training picture."""

    def make_train_loader(self, trainer: Trainer | None, rank: int, world_size: int, raw: bool = False) -> TrainLoader:
        """Training batches, each of one size, the same on every process."""
        buckets = assign(self._shapes(), self.sizes, self.batch_size * world_size)
        decoding = self._decoding("train")
        if self.reduced_decode:
            decoding["reduced_size"] = 2 * max(side for size in self.sizes for side in size)
        source = self.train_dataset.source
        datasets = [
            self.picture_dataset(source, CoverTransform(size, self.resize_filter, self.flip), True, **decoding)
            for size, _ in buckets
        ]
        numbers = [numbers for _, numbers in buckets]
        sampler = BucketBatchSampler(numbers, self.batch_size, self.seed, rank, world_size)
        return self._train_loader(BucketDataset(datasets), sampler, trainer, raw)


class BucketFolderData(BucketData, ImageFolderData):
    """A folder of pictures that keep their aspect ratio, with the arguments of `BucketData` and `ImageFolderData`."""

    def _shapes(self) -> Int[np.ndarray, "n 2"]:
        source = self.train_dataset.source
        return np.array([picture_shape(source[index].image) for index in range(len(source))], np.int64)


class BucketShardData(BucketData, WebDatasetData):
    """Tar shards of pictures that keep their aspect ratio, with arguments of `BucketData` and `WebDatasetData`.

    Training reads samples at random places instead of whole shards one after the other, so that all processes can have
    the same size at the same time and resuming is exact with any number of loading processes: training shards must be
    local and not compressed.

    Raises:
        ValueError: If the training shards are not local, or a setting has no effect.
    """

    def __init__(self, shards: str | None, val_shards: str, **options: Any) -> None:
        if shards is not None and is_remote(shards):
            raise ValueError(
                f"data.shards={shards} is not a folder or files on this machine, and buckets read at random places: "
                "copy the shards here, or read them by data=webdataset, without buckets"
            )
        for name in ("samples_per_epoch", "shuffle_buffer"):
            if name in options:
                raise ValueError(f"data.{name} has no effect on buckets, which shuffle all pictures: leave it out")
        super().__init__(shards=shards, val_shards=val_shards, **options)

    def make_dataset(self, split: Literal["train", "eval"]) -> Any:
        """Training pictures by number, or validation batches of this rank."""
        if split == "eval":
            return super().make_dataset(split)
        if not self.shards:
            raise ValueError("data.shards is not set: set it to a folder or a pattern of shards to train on")
        shards = [shard for shard in self.shards if isinstance(shard, Path)]
        return self._dataset(TarPictures(shards, self.on_bad_shard), split)

    def _shapes(self) -> Int[np.ndarray, "n 2"]:
        return self.train_dataset.source.shapes
