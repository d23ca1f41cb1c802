"""Distances of features: against torch-fidelity and hand arithmetic on a small extractor."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch.nn.functional import normalize
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from two_processes import run_on_two_processes

from vistok.metric import FeatureDistances, Features
from vistok.metric.distances import FRECHET, INCEPTION_DISTANCES, SPLITS, kid, precision_recall

ALL = (*INCEPTION_DISTANCES, "cmmd")


class Extractor:
    """Fixed random projections of small images; counts its calls."""

    def __init__(self, logits=True):
        generator = torch.Generator().manual_seed(0)
        self.pooled, self.spatial, self.classes = (torch.randn(48, n, generator=generator) for n in (6, 5, 7))
        self.protocol, self.logits, self.calls = {"extractor": "random"}, logits, 0

    def __call__(self, pixels):
        self.calls += 1
        rows = pixels.flatten(1) / 255
        return Features(rows @ self.pooled, rows @ self.spatial, rows @ self.classes if self.logits else None)

    def to(self, device):
        return self


def pair(count=40, channels=3):
    originals = torch.rand(count, channels, 4, 4) * 255
    return originals * 0.7 + 20 * torch.rand_like(originals), originals


def measured(names, images, **options):
    distances = FeatureDistances(Extractor(), names, **options)
    distances.update(*images)
    return distances.compute()


def frechet(a, b):
    a, b = a.double().numpy(), b.double().numpy()
    root = sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)


def features(images, field):
    return [getattr(Extractor()(pixels), field) for pixels in images]


@pytest.mark.parametrize("name", FRECHET)
def test_frechet_distances_equal_a_computation_in_float64(name):
    images = pair()
    assert measured([name], images)[name] == pytest.approx(frechet(*features(images, FRECHET[name])), rel=1e-4)


def test_kid_of_few_images_is_the_unbiased_estimate_over_all():
    images = pair()
    a, b = (rows.double() for rows in features(images, "pooled"))
    kernel = lambda x, y: (x @ y.T / 6 + 1) ** 3  # noqa: E731
    within = sum((kernel(rows, rows).sum() - kernel(rows, rows).trace()) / (40 * 39) for rows in (a, b))
    assert measured(["kid"], images)["kid"] == pytest.approx((within - 2 * kernel(a, b).mean()).item(), rel=1e-4)


def test_kid_of_many_images_is_that_of_torch_fidelity():
    images = pair(1200)
    expected = kid_features_to_metric(*features(images, "pooled"), verbose=False)
    assert measured(["kid"], images)["kid"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-5)


def test_precision_and_recall_equal_the_definition():
    images = pair()
    a, b = features(images, "pooled")

    def share(points, centres):
        radii = torch.cdist(centres, centres).sort(1).values[:, 3]
        return (torch.cdist(points, centres) <= radii).any(1).float().mean().item()

    values = measured(["precision_recall"], images)
    assert values == pytest.approx({"precision": share(a, b), "recall": share(b, a)})


@pytest.mark.parametrize("tile", [64, 2048])
def test_precision_and_recall_are_those_of_torch_fidelity_in_tiles_of_any_size(tile, monkeypatch):
    monkeypatch.setattr("vistok.metric.distances.TILE", tile)
    originals, ours = torch.randn(300, 6), 1.2 * torch.randn(300, 6) + 0.5
    expected = prc_features_to_metric(ours, originals, verbose=False)
    values = precision_recall(ours, originals)
    assert values == {name: pytest.approx(expected[name], abs=1e-7) for name in ("precision", "recall")}
    assert 0.05 < values["precision"] < 0.95
    assert 0.05 < values["recall"] < 0.95


def test_images_that_occur_often_are_in_their_own_neighbourhood():
    # A radius of 0: whether equal rows are found at that distance must not depend on rounding.
    originals = (100 * torch.rand(8, 2048)).repeat(5, 1)
    assert precision_recall(originals, originals) == {"precision": 1, "recall": 1}
    assert precision_recall(originals + 0.01, originals) == {"precision": 0, "recall": 0}


def test_nearly_equal_sets_have_a_kid_that_float32_cannot_tell_from_zero():
    originals = 3 * torch.rand(300, 2048)
    ours = originals + 1e-4
    a, b = ours.double().numpy(), originals.double().numpy()
    kernel = lambda x, y: (x @ y.T / 2048 + 1) ** 3  # noqa: E731
    within = sum((kernel(rows, rows).sum() - np.trace(kernel(rows, rows))) / (300 * 299) for rows in (a, b))
    assert kid(ours, originals)["kid"] == pytest.approx(within - 2 * kernel(a, b).mean(), abs=1e-12)


def test_lower_precision_of_products_changes_nothing():
    images, precision = pair(), torch.get_float32_matmul_precision()
    rows = features(images, "pooled")
    expected = kid(*rows), precision_recall(*rows)
    try:
        torch.set_float32_matmul_precision("medium")
        assert (kid(*rows), precision_recall(*rows)) == expected
    finally:
        torch.set_float32_matmul_precision(precision)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_measures_what_the_cpu_does():
    images = pair(1200)
    expected = measured(ALL, images)
    distances = FeatureDistances(Extractor(), ALL).to("cuda")
    distances.extractor.__dict__ |= {
        name: getattr(distances.extractor, name).cuda() for name in ("pooled", "spatial", "classes")
    }
    distances.update(*(pixels.cuda() for pixels in images))
    assert distances.compute() == pytest.approx(expected, rel=1e-4)


def test_inception_score_is_that_of_torch_fidelity():
    images = pair()
    expected = isc_features_to_metric(features(images, "logits")[0])["inception_score_mean"]
    assert measured(["inception_score"], images)["inception_score"] == pytest.approx(expected)


def test_cmmd_is_a_thousand_times_the_squared_mmd_of_unit_vectors():
    images = pair()
    a, b = (normalize(rows.double(), dim=1) for rows in features(images, "pooled"))
    kernel = lambda x, y: torch.exp(-(torch.cdist(x, y) ** 2) / 200).mean()  # noqa: E731
    expected = 1000 * (kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)).item()
    assert measured(["cmmd"], images)["cmmd"] == pytest.approx(expected, rel=1e-6)


def test_the_network_runs_once_for_all_distances():
    distances = FeatureDistances(Extractor(), ALL)
    distances.update(*pair())
    assert distances.extractor.calls == 2


def test_values_do_not_depend_on_the_batches():
    images = pair()
    parts = FeatureDistances(Extractor(), ALL)
    for start in range(0, 40, 7):
        parts.update(*(part[start : start + 7] for part in images))
    assert parts.compute() == pytest.approx(measured(ALL, images), rel=1e-4)


def test_perfect_reconstructions_have_no_distance():
    _, originals = pair()
    values = measured(("rfid", "sfid", "cmmd", "precision_recall"), (originals, originals))
    assert values == pytest.approx({"rfid": 0, "sfid": 0, "cmmd": 0, "precision": 1, "recall": 1}, abs=1e-5)


def test_one_channel_is_repeated():
    images = pair(channels=1)
    assert measured(["rfid"], images) == measured(["rfid"], [pixels.repeat(1, 3, 1, 1) for pixels in images])


def test_a_reference_takes_the_place_of_the_originals(tmp_path):
    images, (others, _) = pair(), pair()
    rows = features([others], "pooled")[0].double().numpy()
    np.savez(tmp_path / "training.npz", mu=rows.mean(0), sigma=np.cov(rows.T))
    expected = frechet(features(images, "pooled")[0], torch.from_numpy(rows))
    assert measured(["rfid"], images, reference=tmp_path / "training.npz")["rfid"] == pytest.approx(expected, rel=1e-4)


def test_the_protocol_says_which_distances_a_reference_is_for(tmp_path):
    np.savez(tmp_path / "training.npz", mu=np.zeros(4), sigma=np.eye(4))

    def reference(*names):
        return FeatureDistances(Extractor(), names, tmp_path / "training.npz").protocol["reference"]

    assert reference("rfid") == "statistics of training.npz"
    assert reference("rfid", "kid").startswith("statistics of training.npz for rfid; for kid the originals")


def test_a_reference_of_another_network_is_refused(tmp_path):
    np.savez(tmp_path / "x.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match="has 3 features, the network 6"):
        measured(["rfid"], pair(), reference=tmp_path / "x.npz")


@pytest.mark.parametrize(("content", "message"), [(None, "there is no file"), (b"no zip", "is no .npz file")])
def test_a_reference_that_cannot_be_read_says_what_it_must_be(content, message, tmp_path):
    if content is not None:
        (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises((ValueError, OSError), match=f"{message}.*with mu and sigma"):
        FeatureDistances(Extractor(), ["rfid"], tmp_path / "x.npz")


def test_a_reference_without_effect_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no effect"):
        FeatureDistances(Extractor(), ["kid"], tmp_path / "x.npz")


def test_an_unknown_distance_is_refused():
    with pytest.raises(ValueError, match=r"got \['fid'\]"):
        FeatureDistances(Extractor(), ["fid"])


def test_four_channels_are_refused():
    with pytest.raises(ValueError, match="1 or 3 channels, got 4"):
        measured(["rfid"], pair(channels=4))


def test_few_images_carry_notes():
    distances = FeatureDistances(Extractor(), ["rfid", "kid"])
    distances.update(*pair(5))
    assert distances.notes["rfid"] == "n = 5, biased: fewer images than feature dimensions (6)"
    assert distances.notes["kid"].startswith("n = 5: one subset")
    distances.update(*pair(1))
    assert "rfid" not in distances.notes


def test_one_image_is_too_few_for_a_distance():
    distances = FeatureDistances(Extractor(), ["rfid", "kid", "precision_recall"])
    distances.update(*pair(1))
    assert distances.compute() == {}
    assert distances.missing["precision_recall"] == "needs at least 4 images, there are 1"


def test_an_inception_score_of_fewer_images_than_splits_is_not_measured():
    # Splits of one image would give 1, whatever the images are.
    distances = FeatureDistances(Extractor(), ["inception_score"])
    distances.update(*pair(SPLITS - 1))
    assert distances.compute() == {}
    assert "at least 10 images" in distances.missing["inception_score"]
    distances.update(*pair(1))
    assert distances.compute()["inception_score"] == pytest.approx(1)
    assert distances.notes["inception_score"] == "n = 10, biased: 10 splits of 1 images, fewer than classes (1000)"


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="there are no images"):
        FeatureDistances(Extractor(), ["rfid"]).compute()


@pytest.mark.parametrize("side", [0, 1])
def test_features_that_are_not_finite_are_refused_by_the_number_of_the_image(side):
    distances, images = FeatureDistances(Extractor(), ["kid"]), pair(5)
    distances.update(*pair(40))
    images[side][3, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=f"features of {('reconstruction', 'original')[side]} 43 hold NaN"):
        distances.update(*images)


def test_a_network_without_logits_has_no_inception_score():
    distances = FeatureDistances(Extractor(logits=False), ["inception_score", "rfid"])
    distances.update(*pair())
    assert distances.compute().keys() == {"rfid"}
    assert "no logits" in distances.missing["inception_score"]


def on_two_processes(rank, folder):
    values = {}
    # Unequal shares, rank by rank; then nothing for the first rank.
    for name, share in (("unequal", 15), ("none", 0)):
        torch.manual_seed(0)
        distances = FeatureDistances(Extractor(), ALL)
        part = [images[:share] if rank == 0 else images[share:] for images in pair()]
        if len(part[0]):
            distances.update(*part)
        values[name] = distances.compute()
        values[f"{name} notes"] = distances.notes["kid"]
    torch.save(values, folder / f"rank{rank}.pt")


def test_two_processes_measure_what_one_does(tmp_path):
    torch.manual_seed(0)
    expected = measured(ALL, pair())
    for values in run_on_two_processes(on_two_processes, tmp_path).values():
        for name in ("unequal", "none"):
            assert values[name] == pytest.approx(expected, rel=1e-5)
            assert all(math.isfinite(value) for value in values[name].values())
            assert values[f"{name} notes"].startswith("n = 40: one subset")
