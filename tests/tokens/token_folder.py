"""Folders of tokens that say which picture and view they are."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from vistok.tokens import Layout
from vistok.tokens.dataset import encode_keys
from vistok.tokens.manifest import Manifest


def write_tokens(folder: Path, counts=(3, 2), views=2, labels=True) -> Path:
    """Grids ``(2, 2)`` whose four tokens are ten times the number of the picture plus that of the view."""
    shards, first = [], 0
    for number, count in enumerate(counts):
        pictures = torch.arange(first, first + count)
        tokens = (pictures[:, None, None] * 10 + torch.arange(views)[:, None] + torch.zeros(4)).to(torch.uint8)
        tensors = {"tokens": tokens, "keys": encode_keys([f"picture {picture}" for picture in pictures.tolist()])}
        save_file(tensors | ({"labels": pictures % 3} if labels else {}), folder / f"tokens-{number}.safetensors")
        shards.append({"file": f"tokens-{number}.safetensors", "num_pictures": count, "sha256": ""})
        first += count
    layout = Layout([8, 8], [2, 2], [64])
    names = [f"view{view}" for view in range(views)]
    tokenizer = {"bundle": None, "sha256": "", "config": {}}
    Manifest(layout, "uint8", names, first, 0, labels, 3 if labels else 0, shards, tokenizer, {}, {}).write(folder)
    return folder
