"""Distances between the features of images and of their reconstructions; the network runs once for all of them.

- ``rfid``: Frechet distance of Inception's pooled features. Heusel et al., 2017.
- ``sfid``: the same of spatial features, first 7 channels of a 17x17 layer. Nash et al., 2021, as in ADM's evaluator.
- ``kid``: unbiased squared MMD with a cubic kernel, mean over 100 subsets of 1000. Binkowski et al., 2018. The subsets
  are those that torch-fidelity draws.
- ``precision_recall``: ``precision`` and ``recall`` with k = 3 neighbours. Kynkaanniemi et al., 2019, on Inception's
  features as in ADM's evaluator; the paper has those of VGG16.
- ``inception_score``: of the reconstructions, over 10 splits. Salimans et al., 2016. Higher is better.
- ``fdd``: Frechet distance of the pooled features of DINOv2 or another backbone. Stein et al., 2023.
- ``fvd``: the same as rFID of a network of videos, see `vistok.metric.I3D`. Unterthiner et al., 2018.
- ``cmmd``: 1000 times the squared MMD of CLIP's unit-length embeddings, Gaussian kernel, sigma 10. Jayasumana et al.,
  2024.

The networks run in float32. Everything after them is float64 on the same device: an MMD is a small difference of large
means, and a squared distance of |a|^2 + |b|^2 - 2ab, in which float32 (or TF32) would lose the digits that matter.
Kernel and neighbour distances keep the features of every image, on the CPU, 8 kB for each image of Inception; they come
to the device to be compared in tiles of `TILE` rows.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch_fidelity.metric_isc import isc_features_to_metric
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.utilities import dim_zero_cat
from torchmetrics.utilities.distributed import gather_all_tensors

from vistok.distributed import all_reduce_min, is_distributed, rank, row_counts
from vistok.metric.extractor import Extractor, Features
from vistok.metric.feature_cache import FeatureCache
from vistok.metric.precision import float64_device

FRECHET = {"rfid": "pooled", "sfid": "spatial", "fdd": "pooled", "fvd": "pooled"}
BANKED = {"kid": "pooled", "precision_recall": "pooled", "cmmd": "pooled", "inception_score": "logits"}
FIELDS = FRECHET | BANKED
INCEPTION_DISTANCES = ("rfid", "sfid", "kid", "precision_recall", "inception_score")
# The seed is torch-fidelity's, so that the subsets are too.
KID_SUBSETS, KID_SUBSET_SIZE, KID_SEED = 100, 1000, 2020
NEIGHBOURS = 3
# The score is at most the number of classes, and that of fewer images at most their number.
SPLITS, CLASSES = 10, 1000
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
# Rows and columns of a matrix of all pairs at a time, 32 MiB of float64: that of 50,000 images would take 19 GiB.
TILE = 2048
# Float64 leaves 1e-15 of |a|^2 + |b|^2 between equal rows, and float32 features cannot be nearer without being equal.
SAME = 1e-12
LEAST = {"precision_recall": NEIGHBOURS + 1, "inception_score": SPLITS}


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
    """The features of every image and reconstruction, kept on the CPU.

    Args:
        **kwargs: Passed to `torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False
    ours: list[Tensor]
    originals: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(compute_on_cpu=True, **kwargs)
        self.dist_sync_fn = self._gather
        self.add_state("ours", [], dist_reduce_fx="cat")
        self.add_state("originals", [], dist_reduce_fx="cat")

    def update(self, ours: Float[Tensor, "b d"], originals: Float[Tensor, "b d"]) -> None:
        """Keep the features of a batch."""
        self.ours.append(ours)
        self.originals.append(originals)

    def compute(self) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
        """Features of all reconstructions and of all images."""
        return dim_zero_cat(self.ours).cpu(), dim_zero_cat(self.originals).cpu()

    def _gather(self, rows: Tensor, group: Any = None) -> list[Tensor]:
        # NCCL sends nothing that lies on the CPU.
        return [part.cpu() for part in gather_all_tensors(rows.to(self.device), group)]


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
        count: Number of images this rank has seen.
        missing: Distances that cannot be measured, and why; known after `compute`.

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
        if unknown := [name for name in names if name not in FIELDS]:
            raise ValueError(f"distances are {', '.join(FIELDS)}; got {unknown}")
        pooled = [name for name in names if FRECHET.get(name) == "pooled"]
        if reference is not None and not pooled:
            raise ValueError(f"reference={reference} has no effect without a Frechet distance of pooled features")
        self.extractor, self.names, self.cache = extractor, tuple(names), cache
        self.reference = read_statistics(reference) if reference is not None else None
        self.missing: dict[str, str] = {}
        self.count = 0
        self._kwargs = kwargs
        self._frechet: dict[str, Frechet] = {}
        self._banks: dict[str, FeatureBank] = {}
        self._lengths: dict[str, int] = {}
        # Of all ranks, once they have told each other.
        self._total = 0
        self._device = torch.device("cpu")
        originals = "the originals of the same images, after resize and crop"
        if reference is not None:
            others = [name for name in names if name not in pooled]
            originals = f"statistics of {Path(reference).name}" + (
                f" for {', '.join(pooled)}; for {', '.join(others)} {originals}" if others else ""
            )
        self.protocol: dict[str, Any] = {
            **extractor.protocol,
            "precision": "float32 network, float64 statistics",
            "reference": originals,
        }

    @property
    def notes(self) -> dict[str, str]:
        """What a reader of the numbers must know, by distance."""
        count = self._total or self.count
        lengths = {name: len(metric.real_features_sum) for name, metric in self._frechet.items()}
        notes = {
            name: f"n = {count}, biased: fewer {_samples(name)} than feature dimensions ({length})"
            for name, length in lengths.items()
            if count < length
        }
        if "kid" in self.names and count < KID_SUBSET_SIZE:
            notes["kid"] = f"n = {count}: one subset of all images instead of {KID_SUBSETS} of {KID_SUBSET_SIZE}"
        if "inception_score" in self.names and count < SPLITS * CLASSES:
            splits = f"{SPLITS} splits of {count // SPLITS} images"
            notes["inception_score"] = f"n = {count}, biased: {splits}, fewer than classes ({CLASSES})"
        return notes

    def to(self, device: torch.device | str) -> "FeatureDistances":
        """Move the network and the statistics."""
        self._device = float64_device(torch.device(device))
        self.extractor.to(torch.device(device))
        for metric in (*self._frechet.values(), *self._banks.values()):
            metric.to(self._device)
        return self

    @torch.no_grad()
    def update(self, ours: Float[Tensor, "b c *size"], originals: Float[Tensor, "b c *size"]) -> None:
        """Add pairs of images, for FVD of videos, of values in [0, 255]; one channel is repeated to three.

        Raises:
            ValueError: If the images have neither one nor three channels, or a feature is not finite.
        """
        if originals.shape[1] not in (1, 3):
            raise ValueError(
                f"distances take images of 1 or 3 channels, got {originals.shape[1]}: composite alpha first"
            )
        extract = self.extractor if self.cache is None else partial(self.cache, self.extractor)
        pair = self.extractor(_in_colour(ours)), extract(_in_colour(originals))
        for field in Features._fields:
            first, second = (getattr(features, field) for features in pair)
            if first is None or second is None:
                continue
            for what, rows in (("reconstruction", first), ("original", second)):
                self._check_finite(rows, field, what)
            self._lengths[field] = first.shape[1]
            for name in self.names:
                if FRECHET.get(name) == field:
                    self._frechet_of(name).update(first.to(self._device), real=False)
                    self._frechet_of(name).update(second.to(self._device), real=True)
            if field in self._banked:
                self._bank_of(field).update(first, second)
        self.count += len(ours)
        self._total = 0

    def _check_finite(self, rows: Tensor, field: str, what: str) -> None:
        bad = ~torch.isfinite(rows).all(1)
        if bad.any():
            number = self.count + int(bad.nonzero()[0])
            raise ValueError(
                f"the {field} features of {what} {number} hold NaN or infinite values: its pixels must be finite and "
                f"in [0, 255], and the weights of the network ({self.protocol.get('extractor')}) whole"
            )

    @property
    def _banked(self) -> set[str]:
        return {BANKED[name] for name in self.names if name in BANKED}

    def _frechet_of(self, name: str) -> Frechet:
        if name not in self._frechet:
            self._frechet[name] = Frechet(self._lengths[FRECHET[name]], **self._kwargs).to(self._device)
        return self._frechet[name]

    def _bank_of(self, field: str) -> FeatureBank:
        if field not in self._banks:
            self._banks[field] = FeatureBank(**self._kwargs).to(self._device)
        return self._banks[field]

    def compute(self) -> dict[str, float]:
        """The distances between everything seen; those that need more images are then in `missing`.

        On several ranks every rank calls this, also one that has seen no image, and gets the distances between what all
        have seen, unless ``sync_on_compute=False``.

        Raises:
            ValueError: If there was no image.
        """
        self._total = self._agree()
        if not self._total:
            raise ValueError("there are no images to measure distances between: call update first")
        values: dict[str, float] = {}
        for name in self.names:
            field, least = FIELDS[name], LEAST.get(name, 2)
            if field not in self._lengths:
                self.missing[name] = f"the network gives no {field}"
            elif self._total < least:
                self.missing[name] = f"needs at least {least} {_samples(name)}, there are {self._total}"
            elif name in FRECHET:
                metric = self._frechet_of(name)
                if self.reference is not None and field == "pooled":
                    set_reference(metric, *self.reference)
                values[name] = float(metric.compute())
            else:
                values |= MEASURES[name](*(rows.to(self._device) for rows in self._bank_of(field).compute()))
        return values

    def _agree(self) -> int:
        """Number of images that all ranks have seen; afterwards each knows of all features."""
        if not is_distributed() or not self._kwargs.get("sync_on_compute", True):
            return self.count
        lengths = torch.tensor([self._lengths.get(field, 0) for field in Features._fields], device=self._device)
        for field, length in zip(Features._fields, (-all_reduce_min(-lengths)).tolist(), strict=True):
            # A rank without images takes part in the sums with none.
            if length and field not in self._lengths:
                self._lengths[field] = length
                if field in self._banked:
                    self._bank_of(field).update(*torch.zeros(2, 0, length, device=self._device))
        return sum(row_counts(self.count, self._device))


def _samples(name: str) -> str:
    return "videos" if name == "fvd" else "images"


def _in_colour(pixels: Tensor) -> Tensor:
    return pixels.expand(-1, 3, *pixels.shape[2:])


def kid(ours: Float[Tensor, "n d"], originals: Float[Tensor, "m d"]) -> dict[str, float]:
    """``kid``, of the subsets that torch-fidelity draws; with at most 1000 images of all of them."""
    size = min(len(ours), len(originals), KID_SUBSET_SIZE)
    subsets = KID_SUBSETS if min(len(ours), len(originals)) > KID_SUBSET_SIZE else 1
    draws, values = np.random.RandomState(KID_SEED), []
    for _ in range(subsets):
        chosen = [torch.from_numpy(draws.choice(len(rows), size, replace=False)) for rows in (ours, originals)]
        a, b = (rows[at.to(rows.device)].double() for rows, at in zip((ours, originals), chosen, strict=True))
        within = sum(kernel.sum() - kernel.trace() for kernel in (_cubic(a, a), _cubic(b, b)))
        values.append(within / (size * (size - 1)) - 2 * _cubic(a, b).mean())
    return {"kid": float(torch.stack(values).mean())}


def _cubic(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def precision_recall(ours: Float[Tensor, "n d"], originals: Float[Tensor, "m d"]) -> dict[str, float]:
    """``precision``: share of reconstructions among the originals' neighbourhoods; ``recall``: the reverse."""
    radii, radii_of_originals = _radii(ours), _radii(originals)
    precise = torch.zeros(len(ours), dtype=torch.bool, device=ours.device)
    recalled = torch.zeros(len(originals), dtype=torch.bool, device=ours.device)
    for rows, radius, inside in _tiles(ours, radii, precise):
        for columns, other_radius, other_inside in _tiles(originals, radii_of_originals, recalled):
            distances = _squared_distances(rows, columns)
            inside |= (distances <= other_radius).any(1)
            other_inside |= (distances <= radius[:, None]).any(0)
    return {"precision": float(precise.double().mean()), "recall": float(recalled.double().mean())}


def _radii(rows: Tensor) -> Tensor:
    """Squared distance of each row to its neighbour number `NEIGHBOURS`, itself not counted."""
    radii = []
    for part in rows.split(TILE):
        nearest = rows.new_empty(len(part), 0, dtype=torch.float64)
        for columns in rows.split(TILE):
            nearest = torch.cat([nearest, _squared_distances(part, columns)], 1)
            nearest = nearest.topk(min(NEIGHBOURS + 1, nearest.shape[1]), largest=False).values
        radii.append(nearest[:, -1])
    return torch.cat(radii)


def _tiles(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of `TILE` rows of each."""
    return zip(*(tensor.split(TILE) for tensor in tensors), strict=True)


def _squared_distances(a: Tensor, b: Tensor) -> Float[Tensor, "n m"]:
    a, b = a.double(), b.double()
    lengths = a.square().sum(1)[:, None] + b.square().sum(1)
    distances = torch.addmm(lengths, a, b.T, alpha=-2)
    # Equal rows must be at distance 0: of images that occur several times the radius is 0.
    return distances.masked_fill_(distances < SAME * lengths, 0)


def inception_score(ours: Float[Tensor, "n k"], originals: Float[Tensor, "n k"]) -> dict[str, float]:
    """``inception_score`` of the logits of reconstructions; those of the originals have no part in it."""
    return {"inception_score": isc_features_to_metric(ours, splits=SPLITS)["inception_score_mean"]}


def cmmd(ours: Float[Tensor, "n d"], originals: Float[Tensor, "m d"]) -> dict[str, float]:
    """``cmmd`` of embeddings of any length."""
    a, b = (nn.functional.normalize(features.double(), dim=1) for features in (ours, originals))
    return {"cmmd": CMMD_SCALE * (_mean_kernel(a, a) + _mean_kernel(b, b) - 2 * _mean_kernel(a, b))}


def _mean_kernel(a: Tensor, b: Tensor) -> float:
    """Mean of the Gaussian kernel over all pairs of rows of length 1."""
    total = sum(
        ((rows @ columns.T - 1) / CMMD_SIGMA**2).exp().sum().item()
        for rows in a.split(TILE)
        for columns in b.split(TILE)
    )
    return total / (len(a) * len(b))


MEASURES = {"kid": kid, "precision_recall": precision_recall, "inception_score": inception_score, "cmmd": cmmd}


def read_statistics(path: str | Path) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
    """Mean and covariance, float64, of an ``.npz`` file with ``mu`` and ``sigma``.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it holds something else.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path.absolute()}: a reference is an .npz file with mu and sigma")
    try:
        file = np.load(path)
        names = set(file)
    except (ValueError, TypeError, EOFError, BadZipFile) as error:
        raise ValueError(f"{path} is no .npz file with mu and sigma ({error})") from error
    if not {"mu", "sigma"} <= names:
        raise ValueError(f"{path} must hold mu and sigma, it has {sorted(names)}")
    with file:
        return torch.from_numpy(file["mu"]).double(), torch.from_numpy(file["sigma"]).double()


def set_reference(metric: Frechet, mean: Float[Tensor, " d"], covariance: Float[Tensor, "d d"]) -> None:
    """Make the sums of the originals those of two images of this mean and covariance.

    Raises:
        ValueError: If they are of another number of features.
    """
    mean, covariance = mean.to(metric.real_features_sum.device), covariance.to(metric.real_features_sum.device)
    if mean.shape != metric.real_features_sum.shape:
        raise ValueError(f"the reference has {len(mean)} features, the network {len(metric.real_features_sum)}")
    # The ranks' sums are added up: one rank has them, the others nothing.
    share = int(rank() == 0)
    metric.real_features_sum = share * 2 * mean
    metric.real_features_cov_sum = share * (covariance + 2 * torch.outer(mean, mean))
    metric.real_features_num_samples = torch.tensor(share * 2, device=mean.device)
