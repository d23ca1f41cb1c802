"""Schedules of weights: values by hand, and what is refused."""

import pickle

import pytest
from omegaconf import OmegaConf

from vistok.loss import make_schedule

STEPS = (0, 10, 25, 50, 75, 100, 150)


def values(**config):
    schedule = make_schedule(config)
    return [schedule(step, 100) for step in STEPS]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"kind": "constant"}, [1] * 7),
        ({"kind": "constant", "value": 0.5}, [0.5] * 7),
        ({"kind": "linear"}, [0, 0.1, 0.25, 0.5, 0.75, 1, 1]),
        ({"kind": "linear", "start": 25, "end": 75, "initial": 1.0, "final": 0.0}, [1, 1, 1, 0.5, 0, 0, 0]),
        ({"kind": "linear", "start": 0.25, "end": 0.75, "initial": 1.0, "final": 0.0}, [1, 1, 1, 0.5, 0, 0, 0]),
        ({"kind": "linear", "start": 50, "end": 50}, [0, 0, 0, 1, 1, 1, 1]),
        ({"kind": "cosine", "initial": 2.0, "final": 0.0, "end": 1.0}, [2, 1.9510565, 1.7071068, 1, 0.2928932, 0, 0]),
        ({"kind": "piecewise", "points": [[25, 0.0], [0.75, 1.0], [0.75, 0.1]]}, [0, 0, 0, 0.5, 0.1, 0.1, 0.1]),
    ],
)
def test_multipliers_are_those_worked_out_by_hand(config, expected):
    assert values(**config) == pytest.approx(expected)


def test_a_step_of_one_and_a_share_of_one_are_different_positions():
    assert values(kind="linear", start=1, end=1)[1] == 1
    assert values(kind="linear", start=1.0, end=1.0)[1] == 0


def test_a_config_of_hydra_is_a_schedule():
    config = OmegaConf.create({"kind": "piecewise", "points": [[0, 1.0], [0.5, 0.0]]})
    assert make_schedule(config)(25, 100) == 0.5


def test_a_schedule_survives_pickling():
    schedule = make_schedule({"kind": "linear"})
    assert pickle.loads(pickle.dumps(schedule)) == schedule


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "one of constant, linear, cosine, piecewise, got None"),
        ({"kind": "exponential"}, "got 'exponential'"),
        ({"kind": "constant", "end": 3}, "a constant schedule has no end: write value"),
        ({"kind": "piecewise"}, "points must be pairs"),
        ({"kind": "piecewise", "points": [1, 2]}, "points must be pairs"),
        ({"kind": "linear", "end": 1e4}, "write 10000 for a step"),
        ({"kind": "linear", "start": -1}, "a position must be a step"),
        ({"kind": "linear", "start": True}, "a position must be a step"),
        ({"kind": "constant", "value": -1.0}, "a number that is not negative, got -1.0"),
        ({"kind": "constant", "value": float("nan")}, "a number that is not negative, got nan"),
    ],
)
def test_an_error_says_what_to_write(config, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(config)


def test_positions_out_of_order_in_this_training_are_an_error():
    schedule = make_schedule({"kind": "linear", "start": 5000, "end": 0.1})
    assert schedule(5000, 100_000) == 0
    with pytest.raises(ValueError, match=r"must not decrease, got the steps \[5000, 1000.0\]"):
        schedule(0, 10_000)
