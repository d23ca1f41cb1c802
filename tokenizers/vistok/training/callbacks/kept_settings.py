"""Settings of a run, kept in its checkpoints."""

import json
import logging
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf
from typing_extensions import override

from vistok.training.checkpoint import differences

log = logging.getLogger(__name__)

COMPARED = ("optimizer", "scheduler", "loss", "module", "discriminator", "trainer")
# What a resumed optimiser goes on with, its learning rates at their peak included, is in its state: other values would
# be recorded and have no effect. The form of the schedule is that of the run.
RESTORED = (
    "optimizer.",
    "scheduler.reference_batch",
    "scheduler.batch_scaling",
    *(f"discriminator.adversarial.{name}=" for name in ("lr", "betas", "weight_decay")),
)


class KeptSettings(Callback):
    """Keeps settings in checkpoints, and compares those of a run with the ones of the checkpoint that it goes on from.

    Other settings of the optimiser are refused, since it continues with those of the checkpoint. All others are
    followed, and said.

    Args:
        config: Of the run.
    """

    def __init__(self, config: DictConfig) -> None:
        plain = {name: OmegaConf.to_container(config[name], resolve=True) for name in COMPARED if config.get(name)}
        self.settings = json.loads(json.dumps(plain))

    @override
    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the settings."""
        checkpoint["vistok_settings"] = json.dumps(self.settings)

    @override
    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Compare the settings.

        Raises:
            ValueError: If the optimiser is set otherwise.
        """
        saved = json.loads(checkpoint.get("vistok_settings", "null"))
        if saved is None:  # of before settings were kept
            return
        changed = list(differences(saved, self.settings))
        if lost := [change for change in changed if change.startswith(RESTORED)]:
            raise ValueError(
                "a resumed run goes on with the optimiser of its checkpoint, these would have no effect: leave them "
                "out, or begin a new training from its weights by pretrained.load=RUN. "
                "Checkpoint / now: " + "; ".join(lost)
            )
        log.info(
            "going on from step %d%s",
            checkpoint["global_step"],
            " with other settings than before (checkpoint / now): " + "; ".join(changed) if changed else "",
        )
