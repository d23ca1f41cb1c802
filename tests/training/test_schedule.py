"""Learning rates by optimiser step."""

import math

import pytest
import torch

from vistok.training import schedule

SCHEDULES = {
    "cosine": (schedule.cosine, lambda progress: 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2),
    "linear": (schedule.linear, lambda progress: 1 - 0.9 * progress),
    "constant": (schedule.constant, lambda progress: 1.0),
    "step": (schedule.step, lambda progress: 0.1 ** sum(progress >= milestone for milestone in (0.25, 0.5))),
}
OPTIONS = {"cosine": {"final_share": 0.1}, "linear": {"final_share": 0.1}, "step": {"milestones": [0.25, 0.5]}}


def optimizer(*rates):
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(()))], "lr": rate} for rate in rates])


@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_rise_linearly_and_then_follow_the_formula(name):
    make, formula = SCHEDULES[name]
    sgd = optimizer(2.0)
    scheduler = make(sgd, total_steps=24, warmup_steps=4, **OPTIONS.get(name, {}))
    for step in range(24):
        expected = (step + 1) / 4 if step < 4 else formula((step - 4) / 20)
        assert sgd.param_groups[0]["lr"] == pytest.approx(2 * expected)
        sgd.step()
        scheduler.step()


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("rule", "factor"), [("linear", 4.0), ("sqrt", 2.0)])
def test_rates_of_all_groups_scale_with_the_batch_and_say_so(name, rule, factor, caplog):
    caplog.set_level("INFO")
    sgd = optimizer(0.5, 0.1)
    SCHEDULES[name][0](sgd, total_steps=9, reference_batch=256, batch_scaling=rule, global_batch=1024)
    assert [group["lr"] for group in sgd.param_groups] == pytest.approx([0.5 * factor, 0.1 * factor])
    assert f"learning rates multiplied by {factor:g} ({rule} in 1024 / 256 samples per step)" in caplog.text


def test_without_a_reference_batch_rates_are_those_of_the_optimizer(caplog):
    sgd = optimizer(0.5)
    schedule.cosine(sgd, total_steps=9, global_batch=1024)
    assert sgd.param_groups[0]["lr"] == 0.5
    assert not caplog.text


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match=r"scheduler.batch_scaling must be linear or sqrt, got 'cubic'"):
        schedule.cosine(optimizer(0.5), total_steps=9, batch_scaling="cubic")


@pytest.mark.parametrize("milestones", [[0.5, 0.25], [0.0], [1.0], [500]])
def test_milestones_outside_the_training_are_refused(milestones):
    with pytest.raises(ValueError, match=r"scheduler.milestones must ascend between 0 and 1"):
        schedule.step(optimizer(0.5), total_steps=9, milestones=milestones)


def test_a_warmup_as_long_as_the_training_is_refused():
    with pytest.raises(ValueError, match=r"warmup_steps must be below the 9 steps .* set scheduler.warmup_steps=0"):
        schedule.linear(optimizer(0.5), total_steps=9, warmup_steps=9)
