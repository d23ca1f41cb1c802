"""Kept features: the same numbers as computed ones, and never those of something else."""

import math
import os

import pytest
import torch

from vistok.metric import FeatureDistances, Features
from vistok.metric.feature_cache import FeatureCache, default_folder


class Extractor:
    """Random projections; counts its calls."""

    def __init__(self, **protocol):
        self.weight = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
        self.protocol = {"extractor": "random", "sha256": "0" * 64, "extractor_resize": "none"} | protocol
        self.calls = 0

    def __call__(self, pixels):
        self.calls += 1
        rows = pixels.flatten(1) / 255
        return Features(rows @ self.weight, rows @ self.weight[:, :2])

    def to(self, device):
        return self


def pixels(count=8):
    return torch.randint(0, 256, (count, 3, 4, 4)).float()


def measured(cache, ours, originals, **protocol):
    extractor = Extractor(**protocol)
    distances = FeatureDistances(extractor, ["rfid", "sfid", "kid", "precision_recall"], cache=cache)
    for start in range(0, len(ours), 4):
        distances.update(ours[start : start + 4], originals[start : start + 4])
    return distances.compute(), extractor.calls


def test_a_second_evaluation_computes_only_reconstructions_and_gives_identical_numbers(tmp_path):
    ours, originals = pixels(), pixels()
    without, _ = measured(None, ours, originals)
    first, calls = measured(FeatureCache(tmp_path), ours, originals)
    cache = FeatureCache(tmp_path)
    second, calls_again = measured(cache, ours, originals)
    assert without == first == second
    assert (calls, calls_again) == (4, 2)
    assert (cache.hits, cache.misses) == (8, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"sha256": "1" * 64},
        {"extractor_resize": "clean"},
        {"extractor": "other"},
    ],
)
def test_another_network_misses(change, tmp_path):
    cache, images = FeatureCache(tmp_path), pixels()
    cache(Extractor(), images)
    cache(Extractor(**change), images)
    assert (cache.hits, cache.misses) == (0, 16)


@pytest.mark.parametrize(
    "change",
    [
        lambda images: images.flip(0),
        lambda images: images[:-1],
        lambda images: images.reshape(8, 3, 2, 8),
        lambda images: images + 0.25,
        lambda images: torch.where(images == images.max(), images - 1, images),
    ],
    ids=["order", "count", "shape", "rounding", "one pixel value"],
)
def test_other_images_miss(change, tmp_path):
    cache, images = FeatureCache(tmp_path), pixels()
    cache(Extractor(), images)
    assert cache.key(Extractor(), change(images)) != cache.key(Extractor(), images)


def test_another_version_of_a_library_misses(tmp_path, monkeypatch):
    cache, images = FeatureCache(tmp_path), pixels()
    before = cache.key(Extractor(), images)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0")
    assert cache.key(Extractor(), images) != before


def test_another_precision_of_products_misses(tmp_path):
    cache, images = FeatureCache(tmp_path), pixels()
    before, precision = cache.key(Extractor(), images), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert cache.key(Extractor(), images) != before
    finally:
        torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "one bit"])
def test_a_damaged_file_is_computed_again_and_replaced(damage, tmp_path):
    cache, images = FeatureCache(tmp_path), pixels()
    expected = cache(Extractor(), images)
    [path] = tmp_path.iterdir()
    data = path.read_bytes()
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "text": b"x" * 100, "one bit": flipped}[damage])
    again = Extractor()
    assert torch.equal(cache(again, images).pooled, expected.pooled)
    assert again.calls == 1
    assert path.read_bytes() == data


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        arguments[1].write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("vistok.metric.feature_cache.save_file", fail)
    FeatureCache(tmp_path)(Extractor(), pixels())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_costs_one_warning_and_no_numbers(tmp_path, caplog):
    (tmp_path / "file").touch()
    ours, originals = pixels(), pixels()
    cache = FeatureCache(tmp_path / "file" / "folder")
    assert measured(cache, ours, originals) == measured(None, ours, originals)
    assert (cache.misses, cache.unkept) == (8, 8)
    assert caplog.text.count("cannot be kept") == 1


def test_a_network_without_a_hash_of_its_weights_is_refused(tmp_path):
    extractor = Extractor()
    del extractor.protocol["sha256"]
    with pytest.raises(ValueError, match="SHA-256"):
        FeatureCache(tmp_path)(extractor, pixels())


def test_the_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("VISTOK_CACHE", raising=False)
    assert default_folder() == tmp_path / "vistok" / "features"
    monkeypatch.setenv("VISTOK_CACHE", str(tmp_path / "mine"))
    assert default_folder() == tmp_path / "mine"


def fill(cache, count):
    """Keep the features of batches of two images, and give the batches."""
    batches = [pixels(2) for _ in range(count)]
    for batch in batches:
        cache(Extractor(), batch)
    return batches


def test_what_was_not_used_for_longest_makes_room(tmp_path):
    first, second, third = fill(FeatureCache(tmp_path), 3)
    for age, batch in ((30, second), (20, third), (10, first)):
        path = tmp_path / f"{FeatureCache(tmp_path).key(Extractor(), batch)}.safetensors"
        os.utime(path, (1e9 - age, 1e9 - age))
    size = path.stat().st_size
    # A hit is a use.
    FeatureCache(tmp_path)(Extractor(), second)
    # Room for two of the three and a fourth, whose head the limit takes for 4 KiB.
    cache = FeatureCache(tmp_path, limit=2 * size + 4096 + 2 * 8 * 4)
    fill(cache, 1)
    assert cache.size() <= cache.limit
    cache = FeatureCache(tmp_path)
    for batch in (first, second, third):
        cache(Extractor(), batch)
    assert (cache.hits, cache.misses) == (4, 2)


def test_a_set_larger_than_the_limit_is_kept_in_part(tmp_path):
    cache = FeatureCache(tmp_path, limit=10_000)
    batches = fill(cache, 30)
    assert cache.size() <= 10_000
    kept = 30 - cache.unkept // 2
    assert 2 < kept < 30
    again = FeatureCache(tmp_path, limit=10_000)
    for batch in batches:
        again(Extractor(), batch)
    assert again.hits == 2 * kept


def test_other_files_in_the_folder_are_neither_counted_nor_deleted(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"0" * 50_000)
    cache = FeatureCache(tmp_path, limit=10_000)
    fill(cache, 1)
    assert (tmp_path / "model.safetensors").is_file()
    assert cache.size() < 10_000
    assert cache.unkept == 0


def test_missing_fields_stay_missing(tmp_path):
    cache, images = FeatureCache(tmp_path), pixels()
    for _ in range(2):
        features = cache(Extractor(), images)
        assert features.logits is None
        assert math.isfinite(features.spatial.sum())


def test_videos_are_kept_too(tmp_path):
    cache, videos = FeatureCache(tmp_path), torch.randint(0, 256, (2, 3, 4, 2, 2)).float()
    first, second = (cache(Extractor(), videos).pooled for _ in range(2))
    assert torch.equal(first, second)
    assert (cache.hits, cache.misses) == (2, 2)
