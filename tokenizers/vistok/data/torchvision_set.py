"""The data sets that come with torchvision, by name."""

from pathlib import Path
from typing import Any

from PIL import UnidentifiedImageError

from vistok.data.decode import BadImageError
from vistok.data.pictures import Picture, PictureSource

# Class in torchvision.datasets, and its splits: the one to train on first, the one to evaluate on second.
SETS: dict[str, tuple[str, tuple[str, ...]]] = {
    "caltech101": ("Caltech101", ("all",)),
    "celeba": ("CelebA", ("train", "valid", "test", "all")),
    "cifar10": ("CIFAR10", ("train", "test")),
    "cifar100": ("CIFAR100", ("train", "test")),
    "dtd": ("DTD", ("train", "test", "val")),
    "eurosat": ("EuroSAT", ("all",)),
    "fashion_mnist": ("FashionMNIST", ("train", "test")),
    "flowers102": ("Flowers102", ("train", "test", "val")),
    "food101": ("Food101", ("train", "test")),
    "imagenet": ("ImageNet", ("train", "val")),
    "mnist": ("MNIST", ("train", "test")),
    "oxford_iiit_pet": ("OxfordIIITPet", ("trainval", "test")),
    "stl10": ("STL10", ("train", "test", "unlabeled", "train+unlabeled")),
    "svhn": ("SVHN", ("train", "test", "extra")),
}
SPLIT_BY_FLAG = ("cifar10", "cifar100", "fashion_mnist", "mnist")


def splits_of(name: str) -> tuple[str, ...]:
    """Names of a set's splits: the one to train on, the one to evaluate on, and others.

    Raises:
        ValueError: If there is no such set.
    """
    if name not in SETS:
        raise ValueError(f"no torchvision set {name!r}; there are {', '.join(SETS)}")
    return SETS[name][1]


class TorchvisionSet(PictureSource):
    """One split of a torchvision set.

    Args:
        name: A key of `SETS`.
        root: Folder where torchvision keeps its sets.
        split: One of `splits_of` the set.
        download: Whether to download a set that is not there.

    Raises:
        FileNotFoundError: If the set is not there and cannot be downloaded.
        ValueError: If there is no such set or split.
    """

    def __init__(self, name: str, root: Path, split: str, download: bool = True) -> None:
        splits = splits_of(name)
        if split not in splits:
            raise ValueError(f"{name} has no split {split!r}; there are {', '.join(splits)}")
        self.name = f"torchvision {name}, {split}"
        self._set = _open(name, root, split, download)
        self.classes = tuple(map(str, getattr(self._set, "classes", ())))
        self.fingerprint = f"{self.name}, {len(self._set)}"
        # Sets of files are read here, like any folder; torchvision would decode them.
        self._files = getattr(self._set, "samples", None)
        self._root = root

    def __len__(self) -> int:
        return len(self._set)

    def __getitem__(self, index: int) -> Picture:
        if self._files is not None:
            path, label = self._files[index]
            return Picture(Path(path).relative_to(self._root).as_posix(), Path(path), label)
        try:
            image, label = self._set[index]
        except (OSError, UnidentifiedImageError) as error:
            raise BadImageError("unreadable", f"{type(error).__name__}: {error}") from error
        # The unlabeled pictures of stl10 have the label -1.
        return Picture(str(index), image, int(label) if self.classes and int(label) >= 0 else None)


def _open(name: str, root: Path, split: str, download: bool) -> Any:
    from torchvision import datasets

    class_name, splits = SETS[name]
    make = getattr(datasets, class_name)
    if name in SPLIT_BY_FLAG:
        options: dict[str, Any] = {"train": split == "train"}
    else:
        options = {} if splits == ("all",) else {"split": split}
    try:
        return make(root, **options)
    except (RuntimeError, OSError) as error:
        if not download or name == "imagenet":
            how = "its archives must be put there by hand" if name == "imagenet" else "downloading is switched off"
            raise FileNotFoundError(f"{name} is not below {root.absolute()}, and {how}: {_line(error)}") from error
    try:
        root.mkdir(parents=True, exist_ok=True)
        return make(root, download=True, **options)
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(
            f"{name} is not below {root.absolute()} and cannot be downloaded ({_line(error)}): on a machine with a "
            f"network let torchvision.datasets.{class_name}(folder, download=True) do it, and copy the folder here"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
