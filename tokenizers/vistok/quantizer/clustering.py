"""Tools on a trained codebook or on the latents of a trained autoencoder, all by weighted k-means.

- A smaller codebook for a lower rate, without training: Q. Mao et al.: Extreme Image Compression Using Fine-tuned
  VQGANs, https://arxiv.org/abs/2307.08265.
- Coarse labels of codes, which an autoregressive model predicts before the codes: Z. Guo et al.: Improving
  Autoregressive Image Generation through Coarse-to-Fine Token Prediction, https://arxiv.org/abs/2503.16194.
- A codebook for an autoencoder that was trained without one.

Clusters start by k-means++: D. Arthur, S. Vassilvitskii: k-means++: The Advantages of Careful Seeding, SODA 2007.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vistok.config import build, config_of
from vistok.ops import nearest_code
from vistok.quantizer.base import Quantizer
from vistok.quantizer.vq import VectorQuantizer
from vistok.tokenizer import Tokenizer

Tokenizing = TypeVar("Tokenizing", Tokenizer, Quantizer)


class Reclustering(NamedTuple):
    """Clusters of codes.

    Attributes:
        codebook: ``(k d)``, the weighted mean of the codes of each cluster.
        labels: int64 ``(K)``, the cluster of each code.
    """

    codebook: Float[Tensor, "k d"]
    labels: Int[Tensor, " K"]


@torch.no_grad()
def recluster(
    codebook: Tensor,
    size: int,
    weights: Tensor | Sequence[float] | None = None,
    iterations: int = 50,
    seed: int = 0,
) -> Reclustering:
    """Cluster the codes of a codebook by weighted k-means.

    Args:
        codebook: ``(K d)``, any float dtype; the result has it too.
        size: Number of clusters.
        weights: ``(K)``, how much each code counts, such as its occurrences (`CodebookUsage.counts`). Codes of weight 0
            get a label but do not move a cluster. Default: all alike.
        iterations: At most so many; it ends when no label changes.
        seed: Seed of the first clusters.

    Raises:
        ValueError: If the shapes do not fit, a value is not finite, a weight is negative, or fewer distinct codes than
            clusters have a weight.
    """
    if codebook.ndim != 2 or not codebook.is_floating_point() or not codebook.isfinite().all():
        raise ValueError(f"a codebook is a finite float table (K, d), got {codebook.dtype} {tuple(codebook.shape)}")
    weights = torch.ones(len(codebook)) if weights is None else torch.as_tensor(weights)
    weights = weights.to(codebook.device, torch.float64)
    if weights.shape != codebook.shape[:1] or not (weights.isfinite() & (weights >= 0)).all():
        raise ValueError(
            f"weights must be {len(codebook)} finite numbers that are not negative, one per code, "
            f"got {tuple(weights.shape)}"
        )
    for name, value in (("size", size), ("iterations", iterations)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    # Equal codes are one: they cannot be told apart, and would start clusters that stay empty.
    rows, which = codebook.float().unique(dim=0, return_inverse=True)
    weights = weights.new_zeros(len(rows)).index_add_(0, which, weights)
    weighted = int((weights > 0).sum())
    if weighted < size:
        raise ValueError(f"{size} clusters need at least as many distinct codes that are used, got {weighted}")
    centres = _first_centres(rows, weights, size, torch.Generator().manual_seed(seed))
    labels = nearest_code(rows, centres)
    for _ in range(iterations):
        centres = _means(rows, weights, labels, centres)
        previous, labels = labels, nearest_code(rows, centres)
        if torch.equal(labels, previous):
            break
    return Reclustering(centres.to(codebook.dtype), labels[which])


def coarse_to_fine(
    codebook: Float[Tensor, "K d"],
    sizes: Sequence[int],
    weights: Tensor | Sequence[float] | None = None,
    iterations: int = 50,
    seed: int = 0,
) -> list[Reclustering]:
    """Nested clusterings of a codebook: every coarser cluster is a union of finer ones.

    From fine to coarse, the centres of each clustering are clustered to the next.

    Args:
        codebook: As in `recluster`, like the other arguments.
        sizes: Numbers of clusters, all different; the clusterings come back in this order.
        weights: How much each code counts.
        iterations: Of each clustering.
        seed: Of each clustering.

    Raises:
        ValueError: As in `recluster`, or if two sizes are equal.
    """
    if len(set(sizes)) < len(sizes):
        raise ValueError(f"sizes must all be different, got {list(sizes)}")
    weights = torch.ones(len(codebook)) if weights is None else torch.as_tensor(weights)
    labels = torch.arange(len(codebook), device=codebook.device)
    nested: dict[int, Reclustering] = {}
    for size in sorted(sizes, reverse=True):
        step = recluster(codebook, size, weights, iterations, seed)
        labels = step.labels[labels]
        weights = torch.zeros(size, dtype=torch.float64).index_add_(0, step.labels.cpu(), weights.cpu().double())
        codebook = step.codebook
        nested[size] = Reclustering(codebook, labels)
    return [nested[size] for size in sizes]


def reduce_codebook(
    source: Tokenizing,
    size: int,
    weights: Tensor | Sequence[float] | None = None,
    iterations: int = 50,
    seed: int = 0,
) -> Tokenizing:
    """The same tokenizer or quantizer with a smaller, frozen codebook, and so at a lower rate.

    Args:
        source: A vector quantizer or a tokenizer with one. It stays as it is; nothing is shared.
        size: Number of codes.
        weights: ``(K)``, how much each code counts, such as its occurrences.
        iterations: As in `recluster`, like the seed.
        seed: Of the first clusters.

    Raises:
        ValueError: If the codes are not compared with the features themselves (FSQ, LFQ and others), or as in
            `recluster`.

    Example:
        >>> from vistok.quantizer import VectorQuantizer
        >>> reduce_codebook(VectorQuantizer(64, 4), 16).codebook_size
        16
    """
    if isinstance(source, Tokenizer):
        return with_quantizer(source, reduce_codebook(source.quantizer, size, weights, iterations, seed))
    codebook = source.codebook
    # Derived classes compare in their own way.
    if type(source) is not VectorQuantizer or source.choices["distance"] == "linear" or codebook is None:
        raise ValueError(
            f"only the codebook of a VectorQuantizer that compares features with its codes can be reduced, "
            f"got {type(source).__name__}"
        )
    smaller = recluster(codebook.detach(), size, weights, iterations, seed).codebook
    choices = {name: source.choices[name] for name in ("distance", "unit_norm")}
    return frozen_quantizer(smaller, **choices).train(source.training)


def fit_codebook(
    features: Float[Tensor, "b d *grid"] | Iterable[Float[Tensor, "b d *grid"]],
    codebook_size: int,
    iterations: int = 50,
    max_features: int = 2**20,
    seed: int = 0,
) -> VectorQuantizer:
    """A frozen vector quantizer from the latents of an autoencoder that was trained without one.

    Args:
        features: Latents, or batches of them.
        codebook_size: Number of codes.
        iterations: Of k-means.
        max_features: If there are more features, this many of them, drawn at random, are clustered.
        seed: Of the draw and of the first clusters.

    Raises:
        ValueError: If the shapes do not fit, or there are fewer distinct features than codes.

    Example:
        A tokenizer from a continuous one, ``quantizer=identity`` or ``quantizer=kl``::

            latents = (autoencoder.encode(batch["images"]).codes for batch in batches)
            tokenizer = with_quantizer(autoencoder, fit_codebook(latents, 4096))
            vistok.save(tokenizer, "bundle")

        >>> fit_codebook(torch.randn(8, 4, 16, 16), 32).codebook_size
        32
    """
    if max_features < codebook_size:
        raise ValueError(f"max_features must be at least codebook_size = {codebook_size}, got {max_features}")
    generator = torch.Generator().manual_seed(seed)
    kept, keys = torch.empty(0), torch.empty(0, dtype=torch.float64)
    for batch in [features] if isinstance(features, Tensor) else features:
        if batch.ndim < 3 or (len(keys) and batch.shape[1] != kept.shape[1]):
            raise ValueError(f"features must be (b, d, *grid) with one d, got {tuple(batch.shape)}")
        rows = batch.detach().movedim(1, -1).flatten(0, -2).float().cpu()
        # The rows with the smallest of independent random keys are a uniform draw without repetition.
        keys = torch.cat([keys, torch.rand(len(rows), generator=generator, dtype=torch.float64)])
        rows = torch.cat([kept, rows]) if len(kept) else rows
        keys, chosen = keys.topk(min(max_features, len(keys)), largest=False)
        kept = rows[chosen]
    if not len(keys):
        raise ValueError("there are no features to fit a codebook to")
    return frozen_quantizer(recluster(kept, codebook_size, iterations=iterations, seed=seed).codebook)


def frozen_quantizer(codebook: Float[Tensor, "K d"], **choices: str) -> VectorQuantizer:
    """A vector quantizer with a given codebook, which nothing changes.

    Args:
        codebook: Copied.
        **choices: Other arguments of `VectorQuantizer`.
    """
    quantizer = VectorQuantizer(*codebook.shape, table="frozen", init="normal", **choices)  # pyright: ignore
    quantizer.table.copy_(codebook)
    return quantizer.to(codebook.device)


def with_quantizer(tokenizer: Tokenizer, quantizer: Quantizer) -> Tokenizer:
    """A copy of a tokenizer with another quantizer of the same `dim`; nothing is shared.

    Raises:
        ValueError: If the quantizer has another `dim`.
    """
    if quantizer.dim != tokenizer.quantizer.dim:
        raise ValueError(f"the tokenizer has codes of dim {tokenizer.quantizer.dim}, the quantizer of {quantizer.dim}")
    copy = build({**config_of(tokenizer), "quantizer": config_of(quantizer)})
    state = {name: value for name, value in tokenizer.state_dict().items() if not name.startswith("quantizer.")}
    copy.load_state_dict(state | {f"quantizer.{name}": value for name, value in quantizer.state_dict().items()})
    device = next((tensor.device for tensor in tokenizer.state_dict().values()), torch.device("cpu"))
    return copy.to(device).train(tokenizer.training)


def _first_centres(rows: Tensor, weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means++: each next centre is a row drawn with its weight times its squared distance to the centres so far."""
    chance = weights
    distances = torch.full_like(weights, torch.inf)
    chosen = []
    for _ in range(count):
        ends = chance.cumsum(0)
        draw = torch.rand((), generator=generator, dtype=torch.float64).to(ends.device) * ends[-1]
        # Rounding may not lead to a row of no chance: at worst the likeliest row.
        position = torch.searchsorted(ends, draw, right=True).clamp(max=len(rows) - 1)
        position = torch.where(chance[position] > 0, position, chance.argmax())
        chosen.append(position)
        distances = distances.minimum((rows - rows[position]).double().square().sum(-1))
        chance = weights * distances
    return rows[torch.stack(chosen)]


def _means(rows: Tensor, weights: Tensor, labels: Tensor, centres: Tensor) -> Tensor:
    """Weighted mean of each cluster; a cluster without weight moves to a row that its own centre fits worst."""
    totals = weights.new_zeros(len(centres)).index_add_(0, labels, weights)
    sums = weights.new_zeros(centres.shape).index_add_(0, labels, rows * weights.unsqueeze(-1))
    means = sums / totals.unsqueeze(-1).clamp(min=torch.finfo(torch.float64).tiny)
    empty = (totals == 0).nonzero().squeeze(-1)
    if len(empty):
        misfit = weights * (rows - means[labels]).square().sum(-1)
        means[empty] = rows[misfit.topk(len(empty)).indices].double()
    return means.to(centres.dtype)
