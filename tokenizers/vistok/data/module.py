"""Lightning data modules: one for each kind of data."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningDataModule, Trainer
from torch.utils.data import Dataset, Sampler

from vistok.data.bad_samples import BadSampleLimit
from vistok.data.collate import Batch, collate, in_model_range
from vistok.data.decode import check_background
from vistok.data.hugging_face import HuggingFaceSet, HuggingFaceShards, HuggingFaceStream
from vistok.data.image_folder import (
    ImageFolder,
    find_classes,
    find_images,
    is_readable,
    read_file_list,
    split_by_hash,
)
from vistok.data.loader import TrainLoader, WatchedLoader, leave_signals_to_the_main_process
from vistok.data.photos import Photos
from vistok.data.pictures import PictureDataset, PictureSource
from vistok.data.sampler import EpochBatchSampler
from vistok.data.torchvision_set import TorchvisionSet, splits_of
from vistok.data.transforms import OWN_SIZE, EvalTransform, NativeTransform, TrainTransform, check_filter
from vistok.data.webdataset import Shard, ShardDataset, check_on_bad_shard, count_all, expand_shards, is_remote


class DataModule(LightningDataModule, ABC):
    """What all kinds of data have in common; the arguments are the keys of ``configs/data/*.yaml``.

    A batch is a dict: ``images`` float32 ``(b c s s)`` in [-1, 1], ``keys``, ``labels`` int64 ``(b,)`` where all are
    known, and ``bad``, the `BadSample`s met while it was loaded. The loaders work without a Trainer too; with one,
    their images are uint8, and `on_after_batch_transfer` makes the batch above of them. A training
    epoch has full batches only; evaluation has every picture once (a batch whose pictures are all bad has b = 0).

    Args:
        image_size: Side of the training crops in pixels.
        eval_size: Side of the evaluation pictures in pixels; None: `image_size`.
        batch_size: Training pictures per batch and process.
        eval_batch_size: Evaluation pictures per batch and process; None: `batch_size`.
        num_workers: Loading processes; 0 loads in the main process.
        channels: 3 (RGB), 1 (gray) or 4 (RGBA).
        seed: Seed of the order and of all augmentation.
        resize_filter: ``"bicubic"``, ``"bilinear"``, ``"lanczos"`` or ``"box"``, PIL's, antialiased; or
            ``"opencv_bilinear"``, OpenCV's, which is not.
        flip: Whether to mirror half of the training pictures.
        worker_timeout: Seconds after which a loading process that gives no batch counts as dead; 0: never.
        worker_restarts: How many times training starts its loading processes again after one died.

    Attributes:
        content: What samples are, in the plural, for messages.

    Raises:
        ValueError: If a size or count is not positive, or the filter or number of channels is unknown.
    """

    content = "pictures"

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
        worker_timeout: float = 600,
        worker_restarts: int = 3,
    ) -> None:
        super().__init__()
        self.image_size = at_least(1, "image_size", image_size)
        self.eval_size = at_least(1, "eval_size", image_size if eval_size is None else eval_size)
        self.batch_size = at_least(1, "batch_size", batch_size)
        self.eval_batch_size = at_least(
            1, "eval_batch_size", batch_size if eval_batch_size is None else eval_batch_size
        )
        self.num_workers = at_least(0, "num_workers", num_workers)
        if channels not in (1, 3, 4):
            raise ValueError(f"data.channels must be 3 (RGB), 1 (gray) or 4 (RGBA), got {channels}")
        self.channels = channels
        self.seed = seed
        self.resize_filter = check_filter(resize_filter)
        self.flip = flip
        if worker_timeout < 0:
            raise ValueError(f"data.worker_timeout must be at least 0 seconds, got {worker_timeout}")
        self.worker_timeout = worker_timeout
        self.worker_restarts = at_least(0, "worker_restarts", worker_restarts)

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

    def size_of(self, side: int) -> tuple[int, ...]:
        """Size ``(H, W)``, of videos ``(T, H, W)``, of samples that are `side` pixels wide."""
        return side, side

    @property
    def train_sizes(self) -> list[tuple[int, ...]]:
        """Every size that a training batch may have."""
        return [self.size_of(self.image_size)]

    @property
    @abstractmethod
    def protocol(self) -> dict[str, Any]:
        """What evaluation looks at: dataset, split, num_images, resize, crop, size [H, W]."""

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How a new picture is brought into the form of training; stored with the tokenizer."""
        return {
            "size": list(self.size_of(self.image_size)),
            "channels": self.channels,
            "resize": {"filter": self.resize_filter, "mode": "short_side"},
            "crop": "center",
            "range": [-1, 1],
        }

    def train_dataloader(self) -> TrainLoader:
        """Endless epochs of full batches; resumes exactly from a Trainer's checkpoint."""
        return self.make_train_loader(self.trainer, *self._rank_and_world_size(), raw=self.trainer is not None)

    def eval_dataloader(self) -> WatchedLoader:
        """Every evaluation picture once; under DDP this rank's share."""
        return self.make_eval_loader(*self._rank_and_world_size(), raw=self.trainer is not None)

    def val_dataloader(self) -> WatchedLoader:
        """The same as `eval_dataloader`, under the name that Lightning calls."""
        return self.eval_dataloader()

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Bring images to [-1, 1] on the device that trains, which gets a quarter of the bytes and has the time."""
        return in_model_range(batch)

    def make_train_loader(self, trainer: Trainer | None, rank: int, world_size: int, raw: bool = False) -> TrainLoader:
        """Training batches of one of several processes, on request uint8; without a Trainer, passes are epochs."""
        sampler = EpochBatchSampler(len(self.train_dataset), self.batch_size, self.seed, True, rank, world_size)
        check_epoch(len(sampler), len(self.train_dataset), self.batch_size, world_size, self.content)
        return self._train_loader(self.train_dataset, sampler, trainer, raw)

    def _train_loader(self, dataset: Dataset, sampler: Sampler, trainer: Trainer | None, raw: bool) -> TrainLoader:
        return TrainLoader(
            dataset,
            trainer,
            batch_sampler=sampler,
            persistent_workers=self.num_workers > 0,
            restarts=self.worker_restarts,
            raw=raw,
            **self._options(self.image_size),
        )

    def make_eval_loader(self, rank: int, world_size: int, raw: bool = False) -> WatchedLoader:
        """Evaluation batches of one of several processes, on request uint8, in a fixed order."""
        sampler = EpochBatchSampler(
            len(self.eval_dataset), self.eval_batch_size, 0, False, rank, world_size, drop_last=False
        )
        return WatchedLoader(self.eval_dataset, batch_sampler=sampler, raw=raw, **self._options(self.eval_size))

    def _options(self, size: int) -> dict[str, Any]:
        """Arguments of the loaders of single samples, `size` pixels wide."""
        form = {"channels": self.channels, "size": self.size_of(size)}
        return self._worker_options() | {"collate_fn": partial(collate, **form, raw=True)}

    def _worker_options(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "pin_memory": torch.cuda.is_available(),
            "worker_init_fn": leave_signals_to_the_main_process,
            "timeout": self.worker_timeout if self.num_workers else 0,
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
        self.samples_per_epoch = at_least(1, "samples_per_epoch", samples_per_epoch)
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


class PictureData(DataModule):
    """Picture files of any origin: decoded, resized and cropped.

    Args:
        crop_scale: None: resize the short side, crop at random. ``[low, high]``: cut a square of that share of the
            largest square's area, resize it.
        short_sides: None: `image_size`. ``[low, high]``: short side in pixels that a training picture is resized to
            before the crop, drawn for each (multi-scale).
        resize_mode: ``"short_side"``, or ``"adm"``: halved by a box filter, then bicubic, and the centre rounded down.
        eval_scale: Short side that evaluation resizes to before it cuts the centre, in units of `eval_size`.
        reduced_decode: Decode large JPEG files for training at a half, quarter or eighth of their size, at least twice
            what the crop needs.
        background: RGB in [0, 255] behind transparent pixels, unless `channels` is 4.
        max_bad: How many unreadable pictures in a row are put up with.
        max_bad_share: Largest share of unreadable pictures in a pass.
        native: None, or a number of pixels: evaluation pictures keep their own size, the border cut off until the sides
            are multiples of it, and come one in a batch.
        **options: Arguments of `DataModule`.
    """

    picture_dataset: type[PictureDataset] = PictureDataset

    def __init__(
        self,
        crop_scale: Sequence[float] | None = None,
        short_sides: Sequence[int] | None = None,
        resize_mode: str = "short_side",
        eval_scale: float = 1.0,
        reduced_decode: bool = False,
        background: Sequence[int] = (255, 255, 255),
        max_bad: int = 64,
        max_bad_share: float = 0.1,
        native: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.resize_mode = resize_mode
        self.train_transform = TrainTransform(
            self.image_size, self.resize_filter, crop_scale, self.flip, short_sides, resize_mode
        )
        self.eval_transform = EvalTransform(self.eval_size, self.resize_filter, resize_mode, eval_scale)
        self.native = None if native is None else NativeTransform(at_least(1, "native", native))
        if self.native is not None:
            self.eval_batch_size = 1
        self.reduced_decode = reduced_decode
        self.background = check_background(background)
        self.max_bad = at_least(1, "max_bad", max_bad)
        self.max_bad_share = BadSampleLimit(max_bad_share).max_share

    def _dataset(self, source: PictureSource, split: Literal["train", "eval"]) -> PictureDataset:
        transform = self.train_transform if split == "train" else self.native or self.eval_transform
        return self.picture_dataset(source, transform, split == "train", **self._decoding(split))

    def _decoding(self, split: Literal["train", "eval"]) -> dict[str, Any]:
        """How data sets of a split decode, beside their transform."""
        reduced = self.reduced_decode and split == "train"
        return {
            "channels": self.channels,
            "background": self.background,
            "seed": self.seed,
            "max_bad": self.max_bad,
            # As PIL recommends: with twice the pixels the named filter still decides what is seen.
            "reduced_size": 2 * self.train_transform.needed_size if reduced else None,
        }

    def _worker_options(self) -> dict[str, Any]:
        return super()._worker_options() | {"max_bad_share": self.max_bad_share}

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How a new picture is brought into the form of training."""
        return super().preprocessing | {"resize": {"filter": self.resize_filter, "mode": self.resize_mode}}

    def _protocol(self, dataset: str, split: str, num_images: int) -> dict[str, Any]:
        images = {"dataset": dataset, "split": split, "num_images": num_images}
        if self.native is not None:
            crop = f"center, to multiples of {self.native.step} pixels"
            return images | {"resize": "none", "crop": crop, "size": OWN_SIZE}
        scale = self.eval_transform.scale
        side = "short side" if scale == 1 else f"short side to {scale:g} times the size"
        library = "" if self.resize_filter == "opencv_bilinear" else " (PIL)"
        ways = {
            "short_side": f"{side}, {self.resize_filter}{library}",
            "adm": f"ADM: {side}, halved by box, then bicubic (PIL)",
        }
        size = list(self.size_of(self.eval_size))
        return images | {"resize": ways[self.resize_mode], "crop": "center", "size": size}


class ImageFolderData(PictureData):
    """A folder of pictures; labels are the first-level folders where there are at least two.

    Args:
        root: Folder, searched at any depth; only evaluation on `val_root` does without.
        file_list: Text file with one path relative to `root` per line; None: every picture below `root`.
        val_root: Folder of validation pictures; where it lies below `root`, training leaves it out. None: a share.
        val_share: Share of the pictures of `root` held out by a hash of their paths, without `val_root`.
        **options: Arguments of `PictureData`.
    """

    def __init__(
        self,
        root: str | None = None,
        file_list: str | None = None,
        val_root: str | None = None,
        val_share: float = 0.05,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if root is None and val_root is None:
            raise ValueError(
                f"data.root is not set: set it to a folder of {self.content}, data.root=/my/{self.content}"
            )
        self.root = None if root is None else Path(root).expanduser()
        self.file_list = None if file_list is None else Path(file_list).expanduser()
        self.val_root = None if val_root is None else Path(val_root).expanduser()
        self.val_share = val_share
        if self.root and self.val_root and self.root.resolve().is_relative_to(self.val_root.resolve()):
            raise ValueError(
                f"data.val_root={self.val_root.absolute()} holds all of data.root={self.root.absolute()}: validation "
                f"would measure training {self.content}. Leave val_root out to hold out a share"
            )

    @cached_property
    def _split(self) -> tuple[list[str], list[str], list[str]]:
        """Training paths, validation paths (each below its own root), and classes."""
        if self.root is None:
            assert self.val_root is not None  # one of them is, the constructor saw to it
            val = self._find(self.val_root)
            return [], val, find_classes(val)
        if self.file_list is not None:
            paths = self._read_list(self.root, self.file_list)
            if self.val_root is not None:
                self._check_held_out(self.root, paths, self.val_root)
        else:
            paths = self._find(self.root, exclude=self.val_root)
        classes = find_classes(paths)
        if self.val_root is not None:
            return paths, self._find(self.val_root), classes
        return *split_by_hash(paths, self.val_share, partial(self._is_readable, self.root), self.content), classes

    def _check_held_out(self, root: Path, paths: Sequence[str], val_root: Path) -> None:
        if shared := [path for path in paths if (root / path).absolute().is_relative_to(val_root.absolute())]:
            raise ValueError(
                f"{self.file_list} names {len(shared)} {self.content} below data.val_root={val_root}, such as "
                f"{shared[0]}: validation would measure training {self.content}"
            )

    def _find(self, root: Path, exclude: Path | None = None) -> list[str]:
        return find_images(root, exclude)

    def _read_list(self, root: Path, file_list: Path) -> list[str]:
        return read_file_list(root, file_list)

    def _is_readable(self, root: Path, path: str) -> bool:
        return is_readable(root, path)

    def _source(self, split: Literal["train", "eval"], *contents: Any) -> ImageFolder:
        return ImageFolder(*contents)

    def make_dataset(self, split: Literal["train", "eval"]) -> PictureDataset:
        """Training or validation pictures."""
        train, val, classes = self._split
        if split == "train":
            if self.root is None:
                raise ValueError(
                    f"data.root is not set: set it to a folder of training {self.content}, data.root=/my/{self.content}"
                )
            root, paths = self.root, train
        else:
            root, paths = self.val_root or self.root, val
            assert root is not None
        return self._dataset(self._source(split, root, paths, classes), split)

    @property
    def protocol(self) -> dict[str, Any]:
        """What evaluation looks at."""
        split = "whole folder" if self.val_root else f"share of {self.val_share:g} by hash of the path"
        return self._protocol(str(self.val_root or self.root), split, len(self.eval_dataset))


class TorchvisionData(PictureData):
    """A data set that comes with torchvision, by name.

    Args:
        name: A key of `vistok.data.torchvision_set.SETS`.
        root: Folder where torchvision keeps its sets; a set that is not there is downloaded.
        split: Split to train on; None: the set's own (``train``).
        val_split: Split to evaluate on; None: the set's own (``test`` or ``val``).
        **options: Arguments of `PictureData`.

    Raises:
        ValueError: If there is no such set or split, or both splits are the same.
    """

    def __init__(
        self, name: str, root: str = "data", split: str | None = None, val_split: str | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        splits = splits_of(name)
        self.set_name = name
        self.root = Path(root).expanduser()
        self.splits = {"train": split or splits[0], "eval": val_split or splits[min(1, len(splits) - 1)]}
        if self.splits["train"] == self.splits["eval"]:
            raise ValueError(
                f"training and evaluation would both see the split {self.splits['eval']!r} of {name}: set data.split "
                f"and data.val_split to two of {', '.join(splits)}, or convert it with vistok shards"
            )

    def prepare_data(self) -> None:
        """Download what is not there; Lightning calls this on one process only."""
        for split in self.splits.values():
            TorchvisionSet(self.set_name, self.root, split)

    def make_dataset(self, split: Literal["train", "eval"]) -> PictureDataset:
        """Training or validation pictures."""
        return self._dataset(TorchvisionSet(self.set_name, self.root, self.splits[split]), split)

    @property
    def protocol(self) -> dict[str, Any]:
        """What evaluation looks at."""
        return self._protocol(f"torchvision {self.set_name}", self.splits["eval"], len(self.eval_dataset))


class HuggingFaceData(PictureData):
    """A data set of the Hugging Face hub or a folder of one; needs the library ``datasets``.

    Args:
        name: ``owner/name`` on the hub, or a folder.
        config_name: Which of several configurations of the set; None: its default.
        split: Split to train on.
        val_split: Split to evaluate on, slices such as ``train[95%:]`` included.
        image_key: Column of pictures.
        label_key: Column of integer labels; None: no labels.
        text_key: Column of captions; None: no captions.
        **options: Arguments of `PictureData`.

    Raises:
        ValueError: If both splits are the same.
    """

    def __init__(
        self,
        name: str,
        config_name: str | None = None,
        split: str = "train",
        val_split: str = "validation",
        image_key: str = "image",
        label_key: str | None = None,
        text_key: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_splits(split, val_split)
        self.set_name = name
        self.splits = {"train": split, "eval": val_split}
        self.columns: dict[str, Any] = {
            "config_name": config_name,
            "image_key": image_key,
            "label_key": label_key,
            "text_key": text_key,
        }

    def make_dataset(self, split: Literal["train", "eval"]) -> PictureDataset:
        """Training or validation pictures."""
        return self._dataset(HuggingFaceSet(self.set_name, self.splits[split], **self.columns), split)

    @property
    def protocol(self) -> dict[str, Any]:
        """What evaluation looks at."""
        return self._protocol(f"Hugging Face {self.set_name}", self.splits["eval"], len(self.eval_dataset))


class StreamedData(PictureData):
    """Pictures that are read in sequence, from shards.

    Args:
        samples_per_epoch: Training pictures per epoch; None: as many as there are, where that is known.
        shuffle_buffer: Undecoded pictures that each worker shuffles among.
        on_bad_shard: ``"skip"`` or ``"stop"`` at a shard that is damaged or vanishes.
        **options: Arguments of `PictureData`.
    """

    shard_dataset: type[ShardDataset] = ShardDataset

    def __init__(
        self,
        samples_per_epoch: int | None = None,
        shuffle_buffer: int = 1000,
        on_bad_shard: str = "skip",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if samples_per_epoch is not None:
            at_least(1, "samples_per_epoch", samples_per_epoch)
        self.samples_per_epoch = samples_per_epoch
        self.shuffle_buffer = at_least(1, "shuffle_buffer", shuffle_buffer)
        self.on_bad_shard = check_on_bad_shard(on_bad_shard)

    @abstractmethod
    def shards_of(self, split: Literal["train", "eval"]) -> Sequence[Shard]:
        """Shards of a split."""

    @abstractmethod
    def count(self, split: Literal["train", "eval"]) -> int:
        """Pictures of a split, over all ranks; of training, those of an epoch."""

    def make_dataset(self, split: Literal["train", "eval"]) -> ShardDataset:
        """Training or validation batches of this rank."""
        return self._batches(split, *self._rank_and_world_size(), raw=False)

    def _batches(self, split: Literal["train", "eval"], rank: int, world_size: int, raw: bool = True) -> ShardDataset:
        options = self._decoding(split)
        options |= {"raw": raw, "rank": rank, "world_size": world_size, "on_bad_shard": self.on_bad_shard}
        if split == "eval":
            return self.shard_dataset(
                self.shards_of(split),
                self.native or self.eval_transform,
                self.size_of(self.eval_size),
                self.eval_batch_size,
                train=False,
                num_samples=self.count(split),
                **options,
            )
        return self.shard_dataset(
            self.shards_of(split),
            self.train_transform,
            self.size_of(self.image_size),
            self.batch_size,
            num_samples=self.count(split),
            shuffle_buffer=self.shuffle_buffer,
            **options,
        )

    def make_train_loader(self, trainer: Trainer | None, rank: int, world_size: int, raw: bool = False) -> TrainLoader:
        """Training batches; they resume exactly with the same number of workers and processes."""
        # Lightning warns that the length of an iterable data set may be wrong with workers; this one counts them.
        warnings.filterwarnings("ignore", "Your `IterableDataset` has `__len__` defined")
        # Made anew, since the rank is known only when a Trainer is attached.
        dataset = self._batches("train", rank, world_size)
        check_epoch(len(dataset), dataset.num_samples, self.batch_size, dataset.world_size, self.content)
        options = self._worker_options() | {"raw": raw}
        return TrainLoader(dataset, trainer, self.worker_restarts, batch_size=None, **options)

    def make_eval_loader(self, rank: int, world_size: int, raw: bool = False) -> WatchedLoader:
        """Evaluation batches; their order depends on the number of workers."""
        batches = self._batches("eval", rank, world_size)
        return WatchedLoader(batches, batch_size=None, raw=raw, **self._worker_options())


class WebDatasetData(StreamedData):
    """Tar shards of pictures (any format that `ImageFolderData` reads; label ``cls``, caption ``txt``).

    Args:
        shards: Training shards: a folder, or a brace pattern of files, URLs or pipes such as
            ``/data/train-{00000..00007}.tar``; evaluation does without.
        val_shards: Validation shards in the same form.
        samples_per_epoch: Training pictures per epoch; None: from the manifest, or counted in the tar headers once.
        **options: Arguments of `StreamedData`.
    """

    def __init__(
        self,
        shards: str | None,
        val_shards: str,
        samples_per_epoch: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(samples_per_epoch, **options)
        self.shards = expand_shards(shards, self.content) if shards is not None else []
        self.val_shards = expand_shards(val_shards, self.content)
        self.val_pattern = val_shards
        if samples_per_epoch is None and shards is not None and is_remote(shards):
            raise ValueError(
                "data.samples_per_epoch is not set, and shards behind URLs and pipes are not counted: set it to the "
                f"number of training {self.content}"
            )
        train, val = (
            {shard.resolve() if isinstance(shard, Path) else shard for shard in shards}
            for shards in (self.shards, self.val_shards)
        )
        if shared := train & val:
            first = min(map(str, shared))
            raise ValueError(f"data.shards and data.val_shards share {len(shared)} files such as {first}")

    @cached_property
    def num_samples(self) -> int:
        """Training samples per epoch over all ranks."""
        if not self.shards:
            raise ValueError(
                "data.shards is not set: set it to a folder or a pattern, with both quotes: "
                "\"data.shards='/data/train-{00000..00007}.tar'\""
            )
        return self.samples_per_epoch or count_all(self.shards, self.shard_dataset.extensions)

    @cached_property
    def num_eval_samples(self) -> int:
        """Validation samples over all ranks."""
        return count_all(self.val_shards, self.shard_dataset.extensions)

    def shards_of(self, split: Literal["train", "eval"]) -> Sequence[Shard]:
        """Shards of a split."""
        return self.shards if split == "train" else self.val_shards

    def count(self, split: Literal["train", "eval"]) -> int:
        """Pictures of a split, over all ranks; of training, those of an epoch."""
        return self.num_samples if split == "train" else self.num_eval_samples

    @property
    def protocol(self) -> dict[str, Any]:
        """What evaluation looks at."""
        return self._protocol(self.val_pattern, "val_shards", self.num_eval_samples)


class HuggingFaceStreamData(StreamedData):
    """A data set of the Hugging Face hub, or a folder of one, read as it is downloaded: nothing is stored.

    Args:
        name: ``owner/name`` on the hub, or a folder.
        config_name: Which of several configurations of the set; None: its default.
        split: Split to train on.
        val_split: Split to evaluate on; a stream has no slices.
        image_key: Column of pictures.
        label_key: Column of integer labels; None: no labels.
        text_key: Column of captions; None: no captions.
        samples_per_epoch: Training pictures per epoch; None: the number that the set says it has.
        val_samples: Evaluation pictures, the first of `val_split`; None: all, if the set says how many.
        **options: Arguments of `StreamedData`.

    Raises:
        ValueError: If both splits are the same.
    """

    shard_dataset = HuggingFaceShards

    def __init__(
        self,
        name: str,
        config_name: str | None = None,
        split: str = "train",
        val_split: str = "validation",
        image_key: str = "image",
        label_key: str | None = None,
        text_key: str | None = None,
        samples_per_epoch: int | None = None,
        val_samples: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(samples_per_epoch, **options)
        check_splits(split, val_split)
        if val_samples is not None:
            at_least(1, "val_samples", val_samples)
        self.set_name = name
        self.val_split = val_split
        columns = {"config_name": config_name, "image_key": image_key, "label_key": label_key, "text_key": text_key}
        self._streams: dict[str, HuggingFaceStream] = {}
        # Opened when it is needed, since evaluation needs no training pictures.
        self._open = {
            "train": partial(HuggingFaceStream, name, split, **columns),
            "eval": partial(HuggingFaceStream, name, val_split, **columns, limit=val_samples),
        }

    def stream(self, split: Literal["train", "eval"]) -> HuggingFaceStream:
        """Undecoded pictures of a split."""
        if split not in self._streams:
            self._streams[split] = self._open[split]()
        return self._streams[split]

    def _decoding(self, split: Literal["train", "eval"]) -> dict[str, Any]:
        return super()._decoding(split) | {"stream": self.stream(split)}

    def shards_of(self, split: Literal["train", "eval"]) -> Sequence[Shard]:
        """Files of a split, by number."""
        return self.stream(split).shards

    def count(self, split: Literal["train", "eval"]) -> int:
        """Pictures of a split, over all ranks; of training, those of an epoch."""
        if count := (split == "train" and self.samples_per_epoch) or self.stream(split).num_rows:
            return count
        setting = "samples_per_epoch" if split == "train" else "val_samples"
        raise ValueError(f"data.{setting} is not set, and {self.set_name} does not say how many pictures it has")

    @property
    def protocol(self) -> dict[str, Any]:
        """What evaluation looks at."""
        return self._protocol(f"Hugging Face {self.set_name}", self.val_split, self.count("eval"))


def refuse_native(data: DataModule) -> None:
    """Refuse pictures that keep their own size, for what works on batches of one size.

    Raises:
        ValueError: If `data` gives such.
    """
    if isinstance(data, PictureData) and data.native is not None:
        raise ValueError(
            f"data.native={data.native.step} is for vistok eval: everything else takes pictures of one size, "
            "data.eval_size"
        )


def check_splits(split: str, val_split: str) -> None:
    """Check that training and evaluation see different splits.

    Raises:
        ValueError: If they see the same one.
    """
    if split == val_split:
        raise ValueError(f"training and evaluation would both see the split {split!r}: set data.val_split to another")


def at_least(smallest: int, name: str, value: int) -> int:
    """`value` if it is an integer of at least `smallest`.

    Raises:
        ValueError: If it is not; `name` is how a user types it.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
        raise ValueError(f"data.{name} must be an integer of at least {smallest}, got {value!r}")
    return value


def check_epoch(num_batches: int, num_samples: int, batch_size: int, world_size: int, content: str) -> None:
    """Check that an epoch has a batch.

    Raises:
        ValueError: If it has none.
    """
    if num_batches < 1:
        raise ValueError(
            f"{num_samples} training {content} do not fill one batch of data.batch_size={batch_size} on each of "
            f"{world_size} processes: set data.batch_size to at most {max(1, num_samples // world_size)}"
        )
