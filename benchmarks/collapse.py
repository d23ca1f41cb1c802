"""Codebook collapse: one small autoencoder, every quantizer, growing codebooks.

    python benchmarks/collapse.py                                     the whole grid: hours on two cores
    python benchmarks/collapse.py --methods vq simvq --sizes 1024     a part of it; results are added to the file
    python benchmarks/collapse.py --methods fvq --sizes 4096 --steps 1000 --change init=normal --output /tmp/fvq
                                                                      what a result depends on; one change at a time

Every run has the same seed, initial encoder and decoder, batches and schedule; only the quantizer differs, and of its
config only what `overrides` says. A result is kept in the JSON file and not computed again while its settings and the
quantizer's config stay the same, so the study can be interrupted at any time.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from omegaconf import OmegaConf
from rich.console import Console
from torch import Tensor

import vistok
from vistok.data.photos import Photos
from vistok.decoder import CNNDecoder
from vistok.encoder import CNNEncoder
from vistok.metric.codebook_usage import CodebookUsage
from vistok.metric.image import from_uint8, psnr
from vistok.training.module import clear_moments, mean_squared_correlation
from vistok.training.schedule import cosine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SIZES = (256, 1024, 4096, 16384, 65536)
TABLES = (
    *("vq", "vq_cosine", "vq_ema", "vq_rotation", "vq_lc", "simvq", "fvq", "ibq"),
    *("optvq", "cvq", "gumbel", "vq_kd", "dual_vq"),
)
METHODS = (*TABLES, "fsq", "lfq", "bsq")
# Channels of a code. The largest dot product is always one with a corner of the convex hull of the codes, and few codes
# are corners in few dimensions: of 4096 normal codes a normal feature chooses 18 % with 8 channels, 98 % with 64.
DIMS = {"ibq": 64, "gumbel": 64}
# Table 1 of https://arxiv.org/abs/2309.15505.
LEVELS = {256: [8, 6, 5], 1024: [8, 5, 5, 5], 4096: [7, 5, 5, 5, 5], 16384: [8, 8, 8, 6, 5], 65536: [8, 8, 8, 5, 5, 5]}
CURVE_SIZE = 16384
# Methods whose averages decide when a code is dead or where it is.
AVERAGING = ("vq_ema", "cvq", "vq_kd")
DECAY = 0.9
console = Console()


@dataclass(frozen=True)
class Settings:
    """What all runs have in common.

    Attributes:
        steps: Optimiser steps.
        batch_size: Crops per step.
        crop: Side of a crop in pixels.
        patch: Pixels per token along each axis.
        width: Channels of encoder and decoder.
        blocks: Residual blocks of each.
        dim: Channels of a code, for quantizers with a table that `DIMS` does not name.
        decorrelation: Weight of the squared correlation between channels that enter the quantizer, as in training.
        lr: Peak learning rate of Adam, with linear warm-up and half a cosine.
        warmup: Steps of the warm-up.
        usage_tokens: Tokens on which usage is counted after training. Papers count on millions: with few tokens per
            code, rare codes look dead.
        curve_tokens: The same for the points of the curves.
        measurements: Points of the curves after the start.
        seed: Of weights and crops.
    """

    steps: int = 300
    batch_size: int = 32
    crop: int = 32
    patch: int = 4
    width: int = 64
    blocks: int = 1
    dim: int = 8
    decorrelation: float = 0.02
    lr: float = 1e-3
    warmup: int = 20
    usage_tokens: int = 2**19
    curve_tokens: int = 2**16
    measurements: int = 4
    seed: int = 0

    @property
    def tokens_per_crop(self) -> int:
        """Tokens of one crop."""
        return (self.crop // self.patch) ** 2


def overrides(method: str, size: int, dim: int) -> dict[str, Any]:
    """What a run changes in ``configs/quantizer/METHOD.yaml``: size, `dim` of tables and `decay`.

    Averages over 100 steps (0.99) would take a third of the study to notice that a code is dead; they span 10 steps.

    Raises:
        ValueError: If the method is not part of the study or has no codebook of this size.
    """
    if method in TABLES:
        changed: dict[str, Any] = {"codebook_size": size, "dim": DIMS.get(method, dim)}
        if method in AVERAGING:
            changed["decay"] = DECAY
        if method == "dual_vq":
            # The published shares, 32 of 40 channels.
            changed["semantic_dim"] = round(dim * 0.8)
        return changed
    if method == "fsq" and size in LEVELS:
        return {"levels": LEVELS[size]}
    if method in ("lfq", "bsq") and size & (size - 1) == 0:
        return {"bits": size.bit_length() - 1}
    raise ValueError(f"no {method} with {size} codes in this study; methods are {', '.join(METHODS)}")


def quantizer_config(method: str, size: int, dim: int, changes: Sequence[str] = ()) -> dict[str, Any]:
    """Config of a quantizer with the overrides of the study and further changes, KEY=VALUE."""
    config = OmegaConf.load(ROOT / "configs" / "quantizer" / f"{method}.yaml")
    config = OmegaConf.merge(config, overrides(method, size, dim), OmegaConf.from_dotlist(list(changes)))
    config = OmegaConf.to_container(config, resolve=True)
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


@cache
def photos(split: str, size: int, seed: int) -> Photos:
    """Photographs of the training split at random scales, or tiles of the held-out ones."""
    assert split in ("train", "held-out")
    return Photos(split, size, min_scale=0.5, include_gray=True, seed=seed)


@cache
def crops(first: int, count: int, size: int, seed: int) -> Float[Tensor, "n c s s"]:
    """Crops of the training photographs by number, in [-1, 1]."""
    source = photos("train", size, seed)
    return to_images([source[0, index]["image"] for index in range(first, first + count)])


@cache
def held_out_tiles(size: int) -> Float[Tensor, "n c s s"]:
    """All tiles of the held-out photographs, in [-1, 1]."""
    source = photos("held-out", size, 0)
    return to_images([source[0, index]["image"] for index in range(len(source))])


def to_images(pictures: list[Tensor]) -> Float[Tensor, "n c s s"]:
    """A batch in [-1, 1] of 8-bit pictures."""
    return from_uint8(torch.stack(pictures)).contiguous(memory_format=torch.channels_last)


def make_tokenizer(config: dict[str, Any], settings: Settings) -> vistok.Tokenizer:
    """Tokenizer with the same initial encoder and decoder whatever the quantizer."""
    quantizer = vistok.build(config)
    torch.manual_seed(settings.seed)
    patch, width, blocks = settings.patch, settings.width, settings.blocks
    encoder = CNNEncoder(patch_size=patch, base_channels=width, num_blocks=blocks)
    decoder = CNNDecoder(patch_size=patch, base_channels=width, num_blocks=blocks)
    # Convolutions are twice as fast on a CPU in this format.
    return vistok.Tokenizer(encoder, quantizer, decoder).to(memory_format=torch.channels_last)


@torch.no_grad()
def measure(tokenizer: vistok.Tokenizer, usage_set: Tensor) -> dict[str, float]:
    """Codebook usage on the usage set, reconstruction of the held-out photographs."""
    tokenizer.eval()
    usage = CodebookUsage.of(tokenizer.quantizer)
    assert usage is not None
    for part in usage_set.split(256):
        usage.update(tokenizer.encode(part).indices)
    usage = usage.compute()
    originals = held_out_tiles(usage_set.shape[-1])
    images = tokenizer(originals).images
    tokenizer.train()
    return {name: float(usage[name]) for name in ("utilisation", "perplexity")} | {
        "mse": F.mse_loss(images, originals).item(),
        "psnr": psnr(images, originals).mean().item(),
    }


def train(config: dict[str, Any], size: int, settings: Settings) -> dict[str, Any]:
    """Train one tokenizer and measure it along the way.

    Args:
        config: Of the quantizer.
        size: Number of codes it was asked for.
        settings: What all runs have in common.
    """
    begin = time.perf_counter()
    tokenizer = make_tokenizer(config, settings).train()
    quantizer = tokenizer.quantizer
    final_set = crops(0, settings.usage_tokens // settings.tokens_per_crop, settings.crop, settings.seed + 1)
    curve_set = final_set[: settings.curve_tokens // settings.tokens_per_crop]
    # Tables that start from features get one for each code, as many steps of a larger batch would give them.
    first = crops(0, max(settings.batch_size, 1 + size // settings.tokens_per_crop), settings.crop, settings.seed + 2)
    # As in training. Otherwise most features start as copies of one direction, which few codes are close to.
    tokenizer.whiten_projection(first)
    with torch.no_grad():
        tokenizer(first)
    quantizer.discard()
    optimizer = torch.optim.Adam(
        [parameter for parameter in tokenizer.parameters() if parameter.requires_grad],
        lr=settings.lr,
        betas=(0.9, 0.99),
    )
    schedule = cosine(optimizer, settings.steps, min(settings.warmup, settings.steps - 1))
    points = {round(settings.steps * point / settings.measurements) for point in range(1, settings.measurements + 1)}
    curve: list[dict[str, Any]] = [{"step": 0, **measure(tokenizer, curve_set)}]
    for step in range(1, settings.steps + 1):
        images = crops((step - 1) * settings.batch_size, settings.batch_size, settings.crop, settings.seed)
        reconstruction = tokenizer(images)
        losses = {name: value.item() for name, value in reconstruction.quantized.losses.items()}
        loss = F.mse_loss(reconstruction.images, images)
        loss = loss + settings.decorrelation * mean_squared_correlation(reconstruction.features)
        for name, value in reconstruction.quantized.losses.items():
            loss = loss + quantizer.loss_weights[name] * value
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        quantizer.update()
        for parameter, rows in quantizer.touched_codes:
            clear_moments(optimizer, parameter, rows)
        if step in points:
            curve.append({"step": step, **measure(tokenizer, curve_set), "losses": losses})
    return {"curve": curve, "final": measure(tokenizer, final_set), "seconds": round(time.perf_counter() - begin, 1)}


def load(path: Path) -> dict[str, Any]:
    """Results of earlier calls, by ``method/size``."""
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, results: dict[str, Any]) -> None:
    """Replace the file in one step, so that an interruption leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    temporary.replace(path)


def report(results: dict[str, Any], changes: Sequence[str] = ()) -> str:
    """Tables of utilisation, perplexity and PSNR, methods by sizes, in Markdown; `changes` as in `quantizer_config`."""
    methods = [method for method in METHODS if any(key.startswith(f"{method}/") for key in results)]
    sizes = sorted({int(key.split("/")[1]) for key in results})
    settings = Settings(**next(iter(results.values()))["settings"])
    further = f", and {' '.join(changes)}" if changes else ""
    exceptions = ", ".join(f"{dim} for {name}" for name, dim in DIMS.items())
    lines = [
        "# Codebook collapse",
        "",
        "Written by `python benchmarks/collapse.py`. One convolutional autoencoder "
        f"(f{settings.patch}, {settings.width} channels), {settings.steps} steps of {settings.batch_size} crops of "
        f"{settings.crop}x{settings.crop} pixels ({settings.batch_size * settings.tokens_per_crop} tokens), Adam with "
        f"learning rate {settings.lr:g}, mean squared error; seed, initial weights and batches are those of every run. "
        f"Quantizers are `configs/quantizer/*.yaml` with nothing overridden but the size of the codebook and "
        f"dim = {settings.dim} ({exceptions}, whose dot products reach few codes in few dimensions), and "
        f"decay = {DECAY} of {', '.join(AVERAGING)}, whose averages over 100 steps would be long for the study"
        f"{further}. "
        f"Features start whitened, as in training. Usage is counted on {settings.usage_tokens} tokens of crops of the "
        f"training photographs that training has not seen, {settings.usage_tokens // max(sizes)} per code of the "
        "largest codebook: the fewer they are, the more rare codes look dead. PSNR is the mean over tiles of three "
        "held-out photographs. FSQ has the levels of its paper's Table 1, whose products are close to the sizes.",
    ]
    for title, name, form in (
        ("Utilisation", "utilisation", "{:.1%}"),
        ("Perplexity", "perplexity", "{:.0f}"),
        ("PSNR in dB", "psnr", "{:.2f}"),
    ):
        lines += ["", f"## {title}", "", "| method | " + " | ".join(map(str, sizes)) + " |"]
        lines += ["|---|" + "---:|" * len(sizes)]
        for method in methods:
            found = [results.get(f"{method}/{size}") for size in sizes]
            cells = [form.format(each["final"][name]) if each else "" for each in found]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Utilisation by size; utilisation and PSNR by step at one size."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
    colours = plt.get_cmap("tab20")
    for number, method in enumerate(METHODS):
        style = {"color": colours(number % 20), "marker": "os^"[number % 3], "markersize": 4, "label": method}
        sizes = [size for size in SIZES if f"{method}/{size}" in results]
        finals = [results[f"{method}/{size}"]["final"]["utilisation"] for size in sizes]
        if sizes:
            axes[0].plot(sizes, finals, **style)
        if f"{method}/{CURVE_SIZE}" in results:
            curve = results[f"{method}/{CURVE_SIZE}"]["curve"]
            steps = [point["step"] for point in curve]
            axes[1].plot(steps, [point["utilisation"] for point in curve], **style)
            axes[2].plot(steps[1:], [point["psnr"] for point in curve[1:]], **style)
    axes[0].set_xscale("log", base=2)
    axes[0].set_xticks(SIZES, map(str, SIZES))
    axes[0].set(xlabel="codes", ylabel="utilisation", title=f"after training, {Settings.usage_tokens} tokens")
    axes[1].set(xlabel="step", ylabel="utilisation", title=f"{CURVE_SIZE} codes, {Settings.curve_tokens} tokens")
    axes[2].set(xlabel="step", ylabel="PSNR of held-out photographs in dB", title=f"{CURVE_SIZE} codes")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then write table and plots of all there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD")
    parser.add_argument("--sizes", nargs="+", type=int, choices=SIZES, default=SIZES, metavar="K")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--batch-size", type=int, default=Settings.batch_size)
    parser.add_argument("--lr", type=float, default=Settings.lr)
    parser.add_argument("--usage-tokens", type=int, default=Settings.usage_tokens)
    parser.add_argument("--change", nargs="+", default=(), metavar="KEY=VALUE", help="in the config of the quantizer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    names = ("steps", "batch_size", "lr", "usage_tokens")
    settings = Settings(**{name: getattr(options, name) for name in names})
    if options.output == RESULTS and (options.change or settings != Settings()):
        parser.error("runs with other settings than the study's need a folder of their own: add --output FOLDER")
    path = options.output / "collapse.json"
    results = load(path)
    for size in options.sizes:
        for method in options.methods:
            config = quantizer_config(method, size, settings.dim, options.change)
            setup = {"settings": asdict(settings), "quantizer": config}
            earlier = results.get(f"{method}/{size}", {})
            if {key: earlier.get(key) for key in setup} != setup:
                results[f"{method}/{size}"] = {**setup, **train(config, size, settings)}
                write(path, results)
            result = results[f"{method}/{size}"]
            final = result["final"]
            console.print(
                f"{method:>12} {size:>6}  utilisation {final['utilisation']:6.1%}  "
                f"perplexity {final['perplexity']:6.0f}  PSNR {final['psnr']:5.2f} dB  {result['seconds']:5.0f} s",
                soft_wrap=True,
            )
    path.with_suffix(".md").write_text(report(results, options.change))
    plot(results, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
