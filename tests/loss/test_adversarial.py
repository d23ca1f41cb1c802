"""The losses of both players: formulas, gradients, schedule, and what a rejected step leaves behind."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vistok.discriminator import PatchDiscriminator
from vistok.discriminator.base import Discriminator
from vistok.loss import AdversarialLoss, adaptive_weight

GAME = ("adversarial", "discriminator")


class Mean(Discriminator):
    """The logit of an image is its mean times a parameter."""

    def __init__(self):
        super().__init__()
        self.channels = 3
        self.factor = nn.Parameter(torch.tensor(2.0))

    def logits(self, images):
        return self.factor * images.mean((1, 2, 3))[:, None]


def make(discriminator=None, **arguments):
    return AdversarialLoss(discriminator or Mean(), **arguments)


def constant(*values):
    """Images of one value each."""
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).clone()


# For logits 1 and -3 of images, 2 and 0 of reconstructions.
SOFTPLUS = {value: F.softplus(torch.tensor(float(value))).item() for value in (-3, -2, -1, 0, 1, 2, 3)}
EXPECTED = {
    "hinge": (-1.0, ((0 + 4) / 2 + (3 + 1) / 2) / 2),
    "vanilla": (-1.0, ((SOFTPLUS[-1] + SOFTPLUS[3]) / 2 + (SOFTPLUS[2] + SOFTPLUS[0]) / 2) / 2),
    "non_saturating": (
        (SOFTPLUS[-2] + SOFTPLUS[0]) / 2,
        ((SOFTPLUS[-1] + SOFTPLUS[3]) / 2 + (SOFTPLUS[2] + SOFTPLUS[0]) / 2) / 2,
    ),
    "hinge_non_saturating": ((SOFTPLUS[-2] + SOFTPLUS[0]) / 2, ((0 + 4) / 2 + (3 + 1) / 2) / 2),
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_the_losses_follow_their_formulas(kind):
    terms, measured = make(kind=kind)(constant(1.0, 0.0), constant(0.5, -1.5), GAME)
    assert (terms["adversarial"].item(), terms["discriminator"].item()) == pytest.approx(EXPECTED[kind])
    assert measured["logits_real"].item() == pytest.approx(-1.0)
    assert measured["logits_fake"].item() == pytest.approx(1.0)
    # One image of two is taken for real, no reconstruction of two for one.
    assert measured["discriminator_accuracy"].item() == pytest.approx(0.25)


def test_each_term_reaches_its_own_player_only():
    loss, reconstructions = make(), constant(0.3, 0.4).requires_grad_()
    terms, _ = loss(reconstructions, constant(0.5, -1.5), GAME)
    terms["adversarial"].backward()
    assert reconstructions.grad is not None
    assert loss.discriminator.factor.grad is None
    reconstructions.grad = None
    terms["discriminator"].backward()
    assert reconstructions.grad is None
    assert loss.discriminator.factor.grad is not None


def test_a_term_that_is_not_active_is_not_computed():
    terms, _ = make(lecam=0.1, r1=1.0)(constant(0.0), constant(1.0), ("discriminator",))
    assert terms.keys() == {"discriminator"}


def test_the_gradient_penalty_is_the_squared_norm_of_the_gradient_and_trains_the_discriminator():
    loss = make(r1=10.0, r1_every=4)
    terms, _ = loss(constant(0.0, 0.0), constant(1.0, 1.0), ("discriminator", "r1"))
    # The gradient of factor * mean is factor / n in each of n values.
    assert terms["r1"].item() == pytest.approx(4 / (3 * 64), rel=1e-5)
    terms["r1"].backward()
    assert loss.discriminator.factor.grad.item() == pytest.approx(2 * 2 / (3 * 64), rel=1e-5)


@pytest.mark.parametrize("norm", ["batch", "spectral"])
def test_neither_the_tokenizers_term_nor_the_penalty_changes_the_buffers(norm):
    torch.manual_seed(0)
    discriminators = [PatchDiscriminator(base_channels=8, num_layers=1, norm=norm)]
    discriminators.append(copy.deepcopy(discriminators[0]))
    images, reconstructions = torch.rand(2, 2, 3, 16, 16)
    make(discriminators[0], r1=1.0)(reconstructions, images, ("adversarial", "discriminator", "r1"))
    make(discriminators[1])(reconstructions, images, ("discriminator",))
    for name, buffer in discriminators[0].named_buffers():
        assert torch.equal(buffer, dict(discriminators[1].named_buffers())[name]), name


def test_a_rejected_step_leaves_no_statistics_and_no_averages():
    loss = make(PatchDiscriminator(base_channels=8, num_layers=2), lecam=0.1)
    before = copy.deepcopy(loss.state_dict())
    for _ in range(2):  # two batches of one step
        loss(torch.full((2, 3, 16, 16), torch.nan), torch.rand(2, 3, 16, 16), ("discriminator", "lecam"))
    assert any(not torch.equal(value, before[name]) for name, value in loss.state_dict().items())
    loss.discard()
    for name, value in loss.state_dict().items():
        assert torch.equal(value, before[name]), name
    loss(torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16), ("discriminator", "lecam"))
    loss.update()
    assert all(value.isfinite().all() for value in loss.state_dict().values())
    assert int(loss.averaged_steps) == 1


def test_lecam_compares_with_the_averages_of_earlier_steps():
    loss = make(lecam=0.1)
    first, _ = loss(constant(-1.0), constant(1.0), ("discriminator", "lecam"))
    assert first["lecam"] == 0
    loss.update()
    # The first step sets the averages: logits are 2 and -2.
    assert loss.averages.tolist() == [2.0, -2.0]
    second, _ = loss(constant(0.5), constant(0.0), ("discriminator", "lecam"))
    # (0 + 2)^2 of the image and (2 - 1)^2 of the reconstruction.
    assert second["lecam"].item() == pytest.approx(5.0)
    loss.update()
    assert loss.averages.tolist() == pytest.approx([0.999 * 2, 0.999 * -2 + 0.001 * 1])


def test_the_averages_take_all_batches_of_a_step():
    loss = make(lecam=0.1)
    for value in (1.0, 0.0):
        loss(constant(-value), constant(value), ("discriminator", "lecam"))
    loss.update()
    assert loss.averages.tolist() == [1.0, -1.0]
    assert int(loss.averaged_steps) == 1


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_the_adaptive_weight_is_the_ratio_of_gradient_norms_at_the_last_layer(scale):
    loss, last = make(), nn.Conv2d(4, 3, 3, padding=1)
    features, images = torch.rand(2, 2, 4, 8, 8).sum(0), torch.rand(2, 3, 8, 8)
    reconstructions = last(features)
    terms, _ = loss(reconstructions, images, GAME)
    distance = F.l1_loss(reconstructions, images)
    got = adaptive_weight(distance, terms["adversarial"], last.weight, 1e4, scale)
    norms = []
    for value in (distance, terms["adversarial"]):
        last.weight.grad = None
        value.backward(retain_graph=True)
        norms.append(last.weight.grad.norm())
    assert got.item() == pytest.approx((norms[0] / (norms[1] + 1e-4)).item(), rel=1e-5)
    assert not got.requires_grad


def test_the_adaptive_weight_is_capped():
    loss, last = make(), torch.ones(3, 1, 1, requires_grad=True)
    reconstructions = (torch.rand(2, 3, 8, 8) * last).float()
    terms, _ = loss(reconstructions, constant(0.0, 1.0), GAME)
    assert adaptive_weight(1e6 * reconstructions.sum(), terms["adversarial"], last, 0.75) == 0.75


@pytest.mark.parametrize(
    ("arguments", "opens"),
    [
        ({"discriminator_start": 10, "start": 20, "warmup": 0}, (10, 20, 20)),
        ({"discriminator_start": 0.1, "start": 0.2, "warmup": 0.05}, (10, 20, 24)),
        ({"discriminator_start": 0, "start": 0, "warmup": 4}, (0, 0, 3)),
    ],
)
def test_both_players_start_when_they_are_told_and_the_tokenizer_listens_more_and_more(arguments, opens):
    loss = make(weight=0.8, **arguments)
    weights = [loss.weights(step, total_steps=100) for step in range(100)]
    trains, listens, loud = opens
    assert [row["discriminator"] for row in weights] == [float(step >= trains) for step in range(100)]
    heard = [row["adversarial"] for row in weights]
    assert heard[:listens] == [0.0] * listens
    assert heard[loud:] == [0.8] * (100 - loud)
    ramp = heard[listens : loud + 1]
    assert ramp == pytest.approx([0.8 * (n + 1) / len(ramp) for n in range(len(ramp))])


def test_the_gradient_penalty_is_lazy_and_counts_for_the_steps_between():
    loss = make(r1=10.0, r1_every=4, discriminator_start=6, start=6)
    weights = [loss.weights(step, 100)["r1"] for step in range(13)]
    assert [step for step, weight in enumerate(weights) if weight] == [8, 12]
    assert weights[8] == 10.0 / 2 * 4


def test_listening_to_a_discriminator_that_has_not_begun_is_an_error():
    with pytest.raises(ValueError, match="listen from step 10 on to a discriminator that trains from step 15 on"):
        make(start=0.1, discriminator_start=15).weights(0, 100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "wasserstein"}, "kind must be one of hinge, vanilla"),
        ({"weight": 0.0}, "discriminator=none"),
        ({"max_adaptive_weight": 0.0}, "must be positive, or null"),
        ({"r1_every": 0}, "r1_every positive"),
        ({"clip": 0.0}, "null to clip nothing"),
        ({"augmentations": ("flip",)}, "no augmentation flip: there are color, translation, cutout"),
        ({"start": 1.5}, "start must be steps .* or a share of the training below 1, got 1.5"),
        ({"warmup": -1}, "warmup must be steps"),
    ],
)
def test_settings_out_of_range_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_the_optimiser_gets_the_discriminators_own_settings():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))], lr=1.0, betas=(0.9, 0.999), weight_decay=0.1)
    loss = make(PatchDiscriminator(base_channels=8, num_layers=1), lr=0.5, betas=(0.0, 0.99), weight_decay=0.2)
    loss.add_to(optimizer)
    first, *others = optimizer.param_groups
    assert (first["lr"], first["betas"], first["weight_decay"]) == (1.0, (0.9, 0.999), 0.1)
    assert {(group["lr"], group["betas"]) for group in others} == {(0.5, (0.0, 0.99))}
    assert {group["weight_decay"] for group in others} == {0.0, 0.2}
    assert sum(len(group["params"]) for group in others) == len(list(loss.parameters()))


def test_an_optimiser_without_betas_is_refused():
    with pytest.raises(ValueError, match=r"SGD has no betas, which the discriminator sets: use optimizer.opt=adamw"):
        make().add_to(torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=1.0))
