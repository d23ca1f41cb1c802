"""What can be evaluated: tokenizers of vistok, autoencoders of diffusers, and any function from images to images."""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from vistok.config import import_from_here
from vistok.hub import load
from vistok.hub.importers import FAMILIES
from vistok.tokenizer import Tokenizer

Model = Tokenizer | Callable[[Tensor], Tensor]
KINDS = ("load", "diffusers", "function")
FORMS = (
    "a bundle, run folder, hub id or family:name; package.module:function; "
    "{load: family:name, path: FILE}; {diffusers: AutoencoderKL, path: FOLDER}; {function: package.module:function}; "
    "each of {...} with name: NAME if need be"
)


class NamedModel(NamedTuple):
    """A model and what tables and folders call it."""

    name: str
    model: Model


class DiffusersAutoencoder(nn.Module):
    """An autoencoder of diffusers as a function from images to images in [-1, 1].

    Args:
        kind: Name of the class, such as ``AutoencoderKL``, ``AutoencoderTiny`` or ``VQModel``.
        path: Local folder of ``config.json`` and safetensors; nothing is downloaded or unpickled.
        subfolder: The folder of the autoencoder in that of a pipeline, such as ``vae``.
        torch_dtype: What it computes in, ``float32`` or ``bfloat16``, for example.
        **options: Further arguments of its ``from_pretrained``: ``variant``, or entries of its config.

    Raises:
        ValueError: If diffusers is not installed or has no such class, an option has no effect, or the files lack
            weights of this class.
        OSError: If the folder does not hold such a model.
    """

    def __init__(
        self, kind: str, path: str | Path, subfolder: str = "", torch_dtype: str = "float32", **options: Any
    ) -> None:
        super().__init__()
        try:
            diffusers = importlib.import_module("diffusers")
        except ImportError as error:
            raise ValueError(f"{{diffusers: {kind}}} needs the library: pip install diffusers") from error
        cls: Any = getattr(diffusers, kind, None)
        if not hasattr(cls, "from_pretrained"):
            raise ValueError(f"diffusers has no model {kind!r}: write the name of a class such as AutoencoderKL")
        folder = Path(path).expanduser() / subfolder
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder.absolute()} for {kind} of diffusers")
        if vain := sorted(set(options) - {"variant", *inspect.signature(cls.__init__).parameters}):
            raise ValueError(f"{', '.join(vain)} has no effect on {kind} of diffusers: leave it out")
        dtype = getattr(torch, str(torch_dtype), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"torch_dtype must be float32, float16 or bfloat16, got {torch_dtype!r}")
        options |= {"local_files_only": True, "use_safetensors": True, "low_cpu_mem_usage": False}
        try:
            self.network, info = cls.from_pretrained(folder, torch_dtype=dtype, output_loading_info=True, **options)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"{folder} holds no {kind} of diffusers ({str(error).splitlines()[0]})") from error
        # The library would leave them random.
        if lacking := sorted(info["missing_keys"]):
            raise ValueError(f"{folder} holds no {kind} of diffusers: it lacks {len(lacking)} weights, as {lacking[0]}")

    def forward(self, images: Tensor) -> Tensor:
        """Reconstructions in float32; those of the mean of a posterior."""
        return self.network(images.to(dtype_of(self.network))).sample.float()


def open_models(entries: Sequence[Any]) -> list[NamedModel]:
    """Load every model, on the CPU.

    Args:
        entries: Each a string or a mapping, see `FORMS`.

    Raises:
        ValueError: If an entry has another form, two models have one name, or a model cannot be loaded.
        OSError: If a file is not there.
    """
    models = [_open(entry) for entry in entries]
    names = [model.name for model in models]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two models are called {', '.join(twice)}: name one of them, {{load: ..., name: NAME}}")
    return models


def name_of(bundle: Path) -> str:
    """A short name: that of the run folder for the bundle of a run."""
    return bundle.resolve().parent.name if bundle.name == "bundle" else bundle.resolve().name


def _open(entry: Any) -> NamedModel:
    if isinstance(entry, str):
        entry = {"function" if _is_import_path(entry) else "load": entry}
    kinds = [kind for kind in KINDS if isinstance(entry, Mapping) and entry.get(kind) is not None]
    if len(kinds) != 1:
        raise ValueError(f"a model is {FORMS}; got {entry!r}")
    options = dict(entry)
    source, name = str(options.pop(kinds[0])), options.pop("name", None)
    default, model = {"load": _load, "diffusers": _diffusers, "function": _function}[kinds[0]](source, options)
    name = str(name or default)
    if Path(name).name != name or name.startswith("."):
        raise ValueError(f"the name of a model is also that of its folder, so it has no slash; got {name!r}")
    return NamedModel(name, model)


def _is_import_path(text: str) -> bool:
    family, colon, _ = text.partition(":")
    return bool(colon) and family not in FAMILIES and not Path(text).exists()


def _load(source: str, options: dict[str, Any]) -> NamedModel:
    published = source.partition(":")[0] in FAMILIES and not Path(source).exists()
    name = source.replace(":", "-") if published else name_of(Path(source).expanduser())
    return NamedModel(name, load(source, **options))


def _diffusers(kind: str, options: dict[str, Any]) -> NamedModel:
    path = options.pop("path", None)
    if path is None:
        raise ValueError(f"{{diffusers: {kind}}} needs the path of its folder: {{diffusers: {kind}, path: FOLDER}}")
    return NamedModel(Path(path).resolve().name, DiffusersAutoencoder(kind, path, **options))


def _function(path: str, options: dict[str, Any]) -> NamedModel:
    """A function by its import path; modules in the working folder are found too."""
    if options:
        raise ValueError(f"{', '.join(options)} has no effect on the function {path}: leave it out")
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"write the function as package.module:function; got {path!r}")
    try:
        found: Any = import_from_here(module_name)
    except ImportError as error:
        raise ValueError(
            f"{path} is none of {', '.join(FAMILIES)}, and as package.module:function it cannot be imported ({error})"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{module_name} has no {attribute}: write package.module:function")
        found = getattr(found, part)
    if not callable(found) or isinstance(found, type):
        raise ValueError(f"{path} must be a function from images to images, or a module; got {found!r}")
    return NamedModel(attribute, cast(Model, found))


def device_of(model: Model) -> torch.device:
    """Where the parameters of a model are; the CPU for one without."""
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    return next((parameter.device for parameter in parameters), torch.device("cpu"))


def dtype_of(model: Model) -> torch.dtype:
    """Type of the parameters of a model; float32 for one without."""
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    return next((parameter.dtype for parameter in parameters), torch.float32)
