"""Terms that tell images of a batch apart by what a vision model or a text says about them."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vistok import distributed
from vistok.loss.backbone import FrozenBackbone
from vistok.loss.frozen import Frozen
from vistok.loss.term import LatentTerm
from vistok.tokenizer import Reconstruction

# The largest factor of the cosines, as in CLIP.
MAX_SCALE = 100.0


def info_nce(
    ours: Float[Tensor, "b e"], theirs: Float[Tensor, "b e"], scale: Float[Tensor, ""] | float, gather: bool
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE of pairs: cross-entropy of finding the partner by the scaled cosine, both ways.

    A. van den Oord et al.: Representation Learning with Contrastive Predictive Coding,
    https://arxiv.org/abs/1807.03748; symmetric as in CLIP, https://arxiv.org/abs/2103.00020.

    Args:
        ours: Row i belongs to row i of `theirs`; neither need have unit length.
        theirs: Likewise.
        scale: What multiplies the cosines, the inverse temperature.
        gather: Also tell the rows apart from those of the other ranks: the value is that of the joined batch, and its
            gradient becomes that of the joined batch by DDP's averaging. Every rank has to call it.
    """
    pairs = torch.cat([F.normalize(ours, dim=1), F.normalize(theirs, dim=1)], dim=1)
    everyone, first = distributed.gather_rows(pairs) if gather else (pairs, 0)
    (ours, theirs), (all_ours, all_theirs) = pairs.chunk(2, dim=1), everyone.chunk(2, dim=1)
    partners = torch.arange(first, first + len(pairs), device=pairs.device)
    forth = F.cross_entropy(scale * ours @ all_theirs.T, partners)
    back = F.cross_entropy(scale * theirs @ all_ours.T, partners)
    mean = (forth + back) / 2
    return distributed.mean_over_ranks(mean, len(pairs)) if gather else mean


class _ContrastiveTerm(LatentTerm):
    """InfoNCE between latents, averaged over the grid behind the head, and another description of the image.

    In training the images of all ranks are told apart, in evaluation those of one.
    """

    def __init__(
        self,
        weight: float,
        source: str,
        channels: Sequence[int] | None,
        head: str,
        temperature: float,
        learn_temperature: bool,
    ) -> None:
        super().__init__(weight, source, channels, head)
        if not temperature >= 1 / MAX_SCALE:
            raise ValueError(f"temperature must be at least {1 / MAX_SCALE}, got {temperature}")
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)), requires_grad=learn_temperature)

    def forward(self, reconstruction: Reconstruction, batch: Mapping[str, Any]) -> Float[Tensor, ""]:
        """Mean over the batch, of all ranks in training."""
        images = self.latents(reconstruction).flatten(2).mean(2)
        scale = self.log_scale.exp().clamp(max=MAX_SCALE)
        return info_nce(images, self.targets(batch).float(), scale, gather=self.training)

    @abstractmethod
    def targets(self, batch: Mapping[str, Any]) -> Float[Tensor, "b e"]:
        """The other description of each image."""


class FeatureContrast(_ContrastiveTerm):
    """Tell images apart by the pooled features of a frozen vision model.

    ImageFolder, https://arxiv.org/abs/2410.01756 (last branch, DINOv2, weight 0.1); FQGAN,
    https://arxiv.org/abs/2411.16681 (each semantic branch, weight 0.5, ``temperature=1``, fixed; the paper's head is a
    transformer and its loss goes one way only).

    Args:
        model: Teacher, a name in timm such as ``vit_small_patch14_dinov2.lvd142m``.
        weight: See `vistok.loss.Term`.
        source: See `vistok.loss.LatentTerm`.
        channels: See `vistok.loss.LatentTerm`.
        head: See `vistok.loss.LatentTerm`.
        temperature: Divides the cosines; the start value if it is learned.
        learn_temperature: Train the temperature, down to 0.01.
        pretrained: See `vistok.loss.FrozenBackbone`.
        size: See `vistok.loss.FrozenBackbone`.

    Raises:
        ValueError: If an argument is unknown or out of range.
        WeightsNotFoundError: If there are no weights.
    """

    def __init__(
        self,
        model: str,
        weight: float = 0.1,
        source: str = "codes",
        channels: Sequence[int] | None = None,
        head: str = "linear",
        temperature: float = 0.07,
        learn_temperature: bool = True,
        pretrained: str | Path | None = None,
        size: int | None = 224,
    ) -> None:
        super().__init__(weight, source, channels, head, temperature, learn_temperature)
        self.teacher = FrozenBackbone(model, pretrained, size)
        side = size or 224
        with torch.no_grad():
            self._target_dim = self.teacher.embedding(torch.zeros(1, 3, side, side)).shape[1]

    @property
    def target_dim(self) -> int:
        """Channels of the teacher."""
        return self._target_dim

    def targets(self, batch: Mapping[str, Any]) -> Float[Tensor, "b e"]:
        """Pooled features of the teacher, of videos their mean over frames; no gradient reaches it."""
        with torch.no_grad():
            return self.teacher.embedding(batch["images"]).unflatten(0, (len(batch["images"]), -1)).mean(1)


class TextContrast(_ContrastiveTerm):
    """Tell images apart by their texts: the image-text contrast of CLIP on quantized latents.

    Y. Zhao et al.: QLIP, https://arxiv.org/abs/2502.05178. The batch needs ``texts``, one string for each image.

    Args:
        text_encoder: ``text_encoder(texts) -> (b dim)`` of a sequence of strings, with an attribute ``dim``:
            `vistok.loss.OpenCLIPText`, `vistok.loss.TransformersText`, or any module of that form, tokenizer included.
        weight: See `vistok.loss.Term`.
        train_text: Train the text encoder too. Otherwise it is frozen and in no state dict.
        source: See `vistok.loss.LatentTerm`.
        channels: See `vistok.loss.LatentTerm`.
        head: See `vistok.loss.LatentTerm`.
        temperature: Divides the cosines; the start value if it is learned.
        learn_temperature: Train the temperature, down to 0.01.

    Raises:
        ValueError: If an argument is unknown or out of range.
    """

    def __init__(
        self,
        text_encoder: nn.Module,
        weight: float = 1.0,
        train_text: bool = False,
        source: str = "codes",
        channels: Sequence[int] | None = None,
        head: str = "linear",
        temperature: float = 0.07,
        learn_temperature: bool = True,
    ) -> None:
        super().__init__(weight, source, channels, head, temperature, learn_temperature)
        dim = getattr(text_encoder, "dim", None)
        if not isinstance(dim, int):
            raise ValueError(
                f"{type(text_encoder).__name__} has no integer attribute dim: give it one, the width of its embeddings"
            )
        self._target_dim = dim
        self.text = text_encoder if train_text else Frozen(text_encoder)

    @property
    def target_dim(self) -> int:
        """Channels of the text encoder."""
        return self._target_dim

    def targets(self, batch: Mapping[str, Any]) -> Float[Tensor, "b e"]:
        """Embeddings of the texts.

        Raises:
            ValueError: If the batch has no texts, or not one for each image.
        """
        texts, count = batch.get("texts"), len(batch["images"])
        if texts is None or len(texts) != count:
            raise ValueError(
                f"TextContrast needs one text for each of the {count} images of a batch, got "
                f"{'none' if texts is None else len(texts)}: choose data with texts, or remove the term by "
                "~loss.terms.NAME"
            )
        if isinstance(self.text, Frozen):
            with torch.no_grad():
                return self.text.network(list(texts))
        return self.text(list(texts))
