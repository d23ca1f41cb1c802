"""A tokenizer on disk: a folder with ``config.json``, ``model.safetensors`` and a model card.

Loading executes nothing that the folder brings along: the config may only name module classes of vistok, and
safetensors files hold nothing but tensors.
"""

import difflib
import json
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

from vistok.config import build, config_of, refuse_foreign_targets
from vistok.hub.card import model_card
from vistok.hub.files import atomic_folder
from vistok.hub.importers import FAMILIES, import_pretrained
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
    origin: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a tokenizer as a bundle that `load` reads.

    Args:
        tokenizer: Built from parts of vistok, or from classes given to `vistok.register`.
        folder: New or empty folder; written under a temporary name first, so a failure leaves nothing behind.
        measured: Evaluation to quote in the model card: ``{"metrics": {...}, "protocol": {...}, "command": "..."}``.
        origin: Where the weights come from, to quote in the model card: ``{"licence": ..., "source": ...}``.
        overwrite: Replace what is in `folder`.

    Returns:
        The folder.

    Raises:
        FileExistsError: If `folder` holds files and `overwrite` is false.
        ValueError: If a part is of a class that no bundle can name, see `vistok.register`.
    """
    from vistok import __version__

    folder = Path(folder).expanduser()
    plain = config_of(tokenizer)
    refuse_foreign_targets(plain, "tokenizer")
    config = {**plain, "format": FORMAT, "vistok_version": __version__}
    # Half precision is widened, which loses nothing: a bundle has the dtypes that its config builds.
    tensors = {
        name: (tensor.float() if tensor.is_floating_point() else tensor).detach().contiguous()
        for name, tensor in tokenizer.state_dict().items()
    }
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        # The bundle of a run is best known by the name of the run.
        name = folder.absolute().parent.name if folder.name == "bundle" else folder.name
        (temporary / CARD_FILE).write_text(model_card(tokenizer, name, measured or {}, origin or {}))
    return folder


def load(
    source: str | Path,
    *,
    path: str | Path | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    weights: str | None = None,
    **options: Any,
) -> Tokenizer:
    """Load a tokenizer in evaluation mode.

    Args:
        source: A bundle folder, a run folder that holds ``bundle/``, the id of a Hugging Face model repository, or
            ``family:name`` of a checkpoint that `vistok.list_pretrained` lists.
        path: File or folder of the published checkpoint; None downloads it, if it is on the hub.
        revision: Branch, tag or commit of a hub repository.
        token: Access token of the hub; True uses the one that was saved by ``hf auth login``.
        cache_dir: Where downloads are kept; None: the cache of huggingface_hub.
        local_files_only: Use what was downloaded before, without asking the hub.
        device: Where the weights go.
        dtype: Floating-point type of encoder, decoder and projections; None: float32. A quantizer stays in float32.
        weights: ``raw`` or ``ema``, for published checkpoints that have both.
        **options: What the tensors of a published checkpoint do not tell.

    Raises:
        FileNotFoundError: If there is no bundle at `source`.
        ValueError: If a file is foreign, truncated or does not fit the config, or an argument has no effect.
    """
    family, colon, _ = str(source).partition(":")
    if path is not None and colon and family not in FAMILIES:
        similar = difflib.get_close_matches(family, FAMILIES)
        hint = f"; did you mean {similar[0]}?" if similar else ""
        raise ValueError(f"no family {family!r} of published checkpoints: choose one of {', '.join(FAMILIES)}{hint}")
    hub = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only or None}
    if family in FAMILIES and not Path(source).exists():
        if path is not None:
            if is_bundle(Path(path)):
                raise ValueError(f"{path} is a bundle of vistok: load it by vistok.load({str(path)!r})")
            refuse_vain(f"the local {path}", hub)
        tokenizer = import_pretrained(str(source), path, weights=weights, hub=hub, **options)
    else:
        refuse_vain(f"a bundle such as {source}", {"path": path, "weights": weights, **options})
        tokenizer = read_bundle(find_bundle(source, hub))
    for name, part in tokenizer.named_children():
        part.to(dtype=None if name == "quantizer" else dtype)
    # The format that training uses: convolutions then give the same numbers, bit for bit.
    return tokenizer.to(device=device).to(memory_format=torch.channels_last).eval()  # pyright: ignore


def refuse_vain(what: str, arguments: Mapping[str, Any]) -> None:
    """Raise a ValueError if an argument is given that `what` has no use for."""
    vain = [name for name, value in arguments.items() if value is not None]
    if vain:
        raise ValueError(f"{', '.join(vain)} has no effect on {what}: leave it out")


class Unfilled(TorchFunctionMode):
    """Builds modules without drawing their random weights, which takes long and is for nothing before loading.

    A config may ask for much more than the file beside it holds, so building stops where it gets out of proportion.

    Args:
        shapes: Of the tensors of the file.

    Raises:
        ValueError: From building, if the modules have far more or far larger tensors than the file.
    """

    RANDOM = ("kaiming_normal_", "kaiming_uniform_", "normal_", "trunc_normal_", "uniform_", "xavier_uniform_")
    NEW = ("empty", "full", "ones", "rand", "randn", "zeros")

    def __init__(self, shapes: Iterable[Sequence[int]]) -> None:
        super().__init__()
        numbers = [math.prod(shape) for shape in shapes]
        self.operations = 1000 * (100 + len(numbers))
        self.numbers = 2**24 + 8 * sum(numbers)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", None)
        if name in self.RANDOM:
            tensor = args[0] if args else kwargs["tensor"]
            # Initialisers that draw until the numbers are within bounds have to find them there.
            return tensor if getattr(func, "__module__", None) == "torch.nn.init" else tensor.zero_()
        if name == "_set_grad_enabled":  # an error on the way out of no_grad would leave gradients off for good
            return func(*args, **(kwargs or {}))
        self.operations -= 1
        if name in self.NEW:
            shape = args[0] if args and isinstance(args[0], Sequence) else args
            self.numbers -= math.prod(side for side in shape if isinstance(side, int))
        if self.operations < 0 or self.numbers < 0:
            raise ValueError(f"it asks for far more than {WEIGHTS_FILE} holds")
        return func(*args, **(kwargs or {}))


def read_bundle(folder: Path) -> Tokenizer:
    """The tokenizer of a bundle folder; ValueError if its files are damaged or contradict each other."""
    config = read_config(folder / CONFIG_FILE)
    config = {key: value for key, value in config.items() if key not in ("format", "vistok_version")}
    shapes = read_shapes(folder / WEIGHTS_FILE)
    refuse_foreign_targets(config)
    try:
        with Unfilled(shapes.values()):
            tokenizer = build(config)
    # Any value may stand where a class expects another type.
    except Exception as error:
        raise ValueError(f"{folder / CONFIG_FILE} describes no tokenizer: {error}") from error
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError(f"{folder / CONFIG_FILE} describes a {type(tokenizer).__name__}, not a Tokenizer")
    refuse_other_shapes(tokenizer, shapes, folder / WEIGHTS_FILE)
    load_tensors(tokenizer, folder / WEIGHTS_FILE)
    return tokenizer


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a safetensors file; ValueError if it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}): it may be truncated or of another format"
        ) from error


def refuse_other_shapes(module: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Raise a ValueError if the names or shapes of a file are not those of a module."""
    expected = module.state_dict()
    missing, unexpected = sorted(set(expected) - set(shapes)), sorted(set(shapes) - set(expected))
    if missing or unexpected:
        raise ValueError(
            f"{path} does not fit its config: missing {missing[:5]}{'...' if len(missing) > 5 else ''}, "
            f"unexpected {unexpected[:5]}{'...' if len(unexpected) > 5 else ''}"
        )
    for name, shape in shapes.items():
        if shape != tuple(expected[name].shape):
            raise ValueError(f"{path}: {name} is {shape}, the config asks for {tuple(expected[name].shape)}")


def find_bundle(source: str | Path, hub: Mapping[str, Any] = {}) -> Path:
    """Folder of the bundle at `source`, downloaded if it is a repository id; `hub` are arguments of the download."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        inner = folder / "bundle"
        if not (folder / CONFIG_FILE).exists() and inner.is_dir():
            folder = inner
        missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
        if missing:
            has = sorted(path.name for path in folder.iterdir())
            raise FileNotFoundError(f"{folder} has no {' and no '.join(missing)}; it has {has}")
        refuse_vain(f"the local folder {folder}", hub)
        return folder
    if folder.exists():
        raise ValueError(
            f"{folder} is a file: pass the folder of a bundle, which holds {CONFIG_FILE} and {WEIGHTS_FILE}; "
            "a published checkpoint is loaded by vistok.load('family:name', path=...)"
        )
    name = str(source)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"no folder {folder.absolute()}: pass a bundle, a run folder, a hub id such as owner/name, or family:name "
            f"with a family of {', '.join(FAMILIES)}"
        )
    from huggingface_hub import snapshot_download

    given = {key: value for key, value in hub.items() if value is not None}
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE, CARD_FILE], **given))
    except Exception as error:
        raise FileNotFoundError(
            f"no folder {folder.absolute()}, and the hub repository {name!r} could not be fetched "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no details'})"
        ) from error


def is_bundle(folder: Path) -> bool:
    """Whether a folder holds what `save` writes; other programs have a ``config.json`` too."""
    try:
        read_config(folder / CONFIG_FILE)
    except (OSError, ValueError):
        return False
    return True


def push_to_hub(
    tokenizer: Tokenizer,
    repository: str,
    *,
    measured: Mapping[str, Any] | None = None,
    origin: Mapping[str, Any] | None = None,
    private: bool = False,
    token: str | bool | None = None,
    message: str = "Upload tokenizer",
) -> str:
    """Upload a tokenizer as a bundle with its model card; `vistok.load` with the repository's id reads it.

    Args:
        tokenizer: As for `save`.
        repository: ``owner/name``; made if it does not exist.
        measured: As for `save`.
        origin: As for `save`.
        private: Whether a new repository is private.
        token: Access token of the hub; None uses the one that was saved by ``hf auth login``.
        message: Of the commit.

    Returns:
        URL of the commit.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as temporary:
        folder = save(tokenizer, Path(temporary) / repository.rpartition("/")[2], measured=measured, origin=origin)
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message).commit_url)


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
    """Copy the tensors of a safetensors file, whose names and shapes are known to fit, into a module.

    Raises:
        ValueError: If a dtype differs from the module's, or a value is not finite.
    """
    expected = module.state_dict()
    with safe_open(path, framework="pt") as file:
        for name, target in expected.items():
            tensor = file.get_tensor(name)
            if tensor.dtype != target.dtype:
                raise ValueError(f"{path}: {name} is {tensor.dtype}, the config asks for {target.dtype}")
            # One pass without a copy; NaN is both the least and the greatest.
            if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
                raise ValueError(f"{path}: {name} holds NaN or infinite values")
            expected[name] = tensor
        module.load_state_dict(expected)
