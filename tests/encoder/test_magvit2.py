"""The trunk of Open-MAGVIT2."""

import pytest
import torch
from deterministic import fill, waves

from vistok import Tokenizer
from vistok.decoder import MAGVIT2Decoder
from vistok.encoder import MAGVIT2Encoder
from vistok.layers import AdaptiveGroupNorm, DepthToSpaceUpsample
from vistok.quantizer import LFQ

SMALL = {"base_channels": 32, "channel_multipliers": (1, 2, 2), "num_blocks": 2, "z_channels": 6}


# The expected numbers are those of the package open-magvit2 1.1 with the same weights and inputs.
@torch.no_grad()
def test_features_are_those_of_the_original_program():
    encoder = fill(MAGVIT2Encoder(**SMALL))
    expected = [0.28553307, -0.49968117, 0.29901645, 0.51892382, -0.44276494, 0.04045899]
    found = encoder(waves(2, 3, 16, 24))[1, :, 2, 3]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=0)


@torch.no_grad()
def test_images_are_those_of_the_original_program():
    decoder = MAGVIT2Decoder(**SMALL)
    decoder.set_code_dim(6)
    fill(decoder)
    codes = torch.where(waves(2, 6, 4, 6, phase=1.0) > 0, 1.0, -1.0)
    expected = [[-0.77633232, -0.40669546], [0.11084449, -0.30155125], [0.92847252, 1.25124109]]
    found = decoder(codes, codes=codes)[1, :, 5, 7:9]
    torch.testing.assert_close(found, torch.tensor(expected), atol=2e-4, rtol=0)


def test_the_published_parts_have_as_many_parameters():
    with torch.device("meta"):
        tokenizer = Tokenizer(MAGVIT2Encoder(), LFQ(18), MAGVIT2Decoder(), projection="none")
    parts = tokenizer.encoder.state_dict(), tokenizer.decoder.state_dict()
    assert [len(part) for part in parts] == [159, 180]
    assert [sum(weight.numel() for weight in part.values()) for part in parts] == [49_751_442, 65_376_387]


def test_the_published_parts_of_simvq_have_as_many_parameters():
    arguments = {"channel_multipliers": (1, 2, 2, 4), "num_blocks": 2, "z_channels": 128}
    with torch.device("meta"):
        parts = MAGVIT2Encoder(**arguments), MAGVIT2Decoder(**arguments, adaptive_norm=False)
    assert [sum(weight.numel() for weight in part.parameters()) for part in parts] == [24_282_496, 39_851_907]


def test_upsampling_puts_the_position_before_the_channel():
    upsample = DepthToSpaceUpsample(32)
    features = torch.randn(1, 32, 2, 3)
    predicted = upsample.conv(features).unflatten(1, (2, 2, 32))
    enlarged = upsample(features)
    assert enlarged.shape == (1, 32, 4, 6)
    for row in range(2):
        for column in range(2):
            assert torch.equal(enlarged[:, :, row::2, column::2], predicted[:, row, column])


def test_adaptive_normalisation_scales_by_the_deviation_and_shifts_by_the_mean():
    norm = AdaptiveGroupNorm(32)
    norm.set_code_dim(5)
    features, codes = torch.randn(2, 32, 4, 4), torch.randn(2, 5, 3, 2)
    found = norm(features, codes)
    for image in range(2):
        each = codes[image].double()
        deviation = ((each - each.mean((1, 2), keepdim=True)) ** 2).sum((1, 2)) / 5
        scale = norm.scale.weight.double() @ (deviation + 1e-6).sqrt() + norm.scale.bias
        shift = norm.shift.weight.double() @ each.mean((1, 2)) + norm.shift.bias
        # One channel per group: each is normalised over the image.
        channel = features[image].double()
        normal = (channel - channel.mean((1, 2), keepdim=True)) / (channel.var((1, 2), correction=0) + 1e-6).sqrt()[
            :, None, None
        ]
        expected = normal * scale[:, None, None] + shift[:, None, None]
        torch.testing.assert_close(found[image].double(), expected, atol=1e-5, rtol=0)


def test_one_code_has_no_deviation():
    decoder = MAGVIT2Decoder(**SMALL)
    decoder.set_code_dim(6)
    with pytest.raises(ValueError, match="at least 2 codes: decode a larger image"):
        decoder(torch.randn(1, 6, 1, 1), codes=torch.randn(1, 6, 1, 1))
