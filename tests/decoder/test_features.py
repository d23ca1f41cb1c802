"""The decoder that predicts the features of a teacher."""

import pytest
import torch

import vistok
from vistok.decoder import FeatureDecoder
from vistok.encoder import CNNEncoder
from vistok.quantizer import FSQ

TINY = {"channels": 6, "width": 8, "num_heads": 2}


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("grid", [(3, 3), (2, 5)])
def test_features_have_the_channels_of_the_teacher_and_the_grid_of_the_codes(depth, grid):
    decoder = FeatureDecoder(**TINY, depth=depth)
    assert decoder(torch.randn(2, 8, *grid), size=(48, 48)).shape == (2, 6, *grid)


@pytest.mark.parametrize("depth", [0, 1])
def test_only_a_transformer_sees_more_than_one_position(depth):
    decoder = FeatureDecoder(**TINY, depth=depth)
    features = torch.randn(1, 8, 3, 3)
    other = features.clone()
    other[:, :, 0, 0] = torch.randn(8)
    changed = (decoder(features) != decoder(other)).any(1)
    assert changed.sum() == (9 if depth else 1)


def test_a_transformer_knows_positions():
    decoder = FeatureDecoder(**TINY)
    features = torch.randn(1, 8, 4, 4)
    assert not torch.allclose(decoder(features.flip(3)), decoder(features).flip(3))


def test_a_tokenizer_of_features_fits_any_encoder_and_says_what_it_gives(tmp_path):
    tokenizer = vistok.Tokenizer(CNNEncoder(base_channels=32, num_blocks=1), FSQ((8, 5)), FeatureDecoder(**TINY))
    images = torch.randn(2, 3, 16, 24)
    assert tokenizer(images).images.shape == (2, 6, 2, 3)
    loaded = vistok.load(vistok.save(tokenizer, tmp_path / "bundle"))
    assert loaded.output == "features"
    assert loaded.decode_indices(loaded.encode(images).indices).shape == (2, 6, 2, 3)


@pytest.mark.parametrize("depth", [0, 1])
def test_every_parameter_gets_a_gradient(depth):
    decoder = FeatureDecoder(**TINY, depth=depth)
    decoder(torch.randn(2, 8, 3, 3)).square().mean().backward()
    assert [name for name, parameter in decoder.named_parameters() if parameter.grad is None] == []


def test_the_last_layer_makes_the_features():
    assert FeatureDecoder(**TINY).last_layer.shape == (6, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels must be those of the features of the teacher, got 0"),
        ({"depth": 0, "gradient_checkpointing": True}, "gradient_checkpointing has no effect with depth=0"),
        ({"width": 10, "num_heads": 4}, "width must be a multiple of num_heads"),
    ],
)
def test_impossible_arguments_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        FeatureDecoder(**arguments)
