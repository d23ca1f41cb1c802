"""The command that fetches networks, with sources that are made here: nothing is downloaded."""

import sys

import pytest
import timm
import torch
import torch_fidelity.feature_extractor_inceptionv3 as fidelity
import torchvision
from torchvision.models import VGG16_Weights

from vistok.cli.weights import main
from vistok.hub.files import sha256
from vistok.loss import LPIPS
from vistok.metric.extractor import BackboneFeatures, Inception

MODEL = "test_vit"


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """Random networks where the published ones would come from."""
    network = torch.nn.Module.__new__(fidelity.FeatureExtractorInceptionV3)
    with monkeypatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *a, **k: None)
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *a, **k: None)
        network = fidelity.FeatureExtractorInceptionV3("inception", ["2048"])
    file = tmp_path / "inception.pth"
    torch.save(network.state_dict(), file)
    named = file.rename(tmp_path / f"inception-{sha256(file)[:8]}.pth")
    monkeypatch.setattr(fidelity, "URL_INCEPTION_V3", named.as_uri())
    trunk = torchvision.models.vgg16(weights=None).state_dict()
    monkeypatch.setattr(VGG16_Weights, "get_state_dict", lambda *a, **k: trunk)
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **k: create(name, **k))
    return named


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["vistok weights", *map(str, arguments)])
    main()


def test_the_files_are_those_that_losses_and_metrics_read(sources, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "weights"
    run(monkeypatch, folder, "--lpips", "vgg", "--timm", MODEL)
    assert f"VISTOK_WEIGHTS={folder}" in capsys.readouterr().out
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    weight = LPIPS("vgg", folder).trunk.network[0].weight
    assert torch.equal(weight, VGG16_Weights.IMAGENET1K_V1.get_state_dict()["features.0.weight"])
    assert Inception(folder).protocol["sha256"] == sha256(sources)
    assert BackboneFeatures(MODEL, folder)(images * 127.5 + 127.5).pooled.shape[0] == 2
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_what_is_there_is_kept(sources, tmp_path, monkeypatch, capsys):
    run(monkeypatch, tmp_path, "--lpips", "vgg")
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    capsys.readouterr()
    run(monkeypatch, tmp_path, "--lpips", "vgg")
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert capsys.readouterr().out.count("kept  ") == 3


def test_a_file_that_is_not_the_published_one_is_not_taken(sources, tmp_path, monkeypatch, capsys):
    wrong = sources.rename(tmp_path / "inception-00000000.pth")
    monkeypatch.setattr(fidelity, "URL_INCEPTION_V3", wrong.as_uri())
    with pytest.raises(SystemExit) as exit_:
        run(monkeypatch, tmp_path / "weights", "--lpips", "vgg")
    assert exit_.value.code == 1
    printed = capsys.readouterr()
    assert "inception-2015-12-05.pth: invalid hash value" in printed.err
    names = {path.name for path in (tmp_path / "weights").iterdir()}
    assert names == {"vgg16_features.safetensors", "lpips_vgg_lin.safetensors"}
    assert "VISTOK_WEIGHTS" not in printed.out
