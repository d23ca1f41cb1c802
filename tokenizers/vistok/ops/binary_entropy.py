"""Entropies of codes that are made of independent bits, in nats and exact.

The softmax over all ``2**k`` sign vectors ``c`` with logits ``<x, c> / t`` is a product of k independent bits, each set
with probability ``sigmoid(2 x / t)``. The functions take these logits of the bits. The entropy of one position is thus
a sum over its bits, and only the entropy of the mean over positions has to look at the ``2**k`` codes; it never needs
one row of them per position.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vistok import distributed
from vistok.ops.tile import in_float32

# A probability of e**-40 adds less than 1e-15 nats. Smaller ones are raised to it: their products would be denormal
# numbers, which slow a CPU down by two orders of magnitude, and zero has no finite derivative of the entropy.
SATURATION = 40.0
# The table of the means has 2**22 entries of float32 then: 16 MiB.
MAX_JOINT_BITS = 22
# Elements of the partial products of one chunk of rows. On a GPU larger chunks keep the device busy.
CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**24}


def sample_entropy(logits: Float[Tensor, "n k"]) -> Float[Tensor, ""]:
    """Mean over positions of the entropy of a position's code; at most ``k log 2``."""
    logits = logits.clamp(-SATURATION, SATURATION)
    # In this form nothing cancels, neither in the value nor in its derivative at zero.
    negated = logits.sigmoid() * F.logsigmoid(logits) + (-logits).sigmoid() * F.logsigmoid(-logits)
    return -negated.sum(-1).mean()


def batch_entropy(logits: Float[Tensor, "n k"], group: int, *, all_ranks: bool = False) -> Float[Tensor, ""]:
    """Entropy of the mean over positions of the distribution of their codes; at most ``k log 2``.

    Args:
        logits: Of the bits; a bit is set with probability ``sigmoid(logit)``.
        group: Number of neighbouring bits whose joint distribution counts. The entropies of the groups are added, which
            is an upper bound of the entropy of the whole code, and exact with ``group == k``.
        all_ranks: Whether the positions of all ranks count. Every rank has to call it then.

    Raises:
        ValueError: If `group` does not divide the number of bits, or has more than 22 bits.
    """
    n, k = logits.shape
    if group < 1 or k % group:
        raise ValueError(f"group must divide the {k} bits, got {group}")
    if group > MAX_JOINT_BITS:
        raise ValueError(f"the joint distribution of {group} bits is too large: at most {MAX_JOINT_BITS} in a group")
    mean = _mean_distribution(logits.clamp(-SATURATION, SATURATION).view(n, k // group, group))
    if all_ranks:
        mean = distributed.mean_over_ranks(mean, n)
    return torch.special.entr(mean).sum()


def _mean_distribution(logits: Tensor) -> Tensor:
    """Mean over rows of the probabilities of the codes of each group: ``(n g b)`` to ``(g 2**(b//2) 2**(b-b//2))``."""
    return _sum_of_distributions(logits) / len(logits)


@torch.library.custom_op("vistok::sum_of_distributions", mutates_args=())
@in_float32
def _sum_of_distributions(logits: Tensor) -> Tensor:
    # p(first half, second half) = p(first half) p(second half) in every row, so the sum over rows is a matrix product.
    _, groups, bits = logits.shape
    total = logits.new_zeros(groups, 2 ** (bits // 2), 2 ** (bits - bits // 2))
    for chunk in logits.split(_chunk_rows(logits)):
        first, second = (_products(half) for half in _halves(chunk))
        total.baddbmm_(first.transpose(1, 2), second)
    return total


@_sum_of_distributions.register_fake
def _(logits: Tensor) -> Tensor:
    _, groups, bits = logits.shape
    return logits.new_empty(groups, 2 ** (bits // 2), 2 ** (bits - bits // 2))


@torch.library.custom_op("vistok::sum_of_distributions_backward", mutates_args=())
@in_float32
def _sum_of_distributions_backward(logits: Tensor, grad: Tensor) -> Tensor:
    """The products are computed again, so that those of all rows are never held."""
    grad_logits = []
    for chunk in logits.split(_chunk_rows(logits)):
        halves = _halves(chunk)
        first, second = (_products(half) for half in halves)
        grad_logs = (first * (second @ grad.transpose(1, 2)), second * (first @ grad))
        # log p(code) changes with the logit of a bit by bit - p(bit).
        grads = [
            grad_log @ _settings(half) - half.sigmoid() * grad_log.sum(-1, keepdim=True)
            for half, grad_log in zip(halves, grad_logs, strict=True)
        ]
        grad_logits.append(torch.cat(grads, -1).transpose(0, 1))
    return torch.cat(grad_logits)


@_sum_of_distributions_backward.register_fake
def _(logits: Tensor, grad: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    return _sum_of_distributions_backward(*ctx.saved_tensors, grad)


_sum_of_distributions.register_autograd(_backward, setup_context=_keep)


def _chunk_rows(logits: Tensor) -> int:
    _, groups, bits = logits.shape
    elements = groups * (2 ** (bits // 2) + 2 ** (bits - bits // 2))
    return max(1, CHUNK_ELEMENTS.get(logits.device.type, 2**22) // elements)


def _halves(logits: Tensor) -> tuple[Tensor, Tensor]:
    """``(n g b)`` to ``(g n b//2)`` and ``(g n b-b//2)``."""
    half = logits.shape[-1] // 2
    logits = logits.transpose(0, 1)
    return logits[..., :half], logits[..., half:]


def _products(logits: Tensor) -> Tensor:
    """Probabilities of all settings of independent bits, ``(... b)`` to ``(... 2**b)``; bit j counts ``2**j``."""
    pairs = torch.stack([F.logsigmoid(-logits), F.logsigmoid(logits)], -1)
    total = logits.new_zeros(*logits.shape[:-1], 1)
    for pair in pairs.unbind(-2):
        total = (pair.unsqueeze(-1) + total.unsqueeze(-2)).flatten(-2)
    return total.clamp(min=-SATURATION).exp()


def _settings(logits: Tensor) -> Tensor:
    """All settings of as many bits as there are logits, ``(2**b b)``, in the order of `_products`."""
    bits = torch.arange(logits.shape[-1], device=logits.device)
    return (torch.arange(2 ** len(bits), device=logits.device).unsqueeze(-1) >> bits & 1).to(logits.dtype)
