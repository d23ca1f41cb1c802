"""The Lightning module that trains every tokenizer."""

import json
import logging
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from vistok.config import config_of
from vistok.loss import ReconstructionLoss
from vistok.metric.codebook_usage import CodebookUsage
from vistok.metric.image import psnr
from vistok.tokenizer import Reconstruction, Tokenizer

log = logging.getLogger(__name__)


class TokenizerModule(lightning.LightningModule):
    """Trains a tokenizer: reconstruction loss plus the quantizer's losses, each with its weight.

    The quantizer's state changes once per accepted optimiser step. A step whose gradient is not finite is skipped:
    it reaches neither weights nor codebook.

    Args:
        tokenizer: What is trained.
        loss: Compares reconstructions with images.
        optimizer: Makes the optimiser from the module (so that it can leave biases and norms out of weight decay).
        scheduler: Makes the learning-rate schedule, stepped per optimiser step, from ``(optimizer, total_steps)``.
        whiten: Start the projection to codes from whitened principal components of the first batch, see
            `Tokenizer.whiten_projection`.
        decorrelation: Weight of the mean squared correlation between channels of the features that enter the quantizer.
        channels_last: Keep convolution weights and images in channels-last memory format, which is faster on CPU and
            GPU.
        max_skipped_steps: Stop after this many non-finite steps in a row.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        loss: ReconstructionLoss,
        optimizer: Callable[[torch.nn.Module], Optimizer],
        scheduler: Callable[..., LRScheduler],
        whiten: bool = True,
        decorrelation: float = 0.0,
        channels_last: bool = True,
        max_skipped_steps: int = 20,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.loss = loss
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.whiten = whiten
        self.decorrelation = decorrelation
        self.max_skipped_steps = max_skipped_steps
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self._step_is_finite = True
        self._restored_random_states: dict[str, Any] | None = None
        self._training_random_states: dict[str, Any] | None = None
        self.usage = CodebookUsage.of(tokenizer.quantizer)
        if channels_last:
            tokenizer.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Reconstruction:
        """Reconstruct images in [-1, 1]; only class-specific quantizers take labels."""
        return self.tokenizer(images.contiguous(memory_format=self.memory_format), labels)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Loss of one batch."""
        images = batch["images"]
        reconstruction = self(images, self.tokenizer.labels_of(batch))
        terms = dict(self.loss(reconstruction.images, images))
        terms.update(reconstruction.quantized.losses)
        if self.decorrelation:
            terms["decorrelation"] = mean_squared_correlation(reconstruction.features)
        weights = {**self.loss.weights, **self.tokenizer.quantizer.loss_weights, "decorrelation": self.decorrelation}
        total = torch.stack([weights[name] * value.float() for name, value in terms.items() if weights[name]]).sum()
        with torch.no_grad():
            values = {f"train/{name}": value.detach() for name, value in terms.items()}
            values |= {f"train/weighted/{name}": weights[name] * value.detach() for name, value in terms.items()}
            self.log_dict(values, batch_size=len(images))
            self.log("loss", total.detach(), prog_bar=True, logger=False, batch_size=len(images))
            self.log("train/loss", total.detach(), batch_size=len(images))
            self.log(
                "psnr", psnr(reconstruction.images, images).mean(), prog_bar=True, logger=False, batch_size=len(images)
            )
        return total

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> Any:
        """Metrics of one held-out batch; None if none of its pictures could be read."""
        images = batch["images"]
        if not len(images):
            return None
        reconstruction = self(images, self.tokenizer.labels_of(batch))
        self.log(
            "val/psnr",
            psnr(reconstruction.images, images).mean(),
            prog_bar=True,
            sync_dist=True,
            batch_size=len(images),
        )
        for name, value in self.loss(reconstruction.images, images).items():
            self.log(f"val/{name}", value, sync_dist=True, batch_size=len(images))
        if self.usage is not None:
            self.usage.update(reconstruction.quantized.indices)
        return reconstruction

    def on_validation_epoch_end(self) -> None:
        """Log the codebook usage of the whole held-out set."""
        if self.usage is None:
            return
        usage = self.usage.compute()
        self.log_dict(
            {f"val/{name}": float(usage[name]) for name in ("utilisation", "perplexity", "entropy_bits")},
            rank_zero_only=True,
        )

    def configure_optimizers(self) -> Any:
        """One optimiser, one schedule stepped with it."""
        optimizer = self.make_optimizer(self.tokenizer)
        total_steps = int(self.trainer.estimated_stepping_batches)
        scheduler = self.make_scheduler(optimizer, total_steps=total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Drop the gradients of a step that is not finite, so that the optimiser leaves everything as it is."""
        gradients = [parameter.grad for parameter in self.tokenizer.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        # DDP has averaged the gradients, so every rank comes to the same decision.
        self._step_is_finite = bool(torch.isfinite(norm))
        if self._step_is_finite:
            self.skipped_in_a_row = 0
            self.log("train/grad_norm", norm)
            return
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        log.warning(
            "step %d skipped: its gradient is not finite (%d skipped so far)", self.global_step, self.skipped_steps
        )
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        if self.skipped_in_a_row >= self.max_skipped_steps:
            raise FloatingPointError(
                f"{self.skipped_in_a_row} steps in a row had a gradient that is not finite: lower optimizer.lr, set "
                "trainer.gradient_clip_val=1, or use trainer.precision=32-true; checkpoints/last.ckpt is from before"
            )

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Step the optimiser, then apply what the quantizer collected in the batches of this step."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        quantizer = self.tokenizer.quantizer
        if not self._step_is_finite:
            quantizer.discard()
            return
        quantizer.update()
        for parameter, rows in quantizer.touched_codes:
            clear_moments(optimizer, parameter, rows)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the config and the random states, so that a resumed run continues bit for bit."""
        checkpoint["vistok_tokenizer"] = json.dumps(config_of(self.tokenizer))
        # At a validation those of before it, which training goes on with.
        checkpoint["vistok_random_states"] = self._training_random_states or random_states()
        checkpoint["vistok_skipped_steps"] = self.skipped_steps
        # Rows that are still in memory would be missing after a crash, and a resumed run does not log them again.
        for logger in self.trainer.loggers:
            logger.save()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another architecture; keep its random states for the first batch."""
        saved = json.loads(checkpoint.get("vistok_tokenizer", "null"))
        if saved is None:
            raise ValueError("this checkpoint was not written by vistok: ckpt= resumes runs of train.py only")
        differences = list(_differences(saved, json.loads(json.dumps(config_of(self.tokenizer)))))
        if differences:
            raise ValueError(
                "the checkpoint was trained with another tokenizer; resume with the overrides of its run. "
                "Checkpoint / now: " + "; ".join(differences)
            )
        self._restored_random_states = checkpoint["vistok_random_states"]
        self.skipped_steps = checkpoint["vistok_skipped_steps"]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Restore the random states only now: whatever ran between loading and here may have drawn numbers."""
        if self.whiten and self.global_step == 0 and batch_idx == 0:
            self.tokenizer.whiten_projection(batch["images"].contiguous(memory_format=self.memory_format))
        if self._restored_random_states is not None:
            set_random_states(self._restored_random_states)
            self._restored_random_states = None

    def on_validation_start(self) -> None:
        """Put the random states aside, so that validating more or less often does not change the training."""
        if self.usage is not None:
            self.usage.reset()
        self._training_random_states = random_states()

    def on_validation_end(self) -> None:
        """Take the random states up again."""
        if self._training_random_states is not None:
            set_random_states(self._training_random_states)
        self._training_random_states = None


@torch.no_grad()
def clear_moments(optimizer: Optimizer, parameter: Tensor, rows: Tensor) -> None:
    """Zero what an optimiser remembers of some rows of a parameter, so that they start as in its first step.

    Args:
        optimizer: Its state of the parameter may still be empty.
        parameter: One of those it optimises.
        rows: int64 ``(m,)``, along the first axis.
    """
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value[rows] = 0


def mean_squared_correlation(features: Float[Tensor, "b d *grid"]) -> Float[Tensor, ""]:
    """Mean over pairs of channels of their squared correlation over batch and grid, in [0, 1]; 0 for one channel."""
    channels = features.shape[1]
    if channels == 1:
        return features.new_zeros(())
    rows = features.float().movedim(1, 0).flatten(1)
    rows = F.normalize(rows - rows.mean(1, keepdim=True), dim=1)
    correlations = rows @ rows.T
    return (correlations.square().sum() - correlations.diagonal().square().sum()) / (channels * (channels - 1))


def random_states() -> dict[str, Any]:
    """States of all global random generators, as plain values and tensors that load without pickle."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    states = {
        "python": list(random.getstate()[1]),
        "python_gauss": random.getstate()[2],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def set_random_states(states: Mapping[str, Any]) -> None:
    """Inverse of `random_states`; a different number of GPUs is reported, since it cannot give the same numbers."""
    random.setstate((3, tuple(states["python"]), states["python_gauss"]))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"].cpu())
    cuda = states.get("cuda", [])
    if torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in cuda])
    elif len(cuda) != (torch.cuda.device_count() if torch.cuda.is_available() else 0):
        log.warning(
            "the checkpoint has random states of %d GPUs: the resumed run draws other random numbers", len(cuda)
        )


def _differences(saved: Any, now: Any, where: str = "") -> Iterator[str]:
    if isinstance(saved, dict) and isinstance(now, dict):
        for key in sorted(saved.keys() | now.keys()):
            if key != "preprocessing":
                yield from _differences(saved.get(key), now.get(key), f"{where}.{key}" if where else key)
    elif saved != now:
        yield f"{where}={saved} / {now}"
