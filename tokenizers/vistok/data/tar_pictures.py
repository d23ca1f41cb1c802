"""Pictures in tar shards by number: for orders that a stream cannot have."""

import hashlib
import io
import logging
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from webdataset import tariterators

from vistok.data.buckets import picture_shape
from vistok.data.decode import BadImageError
from vistok.data.pictures import Picture, PictureSource
from vistok.data.webdataset import IMAGE_KEYS, BadShardError, RawSample, check_on_bad_shard, sample_of

logger = logging.getLogger(__name__)
BLOCK = 512  # bytes; members of tar files begin at its multiples


class TarPictures(PictureSource):
    """The samples of local, uncompressed tar files that have a picture; the headers of all are read at the start.

    A sample is read from its place in the file, whatever the order.

    Args:
        shards: Tar files.
        on_bad_shard: ``"skip"``: log a shard that is damaged, and take what comes before the damage; ``"stop"``: raise
            a `BadShardError`.

    Attributes:
        shapes: Height and width of each picture that stands upright, int64 ``(n 2)``; 1 and 1 where it has no header.

    Raises:
        ValueError: If there are no pictures, or `on_bad_shard` is neither.
    """

    def __init__(self, shards: Sequence[Path], on_bad_shard: str = "skip") -> None:
        self._shards = list(shards)
        self._stop = check_on_bad_shard(on_bad_shard) == "stop"
        self.name = f"{len(self._shards)} shards such as {self._shards[0]}"
        places = [(number, *place) for number, shard in enumerate(self._shards) for place in self._index(shard)]
        if not places:
            raise ValueError(f"no pictures in {self.name}: they must be tar files without compression")
        table = np.array(places, np.int64)
        # Arrays, as of `ImageFolder`: shard, first byte, bytes.
        self._places, self.shapes = table[:, :3].copy(), table[:, 3:].copy()
        self.fingerprint = hashlib.blake2b(table.tobytes(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Picture:
        number, start, length = map(int, self._places[index])
        shard = self._shards[number]
        try:
            with shard.open("rb") as file:
                file.seek(start)
                members = file.read(length)
            sample = _unpack(members)
        except (tarfile.TarError, OSError, EOFError) as error:
            if self._stop:
                raise BadShardError(f"shard {shard.name}: {type(error).__name__}: {error}") from error
            raise BadImageError("bad shard", f"{shard.name}: {type(error).__name__}: {error}") from error
        if sample.keys().isdisjoint(IMAGE_KEYS):
            raise BadImageError("bad shard", f"{shard.name} is not what it was when training began")
        return sample_of(sample, IMAGE_KEYS)

    def _index(self, shard: Path) -> Iterator[tuple[int, int, int, int]]:
        """First byte, bytes, height and width of each sample with a picture."""
        try:
            yield from _samples(shard)
        except (tarfile.TarError, OSError, EOFError) as error:
            if self._stop:
                raise BadShardError(f"shard {shard}: {type(error).__name__}: {error}") from error
            logger.warning("bad shard %s: %s: %s", shard, type(error).__name__, error)


def _samples(shard: Path) -> Iterator[tuple[int, int, int, int]]:
    key, start, end, shapes = None, 0, 0, {}
    with tarfile.open(shard, "r:") as archive:
        for member in archive:
            name, extension = tariterators.base_plus_ext(member.name)
            if not member.isreg() or extension is None:
                continue
            if name != key:
                if shapes:
                    yield start, end - start, *shapes[min(shapes)]
                key, start, shapes = name, member.offset, {}
            end = member.offset_data + -(-member.size // BLOCK) * BLOCK
            if extension.lower() in IMAGE_KEYS:
                file = archive.extractfile(member)
                assert isinstance(file, io.BufferedReader)  # what tarfile gives of a regular member
                # Of several pictures the one that `sample_of` chooses.
                shapes[IMAGE_KEYS.index(extension.lower())] = picture_shape(file)
            # It keeps all that it has seen.
            archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
        if shapes:
            yield start, end - start, *shapes[min(shapes)]
    with shard.open("rb") as file:
        file.seek(-BLOCK, io.SEEK_END)
        if any(file.read()):
            raise tarfile.ReadError("no end-of-archive mark, so the file was cut off")


def _unpack(members: bytes) -> RawSample:
    """A sample in the form of webdataset."""
    sample: RawSample = {}
    with tarfile.open(fileobj=io.BytesIO(members), mode="r:") as archive:
        for member in archive:
            name, extension = tariterators.base_plus_ext(member.name)
            file = archive.extractfile(member)
            if file is not None and extension is not None:
                sample.setdefault("__key__", name)
                sample[extension.lower()] = file.read()
    return sample
