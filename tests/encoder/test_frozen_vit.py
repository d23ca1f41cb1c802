"""Models of timm as encoders: what is frozen, what they see, and where their weights come from."""

import json
import os
import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import vistok
from vistok.decoder import CNNDecoder
from vistok.encoder import TimmEncoder
from vistok.metric.weights import WeightsNotFoundError
from vistok.quantizer import FSQ

VIT, CNN = "test_vit", "test_efficientnet"


def make(model=VIT, **arguments):
    return TimmEncoder(model, **{"pretrained": False, **arguments})


@pytest.fixture
def weights(tmp_path):
    """A file with weights of a model, as timm publishes them."""
    path = tmp_path / f"{VIT}.safetensors"
    save_file(timm.create_model(VIT).state_dict(), path)
    return path


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("model", [VIT, CNN])
def test_images_of_any_size_give_features_on_their_grid(model, channels):
    encoder = make(model, channels=channels)
    for size in ((64, 64), (64, 96)):
        features = encoder(torch.randn(2, channels, *size))
        assert features.shape == (2, encoder.dim, *encoder.grid(size))


def test_features_are_those_of_timm():
    encoder = make()
    images = torch.rand(2, 3, 160, 160) * 2 - 1
    config = timm.data.resolve_model_data_config(encoder.model)
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    expected = encoder.model.forward_features((images / 2 + 0.5 - mean) / std)[:, encoder.model.num_prefix_tokens :]
    torch.testing.assert_close(encoder(images).flatten(2).transpose(1, 2), expected)


def test_levels_are_concatenated_in_their_order_on_the_coarsest_grid():
    several, coarse, fine = make(CNN, levels=[2, -1]), make(CNN), make(CNN, levels=[2])
    for encoder in (coarse, fine):
        encoder.model.load_state_dict(several.model.state_dict(), strict=False)
    images = torch.randn(1, 3, 64, 64)
    features = several(images)
    assert several.factor == coarse.factor > fine.factor
    torch.testing.assert_close(features[:, fine.dim :], coarse(images))
    pooled = torch.nn.functional.adaptive_avg_pool2d(fine(images), features.shape[2:])
    torch.testing.assert_close(features[:, : fine.dim], pooled)


def test_another_factor_resizes_the_images():
    encoder, other = make(), make(factor=20)
    other.model.load_state_dict(encoder.model.state_dict())
    images = torch.full((1, 3, 40, 60), 0.3)
    assert other.grid((40, 60)) == (2, 3)
    expected = encoder(torch.full((1, 3, 2 * encoder.factor, 3 * encoder.factor), 0.3))
    torch.testing.assert_close(other(images), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("model", [VIT, CNN])
def test_a_frozen_model_stays_in_evaluation_mode_and_has_no_gradient(model):
    encoder = make(model).train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    features = encoder(torch.randn(2, 3, 64, 64))
    assert encoder.training
    assert not any(module.training for module in encoder.model.modules())
    assert not features.requires_grad
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


@pytest.mark.parametrize("model", [VIT, CNN])
def test_every_parameter_of_a_model_that_is_not_frozen_gets_a_gradient(model):
    encoder = make(model, frozen=False).train()
    encoder(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []
    assert all(module.training for module in encoder.model.modules())


def test_weights_come_from_a_file_a_folder_or_the_environment(weights, monkeypatch):
    images = torch.randn(1, 3, 32, 32)
    expected = TimmEncoder(VIT, weights=str(weights))(images)
    assert torch.equal(TimmEncoder(VIT, weights=str(weights.parent))(images), expected)
    monkeypatch.setenv("VISTOK_WEIGHTS", str(weights.parent))
    assert torch.equal(TimmEncoder(VIT)(images), expected)
    assert not torch.equal(make()(images), expected)


def test_a_pickled_file_is_read_without_executing_it(weights, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model(VIT).state_dict(), path)
    assert TimmEncoder(VIT, weights=str(path)).dim == make().dim

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "trap"),))

    torch.save({"state": Bomb()}, path)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        TimmEncoder(VIT, weights=str(path))
    assert not (tmp_path / "trap").exists()


def test_missing_weights_name_the_file_the_argument_and_the_variable(monkeypatch, tmp_path):
    monkeypatch.delenv("VISTOK_WEIGHTS", raising=False)
    with pytest.raises(WeightsNotFoundError, match=r"test_vit.safetensors.*weights=.*VISTOK_WEIGHTS"):
        TimmEncoder(VIT)
    with pytest.raises(WeightsNotFoundError, match=r"there is no file .*nowhere/test_vit.safetensors"):
        TimmEncoder(VIT, weights=str(tmp_path / "nowhere"))


def test_a_bundle_loads_without_the_file_of_the_weights(weights, tmp_path, monkeypatch):
    monkeypatch.delenv("VISTOK_WEIGHTS", raising=False)
    encoder = TimmEncoder(VIT, weights=str(weights))
    decoder = CNNDecoder(patch_size=encoder.factor, base_channels=32, num_blocks=1)
    tokenizer = vistok.Tokenizer(encoder, FSQ((8, 5, 5)), decoder, preprocessing={"size": [64, 64]}).eval()
    images = torch.randn(1, 3, 64, 64)
    expected = tokenizer.encode(images).indices
    bundle = vistok.save(tokenizer, tmp_path / "bundle")
    weights.unlink()
    config = json.loads((bundle / "config.json").read_text())["encoder"]
    assert (config["pretrained"], config["weights"], config["frozen"]) == (False, None, True)
    loaded = vistok.load(bundle)
    assert torch.equal(loaded.encode(images).indices, expected)
    assert not any(parameter.requires_grad for parameter in loaded.encoder.parameters())


def test_real_weights_of_a_convolutional_network():
    name = "tf_efficientnet_lite0"
    if not (Path(os.environ.get("VISTOK_WEIGHTS", "")) / f"{name}.safetensors").is_file():
        pytest.skip(f"VISTOK_WEIGHTS has no {name}.safetensors")
    encoder = TimmEncoder(name, levels=[-2, -1])
    features = encoder(torch.zeros(1, 3, 64, 64))
    assert features.shape == (1, 112 + 320, 2, 2)
    assert torch.isfinite(features).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "test_vitt"}, "model='test_vitt' is no model of timm: choose one of timm.list_models"),
        ({"weights": "file.pth"}, "weights=file.pth has no effect with pretrained=false"),
        ({"gradient_checkpointing": True}, "no effect on a frozen model: set frozen=false"),
        ({"levels": []}, r"levels must be ascending numbers below \d+, .* got \[\]"),
        ({"levels": [-1, 0]}, r"got \[-1, 0\]"),
        ({"levels": [99]}, r"got \[99\]"),
        ({"factor": 0}, "factor must be a positive number of pixels"),
        ({"channels": 2}, "channels must be 1, 3 or 4, got 2"),
    ],
)
def test_impossible_arguments_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)
