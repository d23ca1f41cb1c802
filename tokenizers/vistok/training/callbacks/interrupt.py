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


class InterruptCheckpoint(Callback):
    """Save ``last.ckpt`` and stop after the running step on SIGINT (Ctrl-C) or SIGTERM; a second Ctrl-C stops at once.

    Args:
        folder: Where the checkpoint goes.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
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
        """Save and stop if a signal came; all ranks decide alike, at optimiser-step boundaries only."""
        if trainer.fit_loop._should_accumulate():
            return
        received = self._received is not None
        if trainer.world_size > 1:
            received = trainer.strategy.reduce_boolean_decision(received, all=False)
        if received:
            path = self.folder / "last.ckpt"
            trainer.save_checkpoint(path)
            # Lightning logs the metrics of a batch after this hook, which does not return.
            trainer._logger_connector.update_train_step_metrics()
            raise TrainingInterrupted(self._received or signal.SIGTERM, path)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
        self._received = None
