"""Shards: tar files of pictures or videos, read in sequence by the webdataset library."""

import itertools
import random
import tarfile
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from webdataset import filters, shardlists, tariterators
from webdataset.gopen import gopen

from vistok.data.bad_samples import BadSample
from vistok.data.collate import Batch, LazySamples, Sample, collate
from vistok.data.decode import BadImageError, decode_image
from vistok.data.image_folder import EXTENSIONS
from vistok.data.manifest import FILE_NAME, read_manifest
from vistok.data.pictures import Picture
from vistok.data.sampler import Resumable
from vistok.data.transforms import mix, sample_generator

IMAGE_KEYS = tuple(extension[1:] for extension in EXTENSIONS)
RawSample = dict[str, Any]
Shard = Path | str
EMPTY_PASSES = 8  # in a row, after which a worker gives up


class BadShardError(OSError):
    """A shard that cannot be read to its end."""


def check_on_bad_shard(on_bad_shard: str) -> str:
    """`on_bad_shard` if it is ``"skip"`` or ``"stop"``.

    Raises:
        ValueError: If it is neither.
    """
    if on_bad_shard not in ("skip", "stop"):
        raise ValueError(f"on_bad_shard must be skip or stop, got {on_bad_shard!r}")
    return on_bad_shard


def sample_of(raw: RawSample, extensions: Collection[str]) -> Picture:
    """The picture or video of an undecoded sample, of its first file with one of `extensions`, with label and caption.

    Raises:
        BadImageError: If it has no such file, of kind ``"no image"``, or no integer as its class, ``"bad label"``.
    """
    data = next((raw[name] for name in extensions if name in raw), None)
    if data is None:
        there = ", ".join(name for name in raw if not name.startswith("__"))
        raise BadImageError("no image", f"no {', '.join([*extensions][:4])} ... among {there}")
    try:
        label = int(raw["cls"]) if "cls" in raw else None
    except ValueError as error:
        raise BadImageError("bad label", f"cls holds {raw['cls'][:20]!r} instead of an integer") from error
    return Picture(raw["__key__"], data, label, raw["txt"].decode("utf-8", "replace") if "txt" in raw else None)


def is_remote(pattern: str) -> bool:
    """Whether shards are read through a URL or the output of a command, ``pipe:...``."""
    return "://" in pattern or pattern.startswith("pipe:")


def expand_shards(pattern: str, content: str = "pictures") -> list[Shard]:
    """Shards that a pattern names.

    Args:
        pattern: A folder (its manifest says which, or all ``.tar`` files in it), or files, URLs or commands with
            braces: ``train-{00000..00007}.tar``, ``https://host/{00000..00007}.tar``, ``pipe:cat {0..7}.tar``; several
            patterns are joined by ``::``.
        content: ``"pictures"`` or ``"videos"``: what a folder's manifest must say.

    Raises:
        FileNotFoundError: If a folder has no shards, or any of the files does not exist.
        ValueError: If the folder's conversion has not reached its end, or was one of something else; or if the pattern
            is no text.
    """
    if not isinstance(pattern, str):
        raise ValueError(f"shards are a folder or a pattern, several of them joined by ::, got {pattern!r}")
    if is_remote(pattern):
        return list(shardlists.expand_urls(pattern))
    folder = Path(pattern).expanduser()
    if folder.is_dir():
        return list(_shards_in(folder, content))
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
    return list(paths)


def _shards_in(folder: Path, content: str) -> list[Path]:
    manifest = read_manifest(folder)
    if manifest is not None:
        if manifest.content != content:
            name = "video_shards" if manifest.content == "videos" else "webdataset"
            raise ValueError(f"{folder.absolute()} holds shards of {manifest.content}: read them by data={name}")
        if not manifest.complete:
            raise ValueError(f"{folder.absolute()} is not finished: give its vistok shards command again")
        paths = [folder / shard.name for shard in manifest.shards]
        if missing := [path.name for path in paths if not path.is_file()]:
            raise FileNotFoundError(
                f"{len(missing)} shards of {folder.absolute() / FILE_NAME} are missing, such as {missing[0]}"
            )
        return paths
    if not (paths := sorted(folder.glob("*.tar"))):
        raise FileNotFoundError(f"{folder.absolute()} has no .tar files")
    return paths


def count_samples(shard: Shard, extensions: Collection[str] | None = IMAGE_KEYS) -> int:
    """Number of samples in a shard that have a file with one of `extensions`, or any file.

    From the tar headers alone; of a damaged shard, those before the damage.
    """
    keys = set()
    try:
        with open_shard(shard) as stream, tarfile.open(fileobj=stream, mode=_tar_mode(shard)) as archive:
            for member in archive:
                key, extension = tariterators.base_plus_ext(member.name)
                known = extension is not None and (extensions is None or extension.lower() in extensions)
                if member.isreg() and known:
                    keys.add(key)
    except (tarfile.TarError, OSError, EOFError):
        pass  # reported as a bad shard when it is read
    return len(keys)


def _tar_mode(shard: Shard) -> Literal["r:*", "r|*"]:
    # Only a local file can jump from header to header.
    return "r:*" if isinstance(shard, Path) else "r|*"


def count_all(shards: Sequence[Shard], extensions: Collection[str] = IMAGE_KEYS) -> int:
    """Number of samples in all shards, from the manifests beside them where a shard has the size noted there."""
    known: dict[Path, tuple[int, int]] = {}
    for folder in {shard.parent for shard in shards if isinstance(shard, Path)}:
        if (manifest := read_manifest(folder)) is not None:
            known.update({folder / shard.name: (shard.num_bytes, shard.num_samples) for shard in manifest.shards})
    total = 0
    for shard in shards:
        num_bytes, num_samples = known.get(shard, (None, 0)) if isinstance(shard, Path) else (None, 0)
        same = isinstance(shard, Path) and shard.stat().st_size == num_bytes
        total += num_samples if same else count_samples(shard, extensions)
    return total


def open_shard(shard: Shard) -> Any:
    """Open a local file, a URL or a pipe for reading."""
    return shard.open("rb") if isinstance(shard, Path) else gopen(shard)


class _Tail:
    """A stream that remembers the last bytes it gave."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.tail = b""

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        self.tail = data[-512:] or self.tail
        return data


def read_shard(shard: Shard, report: Callable[[BadSample], None]) -> Iterator[RawSample]:
    """Undecoded samples of a shard; one that is damaged, or not there any more, is reported and ends there."""
    name = shard.name if isinstance(shard, Path) else shard
    try:
        with open_shard(shard) as file:
            stream = _Tail(file)
            files = tariterators.tar_file_expander([{"url": str(shard), "stream": stream}])
            yield from tariterators.group_by_keys(files)
            # A cut between two members looks like the end to tarfile; only the closing zeros tell.
            if name.endswith(".tar") and any(stream.tail):
                raise tarfile.ReadError("no end-of-archive mark, so the file was cut off")
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        reason = (
            error.strerror if isinstance(error, OSError) and error.strerror else error.args[0] if error.args else ""
        )
        report(BadSample(name, "bad shard", f"{type(error).__name__}: {reason}"))


class ShardDataset(Resumable, IterableDataset):
    """Whole batches from a list of shards; give it to a loader with ``batch_size=None``.

    Shards are dealt out to the workers of all ranks; where there are fewer shards than workers, every worker reads all
    shards and keeps its share of the samples. In training each worker shuffles its samples in a buffer, and starts
    again with another order if the epoch needs more of them; a sample that cannot be read is replaced by the next one
    of the stream, without moving the stream. In evaluation every sample is given once, in the order of the shards, and
    a bad one is left out.

    Batch ``b`` of an epoch comes from worker ``b % num_workers`` and is a function of the seed, the epoch, b and the
    number of workers and ranks, so `start_at` needs only to leave out undecoded samples.

    Args:
        shards: Tar files: paths, or URLs and pipes as strings.
        transform: From a uint8 picture ``(c h w)`` and a generator to ``(c s s)``.
        size: The side s in pixels, or all sizes of a sample, see `collate`.
        batch_size: Samples per batch and process.
        train: Whether to shuffle, replace and repeat.
        num_samples: Samples per epoch over all ranks. None counts them in the tar headers.
        shuffle_buffer: Undecoded samples that a worker shuffles among.
        channels: 1, 3 or 4.
        seed: Seed of the order and of the transform.
        rank: Number of this process.
        world_size: Number of processes.
        max_bad: How many unreadable samples in a row are put up with in training.
        background: RGB in [0, 255] behind transparent pixels, unless `channels` is 4.
        reduced_size: Decode large JPEG files at a reduced size whose short side is at least this, see `decode_image`.
        on_bad_shard: ``"skip"``: report a shard that is damaged or has vanished, and go on with the next; ``"stop"``:
            raise a `BadShardError`.
        raw: Whether to leave the images uint8, see `collate`.

    Raises:
        ValueError: If there are no samples.
    """

    content = "pictures"
    depends_on_workers = True
    extensions: tuple[str, ...] = IMAGE_KEYS

    def __init__(
        self,
        shards: Sequence[Shard],
        transform: Callable[[Tensor, torch.Generator], Tensor],
        size: int | Sequence[int],
        batch_size: int,
        train: bool = True,
        num_samples: int | None = None,
        shuffle_buffer: int = 1000,
        channels: int = 3,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        max_bad: int = 64,
        background: Sequence[int] = (255, 255, 255),
        reduced_size: int | None = None,
        on_bad_shard: str = "skip",
        raw: bool = False,
    ) -> None:
        check_on_bad_shard(on_bad_shard)
        self.shards = list(shards)
        self.transform = transform
        self.batch_size = batch_size
        self.train = train
        self.num_samples = count_all(self.shards, self.extensions) if num_samples is None else num_samples
        self.shuffle_buffer = shuffle_buffer
        self.channels = channels
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.max_bad = max_bad
        self.background = background
        self.reduced_size = reduced_size
        self.on_bad_shard = on_bad_shard
        self._collate = partial(collate, channels=channels, size=size, raw=raw)
        if self.num_samples < 1:
            raise ValueError(
                f"no {self.content} in {len(self.shards)} shards such as {self.shards[0]}: a sample needs a file whose "
                f"name has, after its first dot, one of {', '.join(self.extensions)}"
            )

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

        def read(position: int) -> Sample:
            """The sample at a position of the batch, or the next that can be read."""
            for offset in range(self.max_bad):
                while len(ahead) <= position + offset:
                    ahead.append(next(stream))
                sample = self._decode(epoch, ahead[position + offset])
                if not isinstance(sample, BadSample):
                    return sample
                bad.append(sample)
            raise ValueError(f"{self.max_bad} samples in a row are unreadable, such as {bad[-3:]}")

        for _ in range(first, len(self), workers):
            batch = self._collate(LazySamples(read, range(self.batch_size)))
            del ahead[: self.batch_size]
            yield batch | {"bad": bad.copy()}
            bad.clear()

    def _stream(
        self, epoch: int, consumer: int, consumers: int, report: Callable[[BadSample], None]
    ) -> Iterator[RawSample]:
        """Undecoded samples without end: one pass over the consumer's shards after the other."""
        empty = 0
        bad: list[BadSample] = []

        def note(shard: BadSample) -> None:
            bad[:] = [shard]
            report(shard)

        for number in itertools.count():
            order = self.shards.copy()
            random.Random(mix(self.seed, epoch, number, "shards")).shuffle(order)
            samples = self._read(order, consumer, consumers, note)
            shuffled = filters._shuffle(
                samples,
                bufsize=self.shuffle_buffer,
                initial=self.shuffle_buffer,
                rng=random.Random(mix(self.seed, epoch, number, "samples", consumer)),
            )
            # All shards of a worker may be bad while others are not: it has others in its next pass.
            empty += 1
            for sample in shuffled:
                empty = 0
                yield sample | {"__pass__": number}
            if empty == EMPTY_PASSES:
                reasons = "".join(f" ({shard.key}: {shard.reason})" for shard in bad)
                raise ValueError(f"no sample can be read from shards such as {order[0]}{reasons}")

    def _read(
        self, shards: Sequence[Shard], consumer: int, consumers: int, report: Callable[[BadSample], None]
    ) -> Iterator[RawSample]:
        """The part of one pass over `shards` that belongs to one worker of one rank."""
        if self.on_bad_shard == "stop":
            report = _stop
        if len(shards) >= consumers:
            shards, consumer, consumers = shards[consumer::consumers], 0, 1
        samples = itertools.chain.from_iterable(self._samples_of(shard, report) for shard in shards)
        return itertools.islice(samples, consumer, None, consumers)

    def _samples_of(self, shard: Shard, report: Callable[[BadSample], None]) -> Iterator[RawSample]:
        return read_shard(shard, report)

    def _evaluate(self, consumer: int, consumers: int) -> Iterator[Batch]:
        bad: list[BadSample] = []
        samples = self._read(self.shards, consumer, consumers, bad.append)
        while raw := list(itertools.islice(samples, self.batch_size)):
            batch = self._collate(LazySamples(partial(self._decode, 0), raw))
            batch["bad"] += bad
            bad.clear()
            yield batch
        if bad:  # a shard that broke off after the last batch
            yield self._collate(bad)

    def _decode(self, epoch: int, raw: RawSample) -> Sample | BadSample:
        key = raw["__key__"]
        try:
            picture = sample_of(raw, self.extensions)
            image = self._load(picture.image, sample_generator(self.seed, epoch, f"{key}/{raw.get('__pass__', 0)}"))
        except BadImageError as error:
            return BadSample(key, error.kind, error.reason)
        return {"image": image, "key": key, "label": picture.label, "text": picture.text}

    def _load(self, data: Any, generator: torch.Generator) -> Tensor:
        image = decode_image(data, self.channels, self.background, self.reduced_size)
        return self.transform(image, generator)


def _stop(shard: BadSample) -> None:
    raise BadShardError(f"shard {shard.key}: {shard.reason}; data.on_bad_shard=skip would go on without it")
