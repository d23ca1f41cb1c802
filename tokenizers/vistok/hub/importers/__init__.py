"""Importers of published checkpoints: one module per program, found by what it calls `FAMILIES`."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from vistok.hub.checkpoint import flatten, read_checkpoint
from vistok.hub.files import sha256
from vistok.hub.importers import (
    bsqvit,
    cosmos,
    dalle,
    diffusers,
    emu3,
    fqgan,
    gsq,
    infinity,
    llamagen,
    magvit2,
    maskgit,
    movq,
    openmuse,
    optvq,
    rqvae,
    taming,
    titok,
    var,
    vitvqgan,
    vqgan_lc,
    vqvae,
)
from vistok.hub.importers.base import Checkpoint, Family, Published
from vistok.tokenizer import Tokenizer

FAMILIES = {
    family.name: family
    for family in (
        llamagen.FAMILY,
        taming.FAMILY,
        taming.IBQ,
        taming.CHAMELEON,
        taming.KL,
        diffusers.FAMILY,
        magvit2.FAMILY,
        magvit2.SIMVQ,
        maskgit.FAMILY,
        maskgit.MASKBIT_FAMILY,
        openmuse.FAMILY,
        titok.FAMILY,
        titok.TEXT_FAMILY,
        rqvae.FAMILY,
        cosmos.FAMILY,
        bsqvit.FAMILY,
        movq.FAMILY,
        optvq.FAMILY,
        vqgan_lc.FAMILY,
        infinity.FAMILY,
        var.FAMILY,
        fqgan.FAMILY,
        gsq.FAMILY,
        vitvqgan.FAMILY,
        dalle.FAMILY,
        emu3.FAMILY,
        vqvae.FAMILY,
    )
}
WEIGHTS = ("raw", "ema")
# Under which names programs save a state dict, the trained weights and their moving averages.
WRAPPERS = {
    "raw": ("state_dict", "model", "vae", "model_state_dict"),
    "ema": ("ema", "state_dict_ema", "ema_state_dict"),
}
# What names begin with where a tokenizer is part of something larger, or was wrapped for training.
PREFIXES = (
    *("module.", "_orig_mod.", "model.", "gen_vision_model.", "vqmodel.", "first_stage_model."),
    *("vq_model.", "trainer.", "vae_local."),
)
MODEL_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".jit")
# In the names of the pieces into which transformers and diffusers split a state dict.
SHARD = re.compile(r"-\d{5}-of-(\d{5})(?=\.)")
# Parts of which MoVQGAN keeps moving averages one by one.
AVERAGED_PARTS = ("encoder", "decoder", "quantize", "quant_conv", "post_quant_conv")
# Files that belong together where a folder holds both; in the second ones names do not begin with those of the parts.
JIT_PARTS = ("encoder.jit", "decoder.jit")
PICKLED_PARTS = ("encoder.pkl", "decoder.pkl")


class PretrainedTokenizer(NamedTuple):
    """A published checkpoint that `vistok.load` knows.

    Attributes:
        name: What `vistok.load` is given.
        title: Method and repository.
        source: Repository on the Hugging Face hub, or a URL.
        file: File in it; None: the name is not known.
        parameters: In millions, as far as known.
        licence: Of the weights, as far as their authors state it.
    """

    name: str
    title: str
    source: str
    file: str | None
    parameters: float | None
    licence: str


def list_pretrained() -> list[PretrainedTokenizer]:
    """All published checkpoints whose names `vistok.load` knows."""
    return [
        PretrainedTokenizer(
            f"{family.name}:{each.name}", family.title, each.source, each.file, each.parameters, each.licence
        )
        for family in FAMILIES.values()
        for each in family.published
    ]


def import_pretrained(
    name: str,
    path: str | Path | None = None,
    *,
    weights: str | None = None,
    hub: Mapping[str, Any] = {},
    **options: Any,
) -> Tokenizer:
    """Build the tokenizer of a published checkpoint.

    Args:
        name: ``family:name``, or a family alone for a checkpoint of one's own.
        path: File or folder; None downloads it, where the authors put it on the hub.
        weights: ``raw`` or ``ema``, where the file has both; default: those that the authors' generators use.
        hub: Arguments of the download, of those that are not None.
        **options: What tensors do not tell, such as ``size`` of the training images; the error for one without effect
            lists those of the family.

    Raises:
        ValueError: If there is no such family or name, or the file is not of it.
        FileNotFoundError: If there is no file.
    """
    family_name, _, rest = name.partition(":")
    if family_name not in FAMILIES:
        raise ValueError(f"no family {family_name!r}: choose one of {', '.join(FAMILIES)}")
    family = FAMILIES[family_name]
    published = {each.name: each for each in family.published}
    if rest and rest not in published:
        raise ValueError(f"{family_name} has no checkpoint {rest!r}: choose one of {', '.join(published)}")
    if path is None:
        path = _download(family, published.get(rest), hub)
    known = dict(published[rest].options) if rest else {}
    authors_choice = known.pop("weights", "raw")
    tensors, config = read_source(Path(path), weights or authors_choice, required=weights is not None)
    return _convert(family, tensors, config, {**known, **options}, Path(path))


def import_checkpoint(
    path: str | Path, family: str | None = None, *, weights: str | None = None, **options: Any
) -> Tokenizer:
    """Build the tokenizer of a checkpoint whose family is recognised by the names of its tensors.

    Arguments and errors as for `import_pretrained`; a ValueError also says if no family or several fit.
    """
    if family is not None:
        return import_pretrained(family, path, weights=weights, **options)
    tensors, _ = read_source(Path(path), weights or "raw", choose=False)
    tensors = _tokenizer_part(tensors)
    fitting = [each for each in FAMILIES.values() if each.recognises(tensors)]
    # A quantizer in addition to a trunk says more than the trunk.
    most = max((len(each.marks) for each in fitting), default=0)
    found = [each for each in fitting if len(each.marks) == most]
    if len(found) != 1:
        names = ", ".join(each.name for each in found or FAMILIES.values())
        fits = "may be of any of the families" if found else "is of none of the families"
        raise ValueError(f"{path} {fits} {names}: name the one it is of")
    return import_pretrained(found[0].name, path, weights=weights, **options)


def origin_of(path: str | Path, name: str | None) -> dict[str, Any]:
    """What a model card says about where imported weights come from."""
    path = Path(path).expanduser()
    facts: dict[str, Any] = {"file": path.name}
    if path.is_file():
        facts["sha256"] = sha256(path)
    family, _, rest = (name or "").partition(":")
    if family in FAMILIES:
        facts["program"] = FAMILIES[family].title
        for each in FAMILIES[family].published:
            if each.name == rest:
                facts |= {"source": each.source, "licence": each.licence}
    return facts


def _convert(
    family: Family, tensors: Mapping[str, Tensor], config: Mapping[str, Any], options: Mapping[str, Any], path: Path
) -> Tokenizer:
    checkpoint = Checkpoint(tensors, config, options)
    try:
        tokenizer = family.convert(checkpoint)
        checkpoint.finish()
    except ValueError as error:
        raise ValueError(f"{path} cannot be imported as {family.name}: {error}") from error
    return tokenizer


def read_source(
    path: Path, weights: str, *, choose: bool = True, required: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and original configuration of a checkpoint file, or of a folder that holds one beside ``config.json``.

    Args:
        path: File or folder.
        weights: ``raw`` or ``ema``.
        choose: Whether the moving averages that stand among the trained weights are put in their place, or left out.
        required: Whether there must be moving averages for ``ema``; else the trained weights do where there are none.

    Raises:
        FileNotFoundError: If there is nothing at `path`, or no model in the folder.
        ValueError: If a file cannot be read, or has no moving averages although they are asked for.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be raw or ema, got {weights!r}")
    path = path.expanduser()
    files = _model_files(path) if path.is_dir() else [path]
    config = _config(files[0].parent / "config.json")
    tensors: dict[str, Tensor] = {}
    averaged = False
    for file in files:
        content = read_checkpoint(file)
        # flex_gen keeps its configuration so; only its importer looks into it.
        if isinstance(content, Mapping) and isinstance(content.get("config"), bytes):
            config = config or {"pickled": content["config"]}
        content, from_wrapper = _unwrapped(content, weights)
        averaged |= from_wrapper
        part = f"{file.stem}." if file.name in PICKLED_PARTS else ""
        tensors |= {part + name: tensor for name, tensor in flatten(content).items()}
    if not tensors:
        raise ValueError(f"{path} holds no tensors")
    if choose:
        tensors = _tokenizer_part(tensors)
        starts = ("model_ema.", *(f"ema_{part}." for part in AVERAGED_PARTS))
        inline = {name: tensor for name, tensor in tensors.items() if name.startswith(starts)}
        if weights == "ema" and required and not (averaged or inline):
            raise ValueError(f"{path} has no moving averages: use weights=raw")
        tensors = {name: tensor for name, tensor in tensors.items() if name not in inline}
        if weights == "ema" and inline:
            tensors = {name: _average_of(name, inline, each) for name, each in tensors.items()}
    return tensors, config


def _average_of(name: str, averages: Mapping[str, Tensor], raw: Tensor) -> Tensor:
    """The moving average of a tensor, whose name has lost its dots; `raw` where there is none."""
    part, _, rest = name.partition(".")
    for kept, lost in (("model_ema", name), (f"ema_{part}", rest)):
        raw = averages.get(f"{kept}.{lost.replace('.', '')}", raw)
    return raw


def _unwrapped(content: Any, weights: str) -> tuple[Any, bool]:
    """The state dict within what a program saved, and whether it is one of moving averages."""
    if isinstance(content, Mapping):
        order = ("ema", "raw") if weights == "ema" else ("raw",)
        for kind in order:
            for name in WRAPPERS[kind]:
                if isinstance(content.get(name), Mapping) and flatten(content[name]):
                    return content[name], kind == "ema"
    return content, False


def _tokenizer_part(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the tokenizer within a larger model, without what their names begin with.

    The other parts of such a model (a language model, a prior) are left out.
    """
    while True:
        heads = [prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in tensors)]
        if not heads or any(name.startswith(("encoder.", "enc.", "decoder.")) for name in tensors):
            return tensors
        # A prefix that leads to an encoder or decoder, whatever else there is.
        inner = {name.removeprefix(heads[0]): each for name, each in tensors.items() if name.startswith(heads[0])}
        others = {name: each for name, each in tensors.items() if not name.startswith(heads[0])}
        tensors = inner if _leads_to_tokenizer(inner) or not others else others


def _leads_to_tokenizer(names: Mapping[str, Any]) -> bool:
    return any(f".{name}".find(".encoder.") >= 0 or f".{name}".find(".decoder.") >= 0 for name in names)


def _model_files(folder: Path) -> list[Path]:
    for names in (JIT_PARTS, PICKLED_PARTS):
        if all((folder / name).is_file() for name in names):
            return [folder / name for name in names]
    for suffix in MODEL_FILES:
        models = _models(sorted(folder.glob(f"*{suffix}")))
        if len(models) > 1:
            names = [file.name for files in models for file in files]
            raise ValueError(f"{folder} has several {suffix} files, {names}: pass one of them")
        if models:
            return models[0]
    inner = sorted({file.parent.name for suffix in MODEL_FILES for file in folder.glob(f"*/*{suffix}")})
    hint = f"; pass one of its folders {', '.join(inner)}" if inner else ""
    raise FileNotFoundError(f"{folder} has no file that ends in {', '.join(MODEL_FILES)}{hint}")


def _models(files: Sequence[Path]) -> list[list[Path]]:
    """Files by the models that they hold; variants such as ``model.fp16.safetensors`` are left out beside a full one.

    Raises:
        ValueError: If a piece of a model is missing.
    """
    models: dict[str, list[Path]] = {}
    for file in files:
        models.setdefault(SHARD.sub("", file.name), []).append(file)
    for name, pieces in list(models.items()):
        full = [file for file in pieces if file.name == name]
        if re.sub(r"\.[^.]+(?=\.[^.]+$)", "", name) in models.keys() - {name}:
            del models[name]
        elif full:
            models[name] = full
        elif len(pieces) != int(SHARD.findall(pieces[0].name)[0]):
            raise ValueError(f"{pieces[0].parent} has {len(pieces)} files like {pieces[0].name}: others are missing")
    return list(models.values())


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    return config if isinstance(config, dict) else {}


def _download(family: Family, published: Published | None, hub: Mapping[str, Any]) -> Path:
    if published is None:
        raise ValueError(f"name a file or folder with path=, or one of {family.name}'s published checkpoints")
    if "://" in published.source or published.file is None:
        raise FileNotFoundError(
            f"{family.name}:{published.name} cannot be fetched by name: download {published.file or 'its file'} from "
            f"{published.source}, and pass path="
        )
    from huggingface_hub import hf_hub_download

    given = {key: value for key, value in hub.items() if value is not None}
    try:
        return Path(hf_hub_download(published.source, published.file, **given))
    except Exception as error:
        raise FileNotFoundError(
            f"{published.file} of {published.source} could not be fetched ({type(error).__name__}): download it, and "
            "pass path="
        ) from error


__all__: Sequence[str] = [
    "FAMILIES",
    "Family",
    "PretrainedTokenizer",
    "Published",
    "import_checkpoint",
    "import_pretrained",
    "list_pretrained",
]
