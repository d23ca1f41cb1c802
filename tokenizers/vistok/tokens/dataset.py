"""Exported tokens, read back for the training of a generator."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from vistok import distributed
from vistok.tokens.manifest import read_manifest

Item = dict[str, Tensor]
Views = Literal["all", "random"]


class TokenDataset(Dataset):
    """Tokens of pictures, by number; the files are mapped into memory, so any size opens at once.

    An item is a dict: ``tokens`` int64 ``(length,)``, the flat sequence of `vistok.Tokenizer.flatten` with raw ids, and
    ``labels``, an int64 scalar, where the pictures have classes. The default collation of a DataLoader makes batches.

    Items are asked for by their number, or by ``(epoch, number)`` as `vistok.data.EpochBatchSampler` does.

    Args:
        folder: As `vistok export-tokens` wrote it.
        views: ``all``: every view of every picture is an item, those of a picture one after the other; ``random``:
            every picture is an item, in a view that depends on the seed, the epoch and the picture.
        seed: Of the random views; without effect on ``all``.

    Attributes:
        manifest: What the folder holds.

    Raises:
        FileNotFoundError: If the folder has no manifest, or a file is missing.
        ValueError: If a file is damaged.
    """

    def __init__(self, folder: str | Path, views: Views = "all", seed: int = 0) -> None:
        if views not in ("all", "random"):
            raise ValueError(f"views must be all or random, got {views!r}")
        self.folder = Path(folder).expanduser()
        self.manifest = read_manifest(self.folder)
        self.views = views
        self.seed = seed
        counts = [shard["num_pictures"] for shard in self.manifest.shards]
        self._starts = torch.tensor([0, *accumulate(counts)])
        self._opened: dict[int, dict[str, Tensor]] = {}
        for shard in self.manifest.shards:
            if not (self.folder / shard["file"]).is_file():
                raise FileNotFoundError(f"{self.folder} lists {shard['file']}, which is missing: copy the whole folder")

    @property
    def num_views(self) -> int:
        """Views of each picture."""
        return len(self.manifest.views)

    def __len__(self) -> int:
        return self.manifest.num_pictures * (self.num_views if self.views == "all" else 1)

    def __getitem__(self, item: int | tuple[int, int]) -> Item:
        epoch, number = item if isinstance(item, tuple) else (0, item)
        if not 0 <= number < len(self):
            raise IndexError(f"item {number} of {len(self)}")
        if self.views == "all":
            picture, view = divmod(number, self.num_views)
        else:
            from vistok.data.transforms import mix

            picture, view = number, mix(self.seed, epoch, number, "view") % self.num_views
        shard = int(torch.searchsorted(self._starts, picture, right=True)) - 1
        row = picture - int(self._starts[shard])
        tensors = self.shard(shard)
        found = {"tokens": tensors["tokens"][row, view].long()}
        if self.manifest.labels:
            found["labels"] = tensors["labels"][row]
        return found

    def shard(self, number: int) -> dict[str, Tensor]:
        """A file: ``tokens (n views length)``, mapped into memory, ``keys`` (see `keys_of`), ``labels (n,)``."""
        if number not in self._opened:
            self._opened[number] = read_shard(self.folder / self.manifest.shards[number]["file"])
        return self._opened[number]

    def keys(self, number: int) -> list[str]:
        """Names of the pictures of a file."""
        return keys_of(self.shard(number)["keys"])

    def __getstate__(self) -> dict[str, Any]:
        # Each loading process opens the files itself, instead of receiving their content.
        return self.__dict__ | {"_opened": {}}


class TokenStream(IterableDataset):
    """Tokens of pictures as a stream, file by file: what a disk or a network that is slow to seek can serve.

    Files come in random order, and the items of a file in random order, as functions of the seed and the epoch. Each of
    the processes and loading workers takes every n-th item of this one order, so no item comes twice.

    Args:
        folder: As for `TokenDataset`, whose items these are.
        views: Likewise.
        seed: Of the order and of the random views.
        rank: Number of this process.
        world_size: Number of processes. None: those of `torch.distributed`.
    """

    def __init__(
        self,
        folder: str | Path,
        views: Views = "all",
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self.dataset = TokenDataset(folder, views, seed)
        self.rank = distributed.rank() if rank is None else rank
        self.world_size = distributed.world_size() if world_size is None else world_size
        self._epoch = 0

    @property
    def manifest(self) -> Any:
        """What the folder holds."""
        return self.dataset.manifest

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Items of this process in an epoch."""
        return len(range(self.rank, len(self.dataset), self.world_size))

    def __iter__(self) -> Iterator[Item]:
        from vistok.data.transforms import mix

        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        consumer, consumers = self.rank + self.world_size * number, self.world_size * workers
        views = self.dataset.num_views if self.dataset.views == "all" else 1
        counts = [shard["num_pictures"] * views for shard in self.manifest.shards]
        starts = [0, *accumulate(counts)]
        permutation = partial(_permutation, mix(self.dataset.seed, self._epoch, "stream"))
        position = 0
        for shard in permutation(0, len(counts)):
            for item in permutation(1 + shard, counts[shard]):
                if position % consumers == consumer:
                    yield self.dataset[self._epoch, starts[shard] + item]
                position += 1


def _permutation(seed: int, number: int, count: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed((seed + number) % 2**63)).tolist()


def read_shard(path: Path) -> dict[str, Tensor]:
    """Tensors of a file of tokens, mapped into memory.

    Raises:
        ValueError: If it is damaged.
    """
    return _read(path, lambda file: {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


def read_metadata(path: Path) -> dict[str, Any]:
    """What a file of tokens says of its export: ``fingerprint``, and the ``bad`` pictures that it left out.

    Raises:
        ValueError: If it is damaged.
    """
    return _read(path, lambda file: json.loads((file.metadata() or {}).get("vistok", "{}")))


def _read(path: Path, function: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            return function(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable file of tokens ({error}): delete it and export again") from error


def keys_of(encoded: Tensor) -> list[str]:
    """Names of pictures from their bytes in a file of tokens."""
    text = bytes(encoded.tolist()).decode("utf-8", "surrogateescape")
    return text.split("\n") if text else []


def encode_keys(keys: list[str]) -> Tensor:
    """Inverse of `keys_of`; a line break in a name becomes a space."""
    text = "\n".join(key.replace("\n", " ") for key in keys)
    return torch.tensor(list(text.encode("utf-8", "surrogateescape")), dtype=torch.uint8)
