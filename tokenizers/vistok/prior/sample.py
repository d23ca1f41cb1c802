"""Images of a trained generator, from a config."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.utils import make_grid

from vistok.data import to_uint8
from vistok.evaluation.run import pick_device
from vistok.hub.bundle import WEIGHTS_FILE, find_bundle, load
from vistok.hub.files import atomic_write, sha256
from vistok.metric import FeatureDistances, Inception
from vistok.prior.bundle import load_prior
from vistok.prior.gpt import GPT
from vistok.prior.sampling import Sampling, generate
from vistok.tokenizer import Tokenizer

log = logging.getLogger(__name__)

MAX_PICTURES = 256
DTYPES = ("float32", "bfloat16")


def sample_from_config(config: Any) -> dict[str, Tensor]:
    """Draw images as ``configs/sample.yaml`` says; writes ``samples.safetensors`` and ``samples.png``.

    Returns:
        ``tokens`` int64 ``(n length)``, ``images`` uint8 ``(n c H W)``, and ``labels`` of a model with classes.

    Raises:
        ValueError: If the config asks for something impossible, or the tokenizer is not the generator's own.
        FileExistsError: If `out` holds samples already.
    """
    folder = Path(config.out).expanduser()
    if (folder / "samples.safetensors").exists():
        raise FileExistsError(f"{folder} holds samples already: choose another out=")
    device = pick_device(config.device)
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype must be {' or '.join(DTYPES)}, got {config.dtype!r}")
    prior, meaning = load_prior(config.generator, device, getattr(torch, config.dtype))
    tokenizer = load_tokenizer(config.bundle, meaning["tokenizer"], device)
    settings = OmegaConf.to_container(config.sampling, resolve=True)
    sampling = Sampling(**settings)  # type: ignore[arg-type]
    labels = choose_labels(config.classes, config.num_images, prior)
    generator = torch.Generator(device).manual_seed(config.seed)
    started = time.perf_counter()
    parts = []
    for start in range(0, config.num_images, config.batch_size):
        count = min(config.batch_size, config.num_images - start)
        given: Any = {"num_images": count} if labels is None else {"labels": labels[start : start + count].to(device)}
        tokens = generate(prior, sampling=sampling, compile=config.compile, generator=generator, **given)
        parts.append({"tokens": tokens.cpu(), "images": decode(tokenizer, tokens, meaning["size"]).cpu()})
        log.info("%d of %d images", start + count, config.num_images)
    seconds = time.perf_counter() - started
    samples = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if labels is not None:
        samples["labels"] = labels
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "samples.safetensors", lambda path: save_file(samples, path))
    grid = F.to_pil_image(make_grid(samples["images"][:MAX_PICTURES, :3], nrow=config.columns, pad_value=255))
    atomic_write(folder / "samples.png", lambda path: grid.save(path, format="PNG"))
    log.info(
        "%d images in %.1f s, %.0f tokens/s; %s",
        config.num_images,
        seconds,
        samples["tokens"].numel() / seconds,
        folder / "samples.png",
    )
    if config.fid:
        metric = FeatureDistances(Inception(config.weights), ["rfid"]).to(device)
        distance = fid(metric, samples["images"], pictures(config.data, meaning["size"], tokenizer.channels), device)
        note = metric.notes.get("rfid")
        log.info("FID to %d pictures: %.2f%s", metric.count, distance, f" ({note})" if note else "")
    return samples


def load_tokenizer(source: str | None, recorded: dict[str, Any], device: torch.device) -> Tokenizer:
    """The tokenizer whose tokens a generator knows.

    Args:
        source: Where it is; None: where it was when the tokens were exported.
        recorded: ``bundle`` and ``sha256`` of its weights.
        device: Where the weights go.

    Raises:
        ValueError: If it is another one.
    """
    bundle = find_bundle(source if source is not None else recorded["bundle"])
    if sha256(bundle / WEIGHTS_FILE) != recorded["sha256"]:
        raise ValueError(
            f"{bundle} is not the tokenizer of this generator, whose weights have the SHA-256 {recorded['sha256']}: "
            "set bundle= to that one"
        )
    return load(bundle, device=device)


def choose_labels(classes: Any, count: int, prior: GPT) -> Tensor | None:
    """Classes of `count` images: the given ones, or all, in turn; None for a model without classes.

    Raises:
        ValueError: If a class is given to a model without.
    """
    if not prior.num_classes:
        if classes is not None:
            raise ValueError("this generator has no classes: write classes=null")
        return None
    chosen = torch.tensor(list(range(prior.num_classes)) if classes is None else list(classes))
    return chosen.repeat(-(-count // len(chosen)))[:count]


@torch.inference_mode()
def decode(tokenizer: Tokenizer, tokens: Tensor, size: list[int]) -> Tensor:
    """Images uint8 ``(b c H W)`` of tokens."""
    return to_uint8(tokenizer.decode_indices(tokenizer.unflatten(tokens, size), size))


def pictures(data: Any, size: list[int], channels: int) -> Iterator[Tensor]:
    """Batches of evaluation pictures of a data config, in the size of the samples."""
    module = instantiate(data, image_size=size[-1], eval_size=size[-1], channels=channels, _convert_="all")
    for batch in module.eval_dataloader():
        yield batch["images"]


def fid(metric: FeatureDistances, samples: Tensor, real: Iterator[Tensor], device: torch.device) -> float:
    """Frechet inception distance of samples to equally many pictures.

    Args:
        metric: Of the distance ``rfid``, which does not look at pairs.
        samples: uint8 ``(n c H W)``.
        real: Batches of pictures in [-1, 1].
        device: Of the metric.

    Raises:
        ValueError: If there are fewer pictures than samples.
    """
    waiting = samples
    for batch in real:
        count = min(len(batch), len(waiting))
        metric.update(waiting[:count].float().to(device), to_uint8(batch[:count]).float().to(device))
        waiting = waiting[count:]
        if not len(waiting):
            return metric.compute()["rfid"]
    raise ValueError(
        f"FID compares the {len(samples)} samples with as many pictures, but the data has only {metric.count}: "
        f"write num_images={metric.count}"
    )
