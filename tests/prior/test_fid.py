"""FID of generated images: the formula, its references, and the command."""

import json

import numpy as np
import pytest
import scipy.linalg
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

from vistok.metric import Features
from vistok.prior.fid import fid, read_pictures, read_samples
from vistok.prior.sample import sample_from_config

CPU = torch.device("cpu")


class Colours:
    """In place of Inception: mean and deviation of each channel."""

    def __init__(self):
        self.protocol = {"extractor": "colours"}

    def __call__(self, pixels):
        return Features(torch.cat([pixels.mean((2, 3)), pixels.std((2, 3))], 1))

    def to(self, device):
        return self


def images_of(seed, count=40, size=8):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(count, 3, 1, 1, generator=generator)
    return (torch.rand(count, 3, size, size, generator=generator) * scale * 255).to(torch.uint8)


def statistics(images):
    rows = Colours()(images.float()).pooled.double().numpy()
    return rows.mean(0), np.cov(rows, rowvar=False)


def test_fid_is_the_formula_of_the_paper_for_sets_of_any_sizes():
    ours, theirs = images_of(0), images_of(1, count=90)
    found = fid(ours.split(7), theirs.split(16), Colours(), CPU)
    (mean_a, cov_a), (mean_b, cov_b) = statistics(ours), statistics(theirs)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert found["fid"] == pytest.approx(expected, rel=1e-4)
    assert (found["num_samples"], found["num_reference"]) == (40, 90)
    assert found["note"] is None


def test_a_file_of_statistics_stands_for_its_pictures(tmp_path):
    mean, covariance = statistics(images_of(1))
    np.savez(tmp_path / "reference.npz", mu=mean, sigma=covariance)
    found = fid([images_of(0)], tmp_path / "reference.npz", Colours(), CPU)
    assert found["fid"] == pytest.approx(fid([images_of(0)], [images_of(1)], Colours(), CPU)["fid"], rel=1e-4)
    assert len(found["protocol"]["reference_sha256"]) == 64


def test_images_that_are_the_reference_have_distance_zero_and_few_of_them_a_note():
    found = fid([images_of(0, count=5)], [images_of(0, count=5)], Colours(), CPU)
    assert found["fid"] == pytest.approx(0, abs=1e-3)
    assert "fewer images (5) than features (6)" in found["note"]


def test_samples_are_the_same_from_every_kind_of_source(tmp_path):
    images = images_of(0, count=11)
    save_file({"images": images}, tmp_path / "samples.safetensors")
    np.savez(tmp_path / "samples.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:03d}.png")
    for source in (tmp_path, tmp_path / "samples.npz", folder):
        batches = list(read_samples(source, 4))
        assert [len(batch) for batch in batches] == [4, 4, 3]
        assert torch.equal(torch.cat(batches), images)


@pytest.mark.parametrize(
    ("arrays", "message"), [({"mu": [1]}, "must hold arr_0"), ({"arr_0": np.zeros((2, 3))}, "must hold arr_0")]
)
def test_foreign_files_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "file.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        next(read_samples(tmp_path / "file.npz", 4))
    with pytest.raises(ValueError, match="must hold mu and sigma"):
        fid([images_of(0)], tmp_path / "file.npz", Colours(), CPU)


def test_a_file_that_is_no_archive_is_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "one.png")
    with pytest.raises(ValueError, match=r"a folder or a \.npz file"):
        next(read_samples(tmp_path / "one.png", 4))


def test_a_folder_without_samples_and_pictures_of_other_sizes_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no pictures"):
        next(read_samples(tmp_path, 4))
    for side in (4, 5):
        Image.new("RGB", (side, side)).save(tmp_path / f"{side}.png")
    with pytest.raises(ValueError, match="differ in size"):
        next(read_samples(tmp_path, 4))


def test_no_images_have_no_distance():
    for images in ([], [images_of(0, count=1)]):
        with pytest.raises(ValueError, match="at least 2 images"):
            fid([images_of(0)], images, Colours(), CPU)


@pytest.fixture
def compose(tmp_path, monkeypatch):
    monkeypatch.setattr("vistok.prior.sample.Inception", lambda weights: Colours())

    def made(**settings):
        config = OmegaConf.load("configs/sample.yaml")
        config.data = OmegaConf.load("configs/data/photos.yaml")
        config.data.num_workers = 0
        config.merge_with({"out": str(tmp_path / "out"), "device": "cpu", "fid": True, **settings})
        return config

    return made


def test_the_command_measures_earlier_samples_and_says_how(tmp_path, compose):
    config = compose(samples=str(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    pictures = torch.cat(list(read_pictures(config.data, (3, 32, 32))))
    save_file({"images": pictures}, tmp_path / "out" / "samples.safetensors")
    sample_from_config(config)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["fid"] == pytest.approx(0, abs=1e-2)
    assert metrics["num_samples"] == metrics["num_reference"] == len(pictures)
    assert metrics["sample_shape"] == [3, 32, 32]
    assert metrics["protocol"]["extractor"] == "colours"
    assert metrics["data"]["_target_"] == "vistok.data.PhotosData"
    with pytest.raises(FileExistsError, match=r"metrics\.json already"):
        sample_from_config(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "set either generator"),
        ({"samples": "a", "generator": "b"}, "set either generator"),
        ({"samples": "a", "fid": False}, "set fid=true"),
        ({"generator": "a", "fid": False, "fid_reference": "b"}, "no effect without fid"),
        ({"generator": "a", "num_images": 0}, "at least 1"),
        ({"samples": "a", "batch_size": 0}, "at least 1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(compose, settings, message):
    with pytest.raises(ValueError, match=message):
        sample_from_config(compose(**settings))


def test_a_reference_that_is_missing_is_noticed_before_anything_is_drawn(compose):
    with pytest.raises(FileNotFoundError, match="fid_reference=nowhere"):
        sample_from_config(compose(generator="a", fid_reference="nowhere.npz"))
