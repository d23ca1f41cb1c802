"""Pictures that could not be read: how a worker reports them and where the main process keeps them."""

import csv
import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)


class BadSample(NamedTuple):
    """A sample that was left out or replaced.

    Attributes:
        key: What the data set calls the sample: a path below the root, a key inside a shard, or a shard itself.
        kind: A kind of `vistok.data.decode.BadImageError`, or ``"no image"`` (a shard's sample without a picture),
            ``"bad label"``, ``"bad shard"`` (a tar file that ends early or is none).
        reason: One line for a person.
    """

    key: str
    kind: str
    reason: str


class BadSampleLog:
    """Remembers every bad sample once; training and evaluation feed it with ``batch["bad"]``.

    Example:
        >>> log = BadSampleLog()
        >>> log.add([BadSample("a.jpg", "empty", "0 bytes"), BadSample("a.jpg", "empty", "0 bytes")])
        >>> log.counts
        {'empty': 1}
    """

    def __init__(self) -> None:
        self._samples: dict[str, BadSample] = {}

    def add(self, samples: Iterable[BadSample]) -> None:
        """Remember `samples` and log those that were not seen before."""
        for sample in samples:
            if sample.key not in self._samples:
                self._samples[sample.key] = sample
                logger.warning("bad sample %s: %s (%s)", sample.key, sample.kind, sample.reason)

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def keys(self) -> list[str]:
        """Keys in the order they were met."""
        return list(self._samples)

    @property
    def counts(self) -> dict[str, int]:
        """Number of bad samples by kind."""
        return dict(Counter(sample.kind for sample in self._samples.values()))

    def write(self, folder: Path) -> Path:
        """Write ``bad_samples.csv`` (key, kind, reason) into `folder`; a reader never sees half a file.

        Args:
            folder: An existing folder. Under DDP give every rank its own.

        Returns:
            The file written.
        """
        path = folder / "bad_samples.csv"
        temporary = path.with_suffix(".csv.tmp")
        with temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.writer(file)
            writer.writerow(BadSample._fields)
            writer.writerows(self._samples.values())
        temporary.replace(path)
        return path
