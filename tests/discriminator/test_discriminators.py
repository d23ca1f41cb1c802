"""What holds for every discriminator, and the published sizes."""

import pytest
import torch
from torch import nn

from vistok.discriminator import PatchDiscriminator, StyleGANDiscriminator, VideoPatchDiscriminator
from vistok.discriminator.stylegan import Blur, append_deviation
from vistok.loss import AdversarialLoss

TINY = {
    "patch_batch": lambda channels=3: PatchDiscriminator(channels, base_channels=32, num_layers=2),
    "patch_group": lambda channels=3: PatchDiscriminator(channels, base_channels=32, num_layers=2, norm="group"),
    "patch_none": lambda channels=3: PatchDiscriminator(channels, base_channels=8, num_layers=2, norm="none"),
    "patch_spectral": lambda channels=3: PatchDiscriminator(channels, base_channels=8, num_layers=2, norm="spectral"),
    "stylegan": lambda channels=3: StyleGANDiscriminator(channels, image_size=32, channel_base=256),
}


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("name", TINY)
def test_every_parameter_gets_a_gradient(name, channels):
    discriminator = TINY[name](channels)
    discriminator(torch.randn(2, channels, 32, 32)).square().sum().backward()
    assert [key for key, value in discriminator.named_parameters() if value.grad is None or not value.grad.any()] == []


@pytest.mark.parametrize("name", TINY)
def test_the_gradient_penalty_trains_every_discriminator(name):
    loss = AdversarialLoss(TINY[name](), r1=1.0)
    images, reconstructions = torch.randn(2, 2, 3, 32, 32)
    terms, _ = loss(reconstructions, images, ("discriminator", "r1"))
    terms["r1"].backward()
    assert any(value.grad is not None and value.grad.any() for value in loss.parameters())


@pytest.mark.parametrize("name", TINY)
def test_the_frames_of_a_video_are_judged_like_images(name):
    discriminator = TINY[name]().eval()
    videos = torch.randn(2, 3, 2, 32, 32)
    frames = videos.transpose(1, 2).flatten(0, 1)
    assert torch.equal(discriminator(videos), discriminator(frames))


@pytest.mark.parametrize("name", TINY)
def test_another_number_of_channels_is_an_error_that_says_what_to_set(name):
    with pytest.raises(ValueError, match=r"takes images \(b, 3, H, W\) or videos, got \(2, 1, 32, 32\): choose"):
        TINY[name]()(torch.zeros(2, 1, 32, 32))


@pytest.mark.parametrize(("num_layers", "count", "side"), [(2, 663_361, 62), (3, 2_765_633, 30), (4, 6_960_961, 14)])
def test_patchgan_has_the_published_size_and_grid_of_logits(num_layers, count, side):
    with torch.device("meta"):
        discriminator = PatchDiscriminator(num_layers=num_layers)
        assert sum(parameter.numel() for parameter in discriminator.parameters()) == count
        assert discriminator(torch.empty(2, 3, 256, 256)).shape == (2, 1, side, side)


def test_a_logit_of_patchgan_sees_70_pixels():
    discriminator = PatchDiscriminator(base_channels=8, norm="none")
    images = torch.zeros(1, 3, 128, 128, requires_grad=True)
    discriminator(images)[0, 0, 7, 7].backward()
    assert images.grad is not None
    rows = images.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert len(rows) == 70


def test_patchgan_starts_from_the_published_distributions():
    layers = PatchDiscriminator().main
    weights = torch.cat([layer.weight.flatten() for layer in layers if isinstance(layer, nn.Conv2d)])
    scales = torch.cat([layer.weight for layer in layers if isinstance(layer, nn.BatchNorm2d)])
    assert weights.std().item() == pytest.approx(0.02, rel=1e-2)
    assert scales.mean().item() == pytest.approx(1.0, abs=5e-3)
    assert scales.std().item() == pytest.approx(0.02, rel=0.1)


def test_spectral_normalisation_bounds_the_weights():
    discriminator = PatchDiscriminator(base_channels=8, num_layers=2, norm="spectral")
    for layer in discriminator.main:
        if isinstance(layer, nn.Conv2d):
            assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("frames", [1, 4, 5])
def test_video_patches_are_judged_over_time(frames):
    discriminator = VideoPatchDiscriminator(base_channels=8, num_layers=2, num_time_layers=1, norm="none")
    videos = torch.randn(1, 3, frames, 32, 32, requires_grad=True)
    logits = discriminator(videos)
    assert logits.shape[:2] == (1, 1)
    logits[0, 0, 0, 4, 4].backward()
    assert videos.grad is not None
    assert videos.grad.abs().sum((0, 1, 3, 4)).nonzero().numel() == min(frames, 5)


def test_time_is_halved_by_the_first_layers_only():
    shapes = [
        VideoPatchDiscriminator(base_channels=8, num_time_layers=count, kernel_size=3, norm="none")(
            torch.zeros(1, 3, 9, 32, 32)
        ).shape
        for count in (0, 2, 3)
    ]
    assert [tuple(shape[2:]) for shape in shapes] == [(9, 4, 4), (3, 4, 4), (2, 4, 4)]


def test_a_video_discriminator_refuses_images():
    with pytest.raises(ValueError, match=r"takes videos \(b, 3, T, H, W\), got \(2, 3, 32, 32\)"):
        VideoPatchDiscriminator(base_channels=8)(torch.zeros(2, 3, 32, 32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "layer"}, "norm must be one of batch, group, none, spectral, got 'layer'"),
        ({"num_layers": 0, "num_time_layers": 0}, "must be positive"),
        ({"num_time_layers": 4}, "num_time_layers must be 0 to num_layers=3, got 4"),
        ({"kernel_size": 5}, "kernel_size must be 3 or 4, got 5"),
    ],
)
def test_settings_that_no_patchgan_has_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        VideoPatchDiscriminator(**arguments)


def test_the_stylegan_discriminator_has_the_published_size():
    with torch.device("meta"):
        discriminator = StyleGANDiscriminator(image_size=256, channel_base=16384)
    assert sum(parameter.numel() for parameter in discriminator.parameters()) == 24_001_089


def test_the_weights_of_stylegan_are_of_unit_variance_and_scaled_when_used():
    layer = StyleGANDiscriminator(image_size=32, channel_base=1024).conv_out
    assert layer.parametrizations.weight.original.std().item() == pytest.approx(1, rel=0.05)
    fan_in = layer.weight[0].numel()
    torch.testing.assert_close(layer.weight, layer.parametrizations.weight.original / fan_in**0.5)


def test_blurring_keeps_the_mean_and_removes_the_highest_frequency():
    alternating = torch.tensor([1.0, -1.0]).repeat(8).expand(1, 1, 16, 16)
    assert Blur()(alternating, padding=0).abs().max() < 1e-6
    assert torch.allclose(Blur()(torch.ones(1, 2, 8, 8), padding=0), torch.ones(1, 2, 5, 5))


@pytest.mark.parametrize(("batch", "group"), [(8, 4), (6, 3), (5, 1)])
def test_the_deviation_over_groups_of_images_is_that_of_numpy(batch, group):
    features = torch.randn(batch, 3, 2, 2)
    channel = append_deviation(features)[:, 3]
    members = features.view(group, -1, 3, 2, 2)
    expected = (members.double().var(0, correction=0) + 1e-8).sqrt().mean((1, 2, 3)).repeat(group)
    torch.testing.assert_close(channel, expected.float()[:, None, None].expand(-1, 2, 2))


@pytest.mark.parametrize("size", [4, 96])
def test_an_image_size_without_a_path_to_4_pixels_is_an_error(size):
    with pytest.raises(ValueError, match=f"power of two from 8 on, got {size}"):
        StyleGANDiscriminator(image_size=size)


def test_an_image_of_another_size_names_the_setting():
    with pytest.raises(ValueError, match=r"built for 32x32 pixels, got \(1, 3, 64, 64\): set discriminator.image_size"):
        TINY["stylegan"]()(torch.zeros(1, 3, 64, 64))
