"""Tokens in the file layouts that other programs read."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vistok.hub.files import atomic_folder
from vistok.tokens.dataset import TokenDataset


def write_llamagen(dataset: TokenDataset, folder: Path) -> None:
    """LlamaGen's class-conditional codes: ``<i>.npy`` int64 ``(1 views length)`` and the same for labels ``(1,)``.

    The folders are ``imagenet<size>_codes`` and ``imagenet<size>_labels``, as its reader expects them:
    https://github.com/FoundationVision/LlamaGen.
    """
    size = dataset.manifest.layout.size[-1]
    codes, labels = (folder / f"imagenet{size}_{kind}" for kind in ("codes", "labels"))
    for path in (codes, labels):
        path.mkdir()
    number = 0
    for shard in range(len(dataset.manifest.shards)):
        tensors = dataset.shard(shard)
        for tokens, label in zip(tensors["tokens"].long(), _labels(dataset, shard), strict=True):
            np.save(codes / f"{number}.npy", tokens[None].numpy(), allow_pickle=False)
            np.save(labels / f"{number}.npy", np.array([label]), allow_pickle=False)
            number += 1


def write_rar(dataset: TokenDataset, folder: Path) -> None:
    """1d-tokenizer's (RAR, MaskGIT) lines ``{"class_id": ..., "tokens": [...]}``, one for each view of each picture.

    The file is ``tokens.jsonl``: https://github.com/bytedance/1d-tokenizer.
    """
    with (folder / "tokens.jsonl").open("w") as file:
        for shard in range(len(dataset.manifest.shards)):
            views = dataset.shard(shard)["tokens"].long().tolist()
            for picture, label in zip(views, _labels(dataset, shard), strict=True):
                for tokens in picture:
                    file.write(json.dumps({"class_id": label, "tokens": tokens}) + "\n")


LAYOUTS: dict[str, Callable[[TokenDataset, Path], None]] = {"llamagen": write_llamagen, "rar": write_rar}


def write_layout(dataset: TokenDataset, name: str) -> Path:
    """Write a layout into a folder of its name inside that of the tokens, replacing what is there.

    Raises:
        ValueError: If there is no such layout, or the pictures have no labels, which all of them need.
    """
    check_layout(name)
    if not dataset.manifest.labels:
        raise ValueError(f"the layout {name} has a class for every picture, and these have none: write layouts=[]")
    target = dataset.folder / name
    with atomic_folder(target, overwrite=True) as folder:
        LAYOUTS[name](dataset, folder)
    return target


def check_layout(name: str) -> None:
    """Raise a ValueError if there is no layout of this name."""
    if name not in LAYOUTS:
        raise ValueError(f"layouts are {', '.join(LAYOUTS)}; got {name!r}")


def _labels(dataset: TokenDataset, shard: int) -> list[int]:
    return dataset.shard(shard)["labels"].tolist()
