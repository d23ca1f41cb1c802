"""A callback that ends a run from inside, at a chosen moment; subprocesses import it by its name in a config."""

import os
import signal

from lightning.pytorch.callbacks import Callback


class EndARun(Callback):
    """Sends the own process a signal.

    Args:
        number: Signal; SIGKILL leaves no time for anything.
        hook: ``"batch_start"``, ``"before_step"`` (gradients are there), ``"batch_end"`` or ``"validation"``.
        batch: Number of the training batch, over all epochs, from 1.
        validation_batch: Number of the batch inside the validation after that training batch, from 0.
        rank: Only this process of a run.
        group: Whether the processes that load the data get the signal too.
    """

    def __init__(self, number=signal.SIGKILL, hook="before_step", batch=1, validation_batch=0, rank=0, group=False):
        self.number, self.hook, self.batch = signal.Signals(number), hook, batch
        self.validation_batch, self.rank, self.group = validation_batch, rank, group
        self.validated = 0

    def end(self, trainer, hook):
        if (hook, trainer.fit_loop.total_batch_idx + 1, trainer.global_rank) == (self.hook, self.batch, self.rank):
            (os.killpg if self.group else os.kill)(os.getpgrp() if self.group else os.getpid(), self.number)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.end(trainer, "batch_start")

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.end(trainer, "before_step")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.end(trainer, "batch_end")

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.validated += 1
        if batch_idx == self.validation_batch:
            self.end(trainer, "validation")
