"""Continuous baselines: what a tokenizer does without quantization.

Identity is the plain autoencoder. KL is the variational autoencoder of D. P. Kingma, M. Welling: Auto-Encoding
Variational Bayes, https://arxiv.org/abs/1312.6114 (appendix B), with the settings of R. Rombach et al.: High-Resolution
Image Synthesis with Latent Diffusion Models (LDM), https://arxiv.org/abs/2112.10752 (appendix G).
"""

import math
from typing import NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import override

from vistok.quantizer.base import PositionwiseQuantizer, Quantized


class ContinuousQuantizer(PositionwiseQuantizer):
    """Base of the baselines: codes of unlimited precision, for which there are no integers.

    Args:
        dim: Channels.

    Raises:
        ValueError: If `dim` is not a positive integer.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if type(dim) is not int or dim < 1:
            raise ValueError(f"dim must be an integer of at least 1, got {dim!r}")
        self.dim = dim
        self.codebook_sizes = ()
        self.bits = math.inf
        self.loss_weights = {}

    @override
    def lookup(self, indices: Int[Tensor, "..."]) -> NoReturn:
        self._refuse_indices()

    @override
    def invert(self, codes: Float[Tensor, "... d"]) -> NoReturn:
        self._refuse_indices()

    def _refuse_indices(self) -> NoReturn:
        raise ValueError(f"{type(self).__name__} is continuous, it has no indices: use its codes")

    def extra_repr(self) -> str:
        """One line for ``print(quantizer)``."""
        return f"dim={self.dim}, continuous"


class Identity(ContinuousQuantizer):
    """Return the features as they are: the upper bound of what any quantizer of the same model can reach."""

    @override
    def quantize(
        self, rows: Float[Tensor, "n d"]
    ) -> tuple[Float[Tensor, "n d"], Int[Tensor, "n 0"], dict[str, Tensor]]:
        return rows, no_indices(rows), {}


class KL(ContinuousQuantizer):
    """Diagonal Gaussian around the features, kept near N(0, 1) by a KL term.

    The mean is the features, the log-variance a learned linear map of them (a 1x1 convolution), clamped to [-30, 20].
    LDM maps its encoder's output to both at once; here the encoder's own last layer gives the mean. Codes are a sample
    in training, drawn from the global generator, and the mean in evaluation.

    The loss ``kl`` follows LDM: summed over channels and positions, averaged over the samples of the batch. Its weight
    balances it against the reconstruction loss, which LDM sums over the pixels too: with a mean over the pixels, as
    here and in 1d-tokenizer, a weight of 1e-6 pulls ``3 H W`` times harder (2e5 at 256 x 256 pixels) than LDM's 1e-6.

    Args:
        dim: Channels.
        kl_weight: Weight of the KL term.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, dim: int, kl_weight: float = 1e-6) -> None:
        super().__init__(dim)
        if not kl_weight >= 0:
            raise ValueError(f"kl_weight must not be negative, got {kl_weight}")
        if kl_weight:
            self.loss_weights = {"kl": kl_weight}
        self.log_variance = nn.Linear(dim, dim)

    @override
    def forward(self, features: Float[Tensor, "b d *grid"], labels: Int[Tensor, " b"] | None = None) -> Quantized:
        codes, indices, losses = super().forward(features, labels)
        # Rows do not know how many of them are one sample.
        positions = math.prod(features.shape[2:])
        return Quantized(codes, indices, {name: loss * positions for name, loss in losses.items()})

    @override
    def quantize(
        self, rows: Float[Tensor, "n d"]
    ) -> tuple[Float[Tensor, "n d"], Int[Tensor, "n 0"], dict[str, Tensor]]:
        log_variance = self.log_variance(rows).clamp(-30, 20)
        losses = {}
        if "kl" in self.loss_weights:
            losses["kl"] = (rows.square() + log_variance.exp() - 1 - log_variance).sum(-1).mean() / 2
        codes = rows
        if self.training:
            codes = rows + torch.exp(log_variance / 2) * torch.randn_like(rows)
        return codes, no_indices(rows), losses


def no_indices(rows: Float[Tensor, "n d"]) -> Int[Tensor, "n 0"]:
    """The integers of rows that have none."""
    return torch.empty(len(rows), 0, dtype=torch.int64, device=rows.device)
