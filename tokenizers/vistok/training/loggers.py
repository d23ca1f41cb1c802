"""Loggers that never stop a run, and whose files continue where a checkpoint stopped."""

import csv
import logging
import netrc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torch import Tensor

from vistok.hub.files import atomic_write

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


class MetricsWriter(ExperimentWriter):
    """Appends to ``metrics.csv``; its head is replaced in one step, so a kill leaves every row that was written."""

    def log_metrics(self, metrics_dict: dict[str, Any], step: int | None = None) -> None:
        """Record a row, unless it repeats the one before: a checkpoint asks for the row of its step ahead of time."""
        super().log_metrics(metrics_dict, step)
        row = {name: str(value) for name, value in self.metrics[-1].items()}
        if row == self._latest:
            self.metrics.pop()
        self._latest = row

    def _check_log_dir_exists(self) -> None:
        """Go on with the rows that are there, where Lightning deletes them."""
        self._latest: dict[str, str] = {}
        path = Path(self.metrics_file_path)
        if path.is_file():
            self.metrics_keys, _ = read_rows(path)

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        write_rows(path, fieldnames, read_rows(path)[1])


class MetricsCSV(CSVLogger):
    """``metrics.csv`` directly in the run folder.

    Args:
        save_dir: Run folder.
        flush_every: Logged steps between writes.
    """

    def __init__(self, save_dir: str, flush_every: int = 50) -> None:
        super().__init__(save_dir, name="", version="", flush_logs_every_n_steps=flush_every)

    @property
    def path(self) -> Path:
        """The file."""
        return Path(self.log_dir) / MetricsWriter.NAME_METRICS_FILE

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """What holds the rows that are not written yet; on the first process only."""
        if self._experiment is None:
            self._experiment = MetricsWriter(self.log_dir)
        return self._experiment

    @rank_zero_only
    def start(self, previous: Path | None = None, step: int = 0) -> None:
        """Begin with the rows of an interrupted run up to its checkpoint, or with none.

        Args:
            previous: ``metrics.csv`` of that run, which may be the one of this run.
            step: Optimiser steps in the checkpoint: rows of later ones are left out, since they come again.
        """
        if previous is None or not previous.is_file():
            self.path.unlink(missing_ok=True)
            return
        names, rows = read_rows(previous)
        write_rows(self.path, names, [row for row in rows if int(row["step"]) < step])


def read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Column names and rows of a CSV file as text, without a last line that was not written to its end."""
    lines = path.read_text().splitlines(keepends=True)
    reader = csv.DictReader(line for line in lines if line.endswith("\n"))
    return list(reader.fieldnames or ()), list(reader)


def write_rows(path: Path, names: list[str], rows: list[dict[str, str]]) -> None:
    """Write a CSV file in one step."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)

    atomic_write(path, write)


class SafeLogger(Logger):
    """Hands everything on to another logger until that raises an error, which is reported; from then on nothing.

    Args:
        logger: Any logger of Lightning.
        label: What the report calls it.
    """

    def __init__(self, logger: Logger, label: str) -> None:
        super().__init__()
        self.logger = logger
        self.label = label
        self.dropped = False

    @property
    def name(self) -> str | None:
        """Name of the experiment."""
        return self.logger.name

    @property
    def version(self) -> int | str | None:
        """Version of the experiment."""
        return self.logger.version

    @property
    def save_dir(self) -> str | None:
        """Folder that the logger writes to."""
        return self.logger.save_dir

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Log numbers of a step."""
        self._attempt(lambda: self.logger.log_metrics(metrics, step))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Log settings."""
        self._attempt(lambda: self.logger.log_hyperparams(params, *args, **kwargs))

    def log_graph(self, model: Any, input_array: Tensor | None = None) -> None:
        """Log the graph of a model."""
        self._attempt(lambda: self.logger.log_graph(model, input_array))

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Learn of a new checkpoint."""
        self._attempt(lambda: self.logger.after_save_checkpoint(checkpoint_callback))

    def save(self) -> None:
        """Write what is in memory."""
        self._attempt(self.logger.save)

    def finalize(self, status: str) -> None:
        """End."""
        self._attempt(lambda: self.logger.finalize(status))

    def log_picture(self, name: str, picture: Image.Image, step: int) -> None:
        """Log a picture where the logger takes pictures, on the first process only."""
        logger = self.logger
        if isinstance(logger, TensorBoardLogger):
            image = np.asarray(picture)
            self._attempt(lambda: logger.experiment.add_image(name, image, step, dataformats="HWC"))
        elif isinstance(logger, WandbLogger):
            self._attempt(lambda: logger.log_image(name, [picture], step=step))

    def log_histogram(self, name: str, values: np.ndarray, step: int) -> None:
        """Log the distribution of values where the logger takes distributions, on the first process only."""
        logger = self.logger
        if isinstance(logger, TensorBoardLogger):
            self._attempt(lambda: logger.experiment.add_histogram(name, values, step))
        elif isinstance(logger, WandbLogger):
            from wandb import Histogram

            self._attempt(lambda: logger.log_metrics({name: Histogram(values.tolist())}, step))  # pyright: ignore

    def _attempt(self, action: Callable[[], object]) -> None:
        if self.dropped:
            return
        try:
            action()
        except Exception as error:  # whatever a logging service raises
            self.dropped = True
            log.warning("logger %s failed and is left out from here on: %r", self.label, error)
