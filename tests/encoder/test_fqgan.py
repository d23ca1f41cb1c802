"""The encoder with a transformer for each code of a position."""

import pytest
import torch

from vistok.encoder import FQGANEncoder

SMALL = {"base_channels": 32, "channel_multipliers": (1, 2), "num_blocks": 1, "image_size": 8, "depth": 1}
HEADS = {"num_heads": 2, "z_channels": 4}


@pytest.mark.parametrize("size", [(8, 8), (16, 4)])
@pytest.mark.parametrize("branches", [2, 3])
def test_features_of_the_branches_follow_one_another(branches, size):
    encoder = FQGANEncoder(**SMALL, **HEADS, branches=branches)
    images = torch.randn(2, 3, *size)
    features = encoder(images)
    assert features.shape == (2, branches * 4, *encoder.grid(size))
    assert torch.equal(features[:, 4:8], encoder.branches[1](encoder.coarsen(images)))


def test_a_branch_does_not_depend_on_the_others():
    encoder = FQGANEncoder(**SMALL, **HEADS)
    encoder(torch.randn(1, 3, 8, 8))[:, :4].sum().backward()
    moved = [any(weight.grad.any() for weight in branch.parameters()) for branch in encoder.branches]
    assert moved == [True, False]


def test_a_number_of_branches_below_one_is_an_error():
    with pytest.raises(ValueError, match="branches must be a positive number of codes of a position, got 0"):
        FQGANEncoder(**SMALL, **HEADS, branches=0)
