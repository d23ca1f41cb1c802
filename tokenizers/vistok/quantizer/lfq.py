"""Lookup-free quantization.

L. Yu et al.: Language Model Beats Diffusion -- Tokenizer is Key to Visual Generation, https://arxiv.org/abs/2310.05737,
section 3.1. The defaults are those of Open-MAGVIT2, https://arxiv.org/abs/2409.04410, the first
published implementation for images.
"""

from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from vistok.quantizer.binary import BinaryQuantizer, check_positive


class LFQ(BinaryQuantizer):
    """The sign of each channel, codes of plus and minus one, straight-through gradient.

    Args:
        bits: Bits of a code, and channels; ``2**bits`` codes.
        index_bits: Bits of one index, a divisor of `bits`; 1 gives the bits themselves, None all in one index.
        bit_order: ``lsb_first`` as Open-MAGVIT2 and MaskBit: channel 0 of an index is its least significant bit;
            ``msb_first`` as lucidrains' LFQ.
        entropy_weight: Weight of ``sample_entropy - gamma * batch_entropy``; 0 switches both off.
        gamma: Weight of the entropy of the batch within the entropy term.
        temperature: The softmax over the codes has the logits ``2 <features, code> / temperature``.
        batch_entropy: ``full``, exact up to 22 bits; ``group`` or ``bit``, upper bounds for more.
        entropy_group: Channels of a group of ``batch_entropy="group"``, a divisor of `bits`; None means the largest
            one up to 9.
        commitment_weight: Weight of ``mse(features, sg[codes])``.

    Raises:
        ValueError: If an argument is out of range, or contradicts another one.

    Example:
        >>> LFQ(bits=18).codebook_size
        262144
    """

    def __init__(
        self,
        bits: int,
        index_bits: int | None = None,
        bit_order: str = "lsb_first",
        entropy_weight: float = 0.1,
        gamma: float = 1.0,
        temperature: float = 0.01,
        batch_entropy: str = "full",
        entropy_group: int | None = None,
        commitment_weight: float = 0.25,
    ) -> None:
        check_positive(temperature=temperature)
        super().__init__(
            bits,
            index_bits,
            bit_order,
            entropy_weight,
            gamma,
            batch_entropy,
            entropy_group,
            commitment_weight,
            magnitude=1.0,
            # The logits of the two values of a bit are +-2 x / T.
            sharpness=4 / temperature,
            gradient_scale=1.0,
        )

    @property
    @override
    def stage_factors(self) -> tuple[float, ...]:
        # Features in [-2, 2] leave a rest in [-1, 1].
        return (0.5,) * self.dim

    @property
    @override
    def stage_limits(self) -> tuple[float, ...]:
        return (2.0,) * self.dim

    @override
    def points(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        return rows
