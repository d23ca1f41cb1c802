"""Checks and helpers that all quantizers share."""

import pytest
import torch

from vistok.quantizer.base import check_features, check_indices, log2_of_product


def test_channels_on_the_last_axis_are_answered_with_what_to_pass():
    with pytest.raises(ValueError, match=r"Q takes features \(b, 4, \*grid\), got \(2, 64, 4\): .*movedim\(-1, 1\)"):
        check_features(torch.zeros(2, 64, 4), 4, "Q", finite=True)


@pytest.mark.parametrize(
    ("indices", "sizes", "message"),
    [
        (torch.zeros(2, 3), (8,), "Q takes integer indices, got torch.float32"),
        (torch.zeros(2, 3, dtype=torch.bool), (8,), "Q takes integer indices, got torch.bool"),
        (torch.tensor([[0, 8]]), (8,), "Q has indices 0 to 7, got values from 0 to 8"),
        (torch.tensor([[-1, 2]]), (8,), "Q has indices 0 to 7, got values from -1 to 2"),
        (torch.tensor([[0, 4]]), (8, 4), "Q has indices 0 to 3 in codebook 1, got values from 4 to 4"),
        (
            torch.zeros(2, 3, dtype=torch.int64),
            (8, 4),
            r"Q takes indices with 2 values on the last axis, one per codebook, got \(2, 3\)",
        ),
        (torch.zeros(2, 1, dtype=torch.int64), (8, 4), "Q takes indices with 2 values on the last axis"),
    ],
)
def test_wrong_indices_are_named(indices, sizes, message):
    with pytest.raises(ValueError, match=message):
        check_indices(indices, sizes, "Q")


def test_a_prefix_of_the_codebooks_is_allowed_where_it_means_something():
    check_indices(torch.zeros(2, 1, dtype=torch.int64), (8, 4), "Q", shorter=True)
    with pytest.raises(ValueError, match="1 to 2 values on the last axis"):
        check_indices(torch.zeros(2, 3, dtype=torch.int64), (8, 4), "Q", shorter=True)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_every_integer_type_is_an_index(dtype):
    assert check_indices(torch.tensor([[0, 7]], dtype=dtype), (8,), "Q") is None


def test_the_logarithm_of_a_product_beyond_any_integer_type_is_exact():
    assert log2_of_product([2] * 5000) == 5000
