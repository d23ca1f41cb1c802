"""Codebook usage while training, and a warning in words when training leaves its usual range."""

import logging
import math
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from vistok.config import config_of
from vistok.metric.codebook_usage import CodebookUsage
from vistok.quantizer.base import Quantizer

log = logging.getLogger(__name__)


class CollapseWatch(Callback):
    """Counts the codes of the training batches, logs how many are in use, and says when something goes wrong.

    The counts are exact, over all processes and over windows of `every` optimiser steps, and are logged at the end of
    each as ``train/utilisation``, ``train/perplexity`` and ``train/dead_codes``. They survive a resume. A window may
    have too few tokens to show every code, so utilisation and perplexity are judged against uniform draws of as many
    tokens. At the end of each window the values that training has logged as ``train/grad_norm*``,
    ``train/adaptive_weight`` and ``train/discriminator_accuracy`` are judged too.

    Args:
        every: Optimiser steps of a window.
        min_utilisation: Warn below this share of the utilisation of uniform draws.
        min_perplexity: Warn below this share of the number of codes in use: few of them carry nearly all tokens.
        max_grad_norm: Warn above this norm of a gradient, before it is clipped.
        max_adaptive_weight: Warn above this weight of the adversarial loss, and below its inverse.
        max_discriminator_accuracy: Warn above this share of images that the discriminator tells apart.
        quiet_steps: Optimiser steps for which a warning is not repeated.

    Raises:
        ValueError: If `every` is not positive.
    """

    def __init__(
        self,
        every: int = 100,
        min_utilisation: float = 0.25,
        min_perplexity: float = 0.1,
        max_grad_norm: float = 1e3,
        max_adaptive_weight: float = 1e3,
        max_discriminator_accuracy: float = 0.95,
        quiet_steps: int = 2000,
    ) -> None:
        if every < 1:
            raise ValueError(f"callbacks.collapse_watch.every must be at least 1, got {every}")
        self.every = every
        self.min_utilisation = min_utilisation
        self.min_perplexity = min_perplexity
        self.max_grad_norm = max_grad_norm
        self.max_adaptive_weight = max_adaptive_weight
        self.max_discriminator_accuracy = max_discriminator_accuracy
        self.quiet_steps = quiet_steps
        self._usage: CodebookUsage | None = None
        self._warned: dict[str, int] = {}

    def setup(self, trainer: lightning.Trainer, pl_module: Any, stage: str) -> None:
        """Make the counters; continuous tokenizers have none."""
        self._usage = CodebookUsage.of(pl_module.tokenizer.quantizer)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; judge at the end of a window."""
        if self._usage is not None:
            self._usage.to(pl_module.device).update(pl_module.last_indices)
        if trainer.fit_loop._should_accumulate() or trainer.global_step % self.every:
            return
        if self._usage is not None:
            usage = {name: value.item() for name, value in self._usage.compute().items() if value.ndim == 0}
            self._usage.reset()
            logged = {f"train/{name}": usage[name] for name in ("utilisation", "perplexity", "dead_codes")}
            for logger in trainer.loggers:
                logger.log_metrics(logged, step=trainer.global_step - 1)
            self._judge_usage(trainer.global_step, usage, pl_module.tokenizer.quantizer)
        for name, value in trainer.callback_metrics.items():
            self._judge(trainer.global_step, name, float(value))

    def on_save_checkpoint(self, trainer: lightning.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep the counts of the running window, summed over the processes."""
        if self._usage is not None:
            with self._usage.sync_context():
                checkpoint["vistok_window"] = {
                    name: value.cpu() if torch.is_tensor(value) else [each.cpu() for each in value]
                    for name, value in self._usage.metric_state.items()
                }

    def on_load_checkpoint(self, trainer: lightning.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Go on with the counts on the first process."""
        if self._usage is not None and trainer.is_global_zero:
            for name, value in checkpoint.get("vistok_window", {}).items():
                setattr(self._usage, name, value)

    def _judge_usage(self, step: int, usage: dict[str, float], quantizer: Quantizer) -> None:
        possible = usage["expected_uniform_utilisation"]
        if usage["utilisation"] < self.min_utilisation * possible:
            self._warn(
                step,
                "codebook",
                f"the codebook is collapsing: {usage['distinct_codes']:.0f} of {sum(quantizer.codebook_sizes)} codes "
                f"in use over the last {self.every} steps, {usage['utilisation']:.1%} where uniform draws would use "
                f"{possible:.1%}. {_cure(quantizer)}",
            )
        elif usage["perplexity"] < self.min_perplexity * usage["distinct_codes"] / quantizer.num_codebooks:
            self._warn(
                step,
                "perplexity",
                f"few codes carry nearly all tokens: a perplexity of {usage['perplexity']:.1f} with "
                f"{usage['distinct_codes']:.0f} codes in use. {_cure(quantizer)}",
            )

    def _judge(self, step: int, name: str, value: float) -> None:
        if name.startswith("train/grad_norm") and not value <= self.max_grad_norm:
            self._warn(
                step,
                name,
                f"{name} is {value:.3g}, above {self.max_grad_norm:g}: lower optimizer.lr, or lengthen "
                "scheduler.warmup_steps",
            )
        if name == "train/adaptive_weight" and not 1 / self.max_adaptive_weight <= value <= self.max_adaptive_weight:
            self._warn(
                step,
                name,
                f"the adaptive weight of the adversarial loss is {value:.3g}: its gradient and that of the "
                "reconstruction differ by orders of magnitude. Raise discriminator.adversarial.start, so that "
                "reconstructions are good when it begins",
            )
        if name == "train/discriminator_accuracy" and value > self.max_discriminator_accuracy:
            self._warn(
                step,
                name,
                f"the discriminator tells {value:.0%} of the images apart and has little left to teach: lower "
                "discriminator.adversarial.lr",
            )

    def _warn(self, step: int, kind: str, message: str) -> None:
        if step - self._warned.get(kind, -math.inf) >= self.quiet_steps:
            self._warned[kind] = step
            log.warning("step %d: %s", step, message)


def _cure(quantizer: Quantizer) -> str:
    """The override that usually helps against unused codes."""
    config = config_of(quantizer)
    if config.get("revival") == "none" and config.get("table") != "frozen":
        return "quantizer.revival=random replaces dead codes"
    if "entropy_weight" in config:
        return f"A larger quantizer.entropy_weight (now {config['entropy_weight']:g}) spreads the codes"
    return "A smaller codebook, a lower optimizer.lr or quantizer=fsq helps"
