"""Checkpoints that are whole or absent, and that load without executing anything."""

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from vistok.hub.files import atomic_write


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target and renames it: a crash or a full disk leaves the previous one intact."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save a checkpoint to a local path.

        Raises:
            OSError: If it cannot be written; says that the previous checkpoint is intact.
        """
        if storage_options is not None:
            raise TypeError("AtomicCheckpointIO writes to local paths and takes no storage_options")
        try:
            atomic_write(Path(path), lambda temporary: torch.save(checkpoint, temporary))
        # torch's zip writer reports a full disk as a RuntimeError.
        except (OSError, RuntimeError) as error:
            reason = (
                "the disk is full"
                if getattr(error, "errno", None) == errno.ENOSPC or "write failed" in str(error)
                else str(error)
            )
            kept = (
                "the previous checkpoint of that name is intact"
                if Path(path).exists()
                else "no checkpoint of that name exists yet"
            )
            raise OSError(f"could not write {path}: {reason}; {kept}") from error


def read_checkpoint(path: Path, setting: str) -> dict[str, Any]:
    """Content of a checkpoint of a run, its tensors left in the file until they are read.

    Args:
        path: The file.
        setting: That named it, for the error.

    Raises:
        ValueError: If it cannot be loaded without executing code.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of pickle, zip or torch, in many forms
        reason = str(error).splitlines()[0]
        raise ValueError(f"{setting}={path} is not a checkpoint that loads without executing code: {reason}") from error


def differences(saved: Any, now: Any, where: str = "") -> Iterator[str]:
    """What two plain configs have otherwise, as ``key=saved / now``; the preprocessing of tokenizers is left out."""
    if isinstance(saved, dict) and isinstance(now, dict):
        for key in sorted(saved.keys() | now.keys()):
            if key != "preprocessing":
                yield from differences(saved.get(key), now.get(key), f"{where}.{key}" if where else key)
    elif saved != now:
        yield f"{where}={saved} / {now}"
