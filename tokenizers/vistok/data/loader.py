"""Loaders that name what goes wrong, and a training loader that can start where a checkpoint stopped."""

import atexit
import logging
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any
from weakref import WeakSet

import torch
from lightning import Trainer
from torch.utils.data import DataLoader, Dataset

from vistok.data.bad_samples import BadSampleLimit
from vistok.data.collate import Batch, in_model_range

logger = logging.getLogger(__name__)


_workers: WeakSet[BaseProcess] = WeakSet()


def _kill(workers: Iterable[Any]) -> None:
    """End loading processes at once, by the one signal that they do not ignore."""
    for worker in workers:
        if worker._parent_pid == os.getpid():
            worker.kill()


# Where an iterator is alive at the end of a program, Python would ask its processes to end, and wait for ever.
atexit.register(lambda: _kill([*_workers]))


class DeadWorkerError(OSError):
    """A loading process died or does not answer."""


def leave_signals_to_the_main_process(worker: int) -> None:
    """Ignore, in a loading process, the signals on which the main process saves; it ends with the main process.

    A scheduler signals every process of a job, and the death of a worker would be an error in the running step.
    """
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class WatchedLoader(DataLoader):
    """A `DataLoader` that stops with a `DeadWorkerError` if a loading process died, and at a share of bad samples.

    Args:
        dataset: As of `DataLoader`.
        max_bad_share: Largest share of bad samples in a pass; judged once 200 samples were seen. None: any.
        raw: Whether to leave images uint8, as loading processes hand them over; else they are brought to [-1, 1].
        **options: Further arguments of `DataLoader`.
    """

    def __init__(self, dataset: Dataset, max_bad_share: float | None = None, raw: bool = False, **options: Any) -> None:
        # Iterators draw a base seed for their workers: from a generator of their own, not from the global one.
        super().__init__(dataset, generator=torch.Generator().manual_seed(0), **options)
        self._max_bad_share = max_bad_share
        self._raw = raw

    def __iter__(self) -> Iterator[Batch]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._watched(self._batches())

    def _batches(self) -> Iterator[Batch]:
        if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
            return self._noted(super().__iter__())
        # Torch installs a handler that raises the death of a worker wherever the main process happens to be, in the
        # middle of an optimiser step too. Without it, the loader notices when it waits for that worker.
        before = signal.getsignal(signal.SIGCHLD)
        batches = self._noted(super().__iter__())
        if _is_of_torch(signal.getsignal(signal.SIGCHLD)):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if _is_of_torch(before) else before)
        return batches

    def _noted(self, batches: Any) -> Iterator[Batch]:
        _workers.update(getattr(batches, "_workers", ()))
        return batches

    def _watched(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        limit = None if self._max_bad_share is None else BadSampleLimit(self._max_bad_share)
        try:
            for batch in batches:
                if limit is not None:
                    limit.add(len(batch["keys"]), batch["bad"])
                yield batch if self._raw else in_model_range(batch)
        except (RuntimeError, OSError, EOFError) as error:
            if self.num_workers == 0 or not _is_of_a_dead_worker(error):
                raise
            # The others, or the one that hangs, would be asked to end, and ignore it.
            _kill(getattr(batches, "_workers", ()))
            raise DeadWorkerError(
                f"{error or type(error).__name__}; a loading process may have been killed for want of memory or "
                f"shared memory: set data.num_workers below {self.num_workers}, or to 0 to see its own error"
            ) from error


def _is_of_a_dead_worker(error: Exception) -> bool:
    # Torch's own words; or a connection that broke while a batch was handed over. Errors of data sets begin otherwise.
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader")
    return not str(error).startswith("Caught ")


def _is_of_torch(handler: Any) -> bool:
    return getattr(handler, "__module__", "").startswith("torch.utils.data")


class TrainLoader(WatchedLoader):
    """A `DataLoader` whose every pass is one epoch, and which knows and can take a position.

    It has ``state_dict`` and ``load_state_dict``, which Lightning stores in its checkpoints and calls before it makes
    the iterator. The position counts the batches that the Trainer has *processed* (Lightning increases that counter
    once per batch, between the optimiser step and ``on_train_batch_end``), so neither what workers fetched ahead nor a
    batch whose step was interrupted is lost.

    Args:
        dataset: A map-style data set with an `EpochBatchSampler` as ``batch_sampler``; or an iterable one that yields
            whole batches and has ``set_epoch``, ``start_at`` and a length.
        trainer: The Trainer that consumes the batches. None: every pass is the next epoch, and ``state_dict`` tells
            where the current pass began.
        restarts: How many times loading processes are started again after one died, with exactly the next batch.
        **options: Further arguments of `WatchedLoader`.
    """

    def __init__(self, dataset: Dataset, trainer: Trainer | None = None, restarts: int = 0, **options: Any) -> None:
        super().__init__(dataset, **options)
        self._restarts = restarts
        self._source: Any = options.get("batch_sampler") or dataset
        self._trainer: Any = trainer  # the counters read here are not in Lightning's declared types
        self._epoch = 0 if trainer is None else self._trainer.fit_loop.epoch_progress.current.processed
        self._batch = 0
        self._origin: int | None = None  # number of processed batches when the current pass began

    def __iter__(self) -> Iterator[Batch]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # Lightning sometimes drops an iterator unused: the epoch advances only if something was taken from it.
        if self._origin is not None and (self._trainer is None or self._processed() > self._origin):
            self._epoch, self._batch = self._epoch + 1, 0
        self._origin = self._processed()
        return self._pass(self._from(self._batch))

    def _from(self, batch: int) -> Iterator[Batch]:
        """Batches of the epoch from a number on."""
        self._source.set_epoch(self._epoch)
        self._source.start_at(batch)
        return self._watched(self._batches())

    def _pass(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        # With max_steps and no validation, Lightning resumes a checkpoint of an epoch's end by asking for one batch
        # more of that epoch. It is told that there is none, and goes on to the next epoch.
        trainer = self._trainer
        if trainer is None or trainer.fit_loop.epoch_loop.batch_progress.current.ready < self._length():
            yield from self._restarted(batches)

    def _restarted(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, from new loading processes where one died."""
        position = self._batch
        while True:
            try:
                for batch in batches:
                    position += 1
                    yield batch
                return
            except DeadWorkerError as error:
                if self._restarts == 0:
                    raise
                self._restarts -= 1
                logger.warning("%s. Started again at batch %d; %d restarts left", error, position, self._restarts)
                self._iterator = None
                batches = self._from(position)

    def _processed(self) -> int:
        return 0 if self._trainer is None else self._trainer.fit_loop.epoch_loop.batch_progress.total.processed

    def _order(self) -> dict[str, int]:
        """What decides which pictures are in a batch of a given number."""
        return {name: int(getattr(self._source, name)) for name in ("batch_size", "world_size", "seed")}

    def _contents(self) -> dict[str, int]:
        """What else does, and may change between runs: a folder grows, a machine has fewer cores."""
        contents = {"num_samples": int(getattr(self._source, "num_samples", len(self)))}
        return contents | ({"num_workers": self.num_workers} if self._source.depends_on_workers else {})

    def _length(self) -> int:
        """Batches of an epoch that are trained on."""
        return len(self) if self._trainer is None else int(min(len(self), self._trainer.num_training_batches))

    def state_dict(self) -> dict[str, int]:
        """Epoch and batch that training needs next."""
        batch = self._batch if self._origin is None else self._batch + self._processed() - self._origin
        epoch, batch = (self._epoch, batch) if batch < self._length() else (self._epoch + 1, 0)
        return {"epoch": epoch, "batch": batch, **self._order(), **self._contents()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next pass at a position of `state_dict`; a warning says where its epoch cannot go on exactly.

        Raises:
            ValueError: If the position counts batches of another order.
        """
        for name, now in self._order().items():
            if state.get(name, now) != now:
                raise ValueError(
                    f"the checkpoint was written with {name} {state[name]}, this run has {now}: its place in the epoch "
                    "means other pictures. Resume with the settings of its run"
                )
        for name, now in self._contents().items():
            if state["batch"] and state.get(name, now) != now:
                logger.warning(
                    "the checkpoint was written inside an epoch with %s %d, this run has %d: in the rest of this epoch "
                    "some samples are seen twice and others not at all",
                    *(name, state[name], now),
                )
        self._epoch, self._batch = state["epoch"], state["batch"]
        self._origin = None
