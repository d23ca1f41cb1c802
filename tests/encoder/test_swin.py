"""Windowed transformers: any size, windows, and every parameter in use."""

import pytest
import torch

from vistok.decoder import SwinDecoder
from vistok.encoder import SwinEncoder

TINY = {"patch_size": 2, "base_channels": 8, "channel_multipliers": (1, 2), "num_heads": 2, "window_size": 4}


def make(**arguments):
    return SwinEncoder(**TINY, **arguments).eval(), SwinDecoder(**TINY, **arguments).eval()


@pytest.mark.parametrize("channels", [1, 3, 4])
# In features of the first resolution: multiples of the window, no multiples, less than a window.
@pytest.mark.parametrize("size", [(16, 16), (20, 36), (4, 12)])
def test_the_decoder_gives_images_of_the_size_that_the_encoder_took(size, channels):
    encoder, decoder = make(channels=channels)
    features = encoder(torch.randn(2, channels, *size))
    assert features.shape == (2, 16, size[0] // 4, size[1] // 4)
    assert decoder(features, size=size).shape == (2, channels, *size)


def test_shifted_windows_reach_beyond_a_window_and_no_further():
    encoder = SwinEncoder(patch_size=1, base_channels=8, channel_multipliers=(1,), num_heads=2, window_size=4).eval()
    images = torch.randn(1, 3, 16, 16)
    other = images.clone()
    other[..., 3, 3] = torch.randn(3)
    changed = (encoder(images) != encoder(other)).any(1)[0]
    # The window of the pixel, then the four shifted windows that overlap with it.
    assert changed.any(0).nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert changed.any(1).nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_every_parameter_gets_a_gradient():
    parts = make()
    parts[1](parts[0](torch.randn(1, 3, 16, 16))).square().mean().backward()
    assert [name for part in parts for name, parameter in part.named_parameters() if parameter.grad is None] == []


def test_the_last_layer_makes_the_images():
    _, decoder = make()
    assert decoder.last_layer is decoder.head.weight


@pytest.mark.parametrize("part", [SwinEncoder, SwinDecoder])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_blocks": 3}, "num_blocks must be even, because every other block shifts the windows"),
        ({"num_heads": 3}, "base_channels must be a multiple of num_heads, got 128 and 3 heads"),
        ({"window_size": 1}, "window_size must be at least 2 features, got 1"),
        ({"channels": 2}, "channels must be 1, 3 or 4, got 2"),
    ],
)
def test_impossible_arguments_are_errors(part, arguments, message):
    with pytest.raises(ValueError, match=message):
        part(**arguments)
