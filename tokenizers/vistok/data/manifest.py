"""What ``vistok shards`` knows about the shards that it wrote."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vistok.data.bad_samples import BadSample

FILE_NAME = "manifest.json"


@dataclass
class Shard:
    """One finished tar file.

    Attributes:
        name: File name.
        num_samples: Pictures or videos in it.
        num_bytes: Size of the file.
        sha256: Of the file, in hexadecimal.
        next: Number of the first sample of the source that comes after it.
    """

    name: str
    num_samples: int
    num_bytes: int
    sha256: str
    next: int


@dataclass
class Manifest:
    """``manifest.json`` beside the shards: a conversion's settings, and what it has written so far.

    Attributes:
        source: What was converted.
        settings: How, and a fingerprint of the keys of the source; a conversion that goes on must have the same.
        classes: Names of the labels in ``cls`` files.
        content: What its samples are: ``"pictures"`` or ``"videos"``.
        complete: Whether the conversion reached the end of the source.
        shards: In the order of the source.
        bad: Samples that were left out.
    """

    source: str
    settings: dict[str, Any]
    classes: list[str] = field(default_factory=list)
    content: str = "pictures"
    complete: bool = False
    shards: list[Shard] = field(default_factory=list)
    bad: list[BadSample] = field(default_factory=list)

    @property
    def num_samples(self) -> int:
        """Pictures or videos in all shards."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.num_bytes for shard in self.shards)

    def write(self, folder: Path) -> None:
        """Write the file so that a reader, or who goes on after a power cut, sees the old one or the new one."""
        # Always the same temporary name, so that the next write takes the place of what a kill left.
        temporary = folder / f"{FILE_NAME}.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            json.dump({"num_samples": self.num_samples, "num_bytes": self.num_bytes} | asdict(self), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / FILE_NAME)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder, or None where there is none.

    Raises:
        ValueError: If the file is not a manifest of vistok.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["shards"] = [Shard(**shard) for shard in content["shards"]]
        content["bad"] = [BadSample(*sample) for sample in content["bad"]]
        del content["num_samples"], content["num_bytes"]
        return Manifest(**content)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no manifest that vistok shards wrote: {type(error).__name__} {error}") from error
