"""Pictures that could not be read: named in the log and listed in the run folder."""

import logging
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from vistok.data.bad_samples import BadSampleLog

log = logging.getLogger(__name__)


class BadSamples(Callback):
    """Collects ``batch["bad"]`` of training and validation into ``bad_samples.csv``.

    Args:
        folder: Run folder; ranks above 0 write into ``rank_N`` below it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.samples = BadSampleLog()

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look at a training batch."""
        self._collect(trainer, batch)

    def on_validation_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Look at a held-out batch."""
        self._collect(trainer, batch)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Say how many there were, by kind."""
        if len(self.samples):
            log.warning("%d unreadable pictures: %s; listed in bad_samples.csv", len(self.samples), self.samples.counts)

    def _collect(self, trainer: lightning.Trainer, batch: Any) -> None:
        before = len(self.samples)
        self.samples.add(batch["bad"])
        if len(self.samples) > before:
            folder = self.folder if trainer.is_global_zero else self.folder / f"rank_{trainer.global_rank}"
            folder.mkdir(parents=True, exist_ok=True)
            self.samples.write(folder)
