"""Usage of codes in training batches, and warnings in words."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from lightning import Trainer

import vistok
from vistok.training.callbacks import CollapseWatch

CODES = 64


class Training:
    """What the callback sees of a training."""

    def __init__(self, quantizer="VectorQuantizer", **arguments):
        arguments = arguments or {"codebook_size": CODES, "dim": 4}
        self.rows = []
        self.module = SimpleNamespace(
            device=torch.device("cpu"),
            tokenizer=SimpleNamespace(
                quantizer=vistok.build({"_target_": f"vistok.quantizer.{quantizer}", **arguments})
            ),
        )
        self.trainer = Mock(Trainer, global_step=0, callback_metrics={}, is_global_zero=True)
        self.trainer.fit_loop = SimpleNamespace(_should_accumulate=lambda: False)
        self.trainer.loggers = [SimpleNamespace(log_metrics=lambda metrics, step: self.rows.append((step, metrics)))]

    def watch(self, **arguments):
        watch = CollapseWatch(**{"every": 2, **arguments})
        watch.setup(self.trainer, self.module, "fit")
        return watch

    def step(self, watch, indices):
        self.trainer.global_step += 1
        self.module.last_indices = indices
        watch.on_train_batch_end(self.trainer, self.module, None, None, 0)


def uniform():
    return torch.randint(CODES, (4, 8, 8))


def test_usage_is_counted_exactly_over_each_window():
    training = Training()
    watch = training.watch()
    for indices in ([0, 1, 1, 2], [2, 2, 3, 3], [5, 5, 5, 5], [5, 5, 5, 5]):
        training.step(watch, torch.tensor([indices]))
    assert [step for step, _ in training.rows] == [1, 3]
    assert training.rows[0][1]["train/utilisation"] == 4 / CODES
    assert training.rows[0][1]["train/dead_codes"] == CODES - 4
    assert training.rows[1][1] == {
        "train/utilisation": 1 / CODES,
        "train/perplexity": 1.0,
        "train/dead_codes": CODES - 1,
    }


def test_a_healthy_training_warns_of_nothing(caplog):
    training = Training()
    training.trainer.callback_metrics = {
        "train/grad_norm": torch.tensor(3.0),
        "train/adaptive_weight": torch.tensor(0.8),
        "train/discriminator_accuracy": torch.tensor(0.7),
    }
    watch = training.watch()
    for _ in range(4):
        training.step(watch, uniform())
    assert not caplog.text


def test_a_small_window_is_no_collapse(caplog):
    training = Training(codebook_size=4096, dim=4)
    watch = training.watch()
    for _ in range(2):
        training.step(watch, torch.randint(4096, (1, 32)))
    assert training.rows[0][1]["train/utilisation"] < 0.02
    assert not caplog.text


@pytest.mark.parametrize(
    ("quantizer", "arguments", "cure"),
    [
        ("VectorQuantizer", {"codebook_size": 64, "dim": 4}, "quantizer.revival=random replaces dead codes"),
        (
            "VectorQuantizer",
            {"codebook_size": 64, "dim": 4, "revival": "anchor"},
            "A larger quantizer.entropy_weight (now 0) spreads the codes",
        ),
        ("FSQ", {"levels": [4, 4, 4]}, "A smaller codebook, a lower optimizer.lr or quantizer=fsq helps"),
    ],
)
def test_a_collapse_is_told_with_its_extent_and_what_helps(caplog, quantizer, arguments, cure):
    training = Training(quantizer, **arguments)
    watch = training.watch()
    for _ in range(2):
        training.step(watch, torch.zeros(4, 8, 8, dtype=torch.int64))
    assert "step 2: the codebook is collapsing: 1 of 64 codes in use over the last 2 steps" in caplog.text
    assert cure in caplog.text


def test_few_codes_with_nearly_all_tokens_are_told(caplog):
    training = Training()
    watch = training.watch()
    indices = torch.zeros(1, 6400, dtype=torch.int64)
    indices[0, :CODES] = torch.arange(CODES)
    for _ in range(2):
        training.step(watch, indices)
    assert "few codes carry nearly all tokens: a perplexity of 1." in caplog.text


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("train/grad_norm", 1e4, "train/grad_norm is 1e+04, above 1000: lower optimizer.lr"),
        ("train/grad_norm/discriminator", float("nan"), "train/grad_norm/discriminator is nan"),
        ("train/adaptive_weight", 1e4, "the adaptive weight of the adversarial loss is 1e+04"),
        ("train/adaptive_weight", 1e-5, "the adaptive weight of the adversarial loss is 1e-05"),
        ("train/discriminator_accuracy", 0.99, "the discriminator tells 99% of the images apart"),
    ],
)
def test_a_value_out_of_range_is_told(caplog, name, value, message):
    training = Training()
    training.trainer.callback_metrics = {name: torch.tensor(value)}
    watch = training.watch()
    for _ in range(2):
        training.step(watch, uniform())
    assert message in caplog.text


def test_a_warning_is_repeated_only_after_the_quiet_steps(caplog):
    training = Training()
    watch = training.watch(quiet_steps=6)
    for _ in range(10):
        training.step(watch, torch.zeros(4, 8, 8, dtype=torch.int64))
    assert [record.args[0] for record in caplog.records] == [2, 8]


def test_a_resumed_window_has_the_counts_of_before(tmp_path):
    whole, resumed = Training(), Training()
    watch, other, checkpoint = whole.watch(), resumed.watch(), {}
    batches = [uniform(), uniform()]
    whole.step(watch, batches[0])
    watch.on_save_checkpoint(whole.trainer, whole.module, checkpoint)
    torch.save(checkpoint, tmp_path / "checkpoint")
    other.on_load_checkpoint(resumed.trainer, resumed.module, torch.load(tmp_path / "checkpoint", weights_only=True))
    resumed.trainer.global_step = 1
    whole.step(watch, batches[1])
    resumed.step(other, batches[1])
    assert resumed.rows == whole.rows != []


def test_a_continuous_tokenizer_has_no_usage_to_watch():
    training = Training("Identity", dim=4)
    watch = training.watch()
    for _ in range(2):
        training.step(watch, torch.zeros(1, 2, 0, dtype=torch.int64))
    assert not training.rows


def test_an_empty_window_is_refused():
    with pytest.raises(ValueError, match=r"callbacks.collapse_watch.every must be at least 1, got 0"):
        CollapseWatch(every=0)
