"""From any set of pictures or videos to tar shards: what ``vistok shards`` does."""

import hashlib
import io
import itertools
import multiprocessing
import os
import tarfile
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, ClassVar, NamedTuple

from PIL import Image
from torchvision.transforms.v2 import functional as F

from vistok.data.bad_samples import BadSample, BadSampleLimit
from vistok.data.decode import MODES, BadImageError, decode_image
from vistok.data.loader import leave_signals_to_the_main_process
from vistok.data.manifest import Manifest, Shard, read_manifest
from vistok.data.pictures import Picture, PictureSource, PictureStream
from vistok.data.transforms import center_crop, check_resize, resize_by_mode
from vistok.data.webdataset import IMAGE_KEYS, count_samples
from vistok.hub.files import sha256

FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
DEFAULT_QUALITY = 95


class Conversion(ABC):
    """What becomes of each sample; a frozen dataclass, whose fields are noted in the manifest.

    Attributes:
        content: What samples are, in the plural.
        chunk: How many of them a worker is given at a time; several chunks per worker are in memory.
    """

    content: ClassVar[str]
    chunk: ClassVar[int]

    @abstractmethod
    def apply(self, image: Path | bytes | Image.Image) -> tuple[str, bytes]:
        """Extension and bytes of the file to write.

        Raises:
            BadImageError: If it cannot be decoded.
        """


@dataclass(frozen=True)
class Recipe(Conversion):
    """What becomes of each picture.

    Without size and format, files are copied byte by byte (after they were decoded once, to find bad ones), and so is
    a file that has size and format already.

    Args:
        size: Short side in pixels; None: as it is.
        resize_filter: One of `vistok.data.transforms.FILTERS`.
        resize_mode: One of `vistok.data.transforms.RESIZE_MODES`.
        crop: Whether to cut the centre square of `size` pixels.
        format: ``"jpg"``, ``"png"`` or ``"webp"``; None: the file's own where it is copied, else ``"jpg"``, or
            ``"png"`` for pictures that another library has decoded and for RGBA.
        quality: 1 to 100, of jpg and webp; None: 95.
        channels: 1, 3 or 4 of pictures that are written anew.

    Raises:
        ValueError: If a value is impossible or a setting would have no effect.
    """

    size: int | None = None
    resize_filter: str = "bicubic"
    resize_mode: str = "short_side"
    crop: bool = False
    format: str | None = None
    quality: int | None = None
    channels: int = 3

    content = "pictures"
    chunk = 16

    def __post_init__(self) -> None:
        check_resize(self.resize_mode, self.resize_filter)
        if self.size is not None and self.size < 1:
            raise ValueError(f"size must be at least 1 pixel, got {self.size}")
        if self.size is None and (self.crop or self.resize_mode != "short_side" or self.resize_filter != "bicubic"):
            raise ValueError("crop, resize mode and filter need a size: nothing is resized without one")
        if self.format is not None and self.format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {self.format!r}")
        if self.channels not in MODES:
            raise ValueError(f"channels must be 3 (RGB), 1 (gray) or 4 (RGBA), got {self.channels}")
        if self.channels == 4 and self.format == "jpg":
            raise ValueError("jpg has no transparency: choose format png or webp for 4 channels")
        if self.channels != 3 and self.size is None and self.format is None:
            raise ValueError("channels has no effect on copied files: choose a size or a format")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise ValueError(f"quality must lie between 1 and 100, got {self.quality}")
        if self.quality is not None and (self.format == "png" or (self.format is None and self.size is None)):
            raise ValueError("quality has no effect on png and on copied files: choose format jpg or webp")

    def apply(self, image: Path | bytes | Image.Image) -> tuple[str, bytes]:
        """Extension and bytes of the file to write.

        Raises:
            BadImageError: If the picture cannot be decoded.
        """
        if isinstance(image, Path):
            try:
                image = image.read_bytes()
            except OSError as error:
                raise BadImageError("unreadable", f"cannot open {image}: {error.strerror}") from error
        pixels = decode_image(image, self.channels)
        if isinstance(image, bytes):
            own = _format_of(image)
            sides = pixels.shape[1:]
            fits = self.size is None or (min(sides) == self.size and not (self.crop and max(sides) > self.size))
            if own in IMAGE_KEYS and fits and self.format in (None, own):
                return own, image
        if self.size is not None:
            pixels = resize_by_mode(pixels, self.size, self.resize_mode, self.resize_filter)
            if self.crop:
                pixels = center_crop(pixels, self.size, self.resize_mode)
        lossless = self.channels == 4 or (self.size is None and isinstance(image, Image.Image))
        name = self.format or ("png" if lossless else "jpg")
        file = io.BytesIO()
        options = {} if name == "png" else {"quality": self.quality or DEFAULT_QUALITY}
        F.to_pil_image(pixels, MODES[self.channels]).save(file, FORMATS[name], **options)
        return name, file.getvalue()


def _format_of(data: bytes) -> str:
    """Extension of a picture file that can be opened."""
    with Image.open(io.BytesIO(data)) as image:
        name = (image.format or "").lower()
    return {"jpeg": "jpg", "mpo": "jpg", "tiff": "tif"}.get(name, name)


class Converted(NamedTuple):
    """Number in the source, name in the shard and files, by extension, of one sample."""

    number: int
    key: str
    files: dict[str, bytes]


def convert_picture(index: int, picture: Picture, recipe: Conversion) -> Converted | BadSample:
    """Make the files of one sample."""
    try:
        extension, data = recipe.apply(picture.image)
    except BadImageError as error:
        return BadSample(picture.key, error.kind, error.reason)
    files = {extension: data}
    if picture.label is not None:
        files["cls"] = str(picture.label).encode()
    if picture.text is not None:
        files["txt"] = picture.text.encode()
    return Converted(index, _member_name(index, picture.key), files)


def _member_name(index: int, key: str) -> str:
    """Name inside a shard: unique, sorted, and without the dots at which webdataset would cut it."""
    number = f"{index:08d}"
    if key == str(index):
        return number
    path = PurePosixPath(key)
    return str(path.with_name(f"{number}_{path.stem.replace('.', '_')}")).lstrip("/")


def convert(
    source: PictureSource | PictureStream,
    folder: Path,
    recipe: Conversion,
    shard_samples: int = 1000,
    shard_bytes: int | None = None,
    num_workers: int = 4,
    max_bad_share: float = 0.01,
    progress: Callable[[int], None] = lambda done: None,
) -> Manifest:
    """Write the pictures or videos of a source into shards, or go on where an interrupted conversion stopped.

    The shards depend on the source and the settings only, not on the number of workers or on interruptions. Each is
    written under a temporary name, read again and compared, and renamed; then the manifest is replaced. A conversion
    that is complete is verified instead.

    Args:
        source: Samples by number, read by the workers; or a stream of pictures, read by the main process.
        folder: Where the shards go; made if need be.
        recipe: What becomes of each sample.
        shard_samples: Most samples of a shard.
        shard_bytes: Most bytes of its files; None: no such limit. A larger sample has a shard of its own.
        num_workers: Processes that decode and encode; 0: the main process does.
        max_bad_share: Largest share of bad samples.
        progress: Called with the number of samples done, now and then.

    Returns:
        The manifest.

    Raises:
        TooManyBadSamplesError: If more samples than allowed are bad.
        ValueError: If the folder has shards of another conversion, a finished shard has changed, or a number is
            impossible.
        OSError: If what was written does not read back, or a worker died.
    """
    if shard_samples < 1 or (shard_bytes is not None and shard_bytes < 1):
        raise ValueError(f"a shard must have room for a sample, got shard_samples={shard_samples}, {shard_bytes=}")
    if num_workers < 0:
        raise ValueError(f"workers must be at least 0 (the main process alone), got {num_workers}")
    settings = vars(recipe) | {
        "shard_samples": shard_samples,
        "shard_bytes": shard_bytes,
        "fingerprint": source.fingerprint,
    }
    limit = BadSampleLimit(max_bad_share)
    manifest = _manifest_to_go_on(folder, Manifest(source.name, settings, list(source.classes), recipe.content))
    if manifest.complete:
        verify(folder, manifest)
        return manifest
    start = manifest.shards[-1].next if manifest.shards else 0
    limit.add(manifest.num_samples, manifest.bad)
    if isinstance(source, PictureSource):
        items: Iterable[Any] = range(start, len(source))
    else:
        items = itertools.islice(enumerate(source), start, None)
    done = start
    with ShardWriter(folder, manifest, shard_samples, shard_bytes) as writer:
        for done, sample in enumerate(_converted(source, items, recipe, num_workers), start + 1):
            if isinstance(sample, BadSample):
                writer.leave_out(sample)
                limit.add(0, [sample])
            else:
                writer.add(sample)
                limit.add(1, [])
            if done % recipe.chunk == 0:
                progress(done)
        limit.check()
        writer.complete(done)
    progress(done)
    return manifest


def verify(folder: Path, manifest: Manifest) -> None:
    """Read all shards of a manifest again.

    Raises:
        ValueError: If a shard is missing or has changed; the message names it.
    """
    for shard in manifest.shards:
        path = folder / shard.name
        if not path.is_file():
            raise ValueError(f"{path} is missing: delete {folder} and convert again")
        if sha256(path) != shard.sha256:
            raise ValueError(f"{path} is not what was written, its checksum differs: delete {folder} and convert again")


class ShardWriter:
    """Fills shard after shard, each under a temporary name until it is finished and in the manifest.

    Args:
        folder: Where the shards go.
        manifest: What is finished; new shards are numbered on from there.
        max_samples: Most samples of a shard.
        max_bytes: Most bytes of its files; None: no such limit.
    """

    def __init__(self, folder: Path, manifest: Manifest, max_samples: int, max_bytes: int | None) -> None:
        self.folder = folder
        self.manifest = manifest
        self.max_samples = max_samples
        self.max_bytes = max_bytes
        self._bad: list[BadSample] = []
        self._file: BinaryIO | None = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._tar.close()
            self._file.close()

    def write(self, data: bytes) -> None:
        """Receive bytes of the tar file."""
        assert self._file is not None
        self._digest.update(data)
        self._file.write(data)

    def add(self, sample: Converted) -> None:
        """Append a sample. Times and owners are left out, so equal samples make equal shards."""
        num_bytes = sum(map(len, sample.files.values()))
        if self._file is not None and (
            self._num_samples >= self.max_samples
            or (self.max_bytes is not None and self._num_bytes + num_bytes > self.max_bytes)
        ):
            self._finish(sample.number)
        if self._file is None:
            self._start()
        for extension, data in sample.files.items():
            info = tarfile.TarInfo(f"{sample.key}.{extension}")
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))
        self._num_bytes += num_bytes
        self._num_samples += 1

    def leave_out(self, sample: BadSample) -> None:
        """Note a sample that is in no shard."""
        self._bad.append(sample)

    def complete(self, next_index: int) -> None:
        """Finish the last shard.

        Raises:
            ValueError: If there is no shard.
        """
        if self._file is None and not self.manifest.shards:
            raise ValueError(f"{self.manifest.source} has no {self.manifest.content} that can be read")
        self.manifest.complete = True
        if self._file is not None:
            self._finish(next_index)
        else:
            self._note()

    def _start(self) -> None:
        self._path = self.folder / f"{len(self.manifest.shards):05d}.tar"
        self._temporary = self._path.with_suffix(".tar.tmp")
        self._file = self._temporary.open("wb")
        self._digest = hashlib.sha256()
        sink: Any = self  # tarfile asks a stream for nothing but `write`
        self._tar = tarfile.open(fileobj=sink, mode="w|")  # noqa: SIM115 - closed with the shard
        self._num_samples = self._num_bytes = 0

    def _finish(self, next_index: int) -> None:
        """Close the shard, read it again, give it its name, and write the manifest."""
        assert self._file is not None
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        path, digest = self._temporary, self._digest.hexdigest()
        if sha256(path) != digest or count_samples(path, None) != self._num_samples:
            raise OSError(f"{path} does not read back as it was written: check the disk")
        shard = Shard(self._path.name, self._num_samples, path.stat().st_size, digest, next_index)
        path.replace(self._path)
        self.manifest.shards.append(shard)
        self._note()

    def _note(self) -> None:
        self.manifest.bad += self._bad
        self._bad = []
        self.manifest.write(self.folder)


def _manifest_to_go_on(folder: Path, new: Manifest) -> Manifest:
    """The manifest of a folder if it is of the same conversion, else the new one."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose a folder for the shards")
    folder.mkdir(parents=True, exist_ok=True)
    manifest = read_manifest(folder)
    if manifest is None:
        if others := sorted(folder.glob("*.tar")):
            raise ValueError(f"{folder} holds {len(others)} .tar files that no manifest names: choose an empty folder")
        return new
    if manifest.content != new.content:
        raise ValueError(f"{folder} holds shards of {manifest.content}: choose another folder for {new.content}")
    different = [key for key, value in new.settings.items() if manifest.settings.get(key) != value]
    if different:
        listed = ", ".join(
            f"{key} {manifest.settings.get(key)!r} instead of {new.settings[key]!r}" for key in different
        )
        raise ValueError(f"{folder} holds shards of another conversion ({listed}): choose another folder or delete it")
    return manifest


_work: tuple[Any, Conversion]


def _start_worker(source: Any, recipe: Conversion) -> None:
    global _work
    _work = source, recipe
    leave_signals_to_the_main_process(0)
    # Where the main process is killed nobody tells the workers, which would wait for work for ever.
    threading.Thread(target=_leave_with_the_main_process, daemon=True).start()


def _leave_with_the_main_process() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _convert_chunk(chunk: Sequence[Any]) -> list[Converted | BadSample]:
    return [_convert_item(*_work, item) for item in chunk]


def _convert_item(
    source: Any, recipe: Conversion, item: int | tuple[int, Picture | BadSample]
) -> Converted | BadSample:
    if not isinstance(item, int):
        index, picture = item
        return picture if isinstance(picture, BadSample) else convert_picture(index, picture, recipe)
    try:
        picture = source[item]
    except BadImageError as error:
        return BadSample(str(item), error.kind, error.reason)
    return convert_picture(item, picture, recipe)


def _converted(
    source: Any, items: Iterable[Any], recipe: Conversion, num_workers: int
) -> Iterator[Converted | BadSample]:
    """Converted samples in the order of `items`; no more than a few chunks per worker are under way."""
    if num_workers == 0:
        for item in items:
            yield _convert_item(source, recipe, item)
        return
    by_number = source if isinstance(source, PictureSource) else None
    items = iter(items)
    chunks = iter(lambda: list(itertools.islice(items, recipe.chunk)), [])
    with ProcessPoolExecutor(num_workers, initializer=_start_worker, initargs=(by_number, recipe)) as pool:
        running: deque[Future] = deque()
        try:
            for chunk in itertools.chain(chunks, itertools.repeat(None)):
                if chunk is not None:
                    running.append(pool.submit(_convert_chunk, chunk))
                if chunk is None and not running:
                    return
                if chunk is None or len(running) >= 4 * num_workers:
                    yield from running.popleft().result()
        except BrokenProcessPool as error:
            raise OSError(
                "a converting process died, perhaps for want of memory: run the same command again to go on, "
                "with fewer workers"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
