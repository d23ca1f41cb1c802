"""A folder of pictures, at any depth."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from vistok.data.decode import BadImageError, decode_image
from vistok.data.pictures import Picture, PictureSource

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
VIDEO_EXTENSIONS = (".mp4", ".webm", ".mkv", ".avi", ".gif", ".mov")


def find_images(root: Path, exclude: Path | None = None) -> list[str]:
    """Paths of all pictures below `root`, relative to it, with forward slashes, sorted.

    Hidden files and folders are left out; links to folders are followed, each folder once.

    Args:
        root: Folder to search.
        exclude: A folder below `root` to leave out.

    Raises:
        FileNotFoundError: If `root` is no folder, or holds no file with one of `EXTENSIONS`.
    """
    found, others = [], []
    for folder, names in walk(root, exclude):
        for name in names:
            path = folder / name
            if path.suffix.lower() in EXTENSIONS:
                found.append(path.relative_to(root).as_posix())
            else:
                others.append(name)
    if not found:
        raise no_files_below(root, "pictures", EXTENSIONS, others)
    return sorted(found)


def walk(root: Path, exclude: Path | None = None, content: str = "pictures") -> Iterator[tuple[Path, list[str]]]:
    """Folders below `root` with the names of the files in them, see `find_images`.

    Raises:
        FileNotFoundError: If `root` is no folder; `content` says of what it should be one.
    """
    if not root.is_dir():
        kind = "is a file" if root.exists() else "does not exist"
        raise FileNotFoundError(f"{root.absolute()} {kind}: data.root and data.val_root are folders of {content}")
    seen = {exclude.resolve()} if exclude is not None else set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = Path(folder).resolve()
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        yield Path(folder), [name for name in files if not name.startswith(".")]


def no_files_below(root: Path, content: str, extensions: Sequence[str], others: Sequence[str]) -> FileNotFoundError:
    """The error that a folder holds nothing but other files."""
    counts = Counter(Path(name).suffix.lower() or "no extension" for name in others)
    listed = ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common(5))
    videos = content == "pictures" and not set(VIDEO_EXTENSIONS).isdisjoint(counts)
    hint = "; videos are read by data=video and by vistok shards --videos" if videos else ""
    return FileNotFoundError(
        f"no {content} below {root.absolute()}: looked for {' '.join(extensions)}, "
        f"saw {len(others)} other files" + (f" ({listed})" if others else "") + hint
    )


def read_file_list(
    root: Path, file_list: Path, exists: Callable[[Path], bool] = Path.is_file, content: str = "files"
) -> list[str]:
    """Paths below `root` from a text file with one relative path per line, in its order.

    Args:
        root: Folder that the paths are relative to.
        file_list: The text file.
        exists: Whether a path is there, and of the right kind.
        content: What the paths should be, for messages.

    Raises:
        FileNotFoundError: If the list, or what it names, does not exist.
        ValueError: If the list is empty.
    """
    if not file_list.is_file():
        raise FileNotFoundError(f"{file_list.absolute()} is no file: a list is a text file of paths, one per line")
    paths = [line.strip() for line in file_list.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not paths:
        raise ValueError(
            f"{file_list.absolute()} names no {content}: write one path relative to {root.absolute()} per line"
        )
    missing = [path for path in paths if not exists(root / path)]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} paths in {file_list} are no {content} below {root.absolute()}, "
            f"such as {', '.join(missing[:3])}"
        )
    return paths


def find_classes(paths: Sequence[str]) -> list[str]:
    """Sorted names of the first-level folders if there are at least two and every picture lies in one; else none."""
    parts = [PurePosixPath(path).parts for path in paths]
    names = {part[0] for part in parts}
    return sorted(names) if len(names) > 1 and all(len(part) > 1 for part in parts) else []


def split_by_hash(
    paths: Sequence[str],
    val_share: float,
    readable: Callable[[str], bool] = lambda path: True,
    content: str = "pictures",
) -> tuple[list[str], list[str]]:
    """Divide pictures into training and validation by a hash of each path.

    A picture's side does not depend on the other pictures, so a folder that grows keeps its validation set (except
    where the share of a small folder rounds to nothing: then the picture with the smallest hash is taken).

    Args:
        paths: At least two relative paths.
        val_share: Expected share of validation pictures, in (0, 1).
        readable: Whether a picture can be read; asked until one of the validation pictures can, and where none can, the
            readable picture with the smallest hash joins them.
        content: What the paths are, for messages.

    Returns:
        Training and validation paths, at least one each, in the order of `paths`.

    Raises:
        ValueError: If there is only one picture or the share is not in (0, 1).
    """
    if not 0 < val_share < 1:
        raise ValueError(f"val_share must lie between 0 and 1, got {val_share}; 0.05 holds one in twenty out")
    if len(paths) < 2:
        raise ValueError(
            f"{len(paths)} {content} ({', '.join(paths)}) cannot be divided into training and validation: add some, "
            "or set data.val_root to a folder of others"
        )
    draws = {path: int(hashlib.blake2b(os.fsencode(path), digest_size=8).hexdigest(), 16) / 2**64 for path in paths}
    val = {path for path in paths if draws[path] < val_share} or {min(paths, key=draws.__getitem__)}
    by_hash = sorted(paths, key=draws.__getitem__)
    if not any(map(readable, (path for path in by_hash if path in val))):
        val.update(next(([path] for path in by_hash if path not in val and readable(path)), []))
    if len(val) == len(draws):
        val.remove(by_hash[-1])
    return [path for path in paths if path not in val], [path for path in paths if path in val]


def is_readable(root: Path, path: str) -> bool:
    """Whether the picture at `path` below `root` can be decoded."""
    try:
        decode_image(root / path)
    except BadImageError:
        return False
    return True


class ImageFolder(PictureSource):
    """Pictures below a folder.

    Args:
        root: Folder that `paths` are relative to.
        paths: Pictures, as `find_images` gives them.
        classes: First-level folder names; a picture's label is the position of its own. Empty, or without one that
            occurs: no labels.
    """

    def __init__(self, root: Path, paths: Sequence[str], classes: Sequence[str] = ()) -> None:
        self.root = root
        self.name = str(root.absolute())
        self.classes = classes
        # One array of bytes instead of a list of str: a million Python objects would be copied into every worker, page
        # by page, as their reference counts change.
        self._paths = np.array([os.fsencode(path) for path in paths])
        self.fingerprint = hashlib.blake2b(self._paths.tobytes(), digest_size=16).hexdigest()
        numbers = {name: number for number, name in enumerate(classes)}
        labels = [numbers.get(PurePosixPath(path).parts[0], -1) for path in paths]
        self._labels = np.array(labels) if -1 not in labels else None

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Picture:
        path = os.fsdecode(self._paths[index])
        return Picture(path, self.root / path, None if self._labels is None else int(self._labels[index]))
