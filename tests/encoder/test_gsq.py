"""The trunk of GSQ."""

import pytest
import torch

from vistok.decoder import GSQDecoder
from vistok.encoder import GSQEncoder
from vistok.layers import ResidualBlock

SMALL = {"base_channels": 32, "channel_multipliers": (1, 2), "num_blocks": (1, 2), "middle_blocks": 1, "z_channels": 4}


@pytest.mark.parametrize("adaptive_norm", [False, True])
@pytest.mark.parametrize("upsample", ["depth_to_space", "nearest"])
def test_features_decode_to_images_of_the_same_size(adaptive_norm, upsample):
    encoder, decoder = GSQEncoder(**SMALL), GSQDecoder(**SMALL, adaptive_norm=adaptive_norm, upsample=upsample)
    decoder.set_code_dim(4)
    features = encoder(torch.randn(2, 3, 8, 12))
    assert features.shape == (2, 4, 4, 6)
    assert decoder(features, codes=features).shape == (2, 3, 8, 12)


@pytest.mark.parametrize("part", [GSQEncoder, GSQDecoder])
def test_a_change_of_channels_has_a_block_of_its_own(part):
    blocks = [block for block in part(**SMALL).blocks if isinstance(block, ResidualBlock)]
    assert len(blocks) == 1 + 2 + 1 + 1
    assert sum(block.conv1.in_channels != block.conv1.out_channels for block in blocks) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_blocks": (1,)}, r"num_blocks needs a number for each of the 2 resolutions, got \[1\]"),
        ({"middle_blocks": -1}, "middle_blocks must be a number of residual blocks, got -1"),
        ({"attention_factors": [4]}, r"attention_factors=\[4\] must be chosen from \[1, 2\]"),
        ({"upsample": "bicubic"}, "upsample must be depth_to_space or nearest, got 'bicubic'"),
    ],
)
def test_sizes_that_no_such_network_has_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        GSQDecoder(**SMALL | changes)
