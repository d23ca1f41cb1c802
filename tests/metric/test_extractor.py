"""Networks of the distances: their own resize, and equality with the programs that published it."""

import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from vistok.metric import BackboneFeatures, FeatureDistances, Inception, WeightsNotFoundError
from vistok.metric.extractor import INCEPTION_FILE

needs_weights = pytest.mark.skipif("VISTOK_WEIGHTS" not in os.environ, reason="VISTOK_WEIGHTS")


def pixels(count=2, size=64):
    small = torch.rand(count, 3, 7, 7)
    return torch.nn.functional.interpolate(small, size, mode="bicubic").clamp(0, 1).mul(255).round()


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """The architecture with random weights, read as torch-fidelity reads them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blank = FeatureExtractorInceptionV3.__new__(FeatureExtractorInceptionV3)
        path = tmp_path_factory.mktemp("weights") / INCEPTION_FILE
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
            patch.setattr(torch, "load", lambda *_, **__: {})
            blank.__init__("random", ["2048"], feature_extractor_weights_path="none")
        torch.save(blank.state_dict(), path)
    return FeatureExtractorInceptionV3(
        "random", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
    ).eval()


def test_features_are_those_of_torch_fidelity(network):
    images = pixels()
    pooled, logits = network(images.to(torch.uint8))
    features = Inception(network=network)(images)
    assert torch.allclose(features.pooled, pooled, rtol=1e-4, atol=1e-5)
    assert torch.allclose(features.logits, logits, rtol=1e-4, atol=1e-4)


def test_spatial_features_are_seven_channels_of_seventeen_positions_squared(network):
    assert Inception(network=network)(pixels(1)).spatial.shape == (1, 7 * 17 * 17)


def test_without_a_classifier_there_are_no_logits(network):
    weight = network.fc.weight.clone()
    network.fc.weight.zero_()
    try:
        assert Inception(network=network)(pixels(1)).logits is None
    finally:
        network.fc.weight.copy_(weight)


@pytest.mark.parametrize("size", [64, 128, 256, 299, 320])
def test_the_clean_resize_is_that_of_pil_in_float(network, size):
    images = pixels(1, size)
    channels = [
        np.asarray(Image.fromarray(channel.numpy(), "F").resize((299, 299), Image.Resampling.BICUBIC))
        for channel in images[0]
    ]
    expected = (torch.from_numpy(np.stack(channels)).clamp(0, 255) - 128) / 128
    assert torch.allclose(Inception(network=network, resize="clean")._inputs(images)[0], expected, atol=1e-4)


def test_the_torch_resize_looks_at_pixel_centres(network):
    ramp = torch.arange(0.0, 150).expand(1, 3, 150, 150)
    row = Inception(network=network, resize="torch")._inputs(ramp)[0, 0, 0] * 127.5 + 127.5
    centres = ((torch.arange(299) + 0.5) * 150 / 299 - 0.5).clamp(0, 149)
    assert torch.allclose(row, centres, atol=1e-3)


def test_the_tf1_resize_looks_at_pixel_corners(network):
    ramp = torch.arange(0.0, 150).expand(1, 3, 150, 150)
    row = Inception(network=network, resize="tf1")._inputs(ramp)[0, 0, 0] * 128 + 128
    assert torch.allclose(row, (torch.arange(299) * 150 / 299).clamp(0, 149), atol=1e-3)


def test_autocast_changes_nothing(network):
    images, extractor = pixels(), Inception(network=network)
    outside = extractor(images).pooled
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(extractor(images).pooled, outside)


def test_an_unknown_resize_is_refused(network):
    with pytest.raises(ValueError, match="tf1, torch, clean; got 'pil'"):
        Inception(network=network, resize="pil")


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(WeightsNotFoundError, match=INCEPTION_FILE):
        Inception(tmp_path)


@pytest.mark.parametrize("projected", [False, True])
def test_a_backbone_gives_its_pooled_features_or_its_projection(projected, tmp_path):
    model = timm.create_model("test_vit")
    save_file(model.state_dict(), tmp_path / "test_vit.safetensors")
    extractor = BackboneFeatures("test_vit", tmp_path, size=32, projected=projected)
    features = extractor(pixels()).pooled
    assert features.shape == (2, model.num_classes if projected else model.num_features)
    assert len(extractor.protocol["sha256"]) == 64


@pytest.mark.parametrize("clamped", [True, False])
def test_a_backbone_sees_the_bicubic_resize_of_pil_in_float(clamped, tmp_path, monkeypatch):
    model = timm.create_model("test_vit")
    save_file(model.state_dict(), tmp_path / "test_vit.safetensors")
    extractor, seen = BackboneFeatures("test_vit", tmp_path, size=48, clamped=clamped), []
    monkeypatch.setattr(extractor.backbone, "embedding", lambda images, **_: seen.append(images) or images[:, 0, 0])
    images = torch.rand(1, 3, 32, 32).gt(0.5).float() * 255
    extractor(images)
    resized = np.stack(
        [
            np.asarray(Image.fromarray(channel.numpy(), "F").resize((48, 48), Image.Resampling.BICUBIC))
            for channel in images[0]
        ]
    )
    assert resized.min() < -1
    expected = torch.from_numpy(resized.clip(0, 255) if clamped else resized) / 127.5 - 1
    assert torch.allclose(seen[0][0], expected, atol=1e-5)
    assert ("not clamped" in extractor.protocol["extractor_resize"]) != clamped


def test_an_unknown_model_is_named_with_similar_ones(tmp_path):
    with pytest.raises(ValueError, match=r"no model 'vit_large_patch14_dinov3'; similar names: .*dinov2"):
        BackboneFeatures("vit_large_patch14_dinov3", tmp_path)


def test_weights_of_another_activation_are_refused_with_the_model_to_write(tmp_path):
    with pytest.raises(ValueError, match=r"write vit_large_patch14_clip_quickgelu_336\.openai"):
        BackboneFeatures("vit_large_patch14_clip_336.openai", tmp_path)
    with pytest.raises(WeightsNotFoundError):
        BackboneFeatures("vit_large_patch14_clip_quickgelu_336.openai", tmp_path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pictures of two folders as PNG files, by size."""
    root, made = tmp_path_factory.mktemp("pictures"), {}
    generator = torch.Generator().manual_seed(0)
    for size in (128, 256, 299):
        clean = torch.nn.functional.interpolate(torch.rand(16, 3, 9, 9, generator=generator), size, mode="bicubic")
        noisy = clean + 0.1 * torch.randn(clean.shape, generator=generator)
        for name, images in (("clean", clean), ("noisy", noisy)):
            folder = root / f"{name}{size}"
            folder.mkdir()
            for number, image in enumerate(images.mul(255).round().clamp(0, 255).to(torch.uint8)):
                Image.fromarray(image.movedim(0, -1).numpy()).save(folder / f"{number:02}.png")
        made[size] = (root / f"noisy{size}", root / f"clean{size}")
    return made


def read(folder):
    files = sorted(folder.glob("*.png"))
    return torch.stack([torch.from_numpy(np.array(Image.open(file))).movedim(-1, 0) for file in files]).float()


def frechet(ours, originals):
    """Frechet distance of rows in float64; of few rows of many features, whose covariances have a small exact root."""
    (mean_a, a), (mean_b, b) = ((rows.mean(0), rows - rows.mean(0)) for rows in (ours.double(), originals.double()))
    root = torch.linalg.svdvals(a @ b.T).sum()
    return ((mean_a - mean_b).square().sum() + (a.square().sum() + b.square().sum() - 2 * root) / (len(a) - 1)).item()


def our_features(pair, resize):
    network = Inception(resize=resize)
    return [network(read(folder)).pooled for folder in pair]


@needs_weights
@pytest.mark.parametrize("size", [128, 256, 299])
def test_rfid_is_that_of_torch_fidelitys_features_on_the_same_files(folders, size):
    path = str(Path(os.environ["VISTOK_WEIGHTS"]) / INCEPTION_FILE)
    network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=path).eval()
    expected = frechet(*(network(read(folder).to(torch.uint8))[0] for folder in folders[size]))
    assert frechet(*our_features(folders[size], "tf1")) == pytest.approx(expected, abs=1e-3)


@needs_weights
def test_rfid_equals_what_torch_fidelity_prints(folders):
    from torch_fidelity import calculate_metrics

    options = {"fid": True, "cuda": False, "verbose": False, "cache": False, "batch_size": 16}
    path = str(Path(os.environ["VISTOK_WEIGHTS"]) / INCEPTION_FILE)
    ours, originals = map(str, folders[128])
    metrics = calculate_metrics(input1=ours, input2=originals, feature_extractor_weights_path=path, **options)
    distances = FeatureDistances(Inception(), ["rfid"])
    distances.update(*map(read, folders[128]))
    assert distances.compute()["rfid"] == pytest.approx(metrics["frechet_inception_distance"], rel=1e-5)


@needs_weights
@pytest.mark.parametrize("size", [128, 256, 299])
def test_rfid_is_that_of_pytorch_fids_features_on_the_same_files(folders, size, monkeypatch):
    pytest.importorskip("pytorch_fid", reason="pytorch-fid is not installed")
    from pytorch_fid import fid_score, inception

    network = Inception(resize="torch").network
    # Its weights are a download: it gets the network, and keeps its own reading, resize and loop.
    monkeypatch.setattr(inception, "fid_inception_v3", lambda: network)
    theirs = inception.InceptionV3([3]).eval()
    files = [sorted(folder.glob("*.png")) for folder in folders[size]]
    rows = [torch.from_numpy(fid_score.get_activations(part, theirs, 16, 2048, "cpu", 0)) for part in files]
    assert frechet(*our_features(folders[size], "torch")) == pytest.approx(frechet(*rows), abs=1e-3)
