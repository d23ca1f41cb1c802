"""One training run of a generator: from a config to a run folder with checkpoints, numbers and a bundle."""

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from vistok.hub.files import atomic_write
from vistok.prior.bundle import save_prior
from vistok.prior.data import TokenData
from vistok.prior.gpt import GPT
from vistok.prior.module import PriorModule
from vistok.training.callbacks import WeightEMA
from vistok.training.run import (
    check_trainer,
    find_checkpoint,
    make_trainer,
    quiet_libraries,
    recorded,
    refuse_existing_run,
)

log = logging.getLogger(__name__)

# Parts of the config that only the training of a tokenizer reads.
TOKENIZER_ONLY = (
    "encoder",
    "quantizer",
    "decoder",
    "tokenizer",
    "loss",
    "discriminator",
    "module",
    "final",
    "pretrained",
    "text_encoder",
)


def train_prior(config: DictConfig, folder: Path, command: str | None = None) -> dict[str, Any]:
    """Train a generator on exported tokens and write everything about it into a run folder.

    Args:
        config: Composed from ``configs/train.yaml`` with ``prior`` and ``data=tokens``.
        folder: Run folder; it must not hold another run, unless ``ckpt=auto`` continues that one.
        command: What reproduces the run.

    Returns:
        ``val_loss`` in nats per token, ``val_bits_per_image``, ``train_steps`` and ``train_seconds``; an empty dict on
        ranks other than 0.

    Raises:
        ValueError: If the config asks for something impossible, or sets what only tokenizers have.
        FileExistsError: If `folder` holds a run already.
        TrainingInterrupted: After a signal, when the checkpoint is written.
    """
    started = time.perf_counter()
    refuse_tokenizer_settings()
    quiet_libraries()
    if config.ckpt != "auto" and not getattr(rank_zero_only, "rank", 0):
        refuse_existing_run(folder)
    checkpoint = find_checkpoint(config.ckpt, folder)
    check_trainer(config)
    if config.trainer.compile:
        raise ValueError("trainer.compile is for tokenizers: write trainer.compile=false")
    lightning.seed_everything(config.seed, verbose=False)
    data = instantiate(config.data, _convert_="all")
    if not isinstance(data, TokenData):
        raise ValueError("a generator trains on tokens: set data=tokens data.tokens=FOLDER, see vistok export-tokens")
    layout = data.manifest.layout
    prior: GPT = instantiate(
        config.prior,
        codebook_sizes=layout.codebook_sizes,
        grid=layout.grid,
        num_classes=data.manifest.num_classes,
        _convert_="all",
    )
    trainer = make_trainer(config, folder, checkpoint)
    global_batch = data.batch_size * trainer.world_size * trainer.accumulate_grad_batches
    module = PriorModule(
        prior,
        optimizer=instantiate(config.optimizer, _convert_="all"),
        scheduler=instantiate(config.scheduler, global_batch=global_batch, _convert_="all"),
    )
    if trainer.is_global_zero:
        log.info(
            "%.2f M parameters, %d steps per image, %d pictures in %d views, run folder %s",
            sum(parameter.numel() for parameter in prior.parameters()) / 1e6,
            prior.num_steps * (prior.num_parts if prior.form == "depth" else 1),
            data.manifest.num_pictures,
            len(data.manifest.views),
            folder,
        )
    with recorded(trainer, config, folder, command):
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightEMA):
            callback.apply(module)
    if not trainer.is_global_zero:
        return {}
    data.trainer = None  # from here on this process looks at the whole data, not at a rank's share
    val_loss = mean_loss(prior, data, trainer.strategy.root_device)
    tokens = {"size": list(layout.size), "tokenizer": data.manifest.tokenizer}
    bundle = save_prior(prior, folder / "bundle", tokens, overwrite=config.ckpt == "auto")
    metrics = {
        "val_loss": val_loss,
        "val_bits_per_image": val_loss * layout.length / math.log(2),
        "train_steps": trainer.global_step,
        "train_seconds": round(time.perf_counter() - started, 1),
    }
    atomic_write(folder / "metrics.json", lambda path: path.write_text(json.dumps(metrics, indent=2) + "\n"))
    log.info("validation: %.4f nats per token; bundle: %s", metrics["val_loss"], bundle)
    return metrics


@torch.inference_mode()
def mean_loss(prior: GPT, data: TokenData, device: torch.device) -> float:
    """Mean negative log-likelihood of a token of the validation pictures, in nats."""
    prior.to(device).eval()
    total, count = 0.0, 0
    for batch in data.val_dataloader():
        labels = batch["labels"].to(device) if "labels" in batch else None
        losses = prior(batch["tokens"].to(device), labels)
        total += losses.double().sum().item()
        count += losses.numel()
    return total / count


def refuse_tokenizer_settings() -> None:
    """Raise a ValueError if the command line sets something that training a generator does not read."""
    if not HydraConfig.initialized():
        return
    for override in HydraConfig.get().overrides.task:
        key = override.split("=")[0].lstrip("+~")
        if key.split(".")[0] in TOKENIZER_ONLY:
            raise ValueError(f"{key} has no effect on the training of a generator (prior): leave it out")
