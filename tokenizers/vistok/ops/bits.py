"""Bits to integers and back, exact up to 62 bits.

Packing multiplies nothing and never goes through floats: float32 holds integers up to 2**24 only, bfloat16 up to 2**8,
and the published quantizers that pack with a weighted sum return wrong indices beyond that.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

BIT_ORDERS = ("lsb_first", "msb_first")
MAX_BITS = 62


def pack_bits(mask: Bool[Tensor, "*n b"], order: str) -> Int[Tensor, "*n"]:
    """The integer whose binary digits are the last axis.

    Args:
        mask: At most 62 bits.
        order: ``lsb_first``: position 0 is the least significant bit; ``msb_first``: the most significant one.

    Raises:
        ValueError: If there are more bits than an index holds, or the order is neither of the two.
    """
    return (mask.long() << _shifts(mask.shape[-1], order, mask.device)).sum(-1)


def unpack_bits(index: Int[Tensor, "*n"], bits: int, order: str) -> Bool[Tensor, "*n b"]:
    """The inverse of `pack_bits`: the lowest `bits` binary digits of integers."""
    return (index.long().unsqueeze(-1) >> _shifts(bits, order, index.device)) % 2 == 1


def _shifts(bits: int, order: str, device: torch.device) -> Tensor:
    if order not in BIT_ORDERS:
        raise ValueError(f"the bit order must be one of {', '.join(BIT_ORDERS)}; got {order!r}")
    if bits > MAX_BITS:
        raise ValueError(f"an index holds at most {MAX_BITS} bits, got {bits}: split them over several indices")
    shifts = torch.arange(bits, device=device)
    return shifts if order == "lsb_first" else shifts.flip(0)
