"""Losses and codes of soft assignments to all codes, tile by tile, recomputed in the backward pass.

One streaming kernel has two heads on the same scores, so that a method that needs both (IBQ with entropies) computes
the scores once per pass:

- the entropy head: sample entropy and mean probability of ``softmax(scores / entropy_temperature)``;
- the one-hot head: the hard code, with the gradient of the soft one.

Forward keeps an online softmax: tiles are summed relative to the running maximum, and the sums are rescaled when it
grows.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vistok.ops.nearest import Search
from vistok.ops.tile import (
    LOWEST_EXPONENT,
    check_metric,
    half_norms,
    in_float32,
    pad_rows,
    product,
    slices,
    tile_shape,
    with_bias,
)

# Scores, and the weights of the two heads. Most passes go from one of them to another.
BUFFERS = 3
BUFFERS_IN_USE = 2


class SoftCodes(NamedTuple):
    """Both heads at once.

    Attributes:
        codes: ``(n v)``, exactly ``values[indices]``, with the gradient of the soft one-hot.
        indices: int64 ``(n)``, the largest score of each row.
        sample_entropy: Mean over the rows of the entropy of their assignment, in nats.
        mean_probability: ``(k)``, mean over the rows of their assignment.
    """

    codes: Float[Tensor, "n v"]
    indices: Int[Tensor, " n"]
    sample_entropy: Float[Tensor, ""]
    mean_probability: Float[Tensor, " k"]


def soft_assignment(
    rows: Float[Tensor, "n d"], codebook: Float[Tensor, "k d"], temperature: float, metric: str = "euclidean"
) -> tuple[Float[Tensor, ""], Float[Tensor, " k"]]:
    """Entropy of each row's assignment and mean assignment, differentiable in rows and codebook.

    The probabilities are ``softmax(-|z - e|^2 / temperature)`` over the codes, or ``softmax(z e / temperature)`` with
    ``metric="dot"``. The entropy of the mean is left to the caller, who averages it over ranks first.

    Args:
        rows: float32, at least one.
        codebook: float32 table.
        temperature: Positive.
        metric: ``euclidean`` or ``dot``.

    Returns:
        Mean entropy over the rows in nats, and the mean probability of each code.
    """
    _check_temperature("temperature", temperature)
    rows, codebook = _scored(rows, codebook, metric, None)
    _, _, entropies, _, probability, _ = _soft(rows, codebook, None, None, 0.0, 1 / temperature)
    return entropies.mean(), probability


def soft_one_hot(
    rows: Float[Tensor, "n d"],
    keys: Float[Tensor, "k d"],
    values: Float[Tensor, "k v"],
    temperature: float = 1.0,
    metric: str = "dot",
    bias: Float[Tensor, " k"] | None = None,
    noise_seed: Int[Tensor, ""] | None = None,
) -> tuple[Float[Tensor, "n v"], Int[Tensor, " n"]]:
    """Values of the best keys, with the gradient of the soft one-hot ``hard - sg[soft] + soft`` over all codes.

    It is the index backpropagation of IBQ (F. Shi et al., https://arxiv.org/abs/2412.02692) and, with noise, the
    straight-through Gumbel-softmax (E. Jang et al., https://arxiv.org/abs/1611.01144). The gradient reaches rows, keys
    and bias through ``soft = softmax(scores / temperature)``, and values through ``hard``.

    Args:
        rows: float32.
        keys: float32; IBQ passes the codebook as keys and as values.
        values: float32.
        temperature: Of the soft part, positive.
        metric: ``dot`` scores by ``z k``, ``euclidean`` by ``-|z - k|^2``.
        bias: Added to the scores.
        noise_seed: Seed of Gumbel noise added to the scores; it is drawn again in the backward pass and never stored.

    Returns:
        ``(n v)`` codes, and the int64 indices of the largest scores. Without noise the index of a row does not depend
        on the other rows.
    """
    _check_temperature("temperature", temperature)
    rows, keys = _scored(rows, keys, metric, bias)
    soft, *_, indices = _soft(rows, keys, values.detach(), noise_seed, 1 / temperature, 0.0)
    return _hard(values, indices, soft), indices


def soft_codes(
    rows: Float[Tensor, "n d"],
    keys: Float[Tensor, "k d"],
    values: Float[Tensor, "k v"],
    temperature: float = 1.0,
    entropy_temperature: float = 0.01,
    metric: str = "dot",
    bias: Float[Tensor, " k"] | None = None,
    noise_seed: Int[Tensor, ""] | None = None,
) -> SoftCodes:
    """`soft_one_hot` and `soft_assignment` of the same scores in the same passes; noise is for the codes only.

    The arguments are theirs; the entropies see the bias too.
    """
    _check_temperature("temperature", temperature)
    _check_temperature("entropy_temperature", entropy_temperature)
    rows, keys = _scored(rows, keys, metric, bias)
    soft, _, entropies, _, probability, indices = _soft(
        rows, keys, values.detach(), noise_seed, 1 / temperature, 1 / entropy_temperature
    )
    return SoftCodes(_hard(values, indices, soft), indices, entropies.mean(), probability)


def _check_temperature(name: str, temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"{name} must be positive, got {temperature}")


def _scored(rows: Tensor, keys: Tensor, metric: str, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows and keys whose plain products are the scores."""
    check_metric(metric)
    if metric == "euclidean":
        norms = 2 * half_norms(keys)
        keys, bias = 2 * keys, -norms if bias is None else bias - norms
    if bias is not None:
        keys, rows = with_bias(keys, rows, bias)
    return rows, keys


def _hard(values: Tensor, indices: Tensor, soft: Tensor) -> Tensor:
    """The hard codes with the gradient of the soft ones; the values see the gradient of the hard ones only."""
    return F.embedding(indices, values) + (soft - soft.detach())


class _OnlineSoftmax:
    """Normaliser and weighted sum of a softmax over tiles.

    Args:
        scale: Inverse temperature.
        rows: Number of rows.
        like: Gives dtype and device.
        width: Channels of the weighted sum.
    """

    def __init__(self, scale: float, rows: int, like: Tensor, width: int = 0) -> None:
        self.scale = scale
        self.peak = like.new_full((rows,), -torch.inf)
        self.total = like.new_zeros(rows)
        self.value = like.new_zeros(rows, width)

    def add(self, scores: Tensor, peak: Tensor, buffer: Tensor, values: Tensor | None = None) -> None:
        """Add a tile ``(codes rows)`` with its largest scores ``(rows)`` and its values ``(codes width)``."""
        peak = torch.maximum(self.peak, peak * self.scale)
        shrink = (self.peak - peak).exp_()
        weights = _exponents(scores, self.scale, peak, buffer).exp_()
        self.total.mul_(shrink).add_(weights.sum(0))
        if values is not None:
            self.value.mul_(shrink.unsqueeze(-1)).addmm_(weights.T, values)
        self.peak = peak

    def normalisers(self) -> Tensor:
        """Largest scaled score and logarithm of the total relative to it, ``(rows 2)``.

        Their sum would lose the total beside a large score.
        """
        return torch.stack([self.peak, self.total.log()], -1)


def _exponents(scores: Tensor, scale: float, peak: Tensor, buffer: Tensor) -> Tensor:
    """``scale * scores - peak`` in the flat `buffer`, cut off where the exponential no longer counts."""
    return torch.add(-peak, scores, alpha=scale, out=_like(scores, buffer)).clamp_(min=LOWEST_EXPONENT)


def _log_probabilities(scores: Tensor, scale: float, normalisers: Tensor, buffer: Tensor) -> Tensor:
    """Logarithms of the softmax over all tiles, in the flat `buffer`."""
    # Contiguous, or the subtraction does not vectorise.
    peak, log_total = normalisers.T.contiguous()
    return _exponents(scores, scale, peak, buffer).sub_(log_total)


def _like(scores: Tensor, buffer: Tensor) -> Tensor:
    """The start of the flat `buffer` in the shape of `scores`."""
    return buffer[: scores.numel()].view(scores.shape)


def _gumbel_noise(seed: Tensor | None, device: torch.device) -> torch.Generator | None:
    """The source of noise of one pass over the tiles; the next pass with the same tiles draws the same."""
    return None if seed is None else torch.Generator(device).manual_seed(int(seed))


def _add_gumbel_(scores: Tensor, generator: torch.Generator, buffer: Tensor) -> Tensor:
    noise = _like(scores, buffer).exponential_(generator=generator)
    return scores.sub_(noise.clamp_(min=torch.finfo(noise.dtype).tiny).log_())


@torch.library.custom_op("vistok::soft", mutates_args=())
@in_float32
def _soft(
    rows: Tensor, keys: Tensor, values: Tensor | None, noise_seed: Tensor | None, scale: float, entropy_scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Both heads; one that is off (no values, ``entropy_scale`` 0) returns empty tensors.

    Returns:
        soft codes ``(n v)``, their normalisers ``(n 2)``, entropies ``(n)``, their normalisers ``(n 2)``, mean
        probability ``(k)``, indices ``(n)``.
    """
    n, k = len(rows), len(keys)
    rows = pad_rows(rows)
    tile_rows, tile_codes = tile_shape(n, k, rows.device, BUFFERS_IN_USE)
    score_buffer, buffer, other_buffer = rows.new_empty(BUFFERS, tile_rows * tile_codes)
    generator = _gumbel_noise(noise_seed, rows.device)
    indices = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
    width = 0 if values is None else values.shape[1]
    soft, soft_normalisers = rows.new_empty(len(rows), width), rows.new_empty(len(rows) if width else 0, 2)
    entropies = rows.new_zeros(len(rows) if entropy_scale else 0)
    entropy_normalisers, probability = rows.new_empty(len(entropies), 2), rows.new_zeros(k if entropy_scale else 0)
    # Padding rows have weight zero.
    weight = (torch.arange(len(rows), device=rows.device) < n).to(rows.dtype) / max(n, 1)
    for part in slices(len(rows), tile_rows):
        z = rows[part]
        search = Search(keys, z, tile_codes)
        noisy_peak, noisy_index = z.new_full((len(z),), -torch.inf), indices[part].zero_()
        entropy_head = _OnlineSoftmax(entropy_scale, len(z), z)
        soft_head = _OnlineSoftmax(scale, len(z), z, width)
        for codes in slices(k, tile_codes):
            scores = product(keys[codes], z, score_buffer)
            peak = search.add(scores)
            if entropy_scale:
                entropy_head.add(scores, peak, buffer)
            if values is None:
                continue
            if generator is not None:
                peak, index = _add_gumbel_(scores, generator, buffer).max(0)
                noisy_index.copy_(torch.where(peak > noisy_peak, index + codes.start, noisy_index))
                noisy_peak = torch.maximum(noisy_peak, peak)
            soft_head.add(scores, peak, buffer, values[codes])
        if generator is None:
            indices[part] = search.best(1).squeeze(-1)
        # Before the next search notes as many peaks.
        del search
        if values is not None:
            soft[part] = soft_head.value / soft_head.total.unsqueeze(-1)
            soft_normalisers[part] = soft_head.normalisers()
        if entropy_scale:
            entropy_normalisers[part] = entropy_head.normalisers()
            for codes in slices(k, tile_codes):
                scores = product(keys[codes], z, score_buffer)
                log_p = _log_probabilities(scores, entropy_scale, entropy_normalisers[part], buffer)
                p = torch.exp(log_p, out=_like(scores, other_buffer))
                probability[codes].addmv_(p, weight[part])
                entropies[part].sub_(log_p.mul_(p).sum(0))
    return (
        soft[:n].clone(),
        soft_normalisers[:n].clone(),
        entropies[:n].clone(),
        entropy_normalisers[:n].clone(),
        probability,
        indices[:n].clone(),
    )


@_soft.register_fake
def _(
    rows: Tensor, keys: Tensor, values: Tensor | None, noise_seed: Tensor | None, scale: float, entropy_scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, k = len(rows), len(keys)
    width = 0 if values is None else values.shape[1]
    soft_rows, entropy_rows = (n if width else 0), (n if entropy_scale else 0)
    return (
        rows.new_empty(n, width),
        rows.new_empty(soft_rows, 2),
        rows.new_empty(entropy_rows),
        rows.new_empty(entropy_rows, 2),
        rows.new_empty(k if entropy_scale else 0),
        torch.empty(n, dtype=torch.int64, device=rows.device),
    )


@torch.library.custom_op("vistok::soft_backward", mutates_args=())
@in_float32
def _soft_backward(
    rows: Tensor,
    keys: Tensor,
    values: Tensor | None,
    noise_seed: Tensor | None,
    scale: float,
    entropy_scale: float,
    soft: Tensor,
    soft_normalisers: Tensor,
    entropies: Tensor,
    entropy_normalisers: Tensor,
    grad_soft: Tensor | None,
    grad_entropies: Tensor | None,
    grad_probability: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of rows and keys.

    With p the probabilities, g the gradients of soft codes (a), entropies (H) and mean probability (m), the gradient of
    the scaled scores is ``p (g_a v_k - g_a a)`` for the one-hot head and
    ``p (g_m / n - E_p[g_m / n] - g_H (log p + H))`` for the entropy head.
    """
    n, k = len(rows), len(keys)
    # In the same blocks as forward, so that the same noise is drawn; the zeros add nothing to the gradients.
    rows, soft, soft_normalisers, entropies, entropy_normalisers = (
        pad_rows(tensor) for tensor in (rows, soft, soft_normalisers, entropies, entropy_normalisers)
    )
    grad_soft = None if grad_soft is None else pad_rows(grad_soft)
    grad_entropies = None if grad_entropies is None else pad_rows(grad_entropies)
    tile_rows, tile_codes = tile_shape(n, k, rows.device, BUFFERS_IN_USE)
    score_buffer, buffer, other_buffer = rows.new_empty(BUFFERS, tile_rows * tile_codes)
    generator = _gumbel_noise(noise_seed, rows.device)
    grad_rows, grad_keys = torch.zeros_like(rows), torch.zeros_like(keys)
    for part in slices(len(rows), tile_rows):
        z = rows[part]
        shift = z.new_zeros(len(z))
        if grad_probability is not None:
            for codes in slices(k, tile_codes):
                scores = product(keys[codes], z, score_buffer)
                p = _log_probabilities(scores, entropy_scale, entropy_normalisers[part], buffer).exp_()
                shift.addmv_(p.T, grad_probability[codes], alpha=-1 / n)
        if grad_entropies is not None:
            shift.addcmul_(grad_entropies[part], entropies[part], value=-1)
        for codes in slices(k, tile_codes):
            scores = product(keys[codes], z, score_buffer)
            grad, factor = None, entropy_scale
            if grad_entropies is not None or grad_probability is not None:
                log_p = _log_probabilities(scores, entropy_scale, entropy_normalisers[part], buffer)
                p = torch.exp(log_p, out=_like(scores, other_buffer))
                grad = log_p.copy_(shift) if grad_entropies is None else log_p.mul_(-grad_entropies[part]).add_(shift)
                if grad_probability is not None:
                    grad.add_(grad_probability[codes].unsqueeze(-1), alpha=1 / n)
                grad.mul_(p)
            if grad_soft is not None:
                assert values is not None
                if generator is not None:
                    _add_gumbel_(scores, generator, other_buffer)
                p = _log_probabilities(scores, scale, soft_normalisers[part], score_buffer).exp_()
                mean = (grad_soft[part] * soft[part]).sum(-1)
                p.mul_(product(values[codes], grad_soft[part], other_buffer).sub_(mean))
                grad, factor = p if grad is None else p.add_(grad, alpha=entropy_scale / scale), scale
            if grad is not None:
                grad_rows[part].addmm_(grad.T, keys[codes], alpha=factor)
                grad_keys[codes].addmm_(grad, z, alpha=factor)
    return grad_rows[:n].clone(), grad_keys


@_soft_backward.register_fake
def _(
    rows: Tensor,
    keys: Tensor,
    values: Tensor | None,
    noise_seed: Tensor | None,
    scale: float,
    entropy_scale: float,
    soft: Tensor,
    soft_normalisers: Tensor,
    entropies: Tensor,
    entropy_normalisers: Tensor,
    grad_soft: Tensor | None,
    grad_entropies: Tensor | None,
    grad_probability: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), torch.empty_like(keys)


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    rows, keys, values, noise_seed, ctx.scale, ctx.entropy_scale = inputs
    ctx.save_for_backward(rows, keys, values, noise_seed, *output[:4])


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    rows, keys, values, noise_seed, soft, soft_normalisers, entropies, entropy_normalisers = ctx.saved_tensors
    grad_soft, _, grad_entropies, _, grad_probability, _ = grads
    grad_rows, grad_keys = _soft_backward(
        rows,
        keys,
        values,
        noise_seed,
        ctx.scale,
        ctx.entropy_scale,
        soft,
        soft_normalisers,
        entropies,
        entropy_normalisers,
        grad_soft if ctx.scale else None,
        grad_entropies if ctx.entropy_scale else None,
        grad_probability if ctx.entropy_scale else None,
    )
    return grad_rows, grad_keys, None, None, None, None


_soft.register_autograd(_backward, setup_context=_keep)
