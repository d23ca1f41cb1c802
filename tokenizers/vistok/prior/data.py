"""Exported tokens as a Lightning data module."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from vistok.data import EpochBatchSampler, TrainLoader
from vistok.data.loader import leave_signals_to_the_main_process
from vistok.tokens.dataset import Item, TokenDataset, Views
from vistok.tokens.manifest import Manifest


class TokenData(LightningDataModule):
    """Batches of ``tokens`` int64 ``(b, length)`` and, of pictures with classes, ``labels`` int64 ``(b,)``.

    Args:
        tokens: Folder of `vistok export-tokens`.
        val_tokens: Likewise, for validation; None: a share of the pictures of `tokens`.
        val_share: Share of the pictures held out, in (0, 1), without `val_tokens`.
        views: See `vistok.tokens.TokenDataset`; validation always has all of them.
        batch_size: Per process.
        num_workers: Loading processes; 0 loads in the main process, which is enough for most.
        seed: Of the order and of the random views.

    Raises:
        ValueError: If a number is out of range, or the two folders are of different tokenizers.
    """

    def __init__(
        self,
        tokens: str,
        val_tokens: str | None = None,
        val_share: float = 0.05,
        views: Views = "random",
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0 or not 0 < val_share < 1:
            raise ValueError(
                "data.batch_size must be positive, data.num_workers not negative and data.val_share in (0, 1); got "
                f"{batch_size}, {num_workers}, {val_share}"
            )
        self.all_train = TokenDataset(tokens, views, seed)
        self.all_val = TokenDataset(tokens if val_tokens is None else val_tokens)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        ours, theirs = self.manifest, self.all_val.manifest
        if (ours.layout, ours.tokenizer["sha256"]) != (theirs.layout, theirs.tokenizer["sha256"]):
            raise ValueError(f"{tokens} and {val_tokens} hold tokens of different tokenizers or sizes")
        if (ours.labels, max(ours.num_classes, theirs.num_classes)) != (theirs.labels, ours.num_classes):
            raise ValueError(
                f"{val_tokens} has classes that {tokens} has not: {theirs.num_classes}, {ours.num_classes}"
            )
        num_val = 0 if val_tokens is not None else max(1, round(val_share * ours.num_pictures))
        order = torch.randperm(ours.num_pictures, generator=torch.Generator().manual_seed(0))
        train = order[num_val:].sort().values
        if len(train) < batch_size:
            raise ValueError(
                f"{len(train)} pictures to train on do not fill one batch: set data.batch_size to at most {len(train)}"
            )
        val = order[:num_val].sort().values if num_val else torch.arange(theirs.num_pictures)
        self._numbers = _items(train, self.all_train), _items(val, self.all_val)

    @property
    def manifest(self) -> Manifest:
        """Of the tokens that are trained on."""
        return self.all_train.manifest

    @cached_property
    def train_dataset(self) -> "Chosen":
        """Items of training pictures."""
        return Chosen(self.all_train, self._numbers[0].tolist())

    @cached_property
    def val_dataset(self) -> "Chosen":
        """Items of validation pictures."""
        return Chosen(self.all_val, self._numbers[1].tolist())

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What the data of tokenizers has; tokens are for generators."""
        raise ValueError("data=tokens is for the training of a generator: choose one, such as prior=gpt")

    def train_dataloader(self) -> TrainLoader:
        """Endless epochs of full batches; resumes exactly from a Trainer's checkpoint."""
        sampler = EpochBatchSampler(len(self.train_dataset), self.batch_size, self.seed, True, *self._rank())
        return TrainLoader(self.train_dataset, self.trainer, batch_sampler=sampler, **self._options())

    def val_dataloader(self) -> DataLoader:
        """Every validation item once."""
        sampler = EpochBatchSampler(len(self.val_dataset), self.batch_size, 0, False, *self._rank(), drop_last=False)
        return DataLoader(self.val_dataset, batch_sampler=sampler, generator=torch.Generator(), **self._options())

    def _rank(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _options(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "pin_memory": torch.cuda.is_available(),
            "worker_init_fn": leave_signals_to_the_main_process,
        }


class Chosen(Dataset):
    """Some items of a data set, asked for by ``(epoch, number)``.

    Args:
        dataset: The whole.
        numbers: Of the chosen items.
    """

    def __init__(self, dataset: TokenDataset, numbers: Sequence[int]) -> None:
        self.dataset = dataset
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, item: tuple[int, int]) -> Item:
        epoch, number = item
        return self.dataset[epoch, self.numbers[number]]


def _items(pictures: torch.Tensor, dataset: TokenDataset) -> torch.Tensor:
    """Numbers of the items of pictures."""
    if dataset.views == "random":
        return pictures
    return (pictures[:, None] * dataset.num_views + torch.arange(dataset.num_views)).flatten()
