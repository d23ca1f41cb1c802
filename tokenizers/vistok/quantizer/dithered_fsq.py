"""Finite scalar quantization that trains with dither.

J. D. Parker et al.: Scaling Transformers for Low-Bitrate High-Quality Speech Coding, https://arxiv.org/abs/2411.19842,
section 3.2. The paper leaves out the third case, continuous codes; its author names it in issue 13 of stable-codec, and
stable-audio-tools computes it.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from vistok.quantizer.base import Quantized
from vistok.quantizer.fsq import FSQ


class DitheredFSQ(FSQ):
    """Symmetric FSQ whose training codes are, sample by sample, noisy, continuous or quantized.

    Uniform noise of one level spacing has the moments of the rounding error and lets the gradient see how the decoder
    reacts to it. The noise is not clamped, so training codes reach half a level spacing beyond [-1, 1]. Indices are
    always those of the quantized value. Evaluation is that of ``FSQ(levels, form="symmetric")``.

    Args:
        levels: Number of levels of each channel, at least 2 each.
        keep: The probability ``p`` that is drawn twice for each sample of the batch: to keep the squashed features
            instead of quantizing them, and to keep the outcome instead of replacing it by features plus noise. A
            sample is hence noisy with probability ``1 - p``, continuous with ``p^2`` and quantized with ``p (1 - p)``.

    Raises:
        ValueError: As FSQ, or if `keep` is no probability.
    """

    def __init__(self, levels: Sequence[int], keep: float = 0.5) -> None:
        super().__init__(levels, form="symmetric")
        if not 0 <= keep <= 1:
            raise ValueError(f"keep is a probability, got {keep}")
        self.keep = keep

    @override
    def forward(self, features: Float[Tensor, "b d *grid"], labels: Int[Tensor, " b"] | None = None) -> Quantized:
        quantized = super().forward(features, labels)
        if not self.training:
            return quantized
        with torch.autocast(features.device.type, enabled=False):
            # Each row of a sample shares the sample's two draws, which `quantize` could not know.
            continuous = self.positions_to_codes(self.positions(features.movedim(1, -1).float()))
            draws = torch.rand(2, len(features), *[1] * (features.ndim - 1), device=features.device)
            codes = torch.where(draws[0] < self.keep, continuous, self.lookup(quantized.indices))
            codes = torch.where(draws[1] < self.keep, codes, continuous + self.noise_like(continuous))
            codes = continuous + (codes - continuous).detach()
        return Quantized(codes.movedim(-1, 1).to(features.dtype), quantized.indices, quantized.losses)
