"""Finite scalar quantization against its paper."""

import math

import pytest
import torch

from vistok.quantizer import FSQ


def brute_force(features, levels, eps=1e-3):
    """Digits of one vector by the formulas of the authors' notebook, in Python floats."""
    digits = []
    for value, level in zip(features, levels, strict=True):
        half = (level - 1) * (1 - eps) / 2
        offset = 0.5 if level % 2 == 0 else 0.0
        bounded = math.tanh(value + math.tan(offset / half)) * half - offset
        digits.append(round(bounded) + level // 2)
    return digits


@pytest.mark.parametrize(
    ("levels", "size"),
    [
        ((8, 6, 5), 240),
        ((8, 5, 5, 5), 1000),
        ((7, 5, 5, 5, 5), 4375),
        ((8, 8, 8, 6, 5), 15360),
        ((8, 8, 8, 5, 5, 5), 64000),
    ],
)
def test_codebook_sizes_are_those_of_table_1(levels, size):
    assert FSQ(levels).codebook_size == size


def test_indices_equal_a_brute_force_computation():
    levels = (8, 5, 4, 3)
    features = torch.randn(500, len(levels), dtype=torch.float64) * 2
    expected = []
    for row in features.tolist():
        digits = brute_force(row, levels)
        # Channel 0 is the fastest digit: index = d0 + 8 d1 + 40 d2 + 160 d3.
        expected.append(digits[0] + 8 * digits[1] + 40 * digits[2] + 160 * digits[3])
    indices = FSQ(levels).eval()(features.float().T.unsqueeze(0)).indices
    assert indices[0].tolist() == expected


def test_a_worked_example():
    # levels 3 and 5: digits (2, 3) -> index 2 + 3 * 3 = 11; code ((2 - 1) / 1, (3 - 2) / 2).
    codes = FSQ((3, 5)).indices_to_codes(torch.tensor([[11]]))
    assert codes.flatten().tolist() == [1.0, 0.5]


def test_zero_is_the_middle_level():
    # Even numbers of levels are not symmetric: 8 levels are -4..3, and zero is level 4.
    quantized = FSQ((8, 5)).eval()(torch.zeros(1, 2, 1))
    assert quantized.codes.flatten().tolist() == [0.0, 0.0]
    assert quantized.indices.item() == 4 + 8 * 2


def test_the_gradient_is_that_of_the_bounding_function():
    quantizer = FSQ((5, 5)).train()
    features = torch.randn(1, 2, 50, dtype=torch.float32, requires_grad=True)
    quantizer(features).codes.sum().backward()
    half = 4 * (1 - 1e-3) / 2
    expected = (1 - torch.tanh(features.detach()) ** 2) * half / 2
    torch.testing.assert_close(features.grad, expected)


@pytest.mark.parametrize("levels", [[], [1, 5], [2, 5], [True, 5]])
def test_impossible_levels_are_an_error(levels):
    with pytest.raises(ValueError, match=r"levels must be a list of integers of at least 3, such as \[8,5,5,5\]"):
        FSQ(levels)


def test_more_than_62_bits_are_an_error():
    with pytest.raises(ValueError, match=r"need 63.0 bits, an index has at most 62"):
        FSQ([8] * 21)


def test_sixty_bits_are_exact():
    quantizer = FSQ([8] * 20)
    indices = torch.randint(2**60, (1, 1000))
    assert torch.equal(quantizer.codes_to_indices(quantizer.indices_to_codes(indices)), indices)
    assert quantizer.codebook is None
