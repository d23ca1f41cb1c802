"""Loggers that never stop a run."""

import logging
import netrc
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, WandbLogger

log = logging.getLogger(__name__)


def wandb(save_dir: str, offline: bool | None = None, **kwargs: Any) -> WandbLogger:
    """Weights & Biases; offline unless an account is set up.

    Args:
        save_dir: Run folder.
        offline: None decides by whether an API key is found in WANDB_API_KEY or ``~/.netrc``.
        kwargs: Passed on to `lightning.pytorch.loggers.WandbLogger`.
    """
    if offline is None:
        offline = os.environ.get("WANDB_MODE") != "online" and not has_wandb_account()
        if offline:
            log.info("no wandb account found: logging offline into %s; upload later with `wandb sync`", save_dir)
    Path(save_dir).mkdir(parents=True, exist_ok=True)
    return WandbLogger(save_dir=save_dir, offline=offline, **kwargs)


def has_wandb_account() -> bool:
    """Whether an API key of wandb is set in the environment or in the user's netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False


class MetricsCSV(CSVLogger):
    """``metrics.csv`` directly in the run folder.

    Args:
        save_dir: Run folder.
        flush_every: Logged steps between writes.
    """

    def __init__(self, save_dir: str, flush_every: int = 50) -> None:
        super().__init__(save_dir, name="", version="", flush_logs_every_n_steps=flush_every)
