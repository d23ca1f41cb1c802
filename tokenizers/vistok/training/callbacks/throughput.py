"""Images per second on the progress bar and in the log."""

import time
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from vistok.metric.image import num_frames


class Throughput(Callback):
    """Measures training images, or frames of videos, per second over all ranks, without the time spent validating.

    Args:
        every: Batches per measurement.
    """

    def __init__(self, every: int = 20) -> None:
        self.every = every
        self.images = 0
        self.seconds = 0.0
        self._started: float | None = None
        self._window: tuple[int, float] = (0, 0.0)

    @property
    def images_per_second(self) -> float:
        """Mean over the training so far, without its first batch."""
        return self.images / self.seconds if self.seconds else float("nan")

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; time runs from the end of one batch to the end of the next, so loading is included."""
        now = time.perf_counter()
        if self._started is not None:
            images, seconds = num_frames(batch["images"]) * trainer.world_size, now - self._started
            self.images += images
            self.seconds += seconds
            self._window = (self._window[0] + images, self._window[1] + seconds)
            if (trainer.fit_loop.total_batch_idx + 1) % self.every == 0:
                pl_module.log("images/s", self._window[0] / self._window[1], prog_bar=True)
                self._window = (0, 0.0)
        self._started = now

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start a new measurement: validation time does not count."""
        self._started = None
