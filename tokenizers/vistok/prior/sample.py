"""Images of a trained generator, from a config."""

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import ListConfig, OmegaConf
from safetensors.torch import save_file
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.utils import make_grid

from vistok.data import to_uint8
from vistok.evaluation.run import pick_device
from vistok.hub.bundle import WEIGHTS_FILE, find_bundle, load
from vistok.hub.files import atomic_write, sha256
from vistok.metric import Inception
from vistok.metric.extractor import Extractor
from vistok.prior.bundle import load_prior
from vistok.prior.fid import SAMPLES_FILE, fid, read_pictures, read_samples
from vistok.prior.gpt import GPT
from vistok.prior.sampling import Sampling, generate
from vistok.tokenizer import Tokenizer
from vistok.tokens.export import check_counts

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.json"
MAX_PICTURES = 256
DTYPES = ("float32", "bfloat16")


def sample_from_config(config: Any) -> dict[str, Tensor]:
    """Draw images as ``configs/sample.yaml`` says, or take those of ``samples``; measure their FID with ``fid``.

    Writes ``samples.safetensors`` and ``samples.png`` of drawn images, and ``metrics.json`` of the FID.

    Returns:
        Of drawn images: ``tokens`` int64 ``(n length)``, ``images`` uint8 ``(n c H W)``, and ``labels`` of a model with
        classes.

    Raises:
        ValueError: If the config asks for something impossible, or the tokenizer is not the generator's own.
        FileExistsError: If `out` holds results already.
        FileNotFoundError: If something is not where the config says.
    """
    if (config.generator is None) == (config.samples is None):
        raise ValueError("set either generator=runs/.../bundle, to draw images, or samples=FOLDER, to measure those")
    if config.samples is not None and not config.fid:
        raise ValueError("samples= are there already, they are only measured: set fid=true")
    if config.fid_reference is not None and not config.fid:
        raise ValueError("fid_reference has no effect without fid=true")
    check_counts(config, "num_images", "batch_size", "columns")
    if not isinstance(config.seed, int):
        raise ValueError(f"seed must be an integer, got {config.seed!r}")
    folder = Path(config.out).expanduser()
    for name in (METRICS_FILE,) if config.generator is None else (SAMPLES_FILE, METRICS_FILE):
        if (folder / name).exists():
            raise FileExistsError(
                f"{folder} holds {name} already: choose another out="
                + (f", or measure it with samples={folder}" if name == SAMPLES_FILE else "")
            )
    device = pick_device(config.device)
    # What is missing for the FID is better known before hours of drawing.
    inception = Inception(config.weights) if config.fid else None
    if config.fid_reference is not None and not Path(config.fid_reference).expanduser().is_file():
        raise FileNotFoundError(f"no file fid_reference={config.fid_reference}")
    samples = draw(config, folder, device) if config.samples is None else {}
    if inception is not None:
        measure(config, folder, inception, device)
    return samples


def draw(config: Any, folder: Path, device: torch.device) -> dict[str, Tensor]:
    """Draw images and write them into a folder; see `sample_from_config`."""
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype must be {' or '.join(DTYPES)}, got {config.dtype!r}")
    prior, meaning = load_prior(config.generator, device, getattr(torch, config.dtype))
    tokenizer = load_tokenizer(config.bundle, meaning["tokenizer"], device)
    settings = OmegaConf.to_container(config.sampling, resolve=True)
    sampling = Sampling(**settings)  # type: ignore[arg-type]
    labels = choose_labels(config.classes, config.num_images, prior)
    generator = torch.Generator(device).manual_seed(config.seed)
    started = time.perf_counter()
    samples: dict[str, Tensor] = {}
    for start in range(0, config.num_images, config.batch_size):
        count = min(config.batch_size, config.num_images - start)
        given: Any = {"num_images": count} if labels is None else {"labels": labels[start : start + count].to(device)}
        tokens = generate(prior, sampling=sampling, compile=config.compile, generator=generator, **given)
        for name, values in (("tokens", tokens), ("images", decode(tokenizer, tokens, meaning["size"]))):
            # Room for all at once: batches that are joined at the end would be there twice.
            samples.setdefault(name, torch.empty(config.num_images, *values.shape[1:], dtype=values.dtype))
            samples[name][start : start + count] = values
        log.info("%d of %d images", start + count, config.num_images)
    seconds = time.perf_counter() - started
    if labels is not None:
        samples["labels"] = labels
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / SAMPLES_FILE, lambda path: save_file(samples, path))
    grid = F.to_pil_image(make_grid(samples["images"][:MAX_PICTURES, :3], nrow=config.columns, pad_value=255))
    atomic_write(folder / "samples.png", lambda path: grid.save(path, format="PNG"))
    log.info(
        "%d images in %.1f s, %.0f tokens/s; %s",
        config.num_images,
        seconds,
        samples["tokens"].numel() / seconds,
        folder / "samples.png",
    )
    return samples


def measure(config: Any, folder: Path, inception: Extractor, device: torch.device) -> dict[str, Any]:
    """FID of the samples that are there, see `vistok.prior.fid.fid`; writes ``metrics.json``."""
    source = folder if config.samples is None else config.samples
    size = list(next(read_samples(source, 1)).shape[1:])
    if config.fid_reference is None:
        reference = read_pictures(config.data, size)
    else:
        reference = Path(config.fid_reference).expanduser()
    metrics = fid(read_samples(source, config.batch_size), reference, inception, device)
    metrics |= {"samples": str(source), "sample_shape": size}
    if config.fid_reference is None:
        metrics["data"] = OmegaConf.to_container(config.data, resolve=True)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / METRICS_FILE, lambda path: path.write_text(json.dumps(metrics, indent=2) + "\n"))
    log.info(
        "FID of %d samples to %s: %.2f%s; %s",
        metrics["num_samples"],
        config.fid_reference or f"{metrics['num_reference']} pictures",
        metrics["fid"],
        f" ({metrics['note']})" if metrics["note"] else "",
        folder / METRICS_FILE,
    )
    return metrics


def load_tokenizer(source: str | None, recorded: dict[str, Any], device: torch.device) -> Tokenizer:
    """The tokenizer whose tokens a generator knows.

    Args:
        source: Where it is; None: where it was when the tokens were exported.
        recorded: ``bundle`` and ``sha256`` of its weights.
        device: Where the weights go.

    Raises:
        ValueError: If it is another one.
    """
    source = source if source is not None else recorded["bundle"]
    if source is None:
        raise ValueError("nobody wrote down where the tokenizer of this generator was: set bundle=")
    bundle = find_bundle(source)
    if sha256(bundle / WEIGHTS_FILE) != recorded["sha256"]:
        raise ValueError(
            f"{bundle} is not the tokenizer of this generator, whose weights have the SHA-256 {recorded['sha256']}: "
            "set bundle= to that one"
        )
    return load(bundle, device=device)


def choose_labels(classes: Any, count: int, prior: GPT) -> Tensor | None:
    """Classes of `count` images: the given ones, or all, in turn; None for a model without classes.

    Raises:
        ValueError: If a class is given to a model without, or the classes are no list of its classes.
    """
    if not prior.num_classes:
        if classes is not None:
            raise ValueError("this generator has no classes: write classes=null")
        return None
    given = range(prior.num_classes) if classes is None else classes
    known = range(prior.num_classes + 1)
    if not isinstance(given, range | list | ListConfig) or not given or not set(given) <= set(known):
        raise ValueError(
            f"classes must be a list of numbers from 0 to {prior.num_classes - 1}, or {prior.num_classes} for no "
            f"class; got {classes}"
        )
    chosen = torch.tensor(list(given))
    return chosen.repeat(-(-count // len(chosen)))[:count]


@torch.inference_mode()
def decode(tokenizer: Tokenizer, tokens: Tensor, size: list[int]) -> Tensor:
    """Images uint8 ``(b c H W)`` of tokens."""
    return to_uint8(tokenizer.decode_indices(tokenizer.unflatten(tokens, size), size))
