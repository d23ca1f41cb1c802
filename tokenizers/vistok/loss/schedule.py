"""Weights that change during training: a schedule gives a multiplier for each step."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

# The keys of each kind with their defaults; None: no default.
KINDS: dict[str, dict[str, Any]] = {
    "constant": {"value": 1.0},
    "linear": {"start": 0, "end": 1.0, "initial": 0.0, "final": 1.0},
    "cosine": {"start": 0, "end": 1.0, "initial": 0.0, "final": 1.0},
    "piecewise": {"points": None},
}


@dataclass(frozen=True)
class Schedule:
    """Multipliers at some positions of training, and what lies between them.

    Attributes:
        points: ``(position, multiplier)`` in order: an int is an optimiser step, a float in [0, 1] a share of training.
            Before the first and after the last the multiplier does not change; at a repeated position it jumps.
        smooth: Half a cosine between two points instead of a line.
    """

    points: tuple[tuple[int | float, float], ...]
    smooth: bool = False

    def __call__(self, step: int, total_steps: int) -> float:
        """Multiplier of an optimiser step.

        Args:
            step: Optimiser steps taken so far.
            total_steps: Those of the whole training.

        Raises:
            ValueError: If the positions are not in order in a training of this length.
        """
        points = [(p * total_steps if isinstance(p, float) else p, value) for p, value in self.points]
        positions = [position for position, _ in points]
        if positions != sorted(positions):
            raise ValueError(
                f"the positions of a schedule must not decrease, got the steps {positions} in a training of "
                f"{total_steps}: change {[position for position, _ in self.points]}"
            )
        if step < positions[0]:
            return points[0][1]
        for (left, before), (right, after) in pairwise(points):
            if step < right:
                share = (step - left) / (right - left)
                if self.smooth:
                    share = (1 - math.cos(math.pi * share)) / 2
                return before + share * (after - before)
        return points[-1][1]


def make_schedule(config: Mapping[str, Any]) -> Callable[[int, int], float]:
    """The schedule that a plain mapping describes: ``schedule(step, total_steps) -> multiplier``.

    Positions are optimiser steps (int) or shares of training (float in [0, 1]).

    - ``{kind: constant, value: 0.5}``
    - ``{kind: linear, start: 0, end: 0.1, initial: 0.0, final: 1.0}``: `initial` until `start`, then a line to `final`
      at `end`. ``start`` equal to ``end`` is a jump: ``{kind: linear, start: 20000, end: 20000}`` switches a loss on.
    - ``{kind: cosine, ...}``: the same with half a cosine in place of the line.
    - ``{kind: piecewise, points: [[0, 1.0], [0.5, 1.0], [0.5, 0.1]]}``: lines between points, a jump where a position
      is repeated.

    Raises:
        ValueError: If a key is unknown or missing, or a value out of range.
    """
    arguments = dict(config)
    kind = arguments.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(f"kind of a schedule must be one of {', '.join(KINDS)}, got {kind!r} in {dict(config)}")
    unknown = sorted(set(arguments) - set(KINDS[kind]))
    if unknown:
        raise ValueError(f"a {kind} schedule has no {', '.join(unknown)}: write {', '.join(KINDS[kind])}")
    arguments = {**KINDS[kind], **arguments}
    if kind == "constant":
        points = [(0, arguments["value"])]
    elif kind == "piecewise":
        points = arguments["points"]
        if (
            not isinstance(points, Sequence)
            or not points
            or any(not isinstance(point, Sequence) or len(point) != 2 for point in points)
        ):
            raise ValueError(f"points must be pairs such as [[0, 1.0], [0.5, 0.1]], got {points!r}")
    else:
        points = [(arguments["start"], arguments["initial"]), (arguments["end"], arguments["final"])]
    return Schedule(tuple((_position(p), _multiplier(value)) for p, value in points), smooth=kind == "cosine")


def _position(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise ValueError(f"a position must be a step (int) or a share of training (float in [0, 1]), got {value!r}")
    if isinstance(value, float) and not value <= 1:
        raise ValueError(f"a share of training must lie in [0, 1], got {value}: write {round(value)} for a step")
    return value


def _multiplier(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"a multiplier must be a number that is not negative, got {value!r}")
    return float(value)
