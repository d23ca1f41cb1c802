"""A generator on disk: a folder with ``config.json`` and ``model.safetensors``, as a tokenizer's bundle."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vistok.config import config_of
from vistok.hub.bundle import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Unfilled,
    find_bundle,
    load_tensors,
    read_shapes,
    refuse_other_shapes,
)
from vistok.hub.files import atomic_folder
from vistok.prior.gpt import GPT

TARGET = "vistok.prior.GPT"
FORMAT = 1


def save_prior(prior: GPT, folder: str | Path, tokens: Mapping[str, Any], *, overwrite: bool = False) -> Path:
    """Write a generator as a folder that `load_prior` reads.

    Args:
        prior: The generator.
        folder: New or empty.
        tokens: What its tokens mean: ``size``, and ``tokenizer`` with ``bundle`` and ``sha256``.
        overwrite: Replace what is in `folder`.

    Raises:
        FileExistsError: If `folder` holds files and `overwrite` is false.
    """
    folder = Path(folder).expanduser()
    config = {**config_of(prior), "_target_": TARGET, "format": FORMAT, "tokens": dict(tokens)}
    tensors = {name: tensor.detach().float().contiguous() for name, tensor in prior.state_dict().items()}
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
    return folder


def load_prior(
    source: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[GPT, dict[str, Any]]:
    """Load a generator in evaluation mode, and what its tokens mean.

    Args:
        source: Its folder, a run folder that holds ``bundle/``, or the id of a Hugging Face repository.
        device: Where the weights go.
        dtype: Of the weights; rotary positions stay float32.

    Raises:
        FileNotFoundError: If there is none at `source`.
        ValueError: If a file is foreign or damaged.
    """
    folder = find_bundle(source)
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        target, version, tokens = (config.pop(key) for key in ("_target_", "format", "tokens"))
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is not the config of a generator, which train.py prior=gpt writes: {error!r}"
        ) from error
    if target != TARGET or version != FORMAT:
        raise ValueError(f"{path} describes {target!r} in format {version!r}; this reads {TARGET} in format {FORMAT}")
    shapes = read_shapes(folder / WEIGHTS_FILE)
    try:
        with Unfilled(shapes.values()):
            prior = GPT(**config)
    except Exception as error:  # any value may stand where a number is expected
        raise ValueError(f"{path} does not describe a GPT: {error}") from error
    refuse_other_shapes(prior, shapes, folder / WEIGHTS_FILE)
    load_tensors(prior, folder / WEIGHTS_FILE)
    for parameter in prior.parameters():
        parameter.data = parameter.data.to(dtype)
    return prior.to(device).eval(), tokens
