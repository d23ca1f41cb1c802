"""Gradient checkpointing."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def call(function: Callable[..., Any], *inputs: Any, gradient_checkpointing: bool) -> Any:
    """``function(*inputs)``; its activations are computed again in the backward pass instead of being kept.

    T. Chen et al.: Training Deep Nets with Sublinear Memory Cost, https://arxiv.org/abs/1604.06174. Call it once per
    block of a trunk. Without gradients, or with ``gradient_checkpointing=False``, it is a plain call.
    """
    if gradient_checkpointing and torch.is_grad_enabled():
        return checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)
