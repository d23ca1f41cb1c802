"""How a reconstruction is compared with its image."""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vistok.loss.lpips import LPIPS


class ReconstructionLoss(nn.Module):
    """Pixel losses and LPIPS; a term of weight zero is not computed.

    Args:
        l1: Weight of the mean absolute error of images in [-1, 1].
        l2: Weight of the mean squared error of images in [-1, 1].
        lpips: Weight of LPIPS (VGG), https://arxiv.org/abs/1801.03924. Needs its weights, see `vistok.loss.LPIPS`.
        lpips_weights: Folder of the LPIPS weights; by default that of the environment variable VISTOK_WEIGHTS.

    Raises:
        ValueError: If a weight is negative or all are zero.
    """

    def __init__(
        self, l1: float = 0.0, l2: float = 1.0, lpips: float = 0.0, lpips_weights: str | Path | None = None
    ) -> None:
        super().__init__()
        weights = {"l1": l1, "l2": l2, "lpips": lpips}
        if min(weights.values()) < 0 or not any(weights.values()):
            raise ValueError(f"loss weights must not be negative and one must be positive, got {weights}")
        self.weights = {name: weight for name, weight in weights.items() if weight}
        if lpips_weights is not None and not lpips:
            raise ValueError("lpips_weights has no effect while lpips is 0: set loss.lpips=1")
        self.lpips = LPIPS("vgg", weights=lpips_weights) if lpips else None

    def forward(
        self, reconstructions: Float[Tensor, "b c *size"], images: Float[Tensor, "b c *size"]
    ) -> dict[str, Float[Tensor, ""]]:
        """Unweighted terms with a positive weight, in float32, means over the batch."""
        return dict(self._terms(reconstructions.float(), images.float()))

    def _terms(self, reconstructions: Tensor, images: Tensor) -> Iterator[tuple[str, Tensor]]:
        if "l1" in self.weights:
            yield "l1", F.l1_loss(reconstructions, images)
        if "l2" in self.weights:
            yield "l2", F.mse_loss(reconstructions, images)
        if self.lpips is not None:
            yield "lpips", torch.mean(self.lpips(reconstructions, images))
