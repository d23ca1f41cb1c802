"""How a reconstruction is compared with its image."""

from collections.abc import Callable, Container, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vistok.loss.frozen import full_precision, rgb_frames
from vistok.loss.lpips import LPIPS, LPIPSTrunk
from vistok.loss.perceptual import gram_distance
from vistok.loss.pixel import LogitLaplace, focal_frequency, wavelet
from vistok.loss.term import Term
from vistok.tokenizer import Reconstruction, Tokenizer


class ReconstructionLoss(nn.Module):
    """Weighted losses by name; one of weight zero is not computed and needs no file.

    Images are ``(b c H W)`` or ``(b c T H W)`` in [-1, 1]. LPIPS and Gram matrices see videos frame by frame, gray as
    RGB, and RGBA composited over white.

    Args:
        l1: Weight of the mean absolute error.
        l2: Weight of the mean squared error.
        huber: Weight of the Huber loss.
        huber_delta: Error from which it grows linearly; default 1, with `huber`.
        logit_laplace: Weight of the likelihood of DALL-E, see `vistok.loss.LogitLaplace`.
        focal_frequency: Weight of the focal frequency loss, see `vistok.loss.focal_frequency`.
        wavelet: Weight of the mean absolute error of Haar coefficients, see `vistok.loss.wavelet`.
        wavelet_levels: Number of times the average is split again; default 3, with `wavelet`.
        lpips: Weight of LPIPS, see `vistok.loss.LPIPS`.
        gram: Weight of the distance of Gram matrices, summed over the stages of the network of LPIPS, see
            `vistok.loss.gram_distance`.
        lpips_net: Network of `lpips` and `gram`: ``vgg``, ``alex`` or ``squeeze``; default vgg.
        lpips_weights: Where its weights are, see `vistok.loss.LPIPS`.
        terms: Further losses by name, each with its weight.

    Attributes:
        weights: Positive weights by name.
        adaptive: Caps of the adaptive weights of the terms that have one, by name.

    Raises:
        ValueError: If a weight is negative or all are zero, a setting has no effect, or a name is taken.
        WeightsNotFoundError: If a file of weights is needed and not there.
    """

    def __init__(
        self,
        l1: float = 0.0,
        l2: float = 1.0,
        huber: float = 0.0,
        huber_delta: float | None = None,
        logit_laplace: float = 0.0,
        focal_frequency: float = 0.0,
        wavelet: float = 0.0,
        wavelet_levels: int | None = None,
        lpips: float = 0.0,
        gram: float = 0.0,
        lpips_net: str | None = None,
        lpips_weights: str | Path | None = None,
        terms: Mapping[str, Term] | None = None,
    ) -> None:
        super().__init__()
        pixel = {
            "l1": l1,
            "l2": l2,
            "huber": huber,
            "logit_laplace": logit_laplace,
            "focal_frequency": focal_frequency,
            "wavelet": wavelet,
        }
        weights = {**pixel, "lpips": lpips, "gram": gram}
        terms = dict(terms or {})
        taken = sorted(set(weights) & set(terms))
        if taken:
            raise ValueError(f"terms must not be named like a loss of ReconstructionLoss: rename {', '.join(taken)}")
        weights |= {name: term.weight for name, term in terms.items()}
        if min(weights.values()) < 0 or not any(weights.values()):
            raise ValueError(f"loss weights must not be negative and one must be positive, got {weights}")
        self.weights = {name: float(weight) for name, weight in weights.items() if weight}
        for name, value, needs in (
            ("huber_delta", huber_delta, ("huber",)),
            ("wavelet_levels", wavelet_levels, ("wavelet",)),
            ("lpips_net", lpips_net, ("lpips", "gram")),
            ("lpips_weights", lpips_weights, ("lpips", "gram")),
        ):
            if value is not None and not any(weights[need] for need in needs):
                raise ValueError(f"{name} has no effect without {' or '.join(needs)}: set loss.{needs[0]}=1")
        self.huber_delta = 1.0 if huber_delta is None else huber_delta
        self.wavelet_levels = 3 if wavelet_levels is None else wavelet_levels
        if not self.huber_delta > 0 or self.wavelet_levels < 1:
            raise ValueError(
                "huber_delta must be positive and wavelet_levels at least 1, got "
                f"{self.huber_delta} and {self.wavelet_levels}"
            )
        self.image_terms = {name for name in (*pixel, "lpips", "gram") if weights[name]}
        self.logit_laplace = LogitLaplace() if logit_laplace else None
        self.lpips = LPIPS(lpips_net or "vgg", lpips_weights) if lpips else None
        self.trunk = self.lpips.trunk if self.lpips is not None else None
        if gram and self.trunk is None:
            self.trunk = LPIPSTrunk(lpips_net or "vgg", lpips_weights)
        self.terms = nn.ModuleDict(terms)
        self.adaptive = {
            name: term.max_adaptive_weight for name, term in terms.items() if term.max_adaptive_weight is not None
        }
        if len(self.adaptive) == len(self.weights):
            raise ValueError(
                f"the adaptive weight of {min(self.adaptive)} balances it with other losses, and there are none: set "
                "loss.l1=1, or max_adaptive_weight=null"
            )

    def attach(self, tokenizer: Tokenizer) -> None:
        """Build the heads of terms that depend on the tokenizer; call it once, before the optimiser is made.

        Raises:
            ValueError: If a loss does not fit the tokenizer.
        """
        if tokenizer.decoder.output == "features" and self.image_terms:
            raise ValueError(
                f"{type(tokenizer.decoder).__name__} decodes features, which {', '.join(sorted(self.image_terms))} "
                "cannot compare with images: set these weights to 0 and use a term such as FeatureDistillation"
            )
        for term in self._named_terms().values():
            term.attach(tokenizer)

    def forward(
        self, reconstruction: Reconstruction, batch: Mapping[str, Any], active: Container[str] | None = None
    ) -> dict[str, Float[Tensor, ""]]:
        """Unweighted means over the batch in float32.

        Args:
            reconstruction: What the tokenizer made of the batch.
            batch: ``images`` and what the terms need.
            active: Names of the losses to compute; default: all with a positive weight.
        """
        wanted = {name for name in self.weights if active is None or name in active}
        with full_precision(reconstruction.images):
            values = dict(self._values(wanted, reconstruction, batch))
        if self.training and values:
            first = next(iter(values))
            values[first] = values[first] + self._nothing(wanted)
        return values

    def _values(
        self, wanted: set[str], reconstruction: Reconstruction, batch: Mapping[str, Any]
    ) -> Iterator[tuple[str, Tensor]]:
        if wanted & self.image_terms:
            ours, images = reconstruction.images.float(), batch["images"].float()
            if ours.shape != images.shape:
                raise ValueError(f"images of shape {tuple(images.shape)} were decoded to {tuple(ours.shape)}")
            for name, function in self._pixel_losses().items():
                if name in wanted:
                    yield name, function(ours, images)
            if self.trunk is not None and wanted & {"lpips", "gram"}:
                with torch.no_grad():
                    theirs = self.trunk(rgb_frames(images))
                features = self.trunk(rgb_frames(ours))
                if self.lpips is not None and "lpips" in wanted:
                    yield "lpips", self.lpips.distance(features, theirs).mean()
                if "gram" in wanted:
                    distances = [gram_distance(a, b) for a, b in zip(features, theirs, strict=True)]
                    yield "gram", torch.stack(distances).sum()
        for name, term in self._named_terms().items():
            if name in wanted:
                yield name, term(reconstruction, batch)

    def _nothing(self, wanted: set[str]) -> float | Tensor:
        """Zero, with a gradient of zero for the parameters of losses that are not wanted: DDP waits for every one."""
        parts = {**self._named_terms(), "logit_laplace": self.logit_laplace}
        idle = [part for name, part in parts.items() if part is not None and name not in wanted]
        return sum(0 * p.flatten()[0] for part in idle for p in part.parameters() if p.requires_grad)

    def _pixel_losses(self) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "l1": F.l1_loss,
            "l2": F.mse_loss,
            "huber": partial(F.huber_loss, delta=self.huber_delta),
            "focal_frequency": focal_frequency,
            "wavelet": partial(wavelet, levels=self.wavelet_levels),
        }
        return losses if self.logit_laplace is None else {**losses, "logit_laplace": self.logit_laplace}

    def _named_terms(self) -> dict[str, Term]:
        return cast("dict[str, Term]", dict(self.terms.items()))
