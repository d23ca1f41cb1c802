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


class TooManyBadSamplesError(ValueError):
    """More samples than allowed could not be read; the message counts them by kind and lists the first."""


class BadSampleLimit:
    """Stops when the share of bad samples is above a limit.

    Args:
        max_share: Largest share put up with, in [0, 1].
        minimum: No judgement before this many samples were seen, so that one bad sample of three is no reason to stop.

    Raises:
        ValueError: If the share is not in [0, 1].
    """

    def __init__(self, max_share: float, minimum: int = 200) -> None:
        if not 0 <= max_share <= 1:
            raise ValueError(f"max_bad_share must lie between 0 and 1, got {max_share}; 0.01 allows one in a hundred")
        self.max_share = max_share
        self.minimum = minimum
        self.num_good = 0
        self.bad: dict[str, BadSample] = {}

    def add(self, num_good: int, bad: Iterable[BadSample]) -> None:
        """Count samples that were read and samples that were not; each bad key counts once.

        Raises:
            TooManyBadSamplesError: If the share is above the limit.
        """
        self.num_good += num_good
        self.bad.update((sample.key, sample) for sample in bad)
        if self.num_good + len(self.bad) >= self.minimum:
            self.check()

    def check(self) -> None:
        """Judge what was seen so far, however little.

        Raises:
            TooManyBadSamplesError: If the share is above the limit.
        """
        seen = self.num_good + len(self.bad)
        if len(self.bad) > self.max_share * seen:
            kinds = ", ".join(
                f"{count} {kind}" for kind, count in Counter(item.kind for item in self.bad.values()).items()
            )
            listed = "\n".join(f"  {key}: {kind} ({reason})" for key, kind, reason in list(self.bad.values())[:50])
            raise TooManyBadSamplesError(
                f"{len(self.bad)} of {seen} samples cannot be read ({kinds}), more than "
                f"max_bad_share={self.max_share:g} allows:\n{listed}"
            )


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
