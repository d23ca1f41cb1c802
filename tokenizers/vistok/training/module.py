"""The Lightning module that trains every tokenizer."""

import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities import GradClipAlgorithmType
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from vistok import distributed
from vistok.config import config_of
from vistok.loss.adversarial import AdversarialLoss, adaptive_weight
from vistok.loss.reconstruction import ReconstructionLoss
from vistok.loss.schedule import make_schedule
from vistok.loss.text import text_features
from vistok.metric.codebook_usage import CodebookUsage
from vistok.metric.image import psnr, to_frames
from vistok.tokenizer import Reconstruction, Tokenizer
from vistok.training.checkpoint import differences

log = logging.getLogger(__name__)

# Of a non-finite step, per run and rank: enough to reproduce it, not enough to fill a disk.
MAX_SAVED_BATCHES = 3
# The discriminator's terms, which are no part of the tokenizer's loss.
DISCRIMINATOR_TERMS = ("discriminator", "lecam", "r1")


class TokenizerModule(lightning.LightningModule):
    """Trains a tokenizer: reconstruction loss plus the quantizer's losses, each with its weight.

    With an adversarial loss there are two players, but one backward pass and one optimiser, see `AdversarialLoss`. So
    ``global_step`` counts optimiser steps, and accumulation, precision and DDP work as Lightning documents them. Each
    player's gradient is clipped by its own norm.

    The quantizer's state changes once per accepted optimiser step. A step whose gradient is not finite is skipped: it
    reaches neither weights nor codebook, nor what the adversarial loss averages. The log names the term and the batch,
    and the batch is saved in the folder ``nonfinite`` of the run.

    Args:
        tokenizer: What is trained.
        loss: Compares reconstructions with images; its parameters are trained too.
        optimizer: Makes the optimiser from a module (so that it can leave biases and norms out of weight decay).
        scheduler: Makes the learning-rate schedule, stepped per optimiser step, from ``(optimizer, total_steps)``.
        adversarial: The discriminator, with its losses and settings; None trains without one.
        schedules: By the name of a loss term, a schedule (see `vistok.loss.make_schedule`) of a factor of its weight; a
            term is not computed while it is zero.
        whiten: Start the projection to codes from whitened principal components of the first batch, see
            `Tokenizer.whiten_projection`.
        decorrelation: Weight of the mean squared correlation between channels of the features that enter the quantizer.
        channels_last: Keep convolution weights and images in channels-last memory format, that of the kernels of GPUs.
        max_skipped_steps: Stop after this many non-finite steps in a row.
        text_encoder: For decoders that are given texts, see `vistok.loss.TextFeatures`.
        freeze: Names of modules of the tokenizer that do not learn: ``encoder``, ``to_codes``, ``quantizer``,
            ``from_codes``, ``decoder``. A frozen quantizer keeps its codebook too.

    Attributes:
        step_is_finite: Whether the last optimiser step was accepted.
        last_indices: Indices of the last training batch, None before the first.

    Raises:
        ValueError: If a schedule has the name of no term, `freeze` that of no module, or the discriminator or the text
            encoder does not fit the tokenizer.
    """

    # Of the strategies that can resume one another's checkpoints.
    strategy_name = "ddp"

    def __init__(
        self,
        tokenizer: Tokenizer,
        loss: ReconstructionLoss,
        optimizer: Callable[[nn.Module], Optimizer],
        scheduler: Callable[..., LRScheduler],
        adversarial: AdversarialLoss | None = None,
        schedules: Mapping[str, Any] | None = None,
        whiten: bool = True,
        decorrelation: float = 0.0,
        channels_last: bool = True,
        max_skipped_steps: int = 20,
        text_encoder: nn.Module | None = None,
        freeze: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.loss = loss
        loss.attach(tokenizer)
        self.adversarial = adversarial
        self.frozen = tuple(freeze)
        self.text_features = text_features(text_encoder, tokenizer.decoder)
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.whiten = whiten
        self.decorrelation = decorrelation
        self.max_skipped_steps = max_skipped_steps
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self.step_is_finite = True
        self.last_indices: Tensor | None = None
        self._restored_random_states: dict[str, Any] | None = None
        self._training_random_states: dict[str, Any] | None = None
        # Of the running optimiser step: each batch with the values of its terms, and what no gradient reaches.
        self._batches: list[tuple[Mapping[str, Any], dict[str, Tensor]]] = []
        self._idle: list[nn.Parameter] = []
        self.usage = CodebookUsage.of(tokenizer.quantizer)
        self._freeze(self.frozen)
        if channels_last:
            tokenizer.to(memory_format=torch.channels_last)
        if adversarial is not None:
            discriminator = adversarial.discriminator
            if tokenizer.decoder.output != "images":
                raise ValueError(
                    f"{type(tokenizer.decoder).__name__} decodes features, a discriminator judges images: use "
                    "discriminator=none"
                )
            if discriminator.channels != tokenizer.channels:
                raise ValueError(
                    f"the discriminator takes {discriminator.channels} channels, the images have {tokenizer.channels}: "
                    f"set discriminator.channels={tokenizer.channels}"
                )
            if channels_last and discriminator.layout == "image":
                discriminator.to(memory_format=torch.channels_last)
        scheduled = {**loss.weights, **tokenizer.quantizer.loss_weights}
        scheduled |= {"decorrelation": decorrelation} if decorrelation else {}
        scheduled |= {"adversarial": adversarial.weight} if adversarial is not None else {}
        if unknown := set(schedules or {}) - set(scheduled):
            raise ValueError(
                f"module.schedules.{min(unknown)}: there is no such term; this run has {', '.join(sorted(scheduled))}"
            )
        self.schedules = {name: make_schedule(config) for name, config in (schedules or {}).items()}

    def _freeze(self, names: Sequence[str]) -> None:
        """Take the gradients from modules."""
        modules = dict(self.tokenizer.named_children())
        if unknown := set(names) - set(modules):
            raise ValueError(f"module.freeze: there is no {min(unknown)}; this tokenizer has {', '.join(modules)}")
        for name in names:
            modules[name].requires_grad_(False)
        if not any(parameter.requires_grad for parameter in self.tokenizer.parameters()):
            raise ValueError(f"module.freeze={list(names)} leaves nothing to train: leave out one of them")
        if "decoder" in names and self.adversarial is not None and self.adversarial.max_adaptive_weight is not None:
            raise ValueError(
                "the adaptive weight of the adversarial term needs a decoder that learns: set "
                "discriminator.adversarial.max_adaptive_weight=null, or leave decoder out of module.freeze"
            )
        if "to_codes" in names and self.loss.adaptive:
            raise ValueError(
                f"the adaptive weight of {min(self.loss.adaptive)} needs a projection that learns: set "
                "max_adaptive_weight=null, or leave to_codes out of module.freeze"
            )
        self.train()

    def train(self, mode: bool = True) -> "TokenizerModule":
        """Frozen modules stay in evaluation mode, but for a quantizer, which in training passes gradients on."""
        super().train(mode)
        for name in self.frozen:
            if name != "quantizer":
                getattr(self.tokenizer, name).eval()
        return self

    def setup(self, stage: str) -> None:
        """Refuse a discriminator under strategies that keep a share of its parameters on each rank."""
        strategy = self.trainer.strategy
        if self.adversarial is not None and isinstance(strategy, FSDPStrategy | DeepSpeedStrategy):
            raise ValueError(
                f"{type(strategy).__name__} shards parameters, and the discriminator's would get gradients of the "
                "tokenizer's loss: use trainer.strategy=fsdp of train.py, trainer.strategy=ddp, or discriminator=none"
            )

    def forward(self, batch: Mapping[str, Any]) -> Reconstruction:
        """Reconstruct the ``images`` of a batch, in [-1, 1], with its ``labels`` or ``texts`` where they are used."""
        texts = self.text_features(batch) if self.text_features is not None else None
        return self.tokenizer(self._in_memory_format(batch["images"]), self.tokenizer.labels_of(batch), texts)

    def _in_memory_format(self, images: Tensor) -> Tensor:
        # Channels last is an order of four axes; a network of videos sees frames, and puts them in order by itself.
        return images.contiguous(memory_format=self.memory_format if images.ndim == 4 else torch.contiguous_format)

    def whole_tokenizer(self) -> Tokenizer:
        """The tokenizer with all of its parameters. Every rank calls it."""
        return self.tokenizer

    def weights(self) -> dict[str, float]:
        """Weight of every term in the running optimiser step; those of weight zero are not computed."""
        quantizer_weights = self.tokenizer.quantizer.loss_weights
        weights = {**self.loss.weights, **quantizer_weights, "decorrelation": self.decorrelation}
        if self.adversarial is not None:
            weights |= self.adversarial.weights(self.global_step, self._total_steps)
        for name, schedule in self.schedules.items():
            weights[name] *= schedule(self.global_step, self._total_steps)
        return weights

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Loss of one batch: the sum of what both players minimise."""
        images = batch["images"]
        weights: dict[str, Any] = self.weights()
        active = {name for name, weight in weights.items() if weight}
        reconstruction = self(batch)
        self.last_indices = reconstruction.quantized.indices
        terms = dict(self.loss(reconstruction, batch, active))
        measured: dict[str, Tensor] = {}
        rest = [weights[name] * value for name, value in terms.items() if name not in self.loss.adaptive]
        for name, maximum in self.loss.adaptive.items():
            if name in terms and rest:
                layer = next(self.tokenizer.to_codes.parameters())
                ratio = adaptive_weight(torch.stack(rest).sum(), terms[name], layer, maximum, self._loss_scale())
                measured[f"adaptive_weight/{name}"] = ratio
                weights[name] = weights[name] * ratio
        if self.adversarial is not None and "discriminator" in active:
            game, logged = self.adversarial(reconstruction.images, images, active)
            measured |= logged
            if "adversarial" in game and self.adversarial.max_adaptive_weight is not None:
                measured["adaptive_weight"] = adaptive_weight(
                    torch.stack([weights[name] * value for name, value in terms.items()]).sum(),
                    game["adversarial"],
                    self.tokenizer.decoder.last_layer,
                    self.adversarial.max_adaptive_weight,
                    self._loss_scale(),
                )
                weights["adversarial"] = weights["adversarial"] * measured["adaptive_weight"]
            terms.update(game)
        terms.update(reconstruction.quantized.losses)
        if "decorrelation" in active:
            terms["decorrelation"] = mean_squared_correlation(reconstruction.features)
        weighted = {name: weights[name] * value.float() for name, value in terms.items() if name in active}
        total = torch.stack([value for name, value in weighted.items() if name not in DISCRIMINATOR_TERMS]).sum()
        with torch.no_grad():
            values = {name: value.detach() for name, value in terms.items()} | measured
            self._batches.append((batch, values))
            logged = {f"train/{name}": value for name, value in values.items()}
            logged |= {f"train/weighted/{name}": weights[name] * value.detach() for name, value in terms.items()}
            self.log_dict(logged, batch_size=len(images))
            self.log("loss", total.detach(), prog_bar=True, logger=False, batch_size=len(images))
            self.log("train/loss", total.detach(), batch_size=len(images))
            if self.tokenizer.output == "images":
                decibels = psnr(to_frames(reconstruction.images), to_frames(images)).mean()
                self.log("psnr", decibels, prog_bar=True, logger=False, batch_size=len(images))
        for name in DISCRIMINATOR_TERMS:
            if name in weighted:
                total = total + weighted[name]
        return self._reach_all(total, weights)

    def _reach_all(self, total: Tensor, weights: Mapping[str, Any]) -> Tensor:
        """Give every parameter a gradient, zero if need be, because DDP waits for all of them.

        Only a term that is switched off for now leaves parameters out, so otherwise nothing is looked for.
        """
        self._idle = []
        if distributed.is_distributed() and not all(
            weights.get(name, 1) for name in (*self.schedules, "discriminator")
        ):
            reached = parameters_under(total)
            self._idle = [value for value in self.parameters() if value.requires_grad and value not in reached]
            for parameter in self._idle:
                total = total + 0 * parameter.sum()
        return total

    def _loss_scale(self) -> float:
        """What float16 training multiplies the loss by; 1 with other precisions."""
        plugin = self.trainer.precision_plugin
        scaler = plugin.scaler if isinstance(plugin, MixedPrecision) else None
        return scaler.get_scale() if scaler is not None else 1.0

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> Any:
        """Metrics of one held-out batch; None if none of its pictures could be read."""
        images = batch["images"]
        if not len(images):
            return None
        reconstruction = self(batch)
        if self.tokenizer.output == "images":
            decibels = psnr(to_frames(reconstruction.images), to_frames(images)).mean()
            self.log("val/psnr", decibels, prog_bar=True, sync_dist=True, batch_size=len(images))
        for name, value in self.loss(reconstruction, batch).items():
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
        """One optimiser with the parameters of both players, one schedule stepped with it."""
        optimizer = self.make_optimizer(Generator(self.tokenizer, self.loss))
        if self.adversarial is not None:
            self.adversarial.add_to(optimizer)
        self._total_steps = int(self.trainer.estimated_stepping_batches)
        scheduler = self.make_scheduler(optimizer, total_steps=self._total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Drop the gradients of a step that is not finite, so that the optimiser leaves everything as it is."""
        # Nothing has reached these, so nothing may move them: no weight decay either.
        for parameter in self._idle:
            parameter.grad = None
        norms = {
            name: self._norm(gradients)
            for name, parameters in self._parts().items()
            if (gradients := [parameter.grad for parameter in parameters if parameter.grad is not None])
        }
        # DDP has averaged the gradients, so every rank comes to the same decision.
        self.step_is_finite = bool(torch.stack(list(norms.values())).isfinite().all())
        if self.step_is_finite:
            self.skipped_in_a_row = 0
            ours = torch.stack([norm for name, norm in norms.items() if name != "discriminator"])
            self.log("train/grad_norm", torch.linalg.vector_norm(ours))
            self.log_dict({f"train/grad_norm/{name}": norm for name, norm in norms.items()})
            return
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        reason = self._explain_skip([name for name, norm in norms.items() if not norm.isfinite()])
        log.warning(
            "step %d skipped: its gradient is not finite: %s (%d skipped so far)",
            self.global_step,
            reason,
            self.skipped_steps,
        )
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        if self.skipped_in_a_row >= self.max_skipped_steps:
            raise FloatingPointError(
                f"{self.skipped_in_a_row} steps in a row had a gradient that is not finite, the last because of "
                f"{reason}. To go on, lower optimizer.lr, set trainer.gradient_clip_val=1, or use "
                "trainer.precision=32-true; checkpoints/last.ckpt is from before"
            )

    def _parts(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by the part of the model that they belong to."""
        parts: dict[str, list[nn.Parameter]] = {}
        for name, module in self.tokenizer.named_children():
            part = {"to_codes": "encoder", "from_codes": "decoder"}.get(name, name)
            parts.setdefault(part, []).extend(module.parameters())
        parts["loss"] = list(self.loss.parameters())
        if self.adversarial is not None:
            parts["discriminator"] = list(self.adversarial.parameters())
        return parts

    def _explain_skip(self, parts: list[str]) -> str:
        """Say which term of which batch is not finite, and save that batch.

        Args:
            parts: Parts of the model whose gradient is not finite.
        """
        bad = [[name for name, value in values.items() if not value.isfinite().all()] for _, values in self._batches]
        ours = torch.tensor(float(any(bad)), device=self.device)
        # Only a rank that has seen something knows the batch; if none has, it happened in a backward pass.
        elsewhere = bool(distributed.all_reduce_sum(ours.clone()) > ours)
        if not any(bad) and elsewhere:
            return "a term on another rank"
        if not any(bad) and self._loss_scale() != 1:
            return f"the scale {self._loss_scale():g} of {self.trainer.precision} is too large, it is lowered now"
        where = f"terms {', '.join(sorted(set().union(*bad)))}" if any(bad) else f"backward pass of {', '.join(parts)}"
        culprits = [position for position, names in enumerate(bad) if names or not any(bad)]
        keys = [str(key) for position in culprits for key in self._batches[position][0].get("keys", ())]
        return f"{where}; batch {', '.join(keys)}" + "".join(self._save_batch(position) for position in culprits)

    def _save_batch(self, position: int) -> str:
        """Save a batch of the running step, unless enough have been; says where, for a message."""
        folder = Path(self.trainer.default_root_dir) / "nonfinite"
        rank = self.trainer.global_rank
        if len(list(folder.glob(f"*_rank{rank}_*.json"))) >= MAX_SAVED_BATCHES:
            return ""
        folder.mkdir(parents=True, exist_ok=True)
        batch, values = self._batches[position]
        path = folder / f"step{self.global_step:06d}_rank{rank}_batch{position}.safetensors"
        save_file({name: value.contiguous() for name, value in batch.items() if isinstance(value, Tensor)}, path)
        record = {
            "step": self.global_step,
            "keys": batch.get("keys"),
            "texts": batch.get("texts"),
            "precision": self.trainer.precision,
            "terms": {name: str(value.item()) for name, value in values.items()},
        }
        path.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
        return f"; saved as {path}"

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the tokenizer's gradient as the trainer says and the discriminator's by its own norm."""
        theirs: list[nn.Parameter] = []
        if self.adversarial is not None:
            theirs = list(self.adversarial.parameters())
            if self.adversarial.clip is not None:
                nn.utils.clip_grad_norm_(theirs, self.adversarial.clip)
        if gradient_clip_val:
            # Not by Lightning, which refuses fused optimisers even where there is no scaler.
            excluded = set(theirs)
            ours = [value for group in optimizer.param_groups for value in group["params"] if value not in excluded]
            by_value = gradient_clip_algorithm == GradClipAlgorithmType.VALUE
            (nn.utils.clip_grad_value_ if by_value else self._clip)(ours, gradient_clip_val)

    def _norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Norm of gradients together."""
        return nn.utils.get_total_norm(gradients)

    def _clip(self, parameters: Sequence[nn.Parameter], limit: float) -> None:
        """Scale gradients down to a norm of at most `limit`."""
        nn.utils.clip_grad_norm_(parameters, limit)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Step the optimiser, then apply what quantizer and adversarial loss collected in the batches of this step."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self._batches.clear()
        learns = self.step_is_finite and "quantizer" not in self.frozen
        (self.tokenizer.quantizer.update if learns else self.tokenizer.quantizer.discard)()
        if self.adversarial is not None:
            (self.adversarial.update if self.step_is_finite else self.adversarial.discard)()
        if learns:
            for parameter, rows in self.tokenizer.quantizer.touched_codes:
                clear_moments(optimizer, parameter, rows)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the config and the random states, so that a resumed run continues bit for bit."""
        checkpoint["vistok_tokenizer"] = json.dumps(config_of(self.tokenizer))
        checkpoint["vistok_discriminator"] = json.dumps(self._discriminator_config())
        # At a validation those of before it, which training goes on with.
        checkpoint["vistok_random_states"] = self._training_random_states or random_states()
        checkpoint["vistok_skipped_steps"] = self.skipped_steps
        checkpoint["vistok_strategy"] = self.strategy_name
        # Rows that are still in memory would be missing after a crash, and a resumed run does not log them again.
        for logger in self.trainer.loggers:
            logger.save()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another architecture or strategy; keep its random states for the first batch."""
        saved = json.loads(checkpoint.get("vistok_tokenizer", "null"))
        if saved is None:
            raise ValueError("this checkpoint was not written by vistok: ckpt= resumes runs of train.py only")
        changes = list(differences(saved, json.loads(json.dumps(config_of(self.tokenizer)))))
        if changes:
            raise ValueError(
                "the checkpoint was trained with another tokenizer; resume with the overrides of its run. "
                "Checkpoint / now: " + "; ".join(changes)
            )
        saved = json.loads(checkpoint["vistok_discriminator"])
        changes = list(differences(saved, json.loads(json.dumps(self._discriminator_config()))))
        if changes:
            raise ValueError(
                "the checkpoint was trained with another discriminator; resume with the overrides of its run. "
                "Checkpoint / now: " + "; ".join(changes)
            )
        if (strategy := checkpoint.get("vistok_strategy", TokenizerModule.strategy_name)) != self.strategy_name:
            raise ValueError(
                f"the checkpoint was written under trainer.strategy={strategy}, which orders the optimiser's state in "
                f"another way than {self.strategy_name}: resume with that strategy"
            )
        self._restored_random_states = checkpoint["vistok_random_states"]
        self.skipped_steps = checkpoint["vistok_skipped_steps"]

    def _discriminator_config(self) -> Any:
        return config_of(self.adversarial.discriminator) if self.adversarial is not None else None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Restore the random states only now: whatever ran between loading and here may have drawn numbers."""
        if self.whiten and self.global_step == 0 and batch_idx == 0:
            self.tokenizer.whiten_projection(self._in_memory_format(batch["images"]))
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


class Generator(nn.Module):
    """The tokenizer and its loss, as one module for the optimiser.

    Args:
        tokenizer: See `TokenizerModule`.
        loss: Likewise.
    """

    def __init__(self, tokenizer: Tokenizer, loss: nn.Module) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.loss = loss

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay would harm, see `Tokenizer.no_weight_decay`."""
        return {f"tokenizer.{name}" for name in self.tokenizer.no_weight_decay()}


def parameters_under(loss: Tensor) -> set[Tensor]:
    """Leaves of the graph of a loss: the parameters that its backward pass reaches."""
    found, seen, waiting = set(), set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(leaf := getattr(node, "variable", None), Tensor):
            found.add(leaf)
        waiting += [function for function, _ in node.next_functions]
    return found


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
