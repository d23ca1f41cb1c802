"""Learning-rate schedules: linear warm-up to the optimiser's learning rate, then a share of it, by optimiser step.

Each is called with the optimiser and the number of optimiser steps of the whole training, and takes, besides its own
arguments, ``warmup_steps`` and those of `scale_learning_rates`.
"""

import logging
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

log = logging.getLogger(__name__)


def cosine(optimizer: Optimizer, total_steps: int, final_share: float = 0.0, **options: Any) -> LambdaLR:
    """Half a cosine from the peak down to `final_share` of it."""
    return _after_warmup(
        lambda progress: final_share + (1 - final_share) * (1 + math.cos(math.pi * progress)) / 2,
        optimizer,
        total_steps,
        **options,
    )


def linear(optimizer: Optimizer, total_steps: int, final_share: float = 0.0, **options: Any) -> LambdaLR:
    """A straight line from the peak down to `final_share` of it."""
    return _after_warmup(
        lambda progress: final_share + (1 - final_share) * (1 - progress), optimizer, total_steps, **options
    )


def constant(optimizer: Optimizer, total_steps: int, **options: Any) -> LambdaLR:
    """The peak throughout."""
    return _after_warmup(lambda progress: 1.0, optimizer, total_steps, **options)


def step(
    optimizer: Optimizer,
    total_steps: int,
    milestones: Sequence[float] = (0.5, 0.75),
    factor: float = 0.1,
    **options: Any,
) -> LambdaLR:
    """The peak, multiplied by `factor` at each milestone.

    Args:
        optimizer: As in the other schedules.
        total_steps: As in the other schedules.
        milestones: Shares of the steps after the warm-up, ascending, each in (0, 1).
        factor: In (0, 1).
        **options: As in the other schedules.

    Raises:
        ValueError: If the milestones or the factor are out of range.
    """
    if not all(low < high for low, high in pairwise((0, *milestones, 1))):
        raise ValueError(
            f"scheduler.milestones must ascend between 0 and 1, got {list(milestones)}: they are shares of the "
            "training, such as [0.5,0.75]"
        )
    if not 0 < factor < 1:
        raise ValueError(f"scheduler.factor must lie between 0 and 1, got {factor}")
    return _after_warmup(
        lambda progress: factor ** sum(progress >= milestone for milestone in milestones),
        optimizer,
        total_steps,
        **options,
    )


def scale_learning_rates(
    optimizer: Optimizer,
    global_batch: int | None = None,
    reference_batch: int | None = None,
    batch_scaling: str = "linear",
) -> None:
    """Multiply the learning rates of all groups by a function of the batch size, in place.

    Linear scaling is for SGD (Goyal et al., https://arxiv.org/abs/1706.02677); the square root is the rule for Adam and
    its relatives (Malladi et al., https://arxiv.org/abs/2205.10287).

    Args:
        optimizer: Its learning rates were chosen for `reference_batch`.
        global_batch: Samples per optimiser step: batch size x processes x accumulated batches.
        reference_batch: None leaves the learning rates as they are.
        batch_scaling: ``"linear"``: by ``global_batch / reference_batch``; ``"sqrt"``: by its square root.

    Raises:
        ValueError: If there is a reference batch but no global batch, or the rule is unknown.
    """
    if batch_scaling not in ("linear", "sqrt"):
        raise ValueError(f"scheduler.batch_scaling must be linear or sqrt, got {batch_scaling!r}")
    if reference_batch is None:
        return
    if global_batch is None or min(global_batch, reference_batch) < 1:
        raise ValueError(
            f"scheduler.reference_batch={reference_batch} scales the learning rate to the global batch of the run, "
            f"which is {global_batch}: both must be at least 1"
        )
    ratio = global_batch / reference_batch
    factor = ratio if batch_scaling == "linear" else math.sqrt(ratio)
    for group in optimizer.param_groups:
        group["lr"] *= factor
    log.info(
        "learning rates multiplied by %.4g (%s in %d / %d samples per step): %s",
        factor,
        batch_scaling,
        global_batch,
        reference_batch,
        ", ".join(f"{rate:.3g}" for rate in sorted({group["lr"] for group in optimizer.param_groups})),
    )


def _after_warmup(
    share: Callable[[float], float], optimizer: Optimizer, total_steps: int, warmup_steps: int = 0, **scaling: Any
) -> LambdaLR:
    """Linear warm-up over `warmup_steps`, then `share` of the progress in [0, 1] through the remaining steps."""
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps must be below the {total_steps} steps of the training, got {warmup_steps}: "
            f"set scheduler.warmup_steps={total_steps // 10}"
        )
    scale_learning_rates(optimizer, **scaling)

    def share_at(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return share(min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0))

    return LambdaLR(optimizer, share_at)
