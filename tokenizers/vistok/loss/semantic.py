"""Terms that teach latents or decoders what a frozen vision model sees."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vistok.loss.backbone import FrozenBackbone
from vistok.loss.perceptual import cosine_distance
from vistok.loss.term import LatentTerm
from vistok.tokenizer import Reconstruction, Tokenizer


class _DenseTerm(LatentTerm):
    """Compares each position with a teacher's features of the same place."""

    def __init__(
        self,
        model: str,
        weight: float,
        source: str,
        channels: Sequence[int] | None,
        head: str,
        level: int | None,
        pretrained: str | Path | None,
        size: int | None,
    ) -> None:
        super().__init__(weight, source, channels, head)
        self.teacher = FrozenBackbone(model, pretrained, size)
        self.level = level
        side = size or 224
        with torch.no_grad():
            self._target_dim = self.teacher.dense(torch.zeros(1, 3, side, side), level).shape[1]

    @property
    def target_dim(self) -> int:
        return self._target_dim

    def forward(self, reconstruction: Reconstruction, batch: Mapping[str, Any]) -> Float[Tensor, ""]:
        """Mean over positions; no gradient reaches the teacher."""
        latents = self.latents(reconstruction)
        with torch.no_grad():
            targets = self._targets(batch["images"], latents.shape[2:])
        return self.compare(latents, targets)

    @abstractmethod
    def compare(self, latents: Float[Tensor, "b e *grid"], targets: Float[Tensor, "b e *grid"]) -> Float[Tensor, ""]:
        """The loss of latents behind the head and the teacher's features."""

    def _targets(self, images: Tensor, grid: Sequence[int]) -> Tensor:
        targets = self.teacher.dense(images, self.level)
        if images.ndim == 5:
            targets = rearrange(targets, "(b t) e h w -> b e t h w", b=len(images))
        if len(grid) == 1 and targets[0, 0].numel() == grid[0]:
            return targets.flatten(2)
        if len(grid) != targets.ndim - 2:
            raise ValueError(
                f"{type(self).__name__} compares position by position: the teacher has a grid of "
                f"{tuple(targets.shape[2:])}, the tokenizer {tuple(grid)}. Use FeatureContrast for tokens without "
                "positions"
            )
        return F.interpolate(targets, size=tuple(grid), mode="area")


class FeatureDistillation(_DenseTerm):
    """Predict a frozen model's features: one minus the cosine at each position.

    With ``source=decoded`` the decoder predicts them: VQ-KD (BEiT v2, https://arxiv.org/abs/2208.06366), VFMTok
    (https://arxiv.org/abs/2507.08441). With ``source=codes`` and a head, codes or one branch of them do: TokenFlow
    (https://arxiv.org/abs/2412.03069). Where the grids differ, the teacher's features are averaged over the area of
    each position.

    Args:
        model: Teacher, a name in timm such as ``vit_base_patch16_clip_224.openai``.
        weight: See `vistok.loss.Term`.
        source: See `vistok.loss.LatentTerm`.
        channels: See `vistok.loss.LatentTerm`.
        head: See `vistok.loss.LatentTerm`.
        level: Stage (block of a transformer) of the teacher, negative from the end; None for the last one behind the
            teacher's classifier, which of CLIP is its projection.
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
        source: str = "decoded",
        channels: Sequence[int] | None = None,
        head: str = "none",
        level: int | None = -1,
        pretrained: str | Path | None = None,
        size: int | None = 224,
    ) -> None:
        super().__init__(model, weight, source, channels, head, level, pretrained, size)

    def compare(self, latents: Float[Tensor, "b e *grid"], targets: Float[Tensor, "b e *grid"]) -> Float[Tensor, ""]:
        """One minus the cosine."""
        return cosine_distance(latents, targets)


class LatentAlignment(_DenseTerm):
    """Align latents with a frozen model: cosine at each position, and cosines between positions, both with a margin.

    J. Yao et al.: Reconstruction vs. Generation (VA-VAE), https://arxiv.org/abs/2501.01423: marginal cosine
    similarity loss and marginal distance matrix similarity loss.

    Args:
        model: Teacher, a name in timm such as ``vit_large_patch14_dinov2.lvd142m``.
        weight: See `vistok.loss.Term`.
        cosine_weight: Weight of ``relu(1 - cosine_margin - cos(head(latent), feature))``.
        cosine_margin: Distance that is free.
        distance_weight: Weight of ``relu(|cos(latent_i, latent_j) - cos(feature_i, feature_j)| - distance_margin)``,
            mean over pairs of positions of one image.
        distance_margin: Difference that is free.
        max_adaptive_weight: None leaves `weight` fixed. A number multiplies it by the ratio of the norms of two
            gradients at the projection to codes, that of the other reconstruction terms and that of this term, and
            caps this ratio; the paper's has no cap in effect.
        source: See `vistok.loss.LatentTerm`.
        channels: See `vistok.loss.LatentTerm`.
        head: See `vistok.loss.LatentTerm`; both parts see the latents behind it.
        level: Stage (block of a transformer) of the teacher, negative from the end; None for the last one behind the
            teacher's classifier, which of CLIP is its projection.
        pretrained: See `vistok.loss.FrozenBackbone`.
        size: See `vistok.loss.FrozenBackbone`.

    Raises:
        ValueError: If an argument is unknown, out of range, or has no effect.
        WeightsNotFoundError: If there are no weights.
    """

    def __init__(
        self,
        model: str,
        weight: float = 0.1,
        cosine_weight: float = 1.0,
        cosine_margin: float = 0.5,
        distance_weight: float = 1.0,
        distance_margin: float = 0.25,
        max_adaptive_weight: float | None = None,
        source: str = "codes",
        channels: Sequence[int] | None = None,
        head: str = "linear",
        level: int | None = -1,
        pretrained: str | Path | None = None,
        size: int | None = 224,
    ) -> None:
        if min(cosine_weight, distance_weight) < 0 or not cosine_weight + distance_weight:
            raise ValueError(
                "cosine_weight and distance_weight must not be negative and one must be positive, got "
                f"{cosine_weight} and {distance_weight}"
            )
        if max_adaptive_weight is not None and (max_adaptive_weight <= 0 or source == "decoded"):
            raise ValueError(
                "max_adaptive_weight must be positive and needs source=codes or features, or write null for a fixed "
                f"weight; got {max_adaptive_weight} and source={source}"
            )
        super().__init__(model, weight, source, channels, head, level, pretrained, size)
        self.max_adaptive_weight = max_adaptive_weight
        self.cosine_weight, self.cosine_margin = cosine_weight, cosine_margin
        self.distance_weight, self.distance_margin = distance_weight, distance_margin

    def attach(self, tokenizer: Tokenizer) -> None:
        """Build the head; refuse an adaptive weight where there is no projection to measure it at."""
        if self.max_adaptive_weight is not None and isinstance(tokenizer.to_codes, nn.Identity):
            raise ValueError(
                "max_adaptive_weight is measured at the projection to codes, which projection=none leaves out: write "
                "projection=linear, or max_adaptive_weight=null for a fixed weight"
            )
        super().attach(tokenizer)

    def compare(self, latents: Float[Tensor, "b e *grid"], targets: Float[Tensor, "b e *grid"]) -> Float[Tensor, ""]:
        """Weighted sum of both parts."""
        ours, theirs = (F.normalize(features.flatten(2), dim=1) for features in (latents, targets))
        total = latents.new_zeros(())
        if self.cosine_weight:
            cosines = (ours * theirs).sum(1)
            total = total + self.cosine_weight * F.relu(1 - self.cosine_margin - cosines).mean()
        if self.distance_weight:
            difference = (ours.mT @ ours - theirs.mT @ theirs).abs()
            total = total + self.distance_weight * F.relu(difference - self.distance_margin).mean()
        return total
