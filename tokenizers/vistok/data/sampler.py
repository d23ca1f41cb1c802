"""The order in which pictures are seen, as a pure function of the seed and the epoch."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from vistok.data.transforms import mix


class Resumable:
    """An order of batches whose passes can begin anywhere; `TrainLoader` calls both methods before every pass."""

    depends_on_workers = False  # whether another number of loading processes makes other batches
    _epoch = 0
    _start = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self._epoch = epoch

    def start_at(self, batch: int) -> None:
        """Leave out the first `batch` batches of the next pass; nothing is decoded to do so."""
        self._start = batch


class EpochBatchSampler(Resumable, Sampler[list[tuple[int, int]]]):
    """Batches of ``(epoch, index)`` pairs.

    The epoch travels with the index, so a data set needs no state and a worker that lives on into the next epoch needs
    no message. Ranks take every `world_size`-th index of the one order: at equal global batch size the pictures of a
    step are the same for any number of processes.

    Args:
        num_samples: Size of the data set.
        batch_size: Samples per batch and process.
        seed: Seed of the order.
        shuffle: Whether an epoch is a random permutation, or 0, 1, 2 ...
        rank: Number of this process.
        world_size: Number of processes.
        drop_last: True (training) gives full batches only, the same number on every rank. False (evaluation) gives
            every sample exactly once, without padding by duplicates: ranks may then differ by one sample, and so by one
            batch.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last

    def __len__(self) -> int:
        """Number of batches in a whole epoch, whatever `start_at` says."""
        if self.drop_last:
            return self.num_samples // (self.batch_size * self.world_size)
        mine = len(range(self.rank, self.num_samples, self.world_size))
        return -(-mine // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # Runs when the first batch is asked for: a DataLoader with workers makes two iterators and uses the second.
        epoch, start, self._start = self._epoch, self._start, 0
        if self.shuffle:
            generator = torch.Generator().manual_seed(mix(self.seed, epoch, "order"))
            order = torch.randperm(self.num_samples, generator=generator)
        else:
            order = torch.arange(self.num_samples)
        mine = order[self.rank :: self.world_size]
        for batch in range(start, len(self)):
            indices = mine[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [(epoch, index) for index in indices.tolist()]
