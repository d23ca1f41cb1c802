"""The trunk of Cosmos for images: against the original program, and by itself."""

import pytest
import torch
from golden import golden
from golden_trunks import TAMING, load_projections, load_trunk

from vistok import Tokenizer
from vistok.decoder import CosmosDecoder
from vistok.encoder import CosmosEncoder
from vistok.quantizer import FSQ

TINY = {"base_channels": 32, "channel_multipliers": (1, 2), "num_blocks": 1, "factor": 8, "z_channels": 8}


def test_codes_and_images_are_those_of_the_original():
    weights, expected, config = golden("cosmos_di")
    arguments = {
        "base_channels": config["channels"],
        "channel_multipliers": config["channels_mult"],
        "factor": config["spatial_compression"],
        "patch_size": config["patch_size"],
        "patching": config["patch_method"],
        "attention": config["attn_resolutions"],
        "image_size": config["resolution"],
        "z_channels": config["z_channels"],
    }
    blocks = config["num_res_blocks"]
    encoder, decoder = CosmosEncoder(num_blocks=blocks, **arguments), CosmosDecoder(num_blocks=blocks + 1, **arguments)
    load_trunk(encoder, weights, TAMING, "encoder.")
    load_trunk(decoder, weights, TAMING, "decoder.")
    tokenizer = Tokenizer(encoder, FSQ(config["levels"]), decoder).eval()
    load_projections(tokenizer, weights)
    with torch.no_grad():
        reconstruction = tokenizer(expected["x"])
    torch.testing.assert_close(reconstruction.features, expected["prequant"], atol=1e-4, rtol=0)
    assert torch.equal(reconstruction.quantized.indices, expected["indices"].long())
    torch.testing.assert_close(reconstruction.images, expected["decoded"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("factor", "millions"), [(8, 79.0), (16, 83.7)])
def test_the_published_sizes(factor, millions):
    with torch.device("meta"):
        tokenizer = Tokenizer(CosmosEncoder(factor=factor), FSQ((8, 8, 8, 5, 5, 5)), CosmosDecoder(factor=factor))
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("patch_size", "patching"), [(4, "haar"), (4, "fold"), (2, "haar"), (1, "none")])
def test_the_decoder_gives_images_of_the_size_that_the_encoder_took(patch_size, patching, channels):
    levels = (1,) * 4
    arguments = {**TINY, "channels": channels, "patch_size": patch_size, "patching": patching}
    arguments["channel_multipliers"] = levels
    encoder, decoder = CosmosEncoder(**arguments), CosmosDecoder(**arguments)
    features = encoder(torch.randn(2, channels, 24, 16))
    assert features.shape == (2, encoder.dim, *encoder.grid((24, 16))) == (2, 8, 3, 2)
    assert decoder(features, size=(24, 16)).shape == (2, channels, 24, 16)


def test_without_a_factor_every_level_changes_the_grid():
    arguments = {**TINY, "channel_multipliers": (1, 1, 1), "factor": None, "z_channels": None}
    decoder = CosmosDecoder(**arguments)
    encoder = CosmosEncoder(**arguments | {"z_channels": decoder.dim})
    assert encoder.factor == decoder.factor == 16
    assert decoder(encoder(torch.randn(1, 3, 32, 16))).shape == (1, 3, 32, 16)


@pytest.mark.parametrize("attention", ["none", "middle", "last"])
def test_every_parameter_gets_a_gradient(attention):
    parts = CosmosEncoder(**TINY, attention=attention), CosmosDecoder(**TINY, attention=attention)
    parts[1](parts[0](torch.randn(1, 3, 16, 16))).square().mean().backward()
    assert [name for part in parts for name, parameter in part.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("part", [CosmosEncoder, CosmosDecoder])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patching": "dct"}, "patching must be one of"),
        ({"factor": 64}, "needs 4 or more levels, got 3"),
        ({"channels": 2}, "channels must be 1, 3 or 4, got 2"),
        ({"attention": "everywhere"}, "attention must be none, middle, last"),
    ],
)
def test_impossible_arguments_are_errors(part, arguments, message):
    with pytest.raises(ValueError, match=message):
        part(**arguments)
