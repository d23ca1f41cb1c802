"""Videos: clips of files that PyAV decodes, and of folders of numbered pictures.

A clip is a number of frames of a video, in order. Only the frames from the key frame before the clip to its end are
decoded, and only one of them is held in its full size.
"""

import io
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from importlib import import_module
from pathlib import Path, PurePath
from typing import Any, TypeVar

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from vistok.data.decode import BadImageError, decode_image
from vistok.data.image_folder import EXTENSIONS as PICTURE_EXTENSIONS
from vistok.data.image_folder import VIDEO_EXTENSIONS as EXTENSIONS
from vistok.data.image_folder import ImageFolder, no_files_below, read_file_list, walk
from vistok.data.pictures import Picture, PictureDataset
from vistok.data.transforms import MAX_RESIZED_PIXELS
from vistok.data.webdataset import ShardDataset

# FFmpeg goes by the content of a file: a play list that is called a video would open other files and addresses.
FORMATS = "mov,matroska,avi,gif"
FRAME_EXTENSIONS = tuple(extension for extension in PICTURE_EXTENSIONS if extension not in EXTENSIONS)
T = TypeVar("T")
NUMBERED = re.compile(r"(.*?)(\d+)")
ZIP = b"PK\3\4"  # how a zip file begins
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError)
MAX_PICTURE_BYTES = 2**28  # of a file in a zip file, which may be a thousandth of that
DURATION = re.compile(r"(\d+):(\d+):(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Clip:
    """Which frames of a video make a sample.

    Args:
        frames: Their number.
        rate: Frames per second; a video that has fewer repeats some. None: by `stride`.
        stride: Take every frame (1), every second one (2) and so on.

    Raises:
        ValueError: If a number is not positive, or both a rate and a stride are given.
    """

    frames: int = 17
    rate: float | None = None
    stride: int = 1

    def __post_init__(self) -> None:
        if min(self.frames, self.stride) < 1 or (self.rate is not None and not self.rate > 0):
            raise ValueError(
                f"frames and stride must be at least 1 and rate positive or null, got frames={self.frames}, "
                f"stride={self.stride}, rate={self.rate}"
            )
        if self.rate is not None and self.stride != 1:
            raise ValueError(f"rate={self.rate:g} has no effect with stride={self.stride}: leave one of them out")

    @property
    def text(self) -> str:
        """In words."""
        if self.rate is not None:
            return f"{self.frames} frames, {self.rate:g} per second"
        return f"{self.frames} frames" + (f", one of {self.stride}" if self.stride > 1 else "")

    def read(self, source: Path | bytes, position: float) -> Iterator[Path | bytes | Image.Image]:
        """The undecoded or decoded frames of a clip.

        Args:
            source: A video file, its bytes, a folder of numbered pictures, or the bytes of a zip file of them.
            position: Where the clip lies, from 0 (it begins with the video) to 1 (it ends with the video).

        Raises:
            BadImageError: If the video cannot be read, of kind ``"empty"``, ``"not a video"``, ``"truncated"``, ``"too
                short"`` (it has fewer frames than a clip), ``"too large"`` or ``"unreadable"``.
            ImportError: If a file is to be read without PyAV.
        """
        if isinstance(source, bytes):
            return self._read_archive(source, position) if source.startswith(ZIP) else self._read_file(source, position)
        if source.is_dir():
            return iter(self._choose(pictures_of(source), position))
        return self._read_file(source, position)

    def _read_archive(self, data: bytes, position: float) -> Iterator[bytes]:
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                for name in self._choose(in_order(archive.namelist()), position):
                    # No more than this is ever read, whatever the data says.
                    if (num_bytes := archive.getinfo(name).file_size) > MAX_PICTURE_BYTES:
                        raise BadImageError("too large", f"{name} has {num_bytes} bytes")
                    yield archive.read(name)
        except (
            zipfile.BadZipFile,
            zlib.error,
            lzma.LZMAError,
            EOFError,
            OSError,
            RuntimeError,
            NotImplementedError,
        ) as error:
            raise BadImageError("unreadable", f"zip file of pictures: {type(error).__name__}: {error}") from error

    def _choose(self, pictures: Sequence[T], position: float) -> Sequence[T]:
        if self.rate is not None:
            raise ValueError(
                f"data.rate={self.rate:g} is of video files, and folders and zip files of pictures, such as the one of "
                f"{pictures[0]}, have no rate: set data.rate=null and data.stride"
            )
        free = len(pictures) - self._needed
        if free < 0:
            raise _too_short(len(pictures), self._needed)
        start = round(position * free)
        return pictures[start : start + self._needed : self.stride]

    @property
    def _needed(self) -> int:
        """Frames from the first to the last of a clip that goes by its stride."""
        return (self.frames - 1) * self.stride + 1

    def _read_file(self, source: Path | bytes, position: float) -> Iterator[Image.Image]:
        with _opened(source) as (container, stream, frame_rate):
            step = 1 / Fraction(self.rate) if self.rate is not None else self.stride / frame_rate
            half = Fraction(1, 2) / frame_rate
            duration = _duration(container, stream)
            # The last frame is shown for its own time, during which no other can begin.
            free = duration - 2 * half - (self.frames - 1) * step
            if free < -half:
                raise _too_short(round(duration * frame_rate), round((self.frames - 1) * step * frame_rate) + 1)
            begin = max(free, Fraction(0)) * Fraction(position)
            taken, first = 0, Fraction(0)
            for number, (time, frame) in enumerate(_frames_from(container, stream, begin, half)):
                first = first if number else time
                if self.rate is None:
                    copies = int(number % self.stride == 0)
                else:
                    # The frame that is nearest to the time, or to several times.
                    copies = max(0, int((time + half - first) / step) + 1 - taken)
                if copies and frame.is_corrupt:
                    raise BadImageError("unreadable", f"the frame at {float(time):.2f} s is damaged")
                for _ in range(min(copies, self.frames - taken)):
                    yield upright(frame)
                    taken += 1
                if taken == self.frames:
                    return
            raise BadImageError(
                "truncated",
                f"the file ends after {taken} of the {self.frames} frames from {float(begin):.2f} s on, it should last "
                f"{float(duration):.2f} s",
            )


def frames_of(source: bytes) -> Iterator[tuple[Fraction, Any]]:
    """All frames of a video file, of PyAV, with their times in seconds.

    Raises:
        BadImageError: If one cannot be decoded, or frames are missing at the end.
    """
    with _opened(source) as (container, stream, rate):
        # First, since it may read to the end.
        duration = _duration(container, stream)
        start = stream.start_time or 0
        container.seek(start, stream=stream)
        end = Fraction(0)
        for time, frame in _decoded(container, stream):
            if frame.is_corrupt:
                raise BadImageError("unreadable", f"the frame at {float(time):.2f} s is damaged")
            end = max(end, time + max((frame.duration or 0) * stream.time_base, 1 / rate))
            yield time, frame
        # Containers round the times of frames.
        if end + 1 / rate < duration:
            raise BadImageError(
                "truncated", f"the frames end after {float(end):.2f} s, they should last {float(duration):.2f} s"
            )


def rates_of(source: bytes) -> tuple[Fraction, Fraction]:
    """Frames per second of a video file, and the unit of their times in seconds."""
    with _opened(source) as (_, stream, rate):
        return rate, stream.time_base


def upright(frame: Any) -> Image.Image:
    """A frame of PyAV as a person sees it."""
    return frame.to_image().rotate(frame.rotation, expand=True)


def _too_short(there: int, needed: int) -> BadImageError:
    return BadImageError("too short", f"{there} frames, a clip takes {needed}")


@contextmanager
def _opened(source: Path | bytes) -> Iterator[tuple[Any, Any, Fraction]]:
    """A container, its first stream of pictures and their rate; what FFmpeg raises becomes a `BadImageError`."""
    av = import_av()
    kind = "not a video"
    try:
        if not (len(source) if isinstance(source, bytes) else source.stat().st_size):
            raise BadImageError("empty", "0 bytes")
        file = io.BytesIO(source) if isinstance(source, bytes) else str(source)
        with av.open(file, options={"format_whitelist": FORMATS}, metadata_errors="replace") as container:
            if not container.streams.video:
                raise BadImageError("not a video", "no pictures in it; of an MP4 file its end may be missing")
            kind = "unreadable"
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise BadImageError("unreadable", "no decoder for its pictures")
            # Loading processes work side by side already.
            stream.codec_context.thread_count = 1
            frame_rate = stream.average_rate or stream.guessed_rate
            if not frame_rate:
                raise BadImageError("unreadable", "no frame rate")
            if stream.width * stream.height > MAX_RESIZED_PIXELS:
                raise BadImageError("too large", f"frames of {stream.width}x{stream.height} pixels")
            yield container, stream, frame_rate
    except BadImageError:
        raise
    except Exception as error:  # PyAV raises nearly anything on damaged files: FFmpegError, UnicodeDecodeError, ...
        kind = "unreadable" if isinstance(error, OSError) else kind
        raise BadImageError(kind, f"{type(error).__name__}: {error}") from error


def import_av() -> Any:
    """The library that reads and writes video files.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        return import_module("av")
    except ImportError as error:
        raise ImportError("video files are read by PyAV: pip install av") from error


def _duration(container: Any, stream: Any) -> Fraction:
    """Seconds that the pictures last."""
    if stream.duration:
        return stream.duration * stream.time_base
    # In Matroska a file's duration is that of its longest stream, which may be its sound.
    if found := DURATION.fullmatch(stream.metadata.get("DURATION", "")):
        hours, minutes, seconds = map(Fraction, found.groups())
        return 3600 * hours + 60 * minutes + seconds
    if container.duration:
        container.seek(container.duration)
    ends = [packet.pts + (packet.duration or 0) for packet in container.demux(stream) if packet.pts is not None]
    return (max(ends, default=0) - (stream.start_time or 0)) * stream.time_base


def _frames_from(container: Any, stream: Any, begin: Fraction, half: Fraction) -> Iterator[tuple[Fraction, Any]]:
    """Frames with their times in seconds, from the one nearest to `begin` on."""
    # Some formats seek beyond the time asked for; there is always a key frame at the start.
    for seconds in (begin, Fraction(0)):
        container.seek((stream.start_time or 0) + int(seconds / stream.time_base), stream=stream)
        frames = _decoded(container, stream)
        time, frame = next(frames, (None, None))
        if time is not None and (time < begin + half or not seconds):
            break
    while time is not None and time < begin - half:
        time, frame = next(frames, (None, None))
    if time is not None:
        yield time, frame
        yield from frames


def _decoded(container: Any, stream: Any) -> Iterator[tuple[Fraction, Any]]:
    start = stream.start_time or 0
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise BadImageError("truncated", "the file ends in the middle of a frame")
        for frame in packet.decode():
            yield ((frame.pts if frame.pts is not None else frame.dts) - start) * stream.time_base, frame


def numbered_pictures(names: Sequence[str]) -> list[tuple[str, int, str]]:
    """What comes before the number at the end of a name, the number and the name, in order; others are left out."""
    found = []
    for name in names:
        parts = NUMBERED.fullmatch(PurePath(name).stem)
        if parts and PurePath(name).suffix.lower() in FRAME_EXTENSIONS and not PurePath(name).name.startswith("."):
            found.append((parts[1], int(parts[2]), name))
    return sorted(found)


def in_order(names: Sequence[str]) -> list[str]:
    """Names of the numbered pictures of one video in their order.

    Raises:
        BadImageError: If they are not the pictures of one video.
    """
    names_and_numbers = numbered_pictures(names)
    if not names_and_numbers:
        raise BadImageError("empty", "no pictures whose names end in a number")
    prefixes = sorted({prefix for prefix, _, _ in names_and_numbers})
    if len(prefixes) > 1:
        listed = ", ".join(f"{prefix}*" for prefix in prefixes[:3])
        raise BadImageError("unreadable", f"pictures of several names ({listed}): one folder is one video")
    return [name for _, _, name in names_and_numbers]


def pictures_of(folder: Path) -> list[Path]:
    """The numbered pictures of a folder in their order.

    Raises:
        BadImageError: If they are not the pictures of one video.
    """
    return [folder / name for name in in_order([path.name for path in folder.iterdir()])]


def is_video(path: Path) -> bool:
    """Whether there is a file, or a folder of numbered pictures."""
    if path.is_dir():
        return len(numbered_pictures([picture.name for picture in path.iterdir()])) > 1
    return path.is_file()


def read_video_list(root: Path, file_list: Path) -> list[str]:
    """Files and folders of numbered pictures below `root` from a text file with one relative path per line.

    Raises:
        FileNotFoundError: If the list, or what it names, does not exist.
        ValueError: If the list is empty.
    """
    return read_file_list(root, file_list, is_video, "files and folders of numbered pictures")


def find_videos(root: Path, exclude: Path | None = None) -> list[str]:
    """Paths of all videos below `root`, relative to it, with forward slashes, sorted.

    A video is a file with one of `EXTENSIONS`, or a folder below `root` that holds none of these and at least two
    pictures whose names end in a number.

    Args:
        root: Folder to search, as `vistok.data.image_folder.find_images` does.
        exclude: A folder below `root` to leave out.

    Raises:
        FileNotFoundError: If `root` is no folder, or holds no video.
    """
    found, others = [], []
    for folder, names in walk(root, exclude, "videos"):
        videos = [name for name in names if name.lower().endswith(EXTENSIONS)]
        if videos:
            found += [(folder / name).relative_to(root).as_posix() for name in videos]
        elif folder != root and len(numbered_pictures(names)) > 1:
            found.append(folder.relative_to(root).as_posix())
        else:
            others += names
    if not found:
        if all(name.endswith(".tar") for name in others) and others:
            raise FileNotFoundError(f"{root.absolute()} holds shards: write data=video_shards data.shards={root}")
        raise no_files_below(root, "videos and no folders of numbered pictures", EXTENSIONS, others)
    return sorted(found)


def is_readable(root: Path, path: str, clip: Clip) -> bool:
    """Whether the middle clip of the video at `path` below `root` can be read."""
    try:
        for frame in clip.read(root / path, 0.5):
            decode_image(frame)
    except BadImageError:
        return False
    return True


class VideoFolder(ImageFolder):
    """Videos below a folder, each of which gives several samples.

    Args:
        root: Folder that `paths` are relative to.
        paths: Videos, as `find_videos` gives them.
        classes: As of `ImageFolder`.
        clips: Samples of each video.
    """

    def __init__(self, root: Path, paths: Sequence[str], classes: Sequence[str] = (), clips: int = 1) -> None:
        super().__init__(root, paths, classes)
        self.clips = clips

    def __len__(self) -> int:
        return super().__len__() * self.clips

    def __getitem__(self, index: int) -> Picture:
        video, clip = divmod(index, self.clips)
        picture = super().__getitem__(video)
        return picture._replace(key=f"{picture.key}#{clip}") if self.clips > 1 else picture

    def position(self, index: int) -> float:
        """Where a sample lies in its video if nothing is random: the clips of a video are spread evenly over it."""
        return (index % self.clips + 0.5) / self.clips


class ClipReader:
    """What data sets of videos have in common: how they read the frames of a clip."""

    clip: Clip
    transform: Callable[[Tensor, torch.Generator], Tensor]
    channels: int
    background: Sequence[int]
    reduced_size: int | None

    def read_clip(self, source: Path | bytes, position: float, generator: torch.Generator) -> UInt8[Tensor, "c t h w"]:
        """Decoded and transformed frames; all are cropped and mirrored alike."""
        state = generator.get_state()
        frames, sizes = [], set()
        for frame in self.clip.read(source, position):
            image = decode_image(frame, self.channels, self.background, self.reduced_size)
            sizes.add(tuple(image.shape))
            if len(sizes) > 1:
                raise BadImageError("unreadable", "its frames differ in size")
            generator.set_state(state)
            frames.append(self.transform(image, generator))
        return torch.stack(frames, 1)


class VideoDataset(ClipReader, PictureDataset):
    """Clips of videos; items are asked for by ``(epoch, index)`` as in `PictureDataset`.

    In training a clip begins anywhere in its video; otherwise the clips of a video are spread evenly over it, and a
    single one lies in its middle.

    Args:
        source: The videos.
        transform: From a frame, uint8 ``(c h w)``, and a generator to ``(c s s)``.
        train: Whether to draw the start and to replace unreadable videos.
        clip: Which frames.
        **options: Further arguments of `PictureDataset`.
    """

    content = "videos"
    source: VideoFolder

    def __init__(
        self,
        source: VideoFolder,
        transform: Callable[[Tensor, torch.Generator], Tensor],
        train: bool = True,
        *,
        clip: Clip,
        **options: Any,
    ) -> None:
        self.clip = clip
        super().__init__(source, transform, train, **options)

    def _load(self, picture: Picture, index: int, generator: torch.Generator) -> Tensor:
        position = torch.rand((), generator=generator).item() if self.train else self.source.position(index)
        assert isinstance(picture.image, Path)
        return self.read_clip(picture.image, position, generator)


class VideoShards(ClipReader, ShardDataset):
    """Whole batches of clips from tar shards of video files and of zip files of numbered pictures, see `ShardDataset`.

    A sample gives one clip. In training it begins anywhere in its video; otherwise it lies in the middle.

    Args:
        shards: Tar files.
        *args: Further arguments of `ShardDataset`.
        clip: Which frames.
        **options: The same.
    """

    content = "videos"
    extensions = (*(extension[1:] for extension in EXTENSIONS), "zip")

    def __init__(self, shards: Sequence[Path | str], *args: Any, clip: Clip, **options: Any) -> None:
        self.clip = clip
        super().__init__(shards, *args, **options)

    def _load(self, data: bytes, generator: torch.Generator) -> Tensor:
        position = torch.rand((), generator=generator).item() if self.train else 0.5
        return self.read_clip(data, position, generator)
