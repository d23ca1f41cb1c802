"""One backward pass for two players gives exactly the gradients of two."""

import copy
from itertools import pairwise
from types import SimpleNamespace

import lightning
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from test_run import assert_equal_weights, interrupted, rows, weights
from torch.utils.data import DataLoader
from two_players import make_batches, make_module, textbook

from vistok.discriminator import PatchDiscriminator
from vistok.loss import AdversarialLoss, ReconstructionLoss, Term
from vistok.training.run import train


class Gradients(Callback):
    """Keeps the gradients of the first optimiser step, clipped, as the optimiser sees them."""

    def __init__(self):
        self.raw = self.clipped = None

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.raw = self.raw or self.take(pl_module)

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        if trainer.global_step and self.clipped is None:
            self.clipped = self.take(pl_module)

    def take(self, module):
        return {name: value.grad.clone() for name, value in module.named_parameters() if value.grad is not None}


def fit(module, batches, tmp_path, **arguments):
    gradients = Gradients()
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=tmp_path,
        **{"callbacks": [gradients], **arguments},
    )
    trainer.fit(module, *(DataLoader(rows, batch_size=None) for rows in (batches, batches[:1])))
    return trainer, gradients


def assert_gradients(got, tokenizer, discriminator):
    expected = {f"tokenizer.{name}": value for name, value in tokenizer.items()}
    expected |= {f"adversarial.discriminator.{name}": value for name, value in discriminator.items()}
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("cap", [None, 1e4])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_both_gradients_are_those_of_two_backward_passes(norm, cap, precision, accumulate, tmp_path):
    module, batches = make_module(norm, weight=0.7, max_adaptive_weight=cap), make_batches(accumulate)
    *expected, discriminator = textbook(module, batches, 0.7, cap is not None, precision == "bf16-mixed")
    _, gradients = fit(module, batches, tmp_path, precision=precision, accumulate_grad_batches=accumulate)
    assert_gradients(gradients.raw, *expected)
    # Statistics of batch normalisation have seen images and reconstructions once each, in this order.
    for name, buffer in discriminator.named_buffers():
        assert torch.equal(dict(module.adversarial.discriminator.named_buffers())[name], buffer), name


def test_each_player_is_clipped_by_its_own_norm(tmp_path):
    module, batches = make_module(clip=0.02), make_batches(2)
    tokenizer, discriminator, _ = textbook(module, batches[:1], 0.5)
    for player, clip in ((tokenizer, 0.01), (discriminator, 0.02)):
        norm = torch.nn.utils.get_total_norm(player.values())
        assert norm > clip
        for value in player.values():
            value.mul_(clip / (norm + 1e-6))
    _, gradients = fit(module, batches, tmp_path, gradient_clip_val=0.01)
    assert_gradients(gradients.clipped, tokenizer, discriminator)


def test_two_steps_of_one_optimiser_are_those_of_two(tmp_path):
    module, batches = make_module(betas=(0.5, 0.9), clip=None), make_batches(2)
    reference = copy.deepcopy(module)
    players = (reference.tokenizer, reference.adversarial.discriminator)
    optimizers = (
        torch.optim.AdamW(players[0].parameters(), lr=1e-3),
        torch.optim.AdamW(players[1].parameters(), lr=2e-3, betas=(0.5, 0.9), weight_decay=0.0),
    )
    for batch in batches:
        *gradients, _ = textbook(reference, [batch], 0.5)
        for player, optimizer, values in zip(players, optimizers, gradients, strict=True):
            for name, parameter in player.named_parameters():
                parameter.grad = values[name]
            optimizer.step()
    trainer, _ = fit(module, batches, tmp_path)
    assert trainer.global_step == 2
    for ours, theirs in zip((module.tokenizer, module.adversarial.discriminator), players, strict=True):
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(parameter, dict(theirs.named_parameters())[name], rtol=1e-5, atol=1e-6)


class History(Callback):
    """Keeps the weights before training and after every optimiser step, and what was logged."""

    def __init__(self):
        self.states, self.logged = [], []

    def on_train_start(self, trainer, pl_module):
        self.states.append(copy.deepcopy(pl_module.state_dict()))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.states.append(copy.deepcopy(pl_module.state_dict()))
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def changed(self, prefix):
        return [
            any(not torch.equal(value, after[name]) for name, value in before.items() if name.startswith(prefix))
            for before, after in pairwise(self.states)
        ]


def test_the_discriminator_and_then_the_tokenizer_start_at_their_steps(tmp_path):
    history = History()
    module = make_module(discriminator_start=2, start=4, warmup=2, weight=0.5, weight_decay=0.1)
    fit(module, make_batches(7), tmp_path, callbacks=[history])
    assert history.changed("adversarial.discriminator.") == [False, False, True, True, True, True, True]
    assert history.changed("tokenizer.") == [True] * 7
    weights = [row.get("train/weighted/adversarial", 0) for row in history.logged]
    assert [bool(weight) for weight in weights] == [False] * 4 + [True] * 3
    assert weights[4] == pytest.approx(0.25 * history.logged[4]["train/adversarial"])
    assert weights[5] == pytest.approx(0.5 * history.logged[5]["train/adversarial"])


def test_until_the_tokenizer_listens_it_trains_as_without_a_discriminator(tmp_path):
    module = make_module(discriminator_start=1, start=5)
    alone = make_module()
    alone.adversarial = None
    for player in (module, alone):
        fit(player, make_batches(4), tmp_path)
    for name, value in alone.tokenizer.state_dict().items():
        assert torch.equal(value, module.tokenizer.state_dict()[name]), name


def test_everything_about_the_game_is_logged(tmp_path):
    history = History()
    module = make_module(max_adaptive_weight=10.0, lecam=0.1, r1=1.0, r1_every=1)
    fit(module, make_batches(2), tmp_path, callbacks=[history])
    row = history.logged[-1]
    for name in ("adversarial", "discriminator", "lecam", "r1", "l1", "l2"):
        assert {f"train/{name}", f"train/weighted/{name}"} <= row.keys()
    for name in ("logits_real", "logits_fake", "discriminator_accuracy", "adaptive_weight", "grad_norm"):
        assert f"train/{name}" in row
    parts = [row[f"train/grad_norm/{part}"] for part in ("encoder", "decoder")]
    assert row["train/grad_norm"] == pytest.approx(sum(part**2 for part in parts) ** 0.5)
    assert row["train/grad_norm/discriminator"] > 0
    weighted = 0.5 * row["train/adaptive_weight"] * row["train/adversarial"]
    assert row["train/weighted/adversarial"] == pytest.approx(weighted)
    assert row["train/loss"] == pytest.approx(0.5 * row["train/l1"] + row["train/l2"] + weighted)


class Pull(Term):
    """Draws the codes to zero."""

    max_adaptive_weight = 1e8

    def forward(self, reconstruction, batch):
        return reconstruction.quantized.codes.square().mean()


def test_an_adaptive_term_weighs_as_much_as_the_other_reconstruction_terms_at_the_projection(tmp_path):
    history = History()
    module = make_module(max_adaptive_weight=10.0)
    module.loss = ReconstructionLoss(l1=0.5, l2=1.0, terms={"pull": Pull(0.1)})
    copied = copy.deepcopy(module.tokenizer).train()
    batch = make_batches(1)[0]
    ours = copied(batch["images"].contiguous(memory_format=torch.channels_last))
    distance = 0.5 * F.l1_loss(ours.images, batch["images"]) + F.mse_loss(ours.images, batch["images"])
    pull = ours.quantized.codes.square().mean()
    layer = copied.to_codes.weight
    norms = [torch.autograd.grad(value, layer, retain_graph=True)[0].norm().item() for value in (distance, pull)]
    fit(module, [batch], tmp_path, callbacks=[history])
    row = history.logged[0]
    assert row["train/adaptive_weight/pull"] == pytest.approx(norms[0] / (norms[1] + 1e-4), rel=1e-4)
    weighted = 0.1 * row["train/adaptive_weight/pull"] * row["train/pull"]
    assert row["train/weighted/pull"] == pytest.approx(weighted)
    others = 0.5 * row["train/l1"] + row["train/l2"] + row["train/weighted/adversarial"]
    assert row["train/loss"] == pytest.approx(others + weighted)


def half_precision(**scaler):
    return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", **scaler))]


def test_float16_gives_the_gradients_and_the_adaptive_weight_of_float32(tmp_path):
    module, batches = make_module("group", max_adaptive_weight=1e4), make_batches(1)
    *expected, _ = textbook(module, batches, 0.5, adaptive=True)
    history, gradients = History(), Gradients()
    plugins = half_precision(init_scale=1024.0)
    fit(module, batches, tmp_path, plugins=plugins, callbacks=[gradients, history])
    names = ["tokenizer.decoder.conv_out.weight", "adversarial.discriminator.main.0.weight"]
    for name, player in zip(names, expected, strict=True):
        value = player[name.removeprefix("tokenizer.").removeprefix("adversarial.discriminator.")]
        assert (gradients.raw[name] - value).norm() < 0.05 * value.norm()


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_scale_of_float16_that_is_too_large_is_lowered_and_blames_no_batch(tmp_path, caplog):
    history = History()
    module = make_module("group")
    plugins = half_precision(init_scale=2.0**60, backoff_factor=2.0**-50)
    fit(module, make_batches(2), tmp_path, plugins=plugins, callbacks=[history])
    for prefix in ("tokenizer.", "adversarial."):
        assert history.changed(prefix) == [False, True]
    assert "of 16-mixed is too large, it is lowered now" in caplog.text
    assert not (tmp_path / "nonfinite").exists()


@pytest.mark.parametrize("player", ["tokenizer", "discriminator"])
def test_a_step_that_is_not_finite_reaches_neither_player(player, tmp_path, caplog):
    history = History()
    module, batches = make_module(lecam=0.1, discriminator_start=0, start=9), make_batches(3)
    if player == "tokenizer":
        batches[1]["images"][0, 0, 0, 0] = torch.nan
    else:
        # A gradient that only the discriminator gets.
        judge, calls = module.adversarial.discriminator.logits, []

        def logits(images):
            calls.append(1)
            return judge(images) * (torch.nan if len(calls) in (3, 4) else 1)

        module.adversarial.discriminator.logits = logits
    fit(module, batches, tmp_path, callbacks=[history])
    for prefix in ("tokenizer.", "adversarial."):
        assert history.changed(prefix) == [True, False, True]
    assert module.skipped_steps == 1
    assert f"terms {'discriminator' if player == 'discriminator' else ''}" in caplog.text
    assert all(value.isfinite().all() for value in module.state_dict().values())


def test_a_schedule_changes_the_weight_of_any_term_and_leaves_out_one_of_zero(tmp_path):
    history = History()
    schedules = {
        "l1": {"kind": "linear", "start": 2, "end": 2},
        "adversarial": {"kind": "constant", "value": 0.5},
    }
    fit(make_module(schedules=schedules), make_batches(3), tmp_path, callbacks=[history])
    assert ["train/l1" in row for row in history.logged] == [False, False, True]
    row = history.logged[-1]
    assert row["train/weighted/adversarial"] == pytest.approx(0.25 * row["train/adversarial"])


def test_a_schedule_of_an_unknown_term_lists_the_terms():
    with pytest.raises(ValueError, match=r"schedules.gan: there is no such term; this run has adversarial, l1, l2"):
        make_module(schedules={"gan": {"kind": "constant", "value": 0.5}})


def test_strategies_that_shard_parameters_are_refused_with_what_to_use():
    module = make_module()
    module._trainer = SimpleNamespace(strategy=object.__new__(FSDPStrategy))
    with pytest.raises(ValueError, match=r"FSDPStrategy shards parameters.*use trainer.strategy=fsdp of train.py"):
        module.setup("fit")


def test_a_discriminator_of_another_number_of_channels_names_the_setting():
    module = make_module()
    with pytest.raises(ValueError, match=r"takes 1 channels, the images have 3: set discriminator.channels=3"):
        type(module)(
            module.tokenizer,
            module.loss,
            module.make_optimizer,
            module.make_scheduler,
            AdversarialLoss(PatchDiscriminator(channels=1, base_channels=8)),
        )


GAME = [
    "quantizer=vq_ema",
    "quantizer.codebook_size=32",
    "quantizer.dim=4",
    "discriminator=patchgan",
    "discriminator.base_channels=8",
    "discriminator.num_layers=1",
    "discriminator.adversarial.lecam=0.1",
    "discriminator.adversarial.augmentations=[color,translation]",
    "discriminator.adversarial.discriminator_start=2",
    "discriminator.adversarial.start=0.3",
    "discriminator.adversarial.warmup=5",
]


def test_resuming_a_game_gives_the_weights_of_the_uninterrupted_run_bit_for_bit(tiny, monkeypatch):
    config, whole = tiny("whole", *GAME)
    train(config, whole)
    config, stopped = tiny("stopped", *GAME)
    checkpoint = interrupted(config, stopped, 7, monkeypatch).checkpoint
    config, resumed = tiny("resumed", *GAME, f"ckpt={checkpoint}")
    train(config, resumed)
    assert_equal_weights(weights(resumed), weights(whole))
    assert rows(resumed) == rows(whole)
    last = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (whole, resumed)]
    players = [checkpoint["current_model_state"] for checkpoint in last]
    assert_equal_weights(*players)
    assert "adversarial.averages" in players[0]


def test_resuming_with_another_discriminator_is_refused_with_the_difference(tiny, monkeypatch):
    config, stopped = tiny("stopped", *GAME)
    checkpoint = interrupted(config, stopped, 3, monkeypatch).checkpoint
    config, other = tiny(
        "other", *GAME, "discriminator.norm=group", "discriminator.base_channels=32", f"ckpt={checkpoint}"
    )
    with pytest.raises(ValueError, match=r"another discriminator.*base_channels=8 / 32; norm=batch / group"):
        train(config, other)
    config, none = tiny("none", *GAME[:3], f"ckpt={checkpoint}")
    with pytest.raises(ValueError, match="another discriminator"):
        train(config, none)
