"""Packing of bits into integers and back."""

import pytest
import torch

from vistok.ops import pack_bits, unpack_bits

ORDERS = ["lsb_first", "msb_first"]


def test_worked_example():
    mask = torch.tensor([[True, True, False], [False, False, True]])
    assert pack_bits(mask, "lsb_first").tolist() == [3, 4]
    assert pack_bits(mask, "msb_first").tolist() == [6, 1]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits", [1, 8, 28, 36, 62])
def test_packing_is_exact_and_invertible(order, bits):
    mask = torch.rand(5, 40, bits) < 0.5
    packed = pack_bits(mask, order)
    digits = mask.int().tolist()
    for row, numbers in zip(digits, packed.tolist(), strict=True):
        for code, number in zip(row, numbers, strict=True):
            # Python's integers have no limit.
            expected = int("".join(map(str, code if order == "msb_first" else code[::-1])), 2)
            assert number == expected
    assert torch.equal(unpack_bits(packed, bits, order), mask)


def test_packing_in_float32_would_be_wrong_from_25_bits():
    mask = torch.ones(1, 28, dtype=torch.bool)
    in_float = (mask.float() * 2.0 ** torch.arange(28)).sum(-1).long()
    assert in_float.item() != 2**28 - 1
    assert pack_bits(mask, "lsb_first").item() == 2**28 - 1


def test_more_than_62_bits_are_refused():
    with pytest.raises(ValueError, match="at most 62 bits, got 63: split"):
        pack_bits(torch.ones(2, 63, dtype=torch.bool), "lsb_first")


def test_an_unknown_order_is_refused():
    with pytest.raises(ValueError, match="lsb_first, msb_first; got 'big_endian'"):
        unpack_bits(torch.zeros(2, dtype=torch.int64), 4, "big_endian")
