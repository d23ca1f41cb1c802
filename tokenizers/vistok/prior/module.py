"""The Lightning module that trains a generator."""

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from vistok.config import config_of
from vistok.prior.gpt import GPT
from vistok.training.module import random_states, set_random_states

log = logging.getLogger(__name__)


class PriorModule(lightning.LightningModule):
    """Trains a generator to predict each token from those before it.

    A step whose gradient is not finite is reported and skipped.

    Args:
        prior: What is trained.
        optimizer: Makes the optimiser from a module.
        scheduler: Makes the learning-rate schedule from ``(optimizer, total_steps)``.

    Attributes:
        step_is_finite: Whether the last optimiser step was accepted.
    """

    def __init__(
        self, prior: GPT, optimizer: Callable[[nn.Module], Optimizer], scheduler: Callable[..., LRScheduler]
    ) -> None:
        super().__init__()
        self.prior = prior
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.step_is_finite = True
        self.skipped_steps = 0
        self._random_states: dict[str, Any] | None = None

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Mean negative log-likelihood of a token, in nats."""
        loss = self.prior(batch["tokens"], batch.get("labels")).mean()
        self.log("train/loss", loss.detach(), batch_size=len(batch["tokens"]))
        self.log("loss", loss.detach(), prog_bar=True, logger=False)
        return loss

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """The same of held-out pictures, mean over all tokens."""
        loss = self.prior(batch["tokens"], batch.get("labels")).mean()
        self.log("val/loss", loss, prog_bar=True, batch_size=len(batch["tokens"]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """The optimiser and its schedule, stepped with it."""
        optimizer = self.make_optimizer(self.prior)
        scheduler = self.make_scheduler(optimizer, total_steps=int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Drop the gradients of a step that is not finite, so that the optimiser leaves everything as it is."""
        gradients = [parameter.grad for parameter in self.prior.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self.step_is_finite = bool(norm.isfinite())
        if self.step_is_finite:
            self.log("train/grad_norm", norm)
            return
        self.skipped_steps += 1
        log.warning("step %d skipped: its gradient is not finite (%d so far)", self.global_step, self.skipped_steps)
        for parameter in self.prior.parameters():
            parameter.grad = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the config and the random states, so that a resumed run continues bit for bit."""
        checkpoint["vistok_prior"] = json.dumps(config_of(self.prior))
        checkpoint["vistok_random_states"] = random_states()
        for logger in self.trainer.loggers:
            logger.save()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another architecture; keep its random states for the first batch."""
        saved = checkpoint.get("vistok_prior")
        if saved != json.dumps(config_of(self.prior)):
            raise ValueError(
                "the checkpoint was trained with another generator or other tokens; resume with the overrides of its "
                f"run. Checkpoint: {saved}"
            )
        self._random_states = checkpoint["vistok_random_states"]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Restore the random states only now: whatever ran between loading and here may have drawn numbers."""
        if self._random_states is not None:
            set_random_states(self._random_states)
            self._random_states = None
