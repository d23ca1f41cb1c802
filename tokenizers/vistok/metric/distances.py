"""Distances between the features of images and of their reconstructions; the network runs once for all of them.

- ``rfid``: Frechet distance of Inception's pooled features. Heusel et al., 2017.
- ``sfid``: the same of spatial features, first 7 channels of a 17x17 layer. Nash et al., 2021, as in ADM's evaluator.
- ``kid``: unbiased squared MMD with a cubic kernel, mean over 100 subsets of 1000. Binkowski et al., 2018.
- ``precision_recall``: ``precision`` and ``recall`` with k = 3 neighbours. Kynkaanniemi et al., 2019.
- ``inception_score``: of the reconstructions, over 10 splits. Salimans et al., 2016. Higher is better.
- ``fdd``: Frechet distance of the pooled features of DINOv2 or another backbone. Stein et al., 2023.
- ``fvd``: the same as rFID of a network of videos, see `vistok.metric.I3D`. Unterthiner et al., 2018.
- ``cmmd``: 1000 times the squared MMD of CLIP's unit-length embeddings, Gaussian kernel, sigma 10. Jayasumana et al.,
  2024.

Sums are float64; the networks run in float32. Kernel and neighbour distances keep the features of every image, on the
CPU, 8 kB for each image of Inception.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.utilities import dim_zero_cat

from vistok.distributed import is_distributed, rank
from vistok.metric.extractor import Extractor, Features
from vistok.metric.feature_cache import FeatureCache

FRECHET = {"rfid": "pooled", "sfid": "spatial", "fdd": "pooled", "fvd": "pooled"}
BANKED = {"kid": "pooled", "precision_recall": "pooled", "cmmd": "pooled", "inception_score": "logits"}
INCEPTION_DISTANCES = ("rfid", "sfid", "kid", "precision_recall", "inception_score")
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
NEIGHBOURS = 3
SPLITS = 10
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
# Rows of a distance matrix at a time: 4 GiB of float64 for 50,000 images would not fit everywhere.
TILE = 1024


class _AsTheyAre(nn.Module):
    """What stands where torchmetrics expects a network: the features are there already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


class Frechet(FrechetInceptionDistance):
    """torchmetrics' sums, with a trace of the root from symmetric matrices: faster, and exact for few images.

    Args:
        num_features: Length of a row.
        **kwargs: Passed to `torchmetrics.Metric`.
    """

    def __init__(self, num_features: int, **kwargs: Any) -> None:
        super().__init__(_AsTheyAre(num_features), **kwargs)

    def compute(self) -> Float[Tensor, ""]:
        """Frechet distance of the two Gaussians.

        Raises:
            ValueError: If there are fewer than two images or reconstructions.
        """
        ours = _moments(self.fake_features_sum, self.fake_features_cov_sum, self.fake_features_num_samples)
        originals = _moments(self.real_features_sum, self.real_features_cov_sum, self.real_features_num_samples)
        return frechet_distance(*ours, *originals)


def _moments(total: Tensor, products: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    if count < 2:
        raise ValueError(f"a Frechet distance needs at least 2 images, got {int(count)}")
    mean = total / count
    return mean, (products - count * torch.outer(mean, mean)) / (count - 1)


def frechet_distance(
    mean_a: Float[Tensor, " d"], cov_a: Float[Tensor, "d d"], mean_b: Float[Tensor, " d"], cov_b: Float[Tensor, "d d"]
) -> Float[Tensor, ""]:
    """``|mean_a - mean_b|^2 + tr(cov_a) + tr(cov_b) - 2 tr((cov_a cov_b)^(1/2))`` in float64.

    With ``cov_a = f f^T`` the last trace is that of the root of the symmetric ``f^T cov_b f``, which is as small as the
    rank of ``cov_a``.
    """
    values, vectors = torch.linalg.eigh(cov_a.double())
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    factor = vectors[:, kept] * values[kept].sqrt()
    root = torch.linalg.eigvalsh(factor.T @ cov_b.double() @ factor).clamp(min=0).sqrt().sum()
    return (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root


class FeatureBank(Metric):
    """The features of every image and reconstruction, on the CPU.

    Args:
        **kwargs: Passed to `torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False
    ours: list[Tensor]
    originals: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(compute_on_cpu=True, **kwargs)
        self.add_state("ours", [], dist_reduce_fx="cat")
        self.add_state("originals", [], dist_reduce_fx="cat")

    def update(self, ours: Float[Tensor, "b d"], originals: Float[Tensor, "b d"]) -> None:
        """Keep the features of a batch."""
        self.ours.append(ours)
        self.originals.append(originals)

    def compute(self) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
        """Features of all reconstructions and of all images."""
        return dim_zero_cat(self.ours).cpu(), dim_zero_cat(self.originals).cpu()


class FeatureDistances:
    """Streaming distances on the features of one network.

    This is not a module, so that the network never enters the state dict of what holds it: move it with `to`.

    Args:
        extractor: Gives the features.
        names: Which distances, see this module.
        reference: File of statistics ``.npz`` with ``mu`` and ``sigma`` to take in place of those of the originals in
            Frechet distances of pooled features, such as ADM's of the training set.
        cache: Keeps the features of the originals; None computes them.
        **kwargs: Passed to the underlying `torchmetrics.Metric`s, which reduce over the ranks when computed unless
            ``sync_on_compute=False``.

    Attributes:
        protocol: What the numbers are, without the number of images.
        missing: Distances that cannot be measured, and why.

    Raises:
        ValueError: If a distance is unknown, or the reference is used by none.
    """

    def __init__(
        self,
        extractor: Extractor,
        names: Sequence[str],
        reference: str | Path | None = None,
        cache: FeatureCache | None = None,
        **kwargs: Any,
    ) -> None:
        if unknown := [name for name in names if name not in FRECHET | BANKED]:
            raise ValueError(f"distances are {', '.join(FRECHET | BANKED)}; got {unknown}")
        pooled = [name for name in names if FRECHET.get(name) == "pooled"]
        if reference is not None and not pooled:
            raise ValueError(f"reference={reference} has no effect without a Frechet distance of pooled features")
        self.extractor, self.names, self.cache = extractor, tuple(names), cache
        self.reference = _read_statistics(reference) if reference is not None else None
        self.missing: dict[str, str] = {}
        self.count = 0
        self._kwargs = kwargs
        self._frechet: dict[str, Frechet] = {}
        self._banks: dict[str, FeatureBank] = {}
        self._device = torch.device("cpu")
        self.protocol: dict[str, Any] = {
            **extractor.protocol,
            "precision": "float32 network, float64 statistics",
            "reference": "the originals of the same images, after resize and crop"
            if reference is None
            else f"statistics of {Path(reference).name}",
        }

    @property
    def notes(self) -> dict[str, str]:
        """What a reader of the numbers must know, by distance."""
        notes = {
            name: f"n = {self.count}, biased: fewer images than feature dimensions ({len(metric.real_features_sum)})"
            for name, metric in self._frechet.items()
            if self.count < len(metric.real_features_sum)
        }
        if "kid" in self.names and self.count < KID_SUBSET_SIZE:
            notes["kid"] = f"n = {self.count}: one subset of all images instead of {KID_SUBSETS} of {KID_SUBSET_SIZE}"
        return notes

    def to(self, device: torch.device | str) -> "FeatureDistances":
        """Move the network and the statistics."""
        self._device = torch.device(device)
        self.extractor.to(self._device)
        for metric in (*self._frechet.values(), *self._banks.values()):
            metric.to(self._device)
        return self

    @torch.no_grad()
    def update(self, ours: Float[Tensor, "b c *size"], originals: Float[Tensor, "b c *size"]) -> None:
        """Add pairs of images, for FVD of videos, of values in [0, 255]; one channel is repeated to three.

        Raises:
            ValueError: If the images have neither one nor three channels.
        """
        if originals.shape[1] not in (1, 3):
            raise ValueError(
                f"distances take images of 1 or 3 channels, got {originals.shape[1]}: composite alpha first"
            )
        extract = self.extractor if self.cache is None else partial(self.cache, self.extractor)
        pair = self.extractor(_in_colour(ours)), extract(_in_colour(originals))
        self.count += len(ours)
        for name in self.names:
            if name not in self.missing:
                self._add(name, *pair)
        for field, bank in self._banks.items():
            bank.update(getattr(pair[0], field), getattr(pair[1], field))

    def _add(self, name: str, ours: Features, originals: Features) -> None:
        field = FRECHET.get(name) or BANKED[name]
        features = getattr(ours, field)
        if features is None:
            self.missing[name] = f"the network gives no {field}"
        elif name in BANKED:
            self._banks.setdefault(field, FeatureBank(**self._kwargs).to(self._device))
        else:
            metric = self._frechet.get(name)
            if metric is None:
                metric = Frechet(features.shape[1], **self._kwargs).to(self._device)
                self._frechet[name] = metric
            metric.update(features, real=False)
            metric.update(getattr(originals, field), real=True)

    def compute(self) -> dict[str, float]:
        """The distances between everything seen; those that need more images are then in `missing`."""
        values: dict[str, float] = {}
        for name, metric in self._frechet.items():
            if self.count < 2 and not is_distributed():
                self.missing[name] = "needs at least 2 images"
                continue
            if self.reference is not None and FRECHET[name] == "pooled":
                _set_reference(metric, *self.reference)
            values[name] = float(metric.compute())
        for field, bank in self._banks.items():
            ours, originals = bank.compute()
            for name in self.names:
                if BANKED.get(name) == field:
                    values |= self._banked(name, ours, originals)
        return values

    def _banked(self, name: str, ours: Tensor, originals: Tensor) -> Mapping[str, float]:
        count = len(ours)
        if name == "inception_score":
            scores = isc_features_to_metric(ours, splits=min(SPLITS, count))
            return {"inception_score": scores["inception_score_mean"]}
        least = {"precision_recall": NEIGHBOURS + 1}.get(name, 2)
        if count < least:
            self.missing[name] = f"needs at least {least} images"
            return {}
        return {"kid": kid, "precision_recall": precision_recall, "cmmd": cmmd}[name](ours, originals)


def _in_colour(pixels: Tensor) -> Tensor:
    return pixels.expand(-1, 3, *pixels.shape[2:])


def kid(ours: Float[Tensor, "n d"], originals: Float[Tensor, "n d"]) -> dict[str, float]:
    """``kid``, as torch-fidelity computes it; with fewer than 1000 images of all of them."""
    count = len(ours)
    subsets = KID_SUBSETS if count > KID_SUBSET_SIZE else 1
    options = {"kid_subset_size": min(count, KID_SUBSET_SIZE), "kid_subsets": subsets}
    return {"kid": kid_features_to_metric(ours, originals, verbose=False, **options)["kernel_inception_distance_mean"]}


def precision_recall(ours: Float[Tensor, "n d"], originals: Float[Tensor, "n d"]) -> dict[str, float]:
    """``precision``: share of reconstructions among the originals' neighbourhoods; ``recall``: the reverse."""
    options = {"prc_neighborhood": NEIGHBOURS, "prc_batch_size": TILE, "save_cpu_ram": True, "verbose": False}
    values = prc_features_to_metric(ours, originals, **options)
    return {"precision": values["precision"], "recall": values["recall"]}


def cmmd(ours: Float[Tensor, "n d"], originals: Float[Tensor, "n d"]) -> dict[str, float]:
    """``cmmd`` of embeddings of any length."""
    a, b = (nn.functional.normalize(features.double(), dim=1) for features in (ours, originals))
    return {"cmmd": CMMD_SCALE * (_mean_kernel(a, a) + _mean_kernel(b, b) - 2 * _mean_kernel(a, b))}


def _mean_kernel(a: Tensor, b: Tensor) -> float:
    """Mean of the Gaussian kernel over all pairs of rows of length 1, in tiles."""
    total = sum(((rows @ b.T - 1) / CMMD_SIGMA**2).exp().sum().item() for rows in a.split(TILE))
    return total / (len(a) * len(b))


def _read_statistics(path: str | Path) -> tuple[Tensor, Tensor]:
    with np.load(path) as file:
        if not {"mu", "sigma"} <= set(file):
            raise ValueError(f"{path} must hold mu and sigma, it has {sorted(file)}")
        return torch.from_numpy(file["mu"]).double(), torch.from_numpy(file["sigma"]).double()


def _set_reference(metric: Frechet, mean: Tensor, covariance: Tensor) -> None:
    """Make the sums of the originals those of two images of this mean and covariance."""
    mean, covariance = mean.to(metric.real_features_sum.device), covariance.to(metric.real_features_sum.device)
    if mean.shape != metric.real_features_sum.shape:
        raise ValueError(f"the reference has {len(mean)} features, the network {len(metric.real_features_sum)}")
    # The ranks' sums are added up: one rank has them, the others nothing.
    share = int(rank() == 0)
    metric.real_features_sum = share * 2 * mean
    metric.real_features_cov_sum = share * (covariance + 2 * torch.outer(mean, mean))
    metric.real_features_num_samples = torch.tensor(share * 2, device=mean.device)
