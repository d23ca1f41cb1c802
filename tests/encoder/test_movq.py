"""The decoder that is modulated by the codes at every position."""

import pytest
import torch
from deterministic import fill, waves

from vistok import Tokenizer
from vistok.decoder import MoVQDecoder
from vistok.encoder import CNNEncoder
from vistok.layers import SpatialNorm
from vistok.quantizer import VectorQuantizer

SMALL = {"patch_size": 1, "base_channels": 32, "channel_multipliers": (1, 2), "z_channels": 4, "attention": "last"}


# The expected numbers are those of diffusers 0.42.1, VQModel(norm_type="spatial"), with the same weights and inputs.
@torch.no_grad()
def test_images_are_those_of_diffusers():
    decoder = MoVQDecoder(**SMALL, num_blocks=2)
    decoder.set_code_dim(4)
    fill(decoder)
    images = decoder(waves(2, 4, 8, 12, phase=1.0), codes=waves(2, 4, 8, 12, phase=2.0))
    expected = [[-0.19047876, -0.10166202], [0.34891507, 0.22106698], [-0.0697612, 0.05607652]]
    torch.testing.assert_close(images[1, :, 5, 7:9], torch.tensor(expected), atol=1e-4, rtol=0)


@torch.no_grad()
def test_features_of_its_encoder_are_those_of_diffusers():
    encoder = fill(CNNEncoder(**SMALL, num_blocks=1))
    expected = [0.16652657, -0.06711048, -0.22313105, -0.15839101]
    found = encoder(waves(2, 3, 16, 24))[1, :, 2, 3]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("base_channels", "num_blocks", "parameters"),
    [pytest.param(128, 2, 67.77e6, id="67M"), pytest.param(128, 4, 101.55e6, id="102M"), (256, 2, 270.60e6)],
)
def test_published_sizes_have_as_many_parameters(base_channels, num_blocks, parameters):
    trunk = {
        "patch_size": 1,
        "base_channels": base_channels,
        "channel_multipliers": (1, 2, 2, 4),
        "attention": [32],
        "resolution": 256,
        "z_channels": 4,
    }
    with torch.device("meta"):
        tokenizer = Tokenizer(
            CNNEncoder(**trunk, num_blocks=num_blocks),
            VectorQuantizer(16384, 4),
            MoVQDecoder(**trunk, num_blocks=num_blocks + 1),
        )
    count = sum(weight.numel() for name, weight in tokenizer.named_parameters() if not name.startswith("quantizer."))
    assert abs(count - parameters) < 0.005e6


def test_a_code_modulates_its_own_position_only():
    norm = SpatialNorm(32)
    norm.set_code_dim(3)
    features, codes = torch.randn(1, 32, 8, 8), torch.randn(1, 3, 4, 4)
    changed = codes.clone()
    changed[..., 1, 2] += 1
    different = (norm(features, codes) != norm(features, changed)).any(1)[0]
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[2:4, 4:6] = True
    assert torch.equal(different, expected)


def test_missing_codes_are_an_error():
    decoder = MoVQDecoder(**SMALL, num_blocks=1)
    features = torch.randn(1, 4, 2, 2)
    with pytest.raises(ValueError, match=r"call decoder\.set_code_dim\(dim\) once"):
        decoder(features, codes=features)
    decoder.set_code_dim(4)
    with pytest.raises(ValueError, match=r"and then decoder\(features, codes=codes\)"):
        decoder(features)
