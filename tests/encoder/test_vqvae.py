"""The trunk of the first VQ-VAE."""

import pytest
import torch

from vistok.decoder import VQVAEDecoder
from vistok.encoder import VQVAEEncoder
from vistok.layers.vqvae import RectifiedResidualBlock

TINY = {"width": 8, "hidden_channels": 4, "num_blocks": 2}


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("num_halvings", [1, 2, 3])
def test_decoder_mirrors_encoder(num_halvings, channels):
    parts = [part(channels, num_halvings=num_halvings, **TINY) for part in (VQVAEEncoder, VQVAEDecoder)]
    features = parts[0](torch.randn(2, channels, 32, 16))
    assert features.shape == (2, 8, 32 >> num_halvings, 16 >> num_halvings)
    assert parts[1](features, size=(32, 16)).shape == (2, channels, 32, 16)


def test_the_rectifier_of_a_block_changes_what_its_skip_connection_carries():
    block = RectifiedResidualBlock(2, 3, bias=True)
    features = torch.tensor([1.0, -1.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4)
    torch.testing.assert_close(block(features), block(features.relu()))


def test_features_are_rectified():
    assert VQVAEEncoder(**TINY)(torch.randn(1, 3, 16, 16)).min() == 0


def test_every_parameter_gets_a_gradient():
    parts = VQVAEEncoder(**TINY), VQVAEDecoder(**TINY, z_channels=8)
    parts[1](parts[0](torch.randn(2, 3, 16, 16))).square().mean().backward()
    assert [name for part in parts for name, parameter in part.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("part", [VQVAEEncoder, VQVAEDecoder])
def test_gradient_checkpointing_changes_nothing(part):
    plain, checkpointing = part(**TINY), part(**TINY, gradient_checkpointing=True)
    checkpointing.load_state_dict(plain.state_dict())
    inputs = torch.randn(2, 3, 16, 16) if part is VQVAEEncoder else torch.randn(2, 8, 4, 4)
    results = []
    for model in (plain, checkpointing):
        outputs = model(inputs)
        outputs.square().sum().backward()
        results.append([outputs, *(parameter.grad for parameter in model.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_the_reference_has_as_many_parameters():
    with torch.device("meta"):
        parts = VQVAEEncoder(), VQVAEDecoder(z_channels=64)
    blocks = 2 * (128 * 32 * 9 + 32 + 32 * 128 + 128)
    encoder = 3 * 64 * 16 + 64 + 64 * 128 * 16 + 128 + 128 * 128 * 9 + 128 + blocks
    decoder = 64 * 128 * 9 + 128 + blocks + 128 * 64 * 16 + 64 + 64 * 3 * 16 + 3
    assert [sum(weight.numel() for weight in part.parameters()) for part in parts] == [encoder, decoder]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 2}, "channels must be 1, 3 or 4, got 2"),
        ({"width": 7}, "width must be a positive even number of channels, got 7"),
        ({"num_halvings": 0}, "num_halvings must be positive, got 0"),
        ({"num_blocks": 0}, "num_blocks must be positive, got 0"),
        ({"hidden_channels": 0}, "hidden_channels must be positive, got 0"),
    ],
)
@pytest.mark.parametrize("part", [VQVAEEncoder, VQVAEDecoder])
def test_impossible_arguments_are_errors(part, arguments, message):
    with pytest.raises(ValueError, match=message):
        part(**arguments)
