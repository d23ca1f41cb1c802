"""What the quantizers with one bit per channel share: signs, their packing into indices, and entropy losses."""

import math
from abc import abstractmethod

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from vistok.ops import batch_entropy, pack_bits, sample_entropy, unpack_bits
from vistok.ops.binary_entropy import MAX_JOINT_BITS
from vistok.ops.bits import BIT_ORDERS, MAX_BITS
from vistok.quantizer.base import PositionwiseQuantizer

BATCH_ENTROPIES = ("full", "group", "bit")
MAX_TABLE_BITS = 20
# Bits of a group whose joint distribution counts, where they divide the code (the groups of BSQ and QLIP).
GROUP_BITS = 9


class BinaryQuantizer(PositionwiseQuantizer):
    """One bit per channel: a positive feature becomes ``+magnitude``, any other ``-magnitude``; nothing is learned.

    The losses pull each position towards a certain code (the entropy of its own distribution over the codes, which is
    minimised) and the positions together towards all of them (the entropy of their mean distribution, which is
    maximised: its weight is negative). The distribution is the softmax of ``sharpness / 2 * <points, codes>``; it is a
    product over the bits, which is why no loss ever looks at positions times codes. In training the mean is taken over
    the positions of all ranks; in evaluation, where ranks need not run alike, over those of its own.

    Args:
        bits: Bits of a code, and channels.
        index_bits: Bits of one index, a divisor of `bits`: a position has ``bits / index_bits`` indices, and index j
            holds the channels from ``j * index_bits``. 1 gives the bits themselves. None means all of them.
        bit_order: ``lsb_first``: channel 0 of an index is its least significant bit; ``msb_first``: the most one.
        entropy_weight: Weight of ``sample_entropy - gamma * batch_entropy``.
        gamma: See `entropy_weight`.
        batch_entropy: ``full``: entropy of the mean distribution over the whole code, exact, up to 22 bits; ``group``:
            sum over groups of channels, an upper bound; ``bit``: sum over channels, the loosest bound.
        entropy_group: Channels of a group of ``batch_entropy="group"``, a divisor of `bits`; None means the largest
            one up to 9.
        commitment_weight: Weight of the mean squared error between points and codes.
        magnitude: Absolute value of every channel of the codes.
        sharpness: Logit of a bit per unit of its channel.
        gradient_scale: Derivative of the codes with respect to the points in training.

    Raises:
        ValueError: If an argument is out of range, or contradicts another one.
    """

    _bits: Tensor

    def __init__(
        self,
        bits: int,
        index_bits: int | None,
        bit_order: str,
        entropy_weight: float,
        gamma: float,
        batch_entropy: str,
        entropy_group: int | None,
        commitment_weight: float,
        magnitude: float,
        sharpness: float,
        gradient_scale: float,
    ) -> None:
        super().__init__()
        if not isinstance(bits, int) or isinstance(bits, bool) or bits < 1:
            raise ValueError(f"bits must be an integer of at least 1, got {bits!r}")
        if bit_order not in BIT_ORDERS:
            raise ValueError(f"bit_order must be one of {', '.join(BIT_ORDERS)}; got {bit_order!r}")
        if batch_entropy not in BATCH_ENTROPIES:
            raise ValueError(f"batch_entropy must be one of {', '.join(BATCH_ENTROPIES)}; got {batch_entropy!r}")
        if entropy_group is not None and batch_entropy != "group":
            raise ValueError(f"entropy_group={entropy_group} has no effect with batch_entropy={batch_entropy}")
        for name, weight in (
            ("entropy_weight", entropy_weight),
            ("gamma", gamma),
            ("commitment_weight", commitment_weight),
        ):
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name} must be a number of at least 0, got {weight}")
        divisors = [number for number in range(1, bits + 1) if bits % number == 0]
        small = [number for number in divisors if number <= MAX_BITS]
        if index_bits is None and bits in small:
            index_bits = bits
        if not isinstance(index_bits, int) or index_bits not in small:
            raise ValueError(
                f"index_bits must divide the {bits} bits and be at most {MAX_BITS}, got {index_bits}: "
                f"write one of {', '.join(map(str, small))}"
            )
        joint = [number for number in divisors if number <= MAX_JOINT_BITS]
        groups = {"full": bits, "group": max(number for number in joint if number <= GROUP_BITS), "bit": 1}
        self._entropy_group = groups[batch_entropy] if entropy_group is None else entropy_group
        if entropy_weight and gamma and self._entropy_group not in joint:
            raise ValueError(
                f"batch_entropy={batch_entropy} with {self._entropy_group} of {bits} bits is not possible: write "
                f"batch_entropy=bit, or batch_entropy=group with entropy_group one of {', '.join(map(str, joint))}"
            )
        self.dim = bits
        self.bits = float(bits)
        self.index_bits = index_bits
        self.bit_order = bit_order
        self.codebook_sizes = (2**index_bits,) * (bits // index_bits)
        self.magnitude = magnitude
        self.sharpness = sharpness
        self.gradient_scale = gradient_scale
        weights = {
            "sample_entropy": entropy_weight,
            "batch_entropy": -entropy_weight * gamma,
            "commitment": commitment_weight,
        }
        self.loss_weights = {name: weight for name, weight in weights.items() if weight}
        # A module without parameters would not know its device.
        self.register_buffer("_bits", torch.arange(bits), persistent=False)

    @property
    @override
    def codebook(self) -> Float[Tensor, "k d"] | None:
        if self.num_codebooks > 1 or self.bits > MAX_TABLE_BITS:
            return None
        return self.lookup(torch.arange(self.codebook_size, device=self._bits.device))

    @abstractmethod
    def points(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """What the codes stand for: the features, brought to the range of the codes; the signs are kept."""

    @override
    def quantize(
        self, rows: Float[Tensor, "n d"]
    ) -> tuple[Float[Tensor, "n d"], Int[Tensor, "n *c"], dict[str, Tensor]]:
        # The signs of the features themselves: those of points that are scaled down may be lost to underflow.
        mask = rows > 0
        codes = self._mask_to_codes(mask)
        points = self.points(rows)
        losses = self._losses(points, codes)
        if self.training:
            # The difference is zero, so that the codes of training are exact too.
            codes = codes + self.gradient_scale * (points - points.detach())
        return codes, self._mask_to_indices(mask), losses

    @override
    def lookup(self, indices: Int[Tensor, "..."]) -> Float[Tensor, "... d"]:
        mask = unpack_bits(indices, self.index_bits, self.bit_order)
        return self._mask_to_codes(mask.flatten(-2) if self.num_codebooks > 1 else mask)

    @override
    def invert(self, codes: Float[Tensor, "... d"]) -> Int[Tensor, "..."]:
        return self._mask_to_indices(codes > 0)

    def _losses(self, points: Tensor, codes: Tensor) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        logits = self.sharpness * points
        if "sample_entropy" in self.loss_weights:
            losses["sample_entropy"] = sample_entropy(logits)
        if "batch_entropy" in self.loss_weights:
            losses["batch_entropy"] = batch_entropy(logits, self._entropy_group, all_ranks=self.training)
        if "commitment" in self.loss_weights:
            losses["commitment"] = F.mse_loss(points, codes)
        return losses

    def _mask_to_codes(self, mask: Bool[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return (mask.float() * 2 - 1) * self.magnitude

    def _mask_to_indices(self, mask: Bool[Tensor, "... d"]) -> Int[Tensor, "..."]:
        parts = mask.unflatten(-1, (self.num_codebooks, self.index_bits))
        indices = pack_bits(parts, self.bit_order)
        return indices if self.num_codebooks > 1 else indices.squeeze(-1)


def check_positive(**values: float) -> None:
    """Raise a ValueError that names the first argument that is not a positive finite number."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be a positive number, got {value}")
