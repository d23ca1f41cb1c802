"""Binary spherical quantization.

Y. Zhao, Y. Xiong, P. Kraehenbuehl: Image and Video Tokenization with Binary Spherical Quantization,
https://arxiv.org/abs/2406.07548, section 4.
"""

import math

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from vistok.quantizer.binary import BinaryQuantizer, check_positive

GRADIENT_SCALES = ("paper", "identity")


class BSQ(BinaryQuantizer):
    """The nearest corner of the hypercube in the unit sphere: features are normalised, codes are ``+-1 / sqrt(bits)``.

    The entropy term is divided by `inv_temperature`, as the authors do: sharpening it does not strengthen it. The
    logit of a bit is ``4 * inv_temperature * point / sqrt(bits)`` with points of about ``1 / sqrt(bits)``: for the same
    sharpness, scale `inv_temperature` with `bits`. At the authors' 1 the distributions are almost flat.

    Args:
        bits: Bits of a code, and channels, at least 2 (one normalised channel has no gradient); ``2**bits`` codes.
        index_bits: Bits of one index, a divisor of `bits`; 1 gives the bits themselves as Infinity uses them, None all
            in one index.
        bit_order: ``msb_first`` as the original and QLIP: channel 0 of an index is its most significant bit;
            ``lsb_first`` is the reverse.
        entropy_weight: Weight of ``(sample_entropy - gamma * batch_entropy) / inv_temperature``; 0 switches both off.
        gamma: Weight of the entropy of the batch within the entropy term.
        inv_temperature: The softmax over the codes has the logits ``2 * inv_temperature * <point, code>``.
        batch_entropy: ``full``, exact up to 22 bits; ``group`` or ``bit``, upper bounds for more.
        entropy_group: Channels of a group of ``batch_entropy="group"``, a divisor of `bits`; None means the largest
            one up to 9.
        commitment_weight: Weight beta of the squared distance between points and codes. The paper sums it over the
            channels, the loss is their mean, so ``loss_weights`` holds ``bits`` times this.
        gradient_scale: Derivative of the codes with respect to the points: ``paper`` ``1 / sqrt(bits)`` (the original
            and QLIP: the straight-through step comes before the scaling); ``identity`` 1 (Infinity).

    Raises:
        ValueError: If an argument is out of range, or contradicts another one.

    Example:
        >>> BSQ(bits=36, index_bits=9).codebook_sizes
        (512, 512, 512, 512)
    """

    def __init__(
        self,
        bits: int,
        index_bits: int | None = None,
        bit_order: str = "msb_first",
        entropy_weight: float = 0.1,
        gamma: float = 1.0,
        inv_temperature: float = 1.0,
        batch_entropy: str = "group",
        entropy_group: int | None = None,
        commitment_weight: float = 0.0,
        gradient_scale: str = "paper",
    ) -> None:
        check_positive(inv_temperature=inv_temperature)
        if not isinstance(bits, int) or isinstance(bits, bool) or bits < 2:
            raise ValueError(f"bits must be an integer of at least 2, got {bits!r}")
        if gradient_scale not in GRADIENT_SCALES:
            raise ValueError(f"gradient_scale must be one of {', '.join(GRADIENT_SCALES)}; got {gradient_scale!r}")
        magnitude = bits**-0.5
        super().__init__(
            bits,
            index_bits,
            bit_order,
            entropy_weight / inv_temperature,
            gamma,
            batch_entropy,
            entropy_group,
            commitment_weight * bits,
            magnitude,
            # The logits of the two values of a bit are +-2 inv_temperature x magnitude.
            sharpness=4 * inv_temperature * magnitude,
            gradient_scale=magnitude if gradient_scale == "paper" else 1.0,
        )

    @property
    @override
    def stage_factors(self) -> tuple[float, ...]:
        # A unit vector x and its code c have |x - c|^2 = 2 - 2 |x|_1 / sqrt(bits); the mean of |x|_1 over the sphere is
        # known. The root is 0.45 at 2 bits and tends to 0.64.
        ratio = math.exp(math.lgamma(self.dim / 2) - math.lgamma((self.dim + 1) / 2))
        return (math.sqrt(2 - 2 * ratio * math.sqrt(self.dim / math.pi)),) * self.dim

    @override
    def points(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        return F.normalize(rows, dim=-1)
