"""Files: their checksums, and writing them so that a crash or a full disk never leaves half of one behind."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; it takes the name of `path` only when the block succeeds.

    Raises:
        OSError: If writing fails, for example on a full disk. A previous file at `path` is untouched then.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write(temporary_path)`` and move the result to `path`; see `atomic_file`."""
    with atomic_file(path) as temporary:
        write(temporary)


@contextmanager
def atomic_folder(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `folder` that takes its name only when the block succeeds.

    Raises:
        FileExistsError: If `folder` exists, is not empty and `overwrite` is false.
        OSError: If another process put a folder there meanwhile and `overwrite` is false.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} exists and is a file: choose another folder")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(
            f"{folder} exists and is not empty: choose another folder, or replace it (overwrite=True, --overwrite)"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if overwrite and folder.exists():
            # A folder cannot be replaced in one step: the old one steps aside until the new one has its name.
            aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".old", dir=folder.parent))
            folder.replace(aside)
            try:
                temporary.replace(folder)
            except OSError:
                aside.replace(folder)
                raise
            shutil.rmtree(aside)
        else:
            temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    # The only way to read the mask is to set it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
