"""Lightning data modules: one for each kind of data."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from vistok.data.collate import collate
from vistok.data.image_folder import (
    ImageFolder,
    find_classes,
    find_images,
    is_readable,
    read_file_list,
    split_by_hash,
)
from vistok.data.loader import TrainLoader, leave_signals_to_the_main_process
from vistok.data.photos import Photos
from vistok.data.sampler import EpochBatchSampler
from vistok.data.transforms import EvalTransform, TrainTransform, check_filter
from vistok.data.webdataset import ShardDataset, count_samples, expand_shards


class DataModule(LightningDataModule, ABC):
    """What all kinds of data have in common; the arguments are the keys of ``configs/data/*.yaml``.

    A batch is a dict: ``images`` float32 ``(b c s s)`` in [-1, 1], ``keys``, ``labels`` int64 ``(b,)`` where all are
    known, and ``bad``, the `BadSample`s met while it was loaded. The loaders work without a Trainer too. A training
    epoch has full batches only; evaluation has every picture once (a batch whose pictures are all bad has b = 0).

    Args:
        image_size: Side of the training crops in pixels.
        eval_size: Side of the evaluation pictures in pixels; None: `image_size`.
        batch_size: Training pictures per batch and process.
        eval_batch_size: Evaluation pictures per batch and process; None: `batch_size`.
        num_workers: Loading processes; 0 loads in the main process.
        channels: 3 (RGB), 1 (gray) or 4 (RGBA).
        seed: Seed of the order and of all augmentation.
        resize_filter: ``"bicubic"``, ``"bilinear"`` or ``"lanczos"``, PIL's, antialiased.
        flip: Whether to mirror half of the training pictures.

    Raises:
        ValueError: If a size or count is not positive, or the filter or number of channels is unknown.
    """

    def __init__(
        self,
        image_size: int = 256,
        eval_size: int | None = None,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 4,
        channels: int = 3,
        seed: int = 0,
        resize_filter: str = "bicubic",
        flip: bool = True,
    ) -> None:
        super().__init__()
        self.image_size = _at_least(1, "image_size", image_size)
        self.eval_size = _at_least(1, "eval_size", image_size if eval_size is None else eval_size)
        self.batch_size = _at_least(1, "batch_size", batch_size)
        self.eval_batch_size = _at_least(
            1, "eval_batch_size", batch_size if eval_batch_size is None else eval_batch_size
        )
        self.num_workers = _at_least(0, "num_workers", num_workers)
        if channels not in (1, 3, 4):
            raise ValueError(f"data.channels must be 3 (RGB), 1 (gray) or 4 (RGBA), got {channels}")
        self.channels = channels
        self.seed = seed
        self.resize_filter = check_filter(resize_filter)
        self.flip = flip

    @abstractmethod
    def make_dataset(self, split: Literal["train", "eval"]) -> Any:
        """Build the data set of a split."""

    @cached_property
    def train_dataset(self) -> Any:
        """Data set of training samples."""
        return self.make_dataset("train")

    @cached_property
    def eval_dataset(self) -> Any:
        """Data set of evaluation samples."""
        return self.make_dataset("eval")

    @property
    @abstractmethod
    def protocol(self) -> dict[str, Any]:
        """What evaluation looks at: dataset, split, num_images, resize, crop, size [H, W]."""

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How a new picture is brought into the form of training; stored with the tokenizer."""
        return {
            "size": [self.image_size, self.image_size],
            "channels": self.channels,
            "resize": {"filter": self.resize_filter, "mode": "short_side"},
            "crop": "center",
            "range": [-1, 1],
        }

    def train_dataloader(self) -> TrainLoader:
        """Endless epochs of full batches; resumes exactly from a Trainer's checkpoint."""
        rank, world_size = self._rank_and_world_size()
        sampler = EpochBatchSampler(len(self.train_dataset), self.batch_size, self.seed, True, rank, world_size)
        _check_epoch(len(sampler), len(self.train_dataset), self.batch_size, world_size)
        return TrainLoader(
            self.train_dataset,
            self.trainer,
            batch_sampler=sampler,
            persistent_workers=self.num_workers > 0,
            **self._options(self.image_size),
        )

    def eval_dataloader(self) -> DataLoader:
        """Every evaluation picture once, in a fixed order; under DDP this rank's share."""
        rank, world_size = self._rank_and_world_size()
        sampler = EpochBatchSampler(
            len(self.eval_dataset), self.eval_batch_size, 0, False, rank, world_size, drop_last=False
        )
        return DataLoader(
            self.eval_dataset, batch_sampler=sampler, generator=torch.Generator(), **self._options(self.eval_size)
        )

    def val_dataloader(self) -> DataLoader:
        """The same as `eval_dataloader`, under the name that Lightning calls."""
        return self.eval_dataloader()

    def _options(self, size: int) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "pin_memory": torch.cuda.is_available(),
            "worker_init_fn": leave_signals_to_the_main_process,
            "collate_fn": partial(collate, channels=self.channels, size=size),
        }

    def _rank_and_world_size(self) -> tuple[int, int]:
        trainer = self.trainer
        if trainer is None:
            return 0, 1
        if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise ValueError(
                "the data is divided among the processes by vistok, and Trainer(use_distributed_sampler=True) would "
                "divide it a second time: set trainer.use_distributed_sampler=false"
            )
        return trainer.global_rank, trainer.world_size


class PhotosData(DataModule):
    """Real photographs from installed packages: trains without a download, evaluates on three held-out pictures.

    Args:
        samples_per_epoch: Crops per epoch.
        min_scale: Smallest random reduction of a crop, in (0, 1]; 1 keeps the photographs' resolution.
        include_gray: Whether to train on six gray photographs too.
        **options: Arguments of `DataModule`.
    """

    def __init__(
        self, samples_per_epoch: int = 10_000, min_scale: float = 1.0, include_gray: bool = False, **options: Any
    ) -> None:
        super().__init__(**options)
        self.samples_per_epoch = _at_least(1, "samples_per_epoch", samples_per_epoch)
        self.min_scale = min_scale
        self.include_gray = include_gray

    def make_dataset(self, split: Literal["train", "eval"]) -> Photos:
        """Random crops of the training photographs, or tiles of the held-out ones."""
        if split == "eval":
            return Photos("held-out", self.eval_size, channels=self.channels)
        return Photos(
            "train",
            self.image_size,
            self.samples_per_epoch,
            self.min_scale,
            self.flip,
            self.include_gray,
            self.channels,
            self.seed,
            self.resize_filter,
        )

    @property
    def protocol(self) -> dict[str, Any]:
        """What evaluation looks at."""
        return {
            "dataset": "photographs in scikit-image: " + ", ".join(self.eval_dataset.names),
            "split": "held-out pictures",
            "num_images": len(self.eval_dataset),
            "resize": "none",
            "crop": "all non-overlapping tiles",
            "size": [self.eval_size, self.eval_size],
        }


class ImageFolderData(DataModule):
    """A folder of pictures; labels are the first-level folders where there are at least two.

    Args:
        root: Folder, searched at any depth; only evaluation on `val_root` does without.
        file_list: Text file with one path relative to `root` per line; None: every picture below `root`.
        val_root: Folder of validation pictures; where it lies below `root`, training leaves it out. None: a share.
        val_share: Share of the pictures of `root` held out by a hash of their paths, without `val_root`.
        crop_scale: None: resize the short side, crop at random. ``[low, high]``: cut a square of that share of the
            largest square's area, resize it.
        max_bad: How many unreadable pictures in a row are put up with.
        **options: Arguments of `DataModule`.
    """

    def __init__(
        self,
        root: str | None = None,
        file_list: str | None = None,
        val_root: str | None = None,
        val_share: float = 0.05,
        crop_scale: Sequence[float] | None = None,
        max_bad: int = 64,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if root is None and val_root is None:
            raise ValueError("data.root is not set: set it to a folder of pictures, data.root=/my/photos")
        self.root = None if root is None else Path(root).expanduser()
        self.file_list = None if file_list is None else Path(file_list).expanduser()
        self.val_root = None if val_root is None else Path(val_root).expanduser()
        self.val_share = val_share
        self.crop_scale = crop_scale
        self.max_bad = _at_least(1, "max_bad", max_bad)
        if self.root and self.val_root and self.val_root.resolve() == self.root.resolve():
            raise ValueError(
                f"data.val_root and data.root are both {self.root.absolute()}: validation would measure training "
                "pictures. Leave val_root out to hold out a share"
            )

    @cached_property
    def _split(self) -> tuple[list[str], list[str], list[str]]:
        """Training paths, validation paths (each below its own root), and classes."""
        if self.root is None:
            assert self.val_root is not None  # one of them is, the constructor saw to it
            val = find_images(self.val_root)
            return [], val, find_classes(val)
        if self.file_list is not None:
            paths = read_file_list(self.root, self.file_list)
        else:
            paths = find_images(self.root, exclude=self.val_root)
        classes = find_classes(paths)
        if self.val_root is not None:
            return paths, find_images(self.val_root), classes
        return *split_by_hash(paths, self.val_share, partial(is_readable, self.root)), classes

    def make_dataset(self, split: Literal["train", "eval"]) -> ImageFolder:
        """Training or validation pictures."""
        train, val, classes = self._split
        if split == "train":
            if self.root is None:
                raise ValueError("data.root is not set: set it to a folder of training pictures, data.root=/my/photos")
            root, paths = self.root, train
            transform = TrainTransform(self.image_size, self.resize_filter, self.crop_scale, self.flip)
        else:
            root, paths = self.val_root or self.root, val
            assert root is not None
            transform = EvalTransform(self.eval_size, self.resize_filter)
        return ImageFolder(root, paths, transform, split == "train", classes, self.channels, self.seed, self.max_bad)

    @property
    def protocol(self) -> dict[str, Any]:
        """What evaluation looks at."""
        return {
            "dataset": str(self.val_root or self.root),
            "split": "whole folder" if self.val_root else f"share of {self.val_share:g} by hash of the path",
            "num_images": len(self.eval_dataset),
            "resize": f"short side, {self.resize_filter} (PIL)",
            "crop": "center",
            "size": [self.eval_size, self.eval_size],
        }


class WebDatasetData(DataModule):
    """Tar shards of pictures (``jpg``, ``jpeg``, ``png``, ``webp``; label ``cls``).

    Args:
        shards: Brace pattern of training shards, such as ``/data/train-{00000..00007}.tar``; evaluation does without.
        val_shards: Brace pattern of validation shards.
        samples_per_epoch: Training pictures per epoch; None counts them in the tar headers once.
        shuffle_buffer: Undecoded pictures that each worker shuffles among.
        crop_scale: As in `ImageFolderData`.
        max_bad: How many unreadable pictures in a row are put up with.
        **options: Arguments of `DataModule`.
    """

    def __init__(
        self,
        shards: str | None,
        val_shards: str,
        samples_per_epoch: int | None = None,
        shuffle_buffer: int = 1000,
        crop_scale: Sequence[float] | None = None,
        max_bad: int = 64,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.shards = expand_shards(shards) if shards is not None else []
        self.val_shards = expand_shards(val_shards)
        self.val_pattern = val_shards
        if samples_per_epoch is not None:
            _at_least(1, "samples_per_epoch", samples_per_epoch)
        self.samples_per_epoch = samples_per_epoch
        self.shuffle_buffer = _at_least(1, "shuffle_buffer", shuffle_buffer)
        self.crop_scale = crop_scale
        self.max_bad = _at_least(1, "max_bad", max_bad)
        if shared := set(self.shards) & set(self.val_shards):
            raise ValueError(f"data.shards and data.val_shards share {len(shared)} files such as {min(shared)}")

    @cached_property
    def num_samples(self) -> int:
        """Training samples per epoch over all ranks."""
        if not self.shards:
            raise ValueError(
                "data.shards is not set: set it to a pattern, with both quotes: "
                "\"data.shards='/data/train-{00000..00007}.tar'\""
            )
        return self.samples_per_epoch or sum(map(count_samples, self.shards))

    @cached_property
    def num_eval_samples(self) -> int:
        """Validation samples over all ranks."""
        return sum(map(count_samples, self.val_shards))

    def make_dataset(self, split: Literal["train", "eval"]) -> Any:
        """Training or validation batches of this rank."""
        rank, world_size = self._rank_and_world_size()
        options: dict[str, Any] = {
            "channels": self.channels,
            "seed": self.seed,
            "rank": rank,
            "world_size": world_size,
            "max_bad": self.max_bad,
        }
        if split == "eval":
            transform = EvalTransform(self.eval_size, self.resize_filter)
            return ShardDataset(
                self.val_shards,
                transform,
                self.eval_size,
                self.eval_batch_size,
                train=False,
                num_samples=self.num_eval_samples,
                **options,
            )
        transform = TrainTransform(self.image_size, self.resize_filter, self.crop_scale, self.flip)
        return ShardDataset(
            self.shards,
            transform,
            self.image_size,
            self.batch_size,
            num_samples=self.num_samples,
            shuffle_buffer=self.shuffle_buffer,
            **options,
        )

    def train_dataloader(self) -> TrainLoader:
        """Endless epochs of full batches; resumes exactly with the same number of workers and processes."""
        # Lightning warns that the length of an iterable data set may be wrong with workers; this one counts them.
        warnings.filterwarnings("ignore", "Your `IterableDataset` has `__len__` defined")
        # Made anew, since the rank is known only when a Trainer is attached.
        dataset = self.make_dataset("train")
        _check_epoch(len(dataset), self.num_samples, self.batch_size, dataset.world_size)
        return TrainLoader(dataset, self.trainer, batch_size=None, **self._options())

    def eval_dataloader(self) -> DataLoader:
        """Every evaluation picture once; the order of batches depends on the number of workers."""
        return DataLoader(self.make_dataset("eval"), batch_size=None, generator=torch.Generator(), **self._options())

    def _options(self, size: int | None = None) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "pin_memory": torch.cuda.is_available(),
            "worker_init_fn": leave_signals_to_the_main_process,
        }

    @property
    def protocol(self) -> dict[str, Any]:
        """What evaluation looks at."""
        return {
            "dataset": self.val_pattern,
            "split": "val_shards",
            "num_images": self.num_eval_samples,
            "resize": f"short side, {self.resize_filter} (PIL)",
            "crop": "center",
            "size": [self.eval_size, self.eval_size],
        }


def _at_least(smallest: int, name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
        raise ValueError(f"data.{name} must be an integer of at least {smallest}, got {value!r}")
    return value


def _check_epoch(num_batches: int, num_samples: int, batch_size: int, world_size: int) -> None:
    if num_batches < 1:
        raise ValueError(
            f"{num_samples} training pictures do not fill one batch of data.batch_size={batch_size} on each of "
            f"{world_size} processes: set data.batch_size to at most {max(1, num_samples // world_size)}"
        )
