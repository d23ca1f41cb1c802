"""The Lightning module: what a step changes, and what it must not."""

import json

import lightning
import pytest
import torch
from safetensors.torch import load_file
from timm.optim import create_optimizer_v2
from torch.utils.data import DataLoader

import vistok
from vistok.decoder import CNNDecoder
from vistok.encoder import CNNEncoder
from vistok.loss import ReconstructionLoss
from vistok.quantizer import FSQ, Identity, VectorQuantizer
from vistok.training.callbacks import WeightEMA
from vistok.training.module import (
    TokenizerModule,
    clear_moments,
    mean_squared_correlation,
    random_states,
    set_random_states,
)
from vistok.training.schedule import constant, cosine


def make(quantizer=None, **arguments):
    tokenizer = vistok.Tokenizer(
        CNNEncoder(base_channels=32, num_blocks=1),
        quantizer or VectorQuantizer(16, 4, table="ema", revival="random", init="batch"),
        CNNDecoder(base_channels=32, num_blocks=1),
    )
    return TokenizerModule(
        tokenizer,
        ReconstructionLoss(l2=1.0),
        optimizer=lambda module: torch.optim.AdamW(module.parameters(), lr=1e-3),
        scheduler=constant,
        **arguments,
    )


def batch(value=None):
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    if value is not None:
        images[0, 0, 0, 0] = value
    return {"images": images, "keys": list("abcd"), "bad": []}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Trainers without a folder write into the current one."""
    monkeypatch.chdir(tmp_path)


def fit(module, batches, **arguments):
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None), DataLoader([batch()], batch_size=None))
    return trainer


def state(module):
    return {name: tensor.clone() for name, tensor in module.tokenizer.state_dict().items()}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_step_that_is_not_finite_reaches_neither_weights_nor_codebook(value, caplog):
    module = make()
    states = []
    module.on_train_batch_end = lambda *arguments: states.append(state(module))
    fit(module, [batch(), batch(value), batch()])
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    assert any(not torch.equal(tensor, states[2][name]) for name, tensor in states[1].items())
    assert module.skipped_steps == 1
    assert "step 1 skipped: its gradient is not finite: terms commitment, l2" in caplog.text
    assert "batch a, b, c, d; saved as" in caplog.text


def test_a_batch_that_is_not_finite_is_saved_with_what_reproduces_it(tmp_path):
    bad = {**batch(torch.nan), "labels": torch.arange(4), "texts": ["w", "x", "y", "z"]}
    fit(make(), [batch(), bad, batch()])
    (path,) = (tmp_path / "nonfinite").glob("*.safetensors")
    assert path.name == "step000001_rank0_batch0.safetensors"
    saved = load_file(path)
    assert torch.equal(saved["labels"], bad["labels"])
    torch.testing.assert_close(saved["images"], bad["images"], rtol=0, atol=0, equal_nan=True)
    record = json.loads(path.with_suffix(".json").read_text())
    assert (record["keys"], record["texts"], record["step"]) == (list("abcd"), list("wxyz"), 1)
    assert record["terms"]["l2"] == "nan"


def test_at_most_three_batches_are_saved(tmp_path):
    fit(make(), [batch()] + [batch(torch.nan)] * 5)
    assert len(list((tmp_path / "nonfinite").glob("*.safetensors"))) == 3


def test_of_accumulated_batches_the_one_that_is_not_finite_is_named(tmp_path, caplog):
    batches = [{**batch(value), "keys": [name]} for name, value in (("fine", None), ("broken", torch.nan))]
    fit(make(), batches, accumulate_grad_batches=2)
    assert "batch broken; saved as" in caplog.text
    assert [path.name for path in (tmp_path / "nonfinite").glob("*.json")] == ["step000000_rank0_batch1.json"]


def test_a_gradient_that_overflows_in_the_backward_pass_names_the_parts(caplog):
    module = make()
    module.tokenizer.decoder.conv_out.weight.register_hook(lambda gradient: gradient * torch.inf)
    fit(module, [batch()])
    assert "step 0 skipped: its gradient is not finite: backward pass of decoder; batch a, b, c, d" in caplog.text


def test_a_skipped_step_changes_neither_the_averaged_weights_nor_their_count():
    ema, states = WeightEMA(decay=0.5), []

    class Watch(lightning.Callback):
        def on_train_batch_end(self, *arguments):
            states.append({name: value.clone() for name, value in ema._average_model.state_dict().items()})

    fit(make(), [batch(), batch(torch.nan), batch()], callbacks=[ema, Watch()])
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert states[2]["n_averaged"] == states[1]["n_averaged"] + 1


def test_many_bad_steps_in_a_row_stop_with_advice():
    with pytest.raises(FloatingPointError, match=r"3 steps in a row .* lower optimizer.lr"):
        fit(make(max_skipped_steps=3), [batch()] + [batch(torch.nan)] * 5)


def test_the_codebook_is_updated_once_per_optimiser_step():
    module = make()
    fit(module, [batch() for _ in range(8)], accumulate_grad_batches=4)
    assert int(module.tokenizer.quantizer.updates) == 2


def test_whitening_gives_uncorrelated_channels_of_unit_variance():
    tokenizer = make(FSQ((8, 5, 5))).tokenizer
    images = torch.rand(16, 3, 32, 32) * 2 - 1
    tokenizer.whiten_projection(images)
    rows = tokenizer(images).features.movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(torch.cov(rows.T), torch.eye(3), atol=1e-3, rtol=0)
    assert rows.mean(0).abs().max() < 1e-3
    assert mean_squared_correlation(tokenizer(images).features) < 1e-5


def test_mean_squared_correlation_is_that_of_numpy():
    features = torch.randn(2, 3, 4, 5)
    features[:, 1] += features[:, 0]
    correlations = torch.corrcoef(features.movedim(1, 0).flatten(1))
    expected = sum(correlations[i, j] ** 2 for i in range(3) for j in range(3) if i != j) / 6
    torch.testing.assert_close(mean_squared_correlation(features), expected)
    assert mean_squared_correlation(features[:, :1]) == 0


def test_random_states_restore_all_generators():
    import random

    import numpy as np

    def draw():
        return random.random(), np.random.rand(), np.random.randn(), torch.rand(1).item()

    states = random_states()
    first = draw()
    set_random_states(states)
    assert draw() == first


def test_cosine_warms_up_to_the_peak_and_ends_at_its_share():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = cosine(optimizer, total_steps=100, warmup_steps=10, final_share=0.1)
    rates = []
    for _ in range(100):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert scheduler.get_last_lr()[0] == pytest.approx(0.2)


def test_a_warm_up_longer_than_the_training_says_what_to_set():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    with pytest.raises(ValueError, match=r"below the 50 steps of the training, got 100: set scheduler.warmup_steps=5"):
        constant(optimizer, total_steps=50, warmup_steps=100)


class Table(FSQ):
    """FSQ beside a learned table, of which every update overwrites the rows it is told."""

    def __init__(self, rows=()):
        super().__init__((5, 5))
        self.rows = torch.tensor(rows, dtype=torch.int64)
        self.loss_weights = {"table": 1.0}
        self.table = torch.nn.Parameter(torch.randn(6, 2))

    def quantize(self, rows):
        codes, indices, _ = super().quantize(rows)
        return codes, indices, {"table": self.table.square().sum()}

    @property
    def touched_codes(self):
        return [(self.table, self.rows)]


OPTIMISERS = {
    "adamw": lambda module: torch.optim.AdamW(module.parameters(), lr=1e-3, amsgrad=True),
    "sgd": lambda module: torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9),
    "timm": lambda module: create_optimizer_v2(module, opt="lion", lr=1e-3, weight_decay=1e-4),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_moments_of_codes_that_were_overwritten_are_cleared_and_no_others(name):
    rows = [1, 4]
    module = make(Table(rows))
    module.make_optimizer = OPTIMISERS[name]
    trainer = fit(module, [batch(), batch()])
    state = trainer.optimizers[0].state
    moments = [value for value in state[module.tokenizer.quantizer.table].values() if value.ndim == 2]
    assert len(moments) == {"adamw": 3, "sgd": 1, "timm": 1}[name]
    for moment in moments:
        assert (moment == 0).all(1).nonzero().flatten().tolist() == rows
    others = [value for value in state[module.tokenizer.to_codes.weight].values() if value.ndim == 2]
    assert all((moment != 0).any() for moment in others)


def test_a_skipped_step_clears_no_moments():
    module = make(Table([0]))
    calls = []
    module.tokenizer.quantizer.update = lambda: calls.append("update")
    trainer = fit(module, [batch(torch.nan)])
    assert calls == []
    assert not trainer.optimizers[0].state


def test_moments_of_an_optimiser_without_state_are_left_alone():
    table = torch.nn.Parameter(torch.zeros(3, 2))
    optimizer = torch.optim.AdamW([table])
    clear_moments(optimizer, table, torch.tensor([1]))
    assert not optimizer.state


def test_continuous_codes_train_and_validate_without_codebook_usage():
    module = make(Identity(4))
    trainer = fit(module, [batch(), batch()])
    assert trainer.global_step == 2
    assert trainer.callback_metrics["val/psnr"] > 0
    assert "val/utilisation" not in trainer.callback_metrics


def test_labels_of_a_batch_reach_the_quantizer_in_training_and_validation():
    class Labelled(FSQ):
        accepts_labels = True

        def forward(self, features, labels=None):
            seen.append((self.training, labels))
            return super().forward(features)

    seen = []
    labels = torch.tensor([3, 1, 4, 1])
    fit(make(Labelled((5, 5))), [{**batch(), "labels": labels}, batch()])
    training = [given for is_training, given in seen if is_training]
    assert torch.equal(training[0], labels)
    assert training[1] is None
    assert [given for is_training, given in seen if not is_training] == [None] * 2
