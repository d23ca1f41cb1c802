"""A tokenizer on disk: a folder with ``config.json``, ``model.safetensors`` and a model card.

Loading executes nothing that the folder brings along: the config may only name module classes of vistok, and
    safetensors files
hold nothing but tensors.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vistok.config import build, config_of
from vistok.hub.card import model_card
from vistok.hub.files import atomic_folder
from vistok.tokenizer import Tokenizer

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"
FORMAT = 1


def save(
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    measured: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a tokenizer as a bundle that `load` reads.

    Args:
        tokenizer: Built from parts of vistok (or classes derived from `vistok.config.Configurable`).
        folder: New or empty folder; written under a temporary name first, so a failure leaves nothing behind.
        measured: Evaluation to quote in the model card: ``{"metrics": {...}, "protocol": {...}, "command": "..."}``.
        overwrite: Replace what is in `folder`.

    Returns:
        The folder.

    Raises:
        FileExistsError: If `folder` holds files and `overwrite` is false.
    """
    from vistok import __version__

    folder = Path(folder).expanduser()
    config = {**config_of(tokenizer), "format": FORMAT, "vistok_version": __version__}
    # Half precision is widened, which loses nothing: a bundle has the dtypes that its config builds.
    tensors = {
        name: (tensor.float() if tensor.is_floating_point() else tensor).detach().contiguous()
        for name, tensor in tokenizer.state_dict().items()
    }
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        (temporary / CARD_FILE).write_text(model_card(tokenizer, folder.name, measured or {}))
    return folder


def load(
    source: str | Path,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
) -> Tokenizer:
    """Load a tokenizer in evaluation mode.

    Args:
        source: A bundle folder, a run folder that holds ``bundle/``, or the id of a Hugging Face model repository.
        revision: Branch, tag or commit of a hub repository.
        device: Where the weights go.

    Raises:
        FileNotFoundError: If there is no bundle at `source`.
        ValueError: If a file is foreign, truncated or does not fit the config.
    """
    folder = find_bundle(source, revision)
    config = read_config(folder / CONFIG_FILE)
    tokenizer = build({key: value for key, value in config.items() if key not in ("format", "vistok_version")})
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError(f"{folder / CONFIG_FILE} describes a {type(tokenizer).__name__}, not a Tokenizer")
    load_tensors(tokenizer, folder / WEIGHTS_FILE)
    # The format that training uses: convolutions then give the same numbers, bit for bit.
    return tokenizer.to(device=device).to(memory_format=torch.channels_last).eval()  # pyright: ignore


def find_bundle(source: str | Path, revision: str | None = None) -> Path:
    """Folder of the bundle at `source`, downloaded from the hub if `source` is a repository id."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        inner = folder / "bundle"
        if not (folder / CONFIG_FILE).exists() and inner.is_dir():
            folder = inner
        missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
        if missing:
            has = sorted(path.name for path in folder.iterdir())
            raise FileNotFoundError(f"{folder} has no {' and no '.join(missing)}; it has {has}")
        if revision is not None:
            raise ValueError(f"revision={revision!r} has no effect on the local folder {folder}")
        return folder
    if folder.exists():
        raise ValueError(
            f"{folder} is a file: pass the folder of a bundle, which holds {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    name = str(source)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"no folder {folder.absolute()}: pass a bundle, a run folder, or a hub id such as owner/name"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE, CARD_FILE]))
    except Exception as error:
        raise FileNotFoundError(
            f"no folder {folder.absolute()}, and the hub repository {name!r} could not be fetched "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no details'})"
        ) from error


def read_config(path: Path) -> dict[str, Any]:
    """Read a ``config.json``; ValueError if it is not one of a format this version reads."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): it may be truncated") from error
    if not isinstance(config, dict) or "_target_" not in config:
        raise ValueError(f"{path} is not the config of a vistok bundle: it has no _target_")
    if config.get("format") != FORMAT:
        raise ValueError(f"{path} has format {config.get('format')!r}, this version of vistok reads format {FORMAT}")
    return config


def load_tensors(module: torch.nn.Module, path: Path) -> None:
    """Copy the tensors of a safetensors file into a module, strictly.

    Raises:
        ValueError: If the file cannot be read, or names, shapes or dtypes differ from the module's, or a value is
            not finite.
    """
    expected = module.state_dict()
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            found = {name: file.get_tensor(name) for name in sorted(names & set(expected))}
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}): it may be truncated or of another format"
        ) from error
    missing, unexpected = sorted(set(expected) - names), sorted(names - set(expected))
    if missing or unexpected:
        raise ValueError(
            f"{path} does not fit its config: missing {missing[:5]}{'...' if len(missing) > 5 else ''}, "
            f"unexpected {unexpected[:5]}{'...' if len(unexpected) > 5 else ''}"
        )
    for name, tensor in found.items():
        target = expected[name]
        if tensor.shape != target.shape or tensor.dtype != target.dtype:
            raise ValueError(
                f"{path}: {name} is {tensor.dtype} {tuple(tensor.shape)}, "
                f"the config asks for {target.dtype} {tuple(target.shape)}"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} holds NaN or infinite values")
    module.load_state_dict(found)
