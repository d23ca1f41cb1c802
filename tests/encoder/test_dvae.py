"""The trunk of DALL-E's discrete VAE."""

import pytest
import torch

from vistok.decoder import DVAEDecoder
from vistok.encoder import DVAEEncoder

SMALL = {"width": 8, "num_levels": 3, "num_blocks": 1}


@pytest.mark.parametrize("channels", [1, 3])
def test_features_decode_to_images_of_the_same_size(channels):
    encoder, decoder = DVAEEncoder(channels, **SMALL), DVAEDecoder(channels, **SMALL, stem_width=4)
    features = encoder(torch.randn(2, channels, 8, 12))
    assert features.shape == (2, encoder.dim, 2, 3) == (2, 32, 2, 3)
    assert decoder(torch.randn(2, 4, 2, 3)).shape == (2, channels, 8, 12)


def test_pixels_reach_a_little_beyond_black_and_white():
    decoder = DVAEDecoder(**SMALL)
    torch.nn.init.constant_(decoder.conv_out.bias, 50.0)
    assert torch.allclose(decoder(torch.zeros(1, 128, 1, 1)), torch.tensor(1.25))


def test_the_published_model_has_as_many_parameters():
    with torch.device("meta"):
        encoder, decoder = DVAEEncoder(), DVAEDecoder()
    counts = [sum(weight.numel() for weight in part.parameters()) for part in (encoder, decoder)]
    # With the scores of 8192 codes of 2048 channels, and the table of 128; the scales of the pixels are left out here.
    assert round((counts[0] + 8192 * 2049) / 1e6, 1) == 53.8
    assert round((counts[1] - 128 * 128 + 8192 * 128) / 1e6, 1) == 43.8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 6}, "width must be a positive multiple of 4, got 6"),
        ({"num_levels": 0}, "num_levels and num_blocks must be positive, got 0 and 1"),
        ({"channels": 2}, "channels must be 1, 3 or 4, got 2"),
        ({"stem_width": 0}, "stem_width and z_channels are positive numbers of channels, got 0, None"),
    ],
)
def test_sizes_that_no_such_network_has_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        DVAEDecoder(**SMALL | changes)
