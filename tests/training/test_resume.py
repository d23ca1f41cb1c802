"""Whatever ends a run, the one that resumes it ends as if nothing had happened, bit for bit."""

import csv
import shutil
import signal
from contextlib import nullcontext

import pytest
import torch
from end_a_run import EndARun
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from tiny_runs import QUANTIZERS, ROOT, TINY, program

from vistok.training import run as run_module
from vistok.training.callbacks import LastCheckpoint, TrainingInterrupted, last_checkpoint
from vistok.training.run import train

# Batches of an epoch: 5. Validations after batches 4, 8 and 12, of 9 batches each. Windows of usage end after step 5.
SHORT = [*TINY, "data.eval_batch_size=4", "callbacks.collapse_watch.every=5"]
GUMBEL = ["quantizer=gumbel", "quantizer.codebook_size=32"]
ACCUMULATION = ["trainer.accumulate_grad_batches=2", "trainer.max_steps=6"]
KINDS = {
    "vq_ema": QUANTIZERS["vq_ema"],
    "gumbel with workers": [*GUMBEL, "data.num_workers=2"],
    "gumbel with accumulation": [*GUMBEL, *ACCUMULATION],
    "discriminator": [
        *QUANTIZERS["vq_ema"],
        *("discriminator=patchgan", "discriminator.base_channels=8", "discriminator.num_layers=1"),
        *("discriminator.adversarial.discriminator_start=2", "discriminator.adversarial.start=4"),
        *("discriminator.adversarial.warmup=2", "discriminator.adversarial.lecam=0.01"),
        *("discriminator.adversarial.r1=1", "discriminator.adversarial.r1_every=3"),
    ],
    "dropout": [*QUANTIZERS["vq_ema"], "encoder.dropout=0.2"],
    "fused": [*QUANTIZERS["vq_ema"], "optimizer.fused=true"],
    "adam": [*QUANTIZERS["fsq"], "optimizer=adam", "scheduler=linear"],
    "lion": [*QUANTIZERS["fsq"], "optimizer=lion", "scheduler=step"],
    "muon": [*QUANTIZERS["vq_ema"], "optimizer=muon", "scheduler=constant"],
}


class Keep(Callback):
    """Keeps a copy of ``last.ckpt`` as a kill after so many batches would leave it."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_start(self, trainer, *_):
        if (self.folder / "last.ckpt").exists():
            shutil.copy(self.folder / "last.ckpt", self.folder / f"after_{trainer.fit_loop.total_batch_idx}.ckpt")


@pytest.fixture
def run(tiny, monkeypatch):
    """``run(name, *overrides, callback=...) -> folder`` of a training without its final evaluation."""

    def run(name, *overrides, callback=None):
        config, folder = tiny(name, *SHORT[len(TINY) :], *overrides)
        with monkeypatch.context() as patch:
            patch.setattr(run_module, "finish", lambda *arguments: {})
            if callback is not None:
                callback = callback(folder / "checkpoints") if isinstance(callback, type) else callback
                patch.setattr(
                    run_module,
                    "instantiate",
                    lambda node, **options: instantiate(
                        node,
                        **{
                            name: [*value, callback] if name == "callbacks" else value
                            for name, value in options.items()
                        },
                    ),
                )
            train(config, folder)
        return folder

    return run


def rows(folder):
    """Rows of ``metrics.csv`` without what a clock measured."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [
            {name: value for name, value in row.items() if value and name != "images/s"} for row in csv.DictReader(file)
        ]


def state(folder):
    """What ``last.ckpt`` holds of the training, apart from the paths of best checkpoints."""
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    del checkpoint["callbacks"]
    # The checks of types in a test run draw from Python's generator.
    del checkpoint["vistok_random_states"]["python"]
    # Lightning counts a resumed epoch's validation batches anew.
    del checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    # And leaves an epoch that ended with the checkpoint out of the number of those begun.
    del checkpoint["loops"]["fit_loop"]["epoch_progress"]
    return checkpoint


def assert_equal(first, second, where="checkpoint"):
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for name in first:
            assert_equal(first[name], second[name], f"{where}.{name}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), where
        for position, pair in enumerate(zip(first, second, strict=True)):
            assert_equal(*pair, f"{where}.{position}")
    else:
        assert first == second or first != first, where


def assert_same_training(resumed, whole):
    assert_equal(state(resumed), state(whole))
    assert rows(resumed) == rows(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumed_from_any_checkpoint_ends_as_the_uninterrupted_one(run, kind):
    overrides = [*KINDS[kind], "callbacks.last.every_n_steps=1"]
    whole = run("whole", *overrides, callback=Keep)
    # In the middle of an epoch, after a validation, at the end of an epoch, between the batches of a step.
    batches = {"vq_ema": (3, 4, 5), "discriminator": (3, 5), "gumbel with accumulation": (4, 5, 8)}.get(kind, (7,))
    for batch in batches:
        kept = whole / "checkpoints" / f"after_{batch}.ckpt"
        assert_same_training(run(f"resumed_{batch}", *overrides, f"ckpt={kept}"), whole)


def test_a_run_resumed_twice_ends_as_the_uninterrupted_one(run):
    overrides = [*KINDS["vq_ema"], "callbacks.last.every_n_steps=1"]
    folder = whole = run("whole", *overrides, callback=Keep)
    for batch in (5, 7):
        kept = folder / "checkpoints" / f"after_{batch}.ckpt"
        folder = run(f"resumed_{batch}", *overrides, f"ckpt={kept}", callback=Keep)
    assert_same_training(folder, whole)


def train_py(folder, *overrides):
    return program(ROOT / "train.py", *SHORT, *overrides, f"hydra.run.dir={folder}")


@pytest.mark.parametrize(
    ("kind", "hook", "batch"),
    [
        ("gumbel with workers", "before_step", 8),
        pytest.param("gumbel with workers", "validation", 8, marks=pytest.mark.slow),
        pytest.param("gumbel with accumulation", "batch_start", 10, marks=pytest.mark.slow),
        pytest.param("vq_ema", "batch_start", 6, marks=pytest.mark.slow),
        pytest.param("vq_ema", "batch_end", 12, marks=pytest.mark.slow),
    ],
)
def test_a_killed_program_is_resumed_bit_for_bit(run, tmp_path, kind, hook, batch):
    overrides = [*KINDS[kind], "callbacks.last.every_n_steps=2"]
    end = f"+callbacks.end={{_target_:end_a_run.EndARun,hook:{hook},batch:{batch}}}"
    killed = train_py(tmp_path / "killed", *overrides, end)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    last = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] > 0
    assert_same_training(run("resumed", *overrides, f"ckpt={last}"), run("whole", *overrides))


def test_a_program_whose_processes_all_get_the_signal_saves_and_goes_on_when_requeued(run, tmp_path):
    overrides = [*KINDS["gumbel with workers"], "ckpt=auto"]
    end = f"+callbacks.end={{_target_:end_a_run.EndARun,number:{signal.SIGTERM:d},batch:7,group:true}}"
    stopped = train_py(tmp_path / "run", *overrides, end)
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    requeued = train_py(tmp_path / "run", *overrides)
    assert requeued.returncode == 0, requeued.stderr
    assert_same_training(tmp_path / "run", run("whole", *KINDS["gumbel with workers"]))


@pytest.mark.parametrize("batch", [4, 12])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_during_validation_stops_it_and_the_resumed_run_begins_it_anew(run, number, batch):
    overrides = QUANTIZERS["vq_ema"]
    end = EndARun(number, "validation", batch, validation_batch=1)
    with pytest.raises(TrainingInterrupted) as caught:
        run("stopped", *overrides, callback=end)
    assert end.validated == (batch // 4 - 1) * 9 + 2
    assert caught.value.exit_code == 128 + number
    assert torch.load(caught.value.checkpoint, weights_only=True)["global_step"] == batch
    resumed = run("resumed", *overrides, f"ckpt={caught.value.checkpoint}")
    assert_same_training(resumed, run("whole", *overrides))


def test_a_signal_at_a_step_with_a_validation_leaves_the_validation_to_the_resumed_run(run):
    end = EndARun(signal.SIGTERM, "batch_start", 8)
    with pytest.raises(TrainingInterrupted) as caught:
        run("stopped", callback=end)
    assert end.validated == 9
    assert_same_training(run("resumed", f"ckpt={caught.value.checkpoint}"), run("whole"))


def test_a_requeued_run_continues_in_its_own_folder(run):
    overrides = [*QUANTIZERS["vq_ema"], "ckpt=auto"]
    with pytest.raises(TrainingInterrupted):
        run("run", *overrides, callback=EndARun(signal.SIGUSR1, "before_step", 7))
    assert rows(run("run", *overrides)) == rows(run("whole", *QUANTIZERS["vq_ema"]))


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(run):
    class Kill(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 2:
                raise InterruptedError

    with pytest.raises(InterruptedError):
        run("run", "ckpt=auto", callback=Kill())
    assert rows(run("run", "ckpt=auto")) == rows(run("whole"))


@pytest.mark.parametrize("failing", [False, True])
def test_after_training_signals_do_what_they_did_before(run, failing):
    class Fail(Callback):
        def on_train_batch_end(self, *_):
            raise InterruptedError

    before = [signal.getsignal(number) for number in last_checkpoint.SIGNALS]
    with pytest.raises(InterruptedError) if failing else nullcontext():
        run("run", callback=Fail() if failing else Callback())
    assert [signal.getsignal(number) for number in last_checkpoint.SIGNALS] == before


def test_a_second_signal_ends_the_process_at_once_but_an_echo_of_the_first_does_not(tmp_path, monkeypatch, caplog):
    callback = LastCheckpoint(tmp_path)
    clock, raised, passed_on = [0.0], [], []
    monkeypatch.setattr(last_checkpoint.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(last_checkpoint.signal, "raise_signal", raised.append)
    handler = signal.getsignal(signal.SIGUSR1)
    handle = callback._handler(passed_on.append)
    handle(signal.SIGUSR1, None)
    clock[0] = 0.1
    handle(signal.SIGUSR1, None)
    assert not raised
    assert passed_on == [signal.SIGUSR1]
    clock[0] = 5.0
    handle(signal.SIGUSR1, None)
    assert raised == [signal.SIGUSR1]
    assert passed_on[-1] == signal.SIGKILL
    signal.signal(signal.SIGUSR1, handler)
    assert caplog.text.count("received SIGUSR1: saving and stopping") == 1


def test_the_handler_of_a_scheduler_is_called_after_the_checkpoint_is_written(run, tmp_path):
    def requeue(number, frame):
        assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
        raise InterruptedError

    before = signal.signal(signal.SIGUSR2, requeue)
    try:
        with pytest.raises(InterruptedError):
            run("run", callback=EndARun(signal.SIGUSR2, "before_step", 3))
        assert signal.getsignal(signal.SIGUSR2) is requeue
    finally:
        signal.signal(signal.SIGUSR2, before)


@pytest.mark.parametrize("name", ["every_n_steps", "every_minutes"])
def test_an_interval_that_is_not_positive_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"callbacks.last.{name} must be positive"):
        LastCheckpoint(tmp_path, **{name: 0})


def test_saves_by_time_are_between_validations(run):
    folder = run("run", "callbacks.last.every_minutes=1e-6", callback=Keep)
    kept = folder / "checkpoints" / "after_3.ckpt"
    assert torch.load(kept, weights_only=True)["global_step"] == 3


def test_a_validation_inside_an_optimiser_step_leaves_the_checkpoint_of_the_step_before(run):
    overrides = ["trainer.accumulate_grad_batches=3", "trainer.max_steps=4", "callbacks.last.every_n_steps=1"]
    whole = run("whole", *overrides, callback=Keep)
    resumed = run("resumed", *overrides, f"ckpt={whole / 'checkpoints' / 'after_4.ckpt'}")
    assert_same_training(resumed, whole)
