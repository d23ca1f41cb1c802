"""The convolutional trunk and its mirror image."""

import pytest
import torch

from vistok.decoder import CNNDecoder
from vistok.encoder import CNNEncoder
from vistok.layers import fold_patches, unfold_patches


@pytest.mark.parametrize("attention", ["none", "last"])
@pytest.mark.parametrize(("patch_size", "multipliers"), [(1, (1, 1, 2)), (4, (1, 2)), (8, (1,))])
def test_decoder_mirrors_encoder(patch_size, multipliers, attention):
    arguments = {
        "patch_size": patch_size,
        "base_channels": 32,
        "channel_multipliers": multipliers,
        "num_blocks": 1,
        "attention": attention,
    }
    encoder, decoder = CNNEncoder(**arguments), CNNDecoder(**arguments)
    features = encoder(torch.randn(2, 3, 32, 16))
    assert features.shape == (2, encoder.dim, 32 // encoder.factor, 16 // encoder.factor)
    assert decoder.dim == encoder.dim
    assert decoder(features).shape == (2, 3, 32, 16)


def test_folding_is_pixel_unshuffle_and_unfolding_its_inverse():
    images = torch.randn(2, 3, 16, 24)
    folded = fold_patches(images, 8)
    assert torch.equal(folded, torch.nn.functional.pixel_unshuffle(images, 8))
    assert torch.equal(unfold_patches(folded, 8), images)


def test_decoding_to_another_size_is_an_error():
    decoder = CNNDecoder(base_channels=32, num_blocks=1)
    with pytest.raises(ValueError, match=r"a grid of \(2, 2\) decodes to \(16, 16\) pixels, not to \(20, 20\)"):
        decoder(torch.randn(1, decoder.dim, 2, 2), size=(20, 20))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_channels": 40}, "multiples of 32"),
        ({"patch_size": 0}, "patch_size"),
        ({"channel_multipliers": []}, "channel_multipliers"),
        ({"attention": "everywhere"}, "attention must be none or last, got 'everywhere'"),
        ({"channels": 2}, "channels must be 1, 3 or 4, got 2"),
    ],
)
@pytest.mark.parametrize("part", [CNNEncoder, CNNDecoder])
def test_impossible_arguments_are_errors(part, arguments, message):
    with pytest.raises(ValueError, match=message):
        part(**arguments)
