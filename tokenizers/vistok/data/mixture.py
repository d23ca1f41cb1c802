"""Several data modules as one, mixed by weight."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from hydra.utils import instantiate
from lightning import Trainer
from torch.utils.data import IterableDataset

from vistok.data.collate import Batch
from vistok.data.loader import TrainLoader, WatchedLoader
from vistok.data.module import DataModule, at_least, check_epoch
from vistok.data.sampler import Resumable

# What all parts have in common, so that their pictures fit into one batch.
SHARED = ("image_size", "eval_size", "batch_size", "eval_batch_size", "channels")


class MixedBatches(Resumable, IterableDataset):
    """Batches joined from the batches of several training loaders, which go through their own epochs at their own pace.

    Args:
        loaders: Endless loaders without a Trainer, by name.
        num_batches: Batches of an epoch.
        batch_size: Pictures of a joined batch.
        world_size: Number of processes.
        seed: Seed of the loaders.
    """

    def __init__(
        self, loaders: Mapping[str, TrainLoader], num_batches: int, batch_size: int, world_size: int, seed: int
    ) -> None:
        self.loaders = loaders
        self.num_batches = num_batches
        self.batch_size = batch_size
        self.world_size = world_size
        self.seed = seed

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        position = self._epoch * self.num_batches + self._start
        streams = {name: _endless(loader, position) for name, loader in self.loaders.items()}
        for _ in range(self._start, self.num_batches):
            yield join({name: next(stream) for name, stream in streams.items()})


def _endless(loader: TrainLoader, position: int) -> Iterator[Batch]:
    """Batches of a loader from a number on, counted over all epochs."""
    epoch, batch = divmod(position, len(loader))
    loader.load_state_dict({"epoch": epoch, "batch": batch})
    while True:
        yield from loader


def named(name: str, batch: Batch) -> Batch:
    """A batch whose keys say which part they are from, without labels: parts number their classes each on its own."""
    keys = [f"{name}:{key}" for key in batch["keys"]]
    bad = [sample._replace(key=f"{name}:{sample.key}") for sample in batch["bad"]]
    return {key: value for key, value in batch.items() if key != "labels"} | {"keys": keys, "bad": bad}


def join(batches: Mapping[str, Batch]) -> Batch:
    """One batch of the pictures of several."""
    parts = [named(name, batch) for name, batch in batches.items()]
    batch: Batch = {"images": torch.cat([part["images"] for part in parts])}
    names = ("keys", "bad", "texts") if all("texts" in part for part in parts) else ("keys", "bad")
    return batch | {name: [item for part in parts for item in part[name]] for name in names}


class OneAfterTheOther(IterableDataset):
    """The batches of several evaluation loaders.

    Args:
        loaders: By name.
    """

    def __init__(self, loaders: Mapping[str, WatchedLoader]) -> None:
        self.loaders = loaders

    def __iter__(self) -> Iterator[Batch]:
        for name, loader in self.loaders.items():
            for batch in loader:
                yield named(name, batch)


def shares(batch_size: int, weights: Sequence[float]) -> list[int]:
    """Integers in proportion to `weights` whose sum is `batch_size`, by the largest remainder.

    Raises:
        ValueError: If a weight is not positive or gets no picture.
    """
    if not weights or not all(isinstance(weight, int | float) and 0 < weight < math.inf for weight in weights):
        raise ValueError(f"data.parts need positive weights, got {list(weights)}")
    exact = [batch_size * weight / sum(weights) for weight in weights]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda part: counts[part] - exact[part])
    for part in by_remainder[: batch_size - sum(counts)]:
        counts[part] += 1
    if 0 in counts:
        raise ValueError(
            f"data.batch_size={batch_size} has no picture for weight {weights[counts.index(0)]:g} among "
            f"{list(weights)}: set it to at least {round(sum(weights) / min(weights))}"
        )
    return counts


class MixtureData(DataModule):
    """Every training batch has pictures of all parts in proportion to their weights; evaluation has all of all parts.

    A part that is at its end begins its next epoch, whatever the others do. Resuming is exact.

    Args:
        parts: By name, the config of a data module (``_target_`` and its own arguments) and its ``weight``. What it
            does not say is taken from the mixture; sizes, batch sizes and channels always are.
        samples_per_epoch: Pictures per epoch over all processes; None: as many as all parts have.
        **options: Arguments of `DataModule`.

    Raises:
        ValueError: If a part is impossible, or its weight gives it no picture of a batch.
    """

    def __init__(
        self, parts: Mapping[str, Mapping[str, Any]], samples_per_epoch: int | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        if samples_per_epoch is not None:
            at_least(1, "samples_per_epoch", samples_per_epoch)
        self.samples_per_epoch = samples_per_epoch
        if not isinstance(parts, Mapping) or not all(isinstance(part, Mapping) for part in parts.values()):
            raise ValueError(f"data.parts are {{name: {{_target_: ..., weight: 1, ...}}, ...}}, got {parts!r}")
        for name, part in parts.items():
            if missing := {"_target_", "weight"} - set(part):
                raise ValueError(
                    f"data.parts.{name} has no {min(missing)}: a part is {{_target_: ..., weight: 1, ...}}"
                )
            if taken := set(part) & set(SHARED):
                raise ValueError(f"data.parts.{name}.{min(taken)} has no effect: set data.{min(taken)} of the mixture")
        counts = shares(self.batch_size, [part["weight"] for part in parts.values()])
        self.counts = dict(zip(parts, counts, strict=True))
        shared = options | {"image_size": self.image_size, "eval_size": self.eval_size, "channels": self.channels}
        shared["eval_batch_size"] = self.eval_batch_size
        self.parts: dict[str, DataModule] = {}
        for name, part in parts.items():
            own = {key: value for key, value in part.items() if key != "weight"}
            config = shared | own | {"batch_size": self.counts[name]}
            self.parts[name] = instantiate(config, _convert_="all")
            if self.parts[name].train_sizes != self.train_sizes:
                raise ValueError(f"data.parts.{name} has other sizes than data.image_size, which do not fit one batch")

    def prepare_data(self) -> None:
        """Let every part download what it needs."""
        for part in self.parts.values():
            part.prepare_data()

    def make_dataset(self, split: Literal["train", "eval"]) -> IterableDataset:
        """Mixed training batches, or those of evaluation one part after the other."""
        place = self._rank_and_world_size()
        return self._mixed(*place) if split == "train" else self._chained(*place)

    def make_train_loader(self, trainer: Trainer | None, rank: int, world_size: int, raw: bool = False) -> TrainLoader:
        """Training batches; the parts have loading processes of their own."""
        return TrainLoader(self._mixed(rank, world_size), trainer, batch_size=None, raw=raw)

    def make_eval_loader(self, rank: int, world_size: int, raw: bool = False) -> WatchedLoader:
        """Evaluation batches, one part after the other."""
        return WatchedLoader(self._chained(rank, world_size), batch_size=None, raw=raw)

    def _mixed(self, rank: int, world_size: int) -> MixedBatches:
        loaders = {name: part.make_train_loader(None, rank, world_size, raw=True) for name, part in self.parts.items()}
        num_samples = self.samples_per_epoch
        if num_samples is None:
            num_samples = world_size * sum(len(loaders[name]) * count for name, count in self.counts.items())
        num_batches = num_samples // (self.batch_size * world_size)
        check_epoch(num_batches, num_samples, self.batch_size, world_size, self.content)
        return MixedBatches(loaders, num_batches, self.batch_size, world_size, self.seed)

    def _chained(self, rank: int, world_size: int) -> OneAfterTheOther:
        return OneAfterTheOther(
            {name: part.make_eval_loader(rank, world_size, raw=True) for name, part in self.parts.items()}
        )

    def size_of(self, side: int) -> tuple[int, ...]:
        """As of the first part."""
        return next(iter(self.parts.values())).size_of(side)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How a new picture is brought into the form of training: as in the first part."""
        return next(iter(self.parts.values())).preprocessing

    @property
    def protocol(self) -> dict[str, Any]:
        """What evaluation looks at: values in which the parts differ are joined."""
        protocols = [part.protocol for part in self.parts.values()]
        joined = {key: [protocol[key] for protocol in protocols] for key in protocols[0]}
        same = {
            key: values[0] if all(value == values[0] for value in values) else " + ".join(map(str, values))
            for key, values in joined.items()
        }
        return same | {"num_images": sum(joined["num_images"])}
