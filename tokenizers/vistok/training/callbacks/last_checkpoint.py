"""Stop at the end of a step when asked to, with a checkpoint that resumes exactly there."""

import logging
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

log = logging.getLogger(__name__)


class TrainingInterrupted(Exception):  # noqa: N818 - a stop on request is not an error
    """Training stopped by a signal after its checkpoint was written.

    Attributes:
        checkpoint: What to resume from.
        exit_code: 128 plus the signal number, as shells and schedulers expect it.
    """

    def __init__(self, signal_number: int, checkpoint: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}; the checkpoint is {checkpoint}")
        self.checkpoint = checkpoint
        self.exit_code = 128 + signal_number


class LastCheckpoint(Callback):
    """Keeps ``last.ckpt``: written after every validation, at the end of training and on a signal.

    SIGINT (Ctrl-C) and SIGTERM stop the training after the running step; a second Ctrl-C stops it at once. Lightning's
    ``save_last`` would write the file when training has ended, with the averaged weights in place of the trained ones.

    Args:
        folder: Where the checkpoint goes.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "last.ckpt"
        self._received: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Install the handlers after Lightning's own."""

        def handle(number: int, frame: FrameType | None) -> None:
            if self._received is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._received = number
            # Ctrl-C reaches every process of the terminal; a scheduler's SIGTERM may reach the first one only.
            kill = getattr(trainer.strategy.launcher, "kill", None)
            if number == signal.SIGTERM and kill is not None:
                kill(signal.SIGTERM)
            log.warning("received %s: saving at the end of this step", signal.Signals(number).name)

        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, handle)
            except ValueError:  # not the main thread: somebody else owns the signals
                return

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save at the end; save and stop if a signal came. All ranks decide alike, at optimiser steps only."""
        if trainer.fit_loop._should_accumulate():
            return
        received = self._received is not None
        if trainer.world_size > 1:
            received = trainer.strategy.reduce_boolean_decision(received, all=False)
        if received or trainer.global_step == trainer.max_steps:
            trainer.save_checkpoint(self.path)
        if received:
            # Lightning logs the metrics of a batch after this hook, which does not return.
            trainer._logger_connector.update_train_step_metrics()
            raise TrainingInterrupted(self._received or signal.SIGTERM, self.path)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save what was validated, unless that was the last step, which is saved already."""
        if not trainer.sanity_checking and trainer.global_step != trainer.max_steps:
            trainer.save_checkpoint(self.path)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stop if a signal came during the last validation."""
        if self._received is not None and self.path.exists():
            raise TrainingInterrupted(self._received, self.path)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
        self._received = None
