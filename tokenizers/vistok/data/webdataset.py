"""Shards: tar files of pictures, read in sequence by the webdataset library."""

import itertools
import os
import random
import tarfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from webdataset import filters, shardlists, tariterators

from vistok.data.bad_samples import BadSample
from vistok.data.collate import Batch, Sample, collate
from vistok.data.decode import BadImageError, decode_image
from vistok.data.transforms import mix, sample_generator

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")
RawSample = dict[str, Any]


def expand_shards(pattern: str) -> list[Path]:
    """Files that a brace pattern such as ``train-{00000..00007}.tar`` names.

    Raises:
        FileNotFoundError: If any of them does not exist.
        ValueError: If the pattern is a URL or a pipe.
    """
    if "://" in pattern or pattern.startswith("pipe:"):
        raise ValueError(f"shards are read from local files, got {pattern}: download or mount them first")
    paths = [Path(path).expanduser() for path in shardlists.expand_urls(pattern)]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        folder = missing[0].parent
        there = sorted(path.name for path in folder.glob("*.tar")) if folder.is_dir() else []
        holds = f"holds {len(there)} .tar files" if folder.is_dir() else "does not exist"
        if there:
            holds += f", from {there[0]} to {there[-1]}"
        raise FileNotFoundError(
            f"{len(missing)} of the {len(paths)} shards that {pattern!r} names are missing, such as {missing[0].name}; "
            f"the folder {folder.absolute()} {holds}"
        )
    return paths


def count_samples(path: Path) -> int:
    """Number of samples in a shard, from the tar headers alone; of a damaged shard, those before the damage."""
    keys = set()
    try:
        with tarfile.open(path) as shard:
            for member in shard:
                key, extension = tariterators.base_plus_ext(member.name)
                if member.isreg() and extension is not None and extension.lower() in IMAGE_KEYS:
                    keys.add(key)
    except (tarfile.TarError, OSError, EOFError):
        pass  # reported as a bad shard when it is read
    return len(keys)


def read_shard(path: Path, report: Callable[[BadSample], None]) -> Iterator[RawSample]:
    """Undecoded samples of a shard; one that is damaged is reported and ends there."""
    try:
        with path.open("rb") as stream:
            files = tariterators.tar_file_expander([{"url": str(path), "stream": stream}])
            yield from tariterators.group_by_keys(files)
            # A cut between two members looks like the end to tarfile; only the closing zeros tell.
            if path.suffix == ".tar" and (stream.seek(-512, os.SEEK_END), any(stream.read()))[1]:
                raise tarfile.ReadError("no end-of-archive mark, so the file was cut off")
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        report(BadSample(path.name, "bad shard", f"{type(error).__name__}: {error.args[0] if error.args else ''}"))


class ShardDataset(IterableDataset):
    """Whole batches from a list of shards; give it to a loader with ``batch_size=None``.

    Shards are dealt out to the workers of all ranks; where there are fewer shards than workers, every worker reads all
    shards and keeps its share of the samples. In training each worker shuffles its samples in a buffer, and starts
    again with another order if the epoch needs more of them; a sample that cannot be read is replaced by the next one
    of the stream, without moving the stream. In evaluation every sample is given once, in the order of the shards, and
    a bad one is left out.

    Batch ``b`` of an epoch comes from worker ``b % num_workers`` and is a function of the seed, the epoch, b and the
    number of workers and ranks, so `start_at` needs only to leave out undecoded samples.

    Args:
        shards: Tar files.
        transform: From a uint8 picture ``(c h w)`` and a generator to ``(c s s)``.
        size: The side s in pixels.
        batch_size: Samples per batch and process.
        train: Whether to shuffle, replace and repeat.
        num_samples: Samples per epoch over all ranks. None counts them in the tar headers.
        shuffle_buffer: Undecoded samples that a worker shuffles among.
        channels: 1, 3 or 4.
        seed: Seed of the order and of the transform.
        rank: Number of this process.
        world_size: Number of processes.
        max_bad: How many unreadable samples in a row are put up with in training.

    Raises:
        ValueError: If there are no samples.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        transform: Callable[[Tensor, torch.Generator], Tensor],
        size: int,
        batch_size: int,
        train: bool = True,
        num_samples: int | None = None,
        shuffle_buffer: int = 1000,
        channels: int = 3,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        max_bad: int = 64,
    ) -> None:
        self.shards = list(shards)
        self.transform = transform
        self.batch_size = batch_size
        self.train = train
        self.num_samples = sum(map(count_samples, self.shards)) if num_samples is None else num_samples
        self.shuffle_buffer = shuffle_buffer
        self.channels = channels
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.max_bad = max_bad
        self._collate = partial(collate, channels=channels, size=size)
        self._epoch = 0
        self._start = 0
        if self.num_samples < 1:
            raise ValueError(
                f"no pictures in {len(self.shards)} shards such as {self.shards[0]}: a sample needs a file that ends "
                f"in one of {', '.join(IMAGE_KEYS)}"
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self._epoch = epoch

    def start_at(self, batch: int) -> None:
        """Leave out the first `batch` batches of the next pass without decoding them."""
        self._start = batch

    def __len__(self) -> int:
        """Training batches per epoch and rank."""
        if not self.train:
            raise TypeError("the number of evaluation batches depends on the number of workers")
        return self.num_samples // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        if not self.train:
            return self._evaluate(self.rank * workers + number, self.world_size * workers)
        # The loader asks its workers in turn, from 0, for what is batch `start` of the epoch and those after it.
        first = self._start + number
        return self._train(self._epoch, first, first % workers, workers)

    def _train(self, epoch: int, first: int, number: int, workers: int) -> Iterator[Batch]:
        if first >= len(self):
            return
        bad: list[BadSample] = []
        stream = self._stream(epoch, self.rank * workers + number, self.world_size * workers, bad.append)
        skipped = first // workers * self.batch_size
        ahead = list(itertools.islice(stream, skipped, skipped + self.batch_size))
        for _ in range(first, len(self), workers):
            samples = []
            for position in range(self.batch_size):
                for offset in range(self.max_bad):
                    while len(ahead) <= position + offset:
                        ahead.append(next(stream))
                    sample = self._decode(epoch, ahead[position + offset])
                    if not isinstance(sample, BadSample):
                        break
                    bad.append(sample)
                else:
                    raise ValueError(f"{self.max_bad} samples in a row are unreadable, such as {bad[-3:]}")
                samples.append(sample)
            del ahead[: self.batch_size]
            yield self._collate(samples) | {"bad": bad.copy()}
            bad.clear()

    def _stream(
        self, epoch: int, consumer: int, consumers: int, report: Callable[[BadSample], None]
    ) -> Iterator[RawSample]:
        """Undecoded samples without end: one pass over the consumer's shards after the other."""
        for number in itertools.count():
            order = self.shards.copy()
            random.Random(mix(self.seed, epoch, number, "shards")).shuffle(order)
            samples = self._read(order, consumer, consumers, report)
            shuffled = filters._shuffle(
                samples,
                bufsize=self.shuffle_buffer,
                initial=self.shuffle_buffer,
                rng=random.Random(mix(self.seed, epoch, number, "samples", consumer)),
            )
            empty = True
            for sample in shuffled:
                empty = False
                yield sample | {"__pass__": number}
            if empty:
                raise ValueError(f"no sample can be read from shards such as {order[0]}")

    def _read(
        self, shards: Sequence[Path], consumer: int, consumers: int, report: Callable[[BadSample], None]
    ) -> Iterator[RawSample]:
        """The part of one pass over `shards` that belongs to one worker of one rank."""
        if len(shards) >= consumers:
            shards, consumer, consumers = shards[consumer::consumers], 0, 1
        samples = itertools.chain.from_iterable(read_shard(shard, report) for shard in shards)
        return itertools.islice(samples, consumer, None, consumers)

    def _evaluate(self, consumer: int, consumers: int) -> Iterator[Batch]:
        bad: list[BadSample] = []
        samples = self._read(self.shards, consumer, consumers, bad.append)
        while raw := list(itertools.islice(samples, self.batch_size)):
            batch = self._collate([self._decode(0, sample) for sample in raw])
            batch["bad"] += bad
            bad.clear()
            yield batch
        if bad:  # a shard that broke off after the last batch
            yield self._collate(bad)

    def _decode(self, epoch: int, raw: RawSample) -> Sample | BadSample:
        key = raw["__key__"]
        data = next((raw[name] for name in IMAGE_KEYS if name in raw), None)
        if data is None:
            there = ", ".join(name for name in raw if not name.startswith("__"))
            return BadSample(key, "no image", f"no {' or '.join(IMAGE_KEYS)} among {there}")
        try:
            label = int(raw["cls"]) if "cls" in raw else None
        except ValueError:
            return BadSample(key, "bad label", f"cls holds {raw['cls'][:20]!r} instead of an integer")
        try:
            image = decode_image(data, self.channels)
            image = self.transform(image, sample_generator(self.seed, epoch, f"{key}/{raw.get('__pass__', 0)}"))
        except BadImageError as error:
            return BadSample(key, error.kind, error.reason)
        return {"image": image, "key": key, "label": label}
