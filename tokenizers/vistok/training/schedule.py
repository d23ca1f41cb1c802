"""Learning-rate schedules as shares of the peak learning rate."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def cosine(optimizer: Optimizer, total_steps: int, warmup_steps: int = 0, final_share: float = 0.0) -> LambdaLR:
    """Linear warm-up to the optimiser's learning rate, then half a cosine down to a share of it.

    Args:
        optimizer: Its learning rates are the peaks.
        total_steps: Optimiser steps of the whole training.
        warmup_steps: Optimiser steps of the warm-up.
        final_share: Learning rate at the end as a share of the peak.

    Raises:
        ValueError: If the warm-up is not shorter than the training.
    """
    _check_warmup(warmup_steps, total_steps)

    def share(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
        return final_share + (1 - final_share) * (1 + math.cos(math.pi * progress)) / 2

    return LambdaLR(optimizer, share)


def constant(optimizer: Optimizer, total_steps: int, warmup_steps: int = 0) -> LambdaLR:
    """Linear warm-up to the optimiser's learning rate, then no change; arguments as for `cosine`."""
    _check_warmup(warmup_steps, total_steps)
    return LambdaLR(optimizer, lambda step: min((step + 1) / max(warmup_steps, 1), 1.0))


def _check_warmup(warmup_steps: int, total_steps: int) -> None:
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps must be below the {total_steps} steps of the training, got {warmup_steps}: "
            f"set scheduler.warmup_steps={total_steps // 10}"
        )
