"""A training run from config to bundle: reproducible, resumable, and nothing lost when something goes wrong."""

import csv
import json
import re
import signal

import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file
from tiny_runs import QUANTIZERS

import vistok
from vistok.training import run as run_module
from vistok.training.callbacks import TrainingInterrupted
from vistok.training.run import train


def weights(folder):
    return load_file(folder / "bundle" / "model.safetensors")


def assert_equal_weights(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return [
            {key: value for key, value in row.items() if value and not key.startswith("images/s")}
            for row in csv.DictReader(file)
        ]


class Terminate(Callback):
    """Sends the process a signal in the middle of a step."""

    def __init__(self, batch, number):
        self.batch, self.number = batch, number

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx + 1 == self.batch:
            signal.raise_signal(self.number)


def interrupted(config, folder, batch, monkeypatch, number=signal.SIGTERM):
    """Train until a signal comes in batch number `batch`; returns the exception."""
    with monkeypatch.context() as patch:
        patch.setattr(
            run_module,
            "instantiate",
            lambda node, **kwargs: (
                instantiate(node, **{**kwargs, "callbacks": [*kwargs["callbacks"], Terminate(batch, number)]})
                if "callbacks" in kwargs
                else instantiate(node, **kwargs)
            ),
        )
        with pytest.raises(TrainingInterrupted) as caught:
            train(config, folder)
    return caught.value


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_the_same_command_twice_gives_identical_weights(tiny, quantizer):
    folders = []
    for name in ("first", "second"):
        config, folder = tiny(name, *QUANTIZERS[quantizer])
        train(config, folder)
        folders.append(folder)
    assert_equal_weights(*map(weights, folders))
    assert rows(folders[0]) == rows(folders[1])


@pytest.mark.parametrize(
    ("quantizer", "workers", "batch", "more"),
    [
        ("fsq", 0, 7, []),
        ("vq_ema", 0, 7, []),
        ("vq_ema", 2, 7, []),
        ("vq_ema", 0, 5, []),
        ("vq_ema", 0, 7, ["encoder.dropout=0.2"]),
        ("vq_ema", 0, 7, ["trainer.accumulate_grad_batches=2", "trainer.max_steps=6"]),
    ],
)
def test_resuming_gives_the_weights_of_the_uninterrupted_run_bit_for_bit(
    tiny, monkeypatch, quantizer, workers, batch, more
):
    overrides = [*QUANTIZERS[quantizer], f"data.num_workers={workers}", *more]
    config, whole = tiny("whole", *overrides)
    train(config, whole)
    config, stopped = tiny("stopped", *overrides)
    interruption = interrupted(config, stopped, batch, monkeypatch)
    assert interruption.checkpoint == stopped / "checkpoints" / "last.ckpt"
    assert not (stopped / "bundle").exists()
    config, resumed = tiny("resumed", *overrides, f"ckpt={interruption.checkpoint}")
    train(config, resumed)
    assert_equal_weights(weights(resumed), weights(whole))
    assert rows(resumed) == rows(whole)


def test_resuming_from_the_checkpoint_of_a_validation_gives_the_same_weights(tiny):
    config, whole = tiny("whole", *QUANTIZERS["vq_ema"])
    train(config, whole)
    best = next((whole / "checkpoints").glob("best*.ckpt"))
    assert 0 < torch.load(best, weights_only=True)["global_step"] <= 12
    config, resumed = tiny("resumed", *QUANTIZERS["vq_ema"], f"ckpt={best}")
    train(config, resumed)
    assert_equal_weights(weights(resumed), weights(whole))


def test_resuming_a_finished_run_gives_its_weights_again(tiny):
    config, whole = tiny("whole", "trainer.val_check_interval=5")
    train(config, whole)
    last = whole / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    assert checkpoint["global_step"] == 12
    name = "tokenizer.to_codes.weight"
    assert not torch.equal(checkpoint["current_model_state"][name], checkpoint["state_dict"][name])
    config, resumed = tiny("resumed", f"ckpt={last}")
    train(config, resumed)
    assert_equal_weights(weights(resumed), weights(whole))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_gives_the_exit_code_of_a_shell(tiny, monkeypatch, number, code):
    config, folder = tiny("run")
    # A shell gives its background jobs another one than Python's.
    handler = signal.getsignal(signal.SIGINT)
    interruption = interrupted(config, folder, 3, monkeypatch, number)
    assert interruption.exit_code == code
    checkpoint = torch.load(interruption.checkpoint, weights_only=True)
    assert checkpoint["global_step"] == 3
    # The handlers are given back.
    assert signal.getsignal(signal.SIGINT) is handler


def test_the_run_folder_holds_everything(tiny):
    config, folder = tiny("run")
    config.callbacks.pictures = {
        "_target_": "vistok.training.callbacks.Pictures",
        "folder": str(folder),
        "num_images": 2,
    }
    metrics = train(config, folder, "python train.py")
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names >= {
        "config.yaml",
        "run.json",
        "metrics.csv",
        "metrics.json",
        "report.md",
        "report.html",
        "codebook_usage.png",
        "reconstructions/step_000004.png",
        "reconstructions/step_000012.png",
        "checkpoints/last.ckpt",
        "bundle/config.json",
        "bundle/model.safetensors",
        "bundle/README.md",
    }
    assert any(name.startswith("checkpoints/best") for name in names)
    record = json.loads((folder / "run.json").read_text())
    assert record["command"] == "python train.py"
    assert record["packages"]["torch"] == torch.__version__.split("+")[0]
    assert metrics.keys() >= {"psnr", "ssim", "utilisation", "train_utilisation", "perplexity", "bits_per_pixel"}
    assert json.loads((folder / "metrics.json").read_text())["metrics"]["psnr"] == pytest.approx(metrics["psnr"])


def test_the_bundle_is_the_trained_tokenizer_bit_for_bit(tiny, monkeypatch):
    trained = []
    original = run_module.evaluate
    monkeypatch.setattr(
        run_module, "evaluate", lambda tokenizer, *a, **k: trained.append(tokenizer) or original(tokenizer, *a, **k)
    )
    config, folder = tiny("run", *QUANTIZERS["vq_ema"])
    train(config, folder)
    loaded = vistok.load(folder)
    images = torch.rand(2, 3, 32, 16) * 2 - 1
    expected, got = trained[0].encode(images), loaded.encode(images)
    assert torch.equal(got.indices, expected.indices)
    assert torch.equal(loaded.decode(got.codes), trained[0].decode(expected.codes))


def test_a_folder_that_holds_a_run_is_refused_with_what_to_do(tiny):
    config, folder = tiny("run")
    train(config, folder)
    before = (folder / "metrics.json").read_bytes()
    with pytest.raises(
        FileExistsError, match=r"holds a run already: choose another hydra.run.dir; resume it with ckpt="
    ):
        train(config, folder)
    assert (folder / "metrics.json").read_bytes() == before


def test_a_checkpoint_of_another_architecture_is_refused_with_the_difference(tiny, monkeypatch):
    config, folder = tiny("run", *QUANTIZERS["fsq"])
    checkpoint = interrupted(config, folder, 3, monkeypatch).checkpoint
    config, other = tiny("other", "quantizer=fsq", "quantizer.levels=[8,5]", f"ckpt={checkpoint}")
    with pytest.raises(ValueError, match=r"trained with another tokenizer.*quantizer.levels=\[5, 5\] / \[8, 5\]"):
        train(config, other)
    config.ckpt = None
    train(config, other)  # what was refused does not hold the folder


@pytest.mark.parametrize(("override", "message"), [("data.batch_size=2", "batch_size 4"), ("seed=1", "seed 0")])
def test_a_checkpoint_of_another_data_order_is_refused(tiny, monkeypatch, override, message):
    config, folder = tiny("run")
    checkpoint = interrupted(config, folder, 3, monkeypatch).checkpoint
    config, other = tiny("other", override, f"ckpt={checkpoint}")
    with pytest.raises(ValueError, match=f"was written with {message}, this run has"):
        train(config, other)


@pytest.mark.parametrize("override", ["optimizer.lr=0.5", "scheduler.reference_batch=64", "optimizer=lion"])
def test_other_settings_of_the_optimiser_are_not_ignored_in_silence(tiny, monkeypatch, override):
    config, folder = tiny("run")
    checkpoint = interrupted(config, folder, 3, monkeypatch).checkpoint
    config, other = tiny("other", override, f"ckpt={checkpoint}")
    with pytest.raises(ValueError, match=r"would have no effect: .*pretrained.load=RUN. Checkpoint / now: (opt|sched)"):
        train(config, other)


def test_other_settings_that_a_resumed_run_follows_are_told(tiny, monkeypatch, caplog):
    config, folder = tiny("run")
    checkpoint = interrupted(config, folder, 3, monkeypatch).checkpoint
    config, other = tiny("other", "loss.l1=0.25", "scheduler.warmup_steps=1", f"ckpt={checkpoint}")
    with caplog.at_level("INFO"):
        train(config, other)
    told = [message for message in caplog.messages if message.startswith("going on from step 3")]
    assert len(told) == 1
    assert re.search(r"\(checkpoint / now\): loss.l1=\S+ / 0.25; scheduler.warmup_steps=\d+ / 1$", told[0])


def test_a_checkpoint_that_does_not_exist_is_named(tiny):
    config, folder = tiny("run", "ckpt=/nowhere/last.ckpt")
    with pytest.raises(FileNotFoundError, match=r"ckpt=/nowhere/last.ckpt is not a file"):
        train(config, folder)


def test_a_run_folder_stands_for_its_last_checkpoint(tmp_path):
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"last.ckpt is not a file: pass a run folder or"):
        run_module.find_checkpoint(str(tmp_path / "run"), tmp_path / "new")
    torch.save({}, last)
    assert run_module.find_checkpoint(str(tmp_path / "run"), tmp_path / "new") == last


def test_a_checkpoint_with_a_pickle_inside_is_refused_and_not_executed(tiny, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (__import__("os").mkdir, (str(tmp_path / "trap"),))

    torch.save({"state_dict": {}, "bomb": Bomb()}, tmp_path / "evil.ckpt")
    config, folder = tiny("run", f"ckpt={tmp_path / 'evil.ckpt'}")
    with pytest.raises(Exception, match=r"weights_only|Weights only|Unsupported"):
        train(config, folder)
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("logger", ["none", "tensorboard"])
def test_every_logger_that_needs_no_service_trains(tiny, logger):
    config, folder = tiny("run", f"logger={logger}", "trainer.max_steps=4", "data.num_workers=0")
    assert train(config, folder)["psnr"] > 0
    assert (folder / "metrics.json").exists()
    assert (folder / "tensorboard").exists() == (logger == "tensorboard")


def test_a_logger_that_cannot_start_does_not_stop_the_run(tiny, caplog):
    config, _ = tiny("run")
    config.logger = {"csv": config.logger.csv, "broken": {"_target_": "vistok.training.loggers.nothing"}}
    assert len(run_module.make_loggers(config)) == 1
    assert "logger broken could not start and is left out" in caplog.text


@pytest.mark.parametrize("quantizer", ["kl", "identity"])
def test_a_continuous_tokenizer_is_trained_measured_and_saved(tiny, quantizer):
    config, folder = tiny("run", f"quantizer={quantizer}", "quantizer.dim=4")
    config.callbacks.pictures = {"_target_": "vistok.training.callbacks.Pictures", "folder": str(folder)}
    metrics = train(config, folder)
    assert metrics["psnr"] > 0
    assert not metrics.keys() & {"utilisation", "train_utilisation", "bits_per_pixel"}
    assert "continuous" in (folder / "bundle" / "README.md").read_text()
    assert not (folder / "codebook_usage.png").exists()
    loaded = vistok.load(folder)
    assert loaded(torch.zeros(1, 3, 16, 16)).quantized.codes.shape == (1, 4, 2, 2)
