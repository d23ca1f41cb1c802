"""Loggers: what they write survives, and none of them stops a run."""

import csv

import numpy as np
import pytest
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from PIL import Image

from vistok.training import loggers
from vistok.training.loggers import MetricsCSV, SafeLogger
from vistok.training.run import train


class Failing(Logger):
    """Works once, then raises."""

    name, version = "failing", 0

    def __init__(self):
        self.calls = 0

    def log_metrics(self, metrics, step=None):
        self.calls += 1
        if self.calls > 1:
            raise ConnectionError("service unavailable")

    def log_hyperparams(self, params):
        pass


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_logger_that_raises_is_reported_once_and_dropped(caplog):
    failing = Failing()
    logger = SafeLogger(failing, "service")
    for step in range(5):
        logger.log_metrics({"loss": 1.0}, step)
    assert failing.calls == 2
    assert caplog.text.count("logger service failed and is left out from here on") == 1
    assert "ConnectionError('service unavailable')" in caplog.text


def test_a_run_goes_on_without_a_logger_that_raises(tiny, caplog):
    config, folder = tiny("run", "trainer.max_steps=4")
    config.logger = {**config.logger, "service": {"_target_": f"{Failing.__module__}.Failing"}}
    assert train(config, folder)["psnr"] > 0
    assert caplog.text.count("logger service failed") == 1
    assert "3" in {row["step"] for row in rows(folder / "metrics.csv")}


def test_a_row_that_repeats_the_one_before_is_written_once(tmp_path):
    logger = MetricsCSV(str(tmp_path))
    for metrics in ({"loss": float("nan")}, {"loss": float("nan")}, {"rate": 1.0}):
        logger.log_metrics(metrics, 3)
        logger.save()
    assert rows(logger.path) == [{"loss": "nan", "rate": "", "step": "3"}, {"loss": "", "rate": "1.0", "step": "3"}]


def test_a_resumed_file_has_the_rows_of_before_the_checkpoint_as_they_were_written(tmp_path):
    previous = tmp_path / "before.csv"
    # The kill came while the row of step 12 was written.
    previous.write_text("loss,step\r\n0.30000001,0\r\n0.2,1\r\n0.1,2\r\n0.05,1")
    logger = MetricsCSV(str(tmp_path))
    logger.start(previous, step=2)
    logger.log_metrics({"loss": 0.1, "val": 7}, 2)
    logger.save()
    assert [row["loss"] for row in rows(logger.path)] == ["0.30000001", "0.2", "0.1"]
    assert [row["val"] for row in rows(logger.path)] == ["", "", "7"]


def test_a_kill_while_columns_are_added_leaves_the_rows(tmp_path, monkeypatch):
    logger = MetricsCSV(str(tmp_path))
    logger.log_metrics({"loss": 1.0}, 0)
    logger.save()

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(csv.DictWriter, "writerows", killed)
    logger.log_metrics({"val": 1.0}, 1)
    with pytest.raises(KeyboardInterrupt):
        logger.save()
    assert rows(logger.path) == [{"loss": "1.0", "step": "0"}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_pictures_and_histograms_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = SafeLogger(TensorBoardLogger(str(tmp_path), name="", version=""), "tensorboard")
    logger.log_picture("grid", Image.new("RGB", (4, 3)), step=5)
    logger.log_histogram("usage", np.arange(9), step=5)
    logger.save()
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(image.step, image.width, image.height) for image in events.Images("grid")] == [(5, 4, 3)]
    assert events.Histograms("usage")[0].histogram_value.num == 9


def test_pictures_and_histograms_reach_an_offline_wandb(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    logger = SafeLogger(loggers.wandb(str(tmp_path), project="test"), "wandb")
    logger.log_picture("grid", Image.new("RGB", (4, 3)), step=5)
    logger.log_histogram("usage", np.arange(9), step=5)
    logger.log_metrics({"loss": 1.0}, 6)
    experiment = logger.logger.experiment
    experiment.finish()
    assert not logger.dropped
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/grid_*.png"))
