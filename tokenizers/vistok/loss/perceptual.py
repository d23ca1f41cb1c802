"""Distances between features of a frozen network."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vistok.loss.backbone import FrozenBackbone
from vistok.loss.term import Term
from vistok.tokenizer import Reconstruction


def cosine_distance(ours: Float[Tensor, "b e *grid"], theirs: Float[Tensor, "b e *grid"]) -> Float[Tensor, ""]:
    """One minus the cosine between the channels of each position, mean over positions."""
    return 1 - F.cosine_similarity(ours, theirs, dim=1).mean()


def gram_distance(ours: Float[Tensor, "b e *grid"], theirs: Float[Tensor, "b e *grid"]) -> Float[Tensor, ""]:
    """Squared Frobenius distance of Gram matrices over channels times positions, mean over the batch: texture.

    J. Johnson et al.: Perceptual Losses for Real-Time Style Transfer and Super-Resolution,
    https://arxiv.org/abs/1603.08155, equations 3 and 4.
    """

    def gram(features: Tensor) -> Tensor:
        rows = features.flatten(2)
        return rows @ rows.mT / rows[0].numel()

    return (gram(ours) - gram(theirs)).square().sum((1, 2)).mean()


DISTANCES = {"l1": F.l1_loss, "l2": F.mse_loss, "cosine": cosine_distance, "gram": gram_distance}


class PerceptualLoss(Term):
    """Distance between what a network of timm makes of the reconstruction and of the image.

    Logits of a ConvNeXt (TiTok, https://arxiv.org/abs/2406.07550) or a ResNet-50 (MaskBit,
    https://arxiv.org/abs/2409.16211), both with ``distance=l2``; or features of any levels.

    Args:
        model: Name in timm, such as ``convnext_small.fb_in1k``.
        weight: See `vistok.loss.Term`.
        levels: Stages (blocks of a transformer) whose features are compared, negative ones from the end; the distance
            is the mean over them. None compares the logits.
        distance: ``l1``, ``l2``, ``cosine`` or ``gram``.
        pretrained: See `vistok.loss.FrozenBackbone`.
        size: See `vistok.loss.FrozenBackbone`.

    Raises:
        ValueError: If an argument is unknown or out of range.
        WeightsNotFoundError: If there are no weights.
    """

    def __init__(
        self,
        model: str,
        weight: float = 1.0,
        levels: Sequence[int] | None = None,
        distance: str = "l2",
        pretrained: str | Path | None = None,
        size: int | None = 224,
    ) -> None:
        super().__init__(weight)
        if distance not in DISTANCES:
            raise ValueError(f"distance must be one of {', '.join(DISTANCES)}, got {distance!r}")
        if levels is None and distance == "gram":
            raise ValueError("distance=gram compares features, not logits: write levels=[-1]")
        if levels is not None and not levels:
            raise ValueError("levels must name at least one level, got []: write levels=[-1], or null for the logits")
        self.backbone = FrozenBackbone(model, pretrained, size)
        self.levels = None if levels is None else list(levels)
        self.distance = DISTANCES[distance]

    def forward(self, reconstruction: Reconstruction, batch: Mapping[str, Any]) -> Float[Tensor, ""]:
        """Mean over levels; the gradient reaches the reconstruction only."""
        with torch.no_grad():
            theirs = self._features(batch["images"])
        ours = self._features(reconstruction.images)
        return torch.stack([self.distance(a, b) for a, b in zip(ours, theirs, strict=True)]).mean()

    def _features(self, images: Tensor) -> list[Tensor]:
        if self.levels is None:
            return [self.backbone.embedding(images, logits=True)]
        return self.backbone.levels(images, self.levels)
