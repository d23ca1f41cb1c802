"""The trunk of Emu3, for images."""

import pytest
import torch

from vistok import Tokenizer
from vistok.decoder import Emu3Decoder
from vistok.encoder import Emu3Encoder
from vistok.quantizer import FSQ, VectorQuantizer

SMALL = {"base_channels": 32, "channel_multipliers": (1, 2), "num_blocks": 1, "time_blocks": 1}


@pytest.mark.parametrize("frames", [1, 2, 8])
def test_any_power_of_two_of_frames_gives_features_of_one(frames):
    encoder = Emu3Encoder(**SMALL, frames=frames)
    assert encoder(torch.randn(2, 3, 8, 12)).shape == (2, 4, 4, 6)


@pytest.mark.parametrize("quantizer", [FSQ((5, 5)), VectorQuantizer(16, 4)], ids=["2 channels", "4 channels"])
def test_codes_of_any_number_of_channels_modulate_the_decoder(quantizer):
    tokenizer = Tokenizer(Emu3Encoder(**SMALL), quantizer, Emu3Decoder(**SMALL)).eval()
    codes = tokenizer.encode(torch.randn(1, 3, 8, 8)).codes
    features = tokenizer.from_codes(codes)
    images = tokenizer.decoder(features, codes=codes)
    assert images.shape == (1, 3, 8, 8)
    assert not torch.allclose(tokenizer.decoder(features, codes=codes + 1), images)


def test_codes_are_asked_for():
    with pytest.raises(ValueError, match="Emu3Decoder is modulated by the codes: call decoder"):
        Emu3Decoder(**SMALL)(torch.zeros(1, 4, 2, 2))


def test_the_published_tokenizer_has_as_many_parameters():
    with torch.device("meta"):
        tokenizer = Tokenizer(Emu3Encoder(), VectorQuantizer(32768, 4), Emu3Decoder())
    assert round(sum(weight.numel() for weight in tokenizer.parameters()) / 1e6, 1) == 270.7


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"frames": 3}, "frames must be a power of 2, got 3"), ({"time_blocks": -1}, "time_blocks must be a number")],
)
def test_sizes_that_no_such_network_has_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        Emu3Encoder(**SMALL | changes)
