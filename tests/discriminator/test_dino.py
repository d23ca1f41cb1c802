"""The discriminator on frozen features."""

import copy

import pytest
import timm
import torch
from safetensors.torch import save_file

from vistok.discriminator import DINODiscriminator
from vistok.loss import AdversarialLoss

MODEL = "test_vit"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A tiny random transformer, as a file."""
    path = tmp_path_factory.mktemp("weights") / f"{MODEL}.safetensors"
    torch.manual_seed(1)
    save_file(timm.create_model(MODEL).state_dict(), path)
    return path


@pytest.fixture
def make(weights):
    def make(**arguments):
        return DINODiscriminator(
            **{
                "model": MODEL,
                "pretrained": str(weights),
                "image_size": 64,
                "layers": (1, 3),
                "kernel_size": 3,
                **arguments,
            }
        )

    return make


def test_there_is_a_logit_per_token_and_depth_whatever_the_size(make):
    discriminator = make()
    for size in ((64, 64), (32, 48), (100, 80)):
        assert discriminator(torch.randn(2, 3, *size)).shape == (2, 3 * 16)


def test_only_the_heads_are_trained_and_saved(make):
    discriminator = make()
    assert {name.split(".")[0] for name, _ in discriminator.named_parameters()} == {"heads"}
    assert {name.split(".")[0] for name in discriminator.state_dict()} == {"heads"}
    discriminator.train()
    assert not discriminator.backbone.network.training


def test_the_gradient_passes_through_the_frozen_network_to_the_images(make):
    discriminator = make()
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    discriminator(images).square().sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in discriminator.parameters())
    assert all(parameter.grad is None for parameter in discriminator.backbone.network.parameters())


def test_the_gradient_penalty_passes_through_attention_twice(make):
    loss = AdversarialLoss(make(), r1=1.0)
    images, reconstructions = torch.randn(2, 2, 3, 32, 32)
    terms, _ = loss(reconstructions, images, ("discriminator", "r1"))
    terms["r1"].backward()
    assert terms["r1"] > 0
    assert any(value.grad is not None and value.grad.any() for value in loss.parameters())


def test_what_is_read_out_are_the_blocks_with_the_class_token_added(make, weights):
    discriminator = make()
    network = timm.create_model(MODEL, pretrained=True, pretrained_cfg_overlay={"file": str(weights)}, img_size=64)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    mean, std = (torch.tensor(network.pretrained_cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    expected = network.eval().forward_intermediates(
        ((images + 1) / 2 - mean) / std,
        indices=[1, 3],
        return_prefix_tokens=True,
        output_fmt="NLC",
        intermediates_only=True,
    )
    stages = discriminator.backbone(images, discriminator.layers)
    assert len(stages) == 3
    for stage, (tokens, prefix) in zip(stages[1:], expected, strict=True):
        torch.testing.assert_close(stage, (tokens + prefix[:, :1]).mT)


def test_blocks_behind_the_last_readout_are_dropped(make):
    assert len(make().backbone.network.blocks) == 4


def test_grey_images_are_judged_as_colour(make):
    discriminator = make(channels=1)
    assert discriminator(torch.randn(2, 1, 32, 32)).shape == (2, 48)


def test_a_copy_judges_alike(make):
    discriminator = make()
    images = torch.randn(2, 3, 32, 32)
    expected = copy.deepcopy(discriminator)(images)
    assert torch.equal(discriminator(images), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": ()}, "layers must be some of 0 to 5"),
        ({"layers": (6,)}, "layers must be some of 0 to 5"),
        ({"kernel_size": 4}, "kernel_size must be odd"),
        ({"channels": 2}, "channels must be 1, 3 or 4, got 2"),
    ],
)
def test_settings_that_do_not_fit_are_errors(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_a_network_that_is_no_transformer_is_refused(tmp_path):
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "test_resnet.safetensors")
    with pytest.raises(ValueError, match="test_resnet is no vision transformer of timm: use model=vit_small"):
        DINODiscriminator(model="test_resnet", pretrained=str(tmp_path), image_size=64)
