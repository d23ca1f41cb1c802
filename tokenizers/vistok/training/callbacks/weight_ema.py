"""Exponential moving average of the weights."""

from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


class WeightEMA(WeightAveraging):
    """Lightning's weight averaging with a decay that warms up, so that a short training is not held back by its start.

    After n steps the decay is ``min(decay, (1 + n) / (10 + n))``. Validation, the weights in checkpoints and the bundle
    use the average. Codebooks that follow the features are buffers: they are copied, not averaged a second time.

    Args:
        decay: Final decay per optimiser step, in [0, 1).
        every: Optimiser steps between updates of the average.
    """

    def __init__(self, decay: float = 0.998, every: int = 1) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")

        def average(averaged: Any, current: Any, num_averaged: Tensor | int) -> None:
            count = int(num_averaged)
            # The function behind torch.optim.swa_utils.get_ema_multi_avg_fn, whose decay is fixed.
            torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + count) / (10 + count)))  # pyright: ignore

        super().__init__(use_buffers=False, multi_avg_fn=average)
        self.every = every
        self.applied = False

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average, unless the step was skipped."""
        if pl_module.step_is_finite:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Give the module the average."""
        super().on_train_end(trainer, pl_module)
        self.applied = True

    def apply(self, pl_module: lightning.LightningModule) -> None:
        """Give the module the average unless it has it: Lightning does not when it resumes a finished training."""
        if not self.applied:
            self._copy_average_to_current(pl_module)
            self.applied = True

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether to update after this step."""
        return step_idx is not None and (step_idx + 1) % self.every == 0
