"""The checkpoint that a run resumes from, whatever ended it: a crash, a kill, a scheduler or a person."""

import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Checkpoint, WeightAveraging
from lightning.pytorch.loops.evaluation_loop import RestartStage
from lightning.pytorch.trainer.states import TrainerFn

from vistok.distributed import all_reduce_min, is_distributed

log = logging.getLogger(__name__)

# Where the system has them: Ctrl-C, the end of a job, its announcement by SLURM, and its announcement by submitit.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))
# A terminal, torchrun and a launcher of ranks may each pass on the same signal; a later one is a second signal.
ECHO_SECONDS = 2.0


class TrainingInterrupted(Exception):  # noqa: N818 - a stop on request is not an error
    """Training stopped by a signal after its checkpoint was written.

    Attributes:
        checkpoint: What to resume from.
        exit_code: 128 plus the signal number, as shells and schedulers expect it: 130 after Ctrl-C, 143 after SIGTERM,
            138 after SIGUSR1, 140 after SIGUSR2.
    """

    def __init__(self, signal_number: int, checkpoint: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}; the checkpoint is {checkpoint}")
        self.checkpoint = checkpoint
        self.exit_code = 128 + signal_number


class LastCheckpoint(Checkpoint):
    """Keeps ``last.ckpt``, from which training continues bit for bit.

    It is written after every validation, at the end of training, every so many steps or minutes, and on SIGINT
    (Ctrl-C), SIGTERM, SIGUSR1 and SIGUSR2. A signal ends the training with `TrainingInterrupted` at the end of the
    running optimiser step or validation batch; a second one, more than two seconds later, ends the process at once.
    A handler of SIGUSR1 or SIGUSR2 that was there before, such as submitit's, which puts the job back into the queue,
    is called when the checkpoint is written.

    Lightning's ``save_last`` would write the file when training has ended, with the averaged weights in place of the
    trained ones, and a run resumed from a save in the middle of an epoch would skip the validation due at that step.

    Args:
        folder: Where the checkpoint goes.
        every_n_steps: Optimiser steps between saves; None: saves do not depend on the number of steps.
        every_minutes: Minutes between saves, by the clock of the first process; None: they do not depend on the time.

    Raises:
        ValueError: If an interval is not positive, or the processes of a run have different folders.
    """

    def __init__(
        self, folder: str | Path, every_n_steps: int | None = None, every_minutes: float | None = None
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("every_minutes", every_minutes)):
            if value is not None and value <= 0:
                raise ValueError(f"callbacks.last.{name} must be positive, or null for no such saves; got {value}")
        self.path = Path(folder) / "last.ckpt"
        self.every_n_steps = every_n_steps
        self.every_minutes = every_minutes
        self._received: int | None = None
        self._received_at = 0.0
        self._previous: dict[int, Any] = {}
        self._saved_at = 0.0
        self._validation_pending = False  # in the checkpoint being written, or in the one that was loaded
        self._loaded_step = 0
        self._extra_steps = 0
        self._common_batches = 0

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Make sure that all processes write into one folder."""
        shared = trainer.strategy.broadcast(str(self.path.parent))
        if shared != str(self.path.parent):
            raise ValueError(
                f"process {trainer.global_rank} of this run writes to {self.path.parent}, process 0 to {shared}: set "
                "hydra.run.dir=runs/NAME, since each process reads its own clock"
            )

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note whether the validation due at this step is still to come, and whether gradients are lost."""
        checkpoint["vistok_validation_pending"] = self._validation_pending
        checkpoint["vistok_accumulating"] = trainer.fit_loop._should_accumulate()

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take up what `on_save_checkpoint` noted."""
        self._validation_pending = checkpoint.get("vistok_validation_pending", False)
        self._loaded_step = checkpoint["global_step"]
        if checkpoint.get("vistok_accumulating", False):
            log.warning(
                "the checkpoint was written between the batches of one optimiser step, whose gradients are lost: the "
                "run continues, but not bit for bit; checkpoints/last.ckpt is always written after a step"
            )

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Keep Lightning from ending at once if only the validation after the last step is to come."""
        if self._validation_pending and self._loaded_step == trainer.max_steps:
            self._extra_steps = 1
            trainer.fit_loop.epoch_loop.max_steps += self._extra_steps

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Install the handlers after Lightning's own; have Lightning begin with the validation that was cut short."""
        self._saved_at = time.monotonic()
        if self._validation_pending:
            validation: Any = trainer.fit_loop.epoch_loop.val_loop
            validation.batch_progress.reset()
            validation._restart_stage = RestartStage.RESTARTED_MID_EVALUATION
            self._validation_pending = False
        handle = self._handler(getattr(trainer.strategy.launcher, "kill", None))
        for number in SIGNALS:
            try:
                self._previous[number] = signal.signal(number, handle)
            except ValueError:  # not the main thread: somebody else owns the signals
                return

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time to, at the end, or because of a signal; at optimiser steps only."""
        if trainer.fit_loop._should_accumulate():
            return
        received, late = self._agree(trainer, pl_module)
        # The validation saves; resumed from a save before it, Lightning would leave it out.
        if self._validation_follows(trainer):
            return
        due = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        if received or late or due or self._is_last_step(trainer):
            # Lightning logs the metrics of a batch after this hook, and a resumed run does not log them again.
            trainer._logger_connector.update_train_step_metrics()
            self._save(trainer)
        if received:
            self._stop(received)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stop before the validation if a signal came."""
        if not _is_part_of_training(trainer):
            return
        trainer.fit_loop.epoch_loop.max_steps -= self._extra_steps
        self._extra_steps = 0
        # Ranks may differ by a batch, and all of them take part in every decision.
        batches = sum(count for count in trainer.num_val_batches if count != float("inf"))
        self._common_batches = int(all_reduce_min(torch.tensor(batches, device=_device(pl_module))))
        self._stop_validation(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop inside the validation if a signal came."""
        if _is_part_of_training(trainer) and batch_idx < self._common_batches:
            averages = [callback for callback in trainer.callbacks if isinstance(callback, WeightAveraging)]  # type: ignore[attr-defined]
            self._stop_validation(trainer, pl_module, averages)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save what was validated; stop if a signal came."""
        if not _is_part_of_training(trainer) or trainer.fit_loop._should_accumulate():
            return
        self._save(trainer)
        received, _ = self._agree(trainer, pl_module)
        if received:
            self._stop(received)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stop if a signal came after the last save, else give the signals back.

        To Lightning, which gives back its own before `on_fit_end` and `teardown`.
        """
        received, _ = self._agree(trainer, pl_module)
        if received and self.path.exists():
            self._stop(received)
        self._restore_handlers()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Give the signals back."""
        self._restore_handlers()

    def _handler(self, kill: Callable[[int], None] | None) -> Callable[[int, FrameType | None], None]:
        """What is done on a signal; `kill` passes it on to processes that this one has started."""
        process = os.getpid()

        def handle(number: int, frame: FrameType | None) -> None:
            if os.getpid() != process:  # a data-loading process, which ends with this one
                return
            now = time.monotonic()
            if self._received is None:
                self._received, self._received_at = number, now
                # Ctrl-C reaches every process of the terminal; a scheduler's signal may reach the first one only.
                if number != signal.SIGINT and kill is not None:
                    kill(number)
                log.warning("received %s: saving and stopping", signal.Signals(number).name)
            elif now - self._received_at > ECHO_SECONDS:
                if kill is not None:
                    kill(signal.SIGKILL)
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)

        return handle

    def _agree(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> tuple[int, bool]:
        """Signal that any process received (0: none), and whether a save is due by the clock of process 0."""
        late = (
            trainer.is_global_zero
            and self.every_minutes is not None
            and time.monotonic() - self._saved_at >= 60 * self.every_minutes
        )
        votes = torch.tensor([-(self._received or 0), -int(late)], device=_device(pl_module))
        received, decided = all_reduce_min(votes).tolist()
        return -received, bool(decided)

    def _validation_follows(self, trainer: lightning.Trainer) -> bool:
        loop: Any = trainer.fit_loop
        return loop.epoch_loop._should_check_val_fx(loop._data_fetcher) and not loop.epoch_loop.val_loop.skip

    def _is_last_step(self, trainer: lightning.Trainer) -> bool:
        last_epoch = trainer.current_epoch + 1 == trainer.max_epochs
        return trainer.global_step == trainer.max_steps or (last_epoch and trainer.is_last_batch)

    def _stop_validation(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        averages: Sequence[WeightAveraging] = (),
    ) -> None:
        """Save as before the validation and stop, if a signal came and no step is under way."""
        if trainer.fit_loop._should_accumulate():
            return
        received, _ = self._agree(trainer, pl_module)
        if not received:
            return
        for average in averages:  # the module has its weights for the time of the validation
            average.on_validation_epoch_end(trainer, pl_module)
        self._validation_pending = True
        self._save(trainer)
        self._stop(received)

    def _save(self, trainer: lightning.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self._saved_at = time.monotonic()

    def _stop(self, number: int) -> None:
        previous = self._previous.get(number)
        self._restore_handlers()
        if number not in (signal.SIGINT, signal.SIGTERM) and callable(previous):
            previous(number, None)
        raise TrainingInterrupted(number, self.path)

    def _restore_handlers(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
        self._received = None


def _is_part_of_training(trainer: lightning.Trainer) -> bool:
    """Whether a validation is one between steps, neither the check before them nor a call of `trainer.validate`."""
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


def _device(pl_module: lightning.LightningModule) -> torch.device:
    """Where a tensor that all processes reduce has to be; one process needs no transfer to its accelerator."""
    return pl_module.device if is_distributed() else torch.device("cpu")
