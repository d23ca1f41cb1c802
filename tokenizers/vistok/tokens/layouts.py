"""Tokens in the file layouts that other programs read."""

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

from vistok.hub.files import atomic_folder
from vistok.tokens.dataset import TokenDataset
from vistok.tokens.manifest import MANIFEST_FILE, read_manifest


def write_llamagen(dataset: TokenDataset, folder: Path) -> None:
    """LlamaGen's class-conditional codes: ``<i>.npy`` int64 ``(1 views length)`` and the same for labels ``(1,)``.

    The folders are ``imagenet<size>_codes`` and ``imagenet<size>_labels``, as its reader expects them:
    https://github.com/FoundationVision/LlamaGen.
    """
    size = dataset.manifest.layout.size[-1]
    codes, labels = (folder / f"imagenet{size}_{kind}" for kind in ("codes", "labels"))
    for path in (codes, labels):
        path.mkdir()
    for number, (views, label) in enumerate(_pictures(dataset)):
        np.save(codes / f"{number}.npy", views.long()[None].numpy(), allow_pickle=False)
        np.save(labels / f"{number}.npy", np.array([label]), allow_pickle=False)


def write_rar(dataset: TokenDataset, folder: Path) -> None:
    """1d-tokenizer's (RAR, MaskGIT) lines ``{"class_id": ..., "tokens": [...]}``, one for each view of each picture.

    The file is ``tokens.jsonl``: https://github.com/bytedance/1d-tokenizer.
    """
    with (folder / "tokens.jsonl").open("w") as file:
        for views, label in _pictures(dataset):
            for tokens in views.tolist():
                file.write(json.dumps({"class_id": label, "tokens": tokens}) + "\n")


def write_halton(dataset: TokenDataset, folder: Path) -> None:
    """Halton-MaskGIT's pickled ``{"code": (h w), "y": class}``, ``Train/<i>.pth`` for each view of each picture.

    Its trainer also wants a folder ``Eval`` beside ``Train``, which is that of another export:
    https://github.com/valeoai/Halton-MaskGIT.

    Raises:
        ValueError: If the tokens are no grid with one codebook.
    """
    layout = dataset.manifest.layout
    if layout.depth != 1 or len(layout.grid) != 2:
        raise ValueError(
            f"the layout halton has one grid (h, w) of tokens per picture, these have {list(layout.indices_shape)}"
        )
    (folder / "Train").mkdir()
    number = 0
    for views, label in _pictures(dataset):
        for tokens in views:
            entry = {"code": tokens.view(*layout.grid).numpy(), "y": label}
            (folder / "Train" / f"{number:07d}.pth").write_bytes(pickle.dumps(entry))
            number += 1


LAYOUTS: dict[str, Callable[[TokenDataset, Path], None]] = {
    "llamagen": write_llamagen,
    "rar": write_rar,
    "halton": write_halton,
}


def write_layout(dataset: TokenDataset, name: str) -> Path:
    """Write a layout into a folder inside that of the tokens, unless it is there.

    Several processes may do so at once: one of them puts its folder there, the others leave it.

    Returns:
        The folder, called as the layout; several views of a picture are ``llamagen_flip``, since LlamaGen's reader
        takes one of them only where its path says ``flip``.

    Raises:
        ValueError: If there is no such layout, the pictures have no labels, which all of them need, or the folder holds
            other tokens.
    """
    check_layout(name)
    if not dataset.manifest.labels:
        raise ValueError(f"the layout {name} has a class for every picture, and these have none: write layouts=[]")
    target = dataset.folder / (f"{name}_flip" if name == "llamagen" and len(dataset.manifest.views) > 1 else name)
    if _is_written(dataset, target):
        return target
    try:
        with atomic_folder(target) as folder:
            LAYOUTS[name](dataset, folder)
            dataset.manifest.write(folder)
    except OSError:
        if not _is_written(dataset, target):
            raise
    return target


def _is_written(dataset: TokenDataset, target: Path) -> bool:
    """Whether a layout of these tokens is there, which it is as a whole or not at all."""
    if not target.exists():
        return False
    here = dataset.manifest
    if (target / MANIFEST_FILE).is_file():
        there = read_manifest(target)
        if (there.layout, there.shards) == (here.layout, here.shards):
            return True
    raise ValueError(f"{target} does not hold these tokens: delete it, or choose another out=")


def check_layout(name: str) -> None:
    """Raise a ValueError if there is no layout of this name."""
    if name not in LAYOUTS:
        raise ValueError(f"layouts are {', '.join(LAYOUTS)}; got {name!r}")


def _pictures(dataset: TokenDataset) -> Iterator[tuple[Tensor, int]]:
    """Tokens ``(views length)`` and class of each picture."""
    for number in range(len(dataset.manifest.shards)):
        tensors = dataset.shard(number)
        yield from zip(tensors["tokens"], tensors["labels"].tolist(), strict=True)
