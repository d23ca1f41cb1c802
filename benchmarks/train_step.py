"""Images per second and memory of a whole GAN step, beside the textbook way with the same architecture.

    python benchmarks/train_step.py                    minutes on two CPU cores
    python benchmarks/train_step.py --device cuda --precision bf16-mixed --compile --image-size 256 --batch-size 16
    python benchmarks/train_step.py --quick            small, to see that everything works

A step is forward, L1 + LPIPS + vector quantization + PatchGAN losses of both players, backward and update. Ours is the
one of `train.py`: Lightning's trainer around `TokenizerModule`, timed from one batch to the next. The reference is
`diffusers.VQModel` of the same parameter count, with the same LPIPS and discriminator, in a plain loop of two
optimisers: the discriminator sees the reconstructions twice, once for each player. ``textbook`` (LlamaGen) keeps them
for the discriminator's step, ``rerun`` (VQGAN-LC, OptVQ) computes them again. All three alternate within one run, with
the same precision, memory format and compilation; minima count. Memory is that of parameters, optimiser states and two
steps, in a fresh process. Variants of our step show what each setting adds; the last table shows the share of each
part, run alone, and of making a batch. LPIPS has random weights, which cost what trained ones do.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from _measure import MEBIBYTE, peak_extra_memory, seconds, synchronise
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import models

import vistok
from vistok.data import PhotosData
from vistok.decoder import CNNDecoder
from vistok.discriminator import PatchDiscriminator
from vistok.encoder import CNNEncoder
from vistok.loss import LPIPS, AdversarialLoss, ReconstructionLoss
from vistok.quantizer import VectorQuantizer
from vistok.training.module import TokenizerModule
from vistok.training.run import quiet_libraries
from vistok.training.schedule import constant

CODES, DIM = 1024, 4
WEIGHTS = {"codebook": 1.0, "commitment": 0.25, "adversarial": 0.1}
LR, BETAS = 1e-4, (0.9, 0.95)
REFERENCES = ("textbook", "rerun")
TARGETS = {"textbook": 1.0, "rerun": 1.2}
console = Console(width=None if sys.stdout.isatty() else 110)


class Setting(argparse.Namespace):
    """What is measured: sizes, device, precision, memory format, compilation and optimiser."""

    image_size: int
    batch_size: int
    base_channels: int
    channel_multipliers: list[int]
    device: str
    precision: str
    channels_last: bool
    compile: bool
    fused: bool

    def changed(self, **changes: Any) -> "Setting":
        """The same but for some attributes."""
        return Setting(**{**vars(self), **changes})


def lpips_weights() -> Path:
    """A folder with random weights for LPIPS; the environment's trained ones cost the same."""
    folder = Path(tempfile.gettempdir()) / "vistok_random_lpips"
    folder.mkdir(exist_ok=True)
    if not (folder / "lpips_vgg_lin.safetensors").exists():
        torch.manual_seed(0)
        features = models.vgg16().features.state_dict()
        save_file(
            {f"features.{name}": value for name, value in features.items()}, folder / "vgg16_features.safetensors"
        )
        channels = (64, 128, 256, 512, 512)
        linear = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) / c for i, c in enumerate(channels)}
        save_file(linear, folder / "lpips_vgg_lin.safetensors")
    return folder


def batch(setting: Setting) -> Tensor:
    """Images in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    size = (setting.batch_size, 3, setting.image_size, setting.image_size)
    return torch.rand(size, generator=generator) * 2 - 1


def make_tokenizer(setting: Setting) -> vistok.Tokenizer:
    """The trunk that `diffusers.VQModel` has: attention in the middle only."""
    torch.manual_seed(0)
    trunk: dict[str, Any] = {
        "patch_size": 1,
        "base_channels": setting.base_channels,
        "channel_multipliers": setting.channel_multipliers,
        "attention": "middle",
        "z_channels": DIM,
    }
    quantizer = VectorQuantizer(CODES, DIM, commitment_weight=WEIGHTS["commitment"])
    return vistok.Tokenizer(CNNEncoder(num_blocks=2, **trunk), quantizer, CNNDecoder(num_blocks=3, **trunk))


def make_module(setting: Setting) -> TokenizerModule:
    """What `train.py` trains."""
    tokenizer = make_tokenizer(setting)
    adversarial = AdversarialLoss(
        PatchDiscriminator(),
        weight=WEIGHTS["adversarial"],
        start=0,
        discriminator_start=0,
        warmup=0,
        lr=LR,
        betas=BETAS,
    )
    module = TokenizerModule(
        tokenizer,
        ReconstructionLoss(l1=1.0, l2=0.0, lpips=1.0, lpips_weights=lpips_weights()),
        optimizer=lambda module: torch.optim.AdamW(module.parameters(), LR, betas=BETAS, fused=setting.fused),
        scheduler=partial(constant, warmup_steps=0),
        adversarial=adversarial,
        whiten=False,
        channels_last=setting.channels_last,
    )
    if setting.compile:
        tokenizer.encoder.compile()
        tokenizer.decoder.compile()
    return module


class Textbook:
    """The step as papers print it: two optimisers, two backward passes.

    Args:
        setting: As for ours.
        rerun: Whether the discriminator's step computes the reconstructions again.
    """

    def __init__(self, setting: Setting, rerun: bool) -> None:
        from diffusers import VQModel

        torch.manual_seed(0)
        widths = [setting.base_channels * each for each in setting.channel_multipliers]
        self.setting, self.rerun = setting, rerun
        model = VQModel(
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            block_out_channels=tuple(widths),
            layers_per_block=2,
            latent_channels=DIM,
            num_vq_embeddings=CODES,
            vq_embed_dim=DIM,
        )
        ours = sum(value.numel() for value in make_tokenizer(setting).parameters())
        theirs = sum(value.numel() for value in model.parameters())
        if ours != theirs:
            raise RuntimeError(f"the architectures differ: {ours} and {theirs} parameters")
        self.format = torch.channels_last if setting.channels_last else torch.contiguous_format
        self.model = model.to(setting.device, memory_format=self.format).train()
        self.discriminator = PatchDiscriminator().to(setting.device, memory_format=self.format)
        self.lpips = LPIPS("vgg", weights=lpips_weights()).to(setting.device)
        self.images = batch(setting).to(setting.device).contiguous(memory_format=self.format)
        self.optimizers = [
            torch.optim.AdamW(part.parameters(), LR, betas=BETAS, fused=setting.fused)
            for part in (self.model, self.discriminator)
        ]
        if setting.compile:
            model.encoder.compile()
            model.decoder.compile()

    def reconstruct(self) -> tuple[Tensor, Tensor]:
        """Reconstructions and the quantizer's loss: codebook plus 0.25 times commitment."""
        hidden = self.model.quant_conv(self.model.encoder(self.images))
        codes, loss, _ = self.model.quantize(hidden)
        return self.model.decoder(self.model.post_quant_conv(codes)), loss

    def __call__(self) -> None:
        """One step of both players."""
        generator, critic = self.optimizers
        with autocast(self.setting):
            reconstructions, quantizer_loss = self.reconstruct()
            loss = F.l1_loss(reconstructions, self.images) + self.lpips(reconstructions, self.images).mean()
            loss = loss + quantizer_loss - WEIGHTS["adversarial"] * self.discriminator(reconstructions).mean()
        generator.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        generator.step()
        with autocast(self.setting):
            if self.rerun:
                reconstructions, _ = self.reconstruct()
            real, fake = self.discriminator(self.images), self.discriminator(reconstructions.detach())
            loss = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
        critic.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.discriminator.parameters(), 1.0)
        critic.step()


def autocast(setting: Setting) -> Any:
    """What the precision means in a plain loop."""
    if setting.precision == "bf16-mixed":
        return torch.autocast(setting.device, torch.bfloat16)
    return nullcontext()


class Alternate(lightning.Callback):
    """Times our batches, and runs the references between them."""

    def __init__(self, references: Mapping[str, Callable[[], Any]]) -> None:
        self.references = references
        self.seconds: dict[str, list[float]] = {name: [] for name in ("ours", *references)}
        self.started = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock."""
        synchronise()
        self.started = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop it, then time the references."""
        synchronise()
        self.seconds["ours"].append(time.perf_counter() - self.started)
        for name, reference in self.references.items():
            self.seconds[name].append(seconds(reference))


def fit(setting: Setting, steps: int, references: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Smallest seconds of a step of ours and of each reference; the first two steps do not count."""
    clock = Alternate(references)
    trainer = lightning.Trainer(
        max_steps=steps + 2,
        accelerator="gpu" if setting.device == "cuda" else "cpu",
        devices=1,
        precision=setting.precision,  # pyright: ignore[reportArgumentType]
        gradient_clip_val=1.0,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    images = batch(setting)
    batches = [{"images": images, "keys": [], "bad": []}] * (steps + 2)
    trainer.fit(make_module(setting), DataLoader(batches, batch_size=None))  # pyright: ignore[reportArgumentType]
    return {name: min(values[2:] or values) for name, values in clock.seconds.items()}


def memory_workload(setting: Mapping[str, Any], who: str) -> Callable[[], object]:
    """Building a model and two steps, for a fresh process in which a small step has loaded the libraries."""

    def run(setting: Setting) -> None:
        if who == "ours":
            fit(setting, 0, {})
            return
        step = Textbook(setting, rerun=who == "rerun")
        step()
        step()

    given = Setting(**setting)
    run(given.changed(image_size=32, batch_size=1, base_channels=32))
    return lambda: run(given)


def shares(setting: Setting, repeats: int) -> dict[str, float]:
    """Seconds of forward and backward of each part alone, on the sizes of the step."""
    module = make_module(setting).to(setting.device)
    tokenizer, adversarial = module.tokenizer.train(), module.adversarial
    assert adversarial is not None
    lpips = module.loss.lpips
    assert lpips is not None
    images = batch(setting).to(setting.device).contiguous(memory_format=module.memory_format)
    with torch.no_grad():
        features = tokenizer.to_codes(tokenizer.encoder(images))
        codes = tokenizer.from_codes(tokenizer.quantizer(features).codes)

    def quantize(features: Tensor) -> Tensor:
        quantized = tokenizer.quantizer(features)
        return quantized.codes.sum() + sum(quantized.losses.values())

    def play(reconstructions: Tensor) -> Tensor:
        weights = adversarial.weights(0, 100)
        terms, _ = adversarial(reconstructions, images, set(weights))
        return torch.stack(list(terms.values())).sum()

    parts: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
        "encoder": (tokenizer.encoder, images),
        "quantizer": (quantize, features),
        "decoder": (tokenizer.decoder, codes),
        "LPIPS": (lambda reconstructions: lpips(reconstructions, images), images),
        "discriminator": (play, images),
    }
    result = {}
    for name, (part, inputs) in parts.items():

        def step(part: Callable[[Tensor], Tensor] = part, inputs: Tensor = inputs, name: str = name) -> None:
            inputs = inputs.detach().requires_grad_(name != "encoder")
            with autocast(setting):
                outputs = part(inputs)
            outputs.float().sum().backward()

        step()
        result[name] = min(seconds(step) for _ in range(repeats))
    return result


def loading(setting: Setting, batches: int) -> float:
    """Smallest seconds of a batch of crops of the embedded photographs, made by the process that trains."""
    data = PhotosData(image_size=setting.image_size, batch_size=setting.batch_size, num_workers=0)
    data.setup("fit")
    iterator = iter(data.train_dataloader())
    return min(seconds(lambda: next(iterator)) for _ in range(batches))


def show(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    table = Table(*headers, title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--base-channels", type=int, default=64)
    parser.add_argument("--channel-multipliers", type=int, nargs="+", default=[1, 2, 2, 4])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="32-true", choices=("32-true", "bf16-mixed"))
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--fused", action=argparse.BooleanOptionalAction, default=True, help="fused AdamW")
    parser.add_argument("--steps", type=int, default=6, help="timed steps; the smallest time counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--variants", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--quick", action="store_true", help="small sizes, one step; the ratios mean nothing then")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    quiet_libraries()
    names = Setting.__annotations__
    setting = Setting(**{name: getattr(options, name) for name in names})
    if options.quick:
        options.steps = 1
        setting = setting.changed(image_size=32, batch_size=2, base_channels=32, channel_multipliers=[1, 2])

    times = fit(setting, options.steps, {name: Textbook(setting, rerun=name == "rerun") for name in REFERENCES})
    memory = {name: peak_extra_memory(memory_workload, vars(setting), name) / MEBIBYTE for name in times}
    rows = []
    for name, value in times.items():
        target = f" (target {TARGETS[name]:g})" if name in TARGETS else ""
        rows.append(
            (name, f"{setting.batch_size / value:.2f}", f"{value / times['ours']:.2f}{target}", f"{memory[name]:.0f}")
        )
    show("A GAN step", ("step", "images/s", "ours is faster by", "MiB"), rows)

    variants: dict[str, float] = {}
    if options.variants:
        changes: dict[str, dict[str, Any]] = {
            "channels last": {"channels_last": not setting.channels_last},
            "fused AdamW": {"fused": not setting.fused},
            "bf16-mixed": {"precision": "32-true" if setting.precision == "bf16-mixed" else "bf16-mixed"},
            "compile": {"compile": not setting.compile},
        }
        for name, change in changes.items():
            # Two models in one trainer cannot alternate; the unchanged one is measured right after instead.
            changed, unchanged = (fit(each, options.steps, {})["ours"] for each in (setting.changed(**change), setting))
            is_on = next(iter(change.values())) in (True, "bf16-mixed")
            variants[name] = unchanged / changed if is_on else changed / unchanged
        show("What settings add", ("setting", "times faster with it"), [(k, f"{v:.2f}") for k, v in variants.items()])

    parts = shares(setting, max(1, options.steps // 2))
    # While a batch is trained on, loading processes make the next ones, so this is no part of the step.
    data = loading(setting, options.steps + 2)
    parts["rest (optimiser, Lightning, logging)"] = max(0.0, times["ours"] - sum(parts.values()))
    parts["data (beside the step, in loading processes)"] = data
    show("Parts run alone", ("part", "share of the step"), [(k, f"{v / times['ours']:.1%}") for k, v in parts.items()])
    if options.json:
        record = {"setting": vars(setting), "torch": torch.__version__, "threads": options.threads}
        record |= {"seconds": times, "extra_mib": memory, "variants": variants, "parts": parts}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
