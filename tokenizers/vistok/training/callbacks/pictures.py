"""What a person looks at during training: reconstructions and codebook usage."""

from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from vistok.evaluation.pictures import reconstruction_grid, video_grid
from vistok.evaluation.plots import plot_usage
from vistok.training.loggers import SafeLogger


class Pictures(Callback):
    """At every validation writes a grid original / reconstruction / error and a plot of the codebook usage.

    There is no grid for a tokenizer that decodes the features of a teacher.

    Args:
        folder: Run folder; grids go to ``reconstructions/step_000500.png``, the plot to ``codebook_usage.png``.
        num_images: Held-out images, or clips of videos, on a grid; always the same ones.
    """

    def __init__(self, folder: str | Path, num_images: int = 8) -> None:
        self.folder = Path(folder)
        self.num_images = num_images
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._seen = 0

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep images spread over the whole held-out set: a few of each batch."""
        if outputs is None or pl_module.tokenizer.output != "images":
            return
        for image, reconstruction in zip(batch["images"], outputs.images, strict=True):
            if self._seen in self._wanted(trainer):
                self._pairs.append((image.cpu(), reconstruction.detach().cpu()))
            self._seen += 1

    def _wanted(self, trainer: lightning.Trainer) -> range:
        """Positions spread evenly over the held-out images, so that they show different pictures."""
        loaders = trainer.val_dataloaders
        try:
            total = len(loaders.dataset)  # type: ignore[union-attr]
        except (TypeError, AttributeError):
            total = self.num_images
        return range(0, total, max(total // self.num_images, 1))[: self.num_images]

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Write the pictures; hand the grid and the occurrences of the codes to the loggers."""
        pairs, self._pairs, self._seen = self._pairs, [], 0
        counts = []
        if pl_module.usage is not None:  # None if the codes are continuous
            # All ranks take part in the reduction.
            with pl_module.usage.sync_context():
                counts = pl_module.usage.counts()
        if not trainer.is_global_zero:
            return
        loggers = [logger for logger in trainer.loggers if isinstance(logger, SafeLogger)]
        if pairs:
            originals, reconstructions = (torch.stack(images) for images in zip(*pairs, strict=True))
            draw = video_grid if originals.ndim == 5 else reconstruction_grid
            grid = draw(originals, reconstructions)
            path = self.folder / "reconstructions" / f"step_{trainer.global_step:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            grid.save(path)
            for logger in loggers:
                logger.log_picture("reconstructions", grid, trainer.global_step)
        if counts:
            plot_usage(counts, self.folder / "codebook_usage.png")
            for logger in loggers:
                for position, occurrences in enumerate(counts):
                    logger.log_histogram(f"codebook_usage/{position}", occurrences.numpy(), trainer.global_step)
