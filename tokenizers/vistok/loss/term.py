"""Losses that `ReconstructionLoss` takes by name beside its own."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from vistok.tokenizer import Projection, Reconstruction, Tokenizer

SOURCES = ("codes", "features", "decoded")
HEADS = ("none", "linear", "mlp")


class Term(nn.Module, ABC):
    """One loss of a reconstruction, with its own networks and heads.

    Its parameters are trained with the tokenizer and are in the state dict of the training, not in that of the
    tokenizer. Frozen networks are neither, see `vistok.loss.frozen.Frozen`.

    Args:
        weight: What training multiplies the loss by; positive.

    Attributes:
        max_adaptive_weight: If not None, training multiplies the weight by a ratio of gradients besides, see
            `vistok.loss.adaptive_weight`, at most this.

    Raises:
        ValueError: If the weight is not positive. Subclasses call this constructor before they look for files.
    """

    max_adaptive_weight: float | None = None

    def __init__(self, weight: float) -> None:
        super().__init__()
        if not weight > 0:
            raise ValueError(
                f"the weight of a term must be positive, got {weight}: leave the term out instead, on the command line "
                "by ~loss.terms.NAME"
            )
        self.weight = float(weight)

    def attach(self, tokenizer: Tokenizer) -> None:
        """Build what depends on the tokenizer; called once, before the optimiser is made.

        Raises:
            ValueError: If the term does not fit the tokenizer.
        """

    @abstractmethod
    def forward(self, reconstruction: Reconstruction, batch: Mapping[str, Any]) -> Float[Tensor, ""]:
        """Mean over the batch, unweighted, float32.

        Args:
            reconstruction: What the tokenizer made of the batch.
            batch: ``images`` ``(b c *size)`` in [-1, 1], and where a term needs them ``labels`` or ``texts``.
        """


class LatentTerm(Term):
    """A term that compares what the tokenizer holds at each position of its grid with something else.

    Args:
        weight: See `Term`.
        source: ``codes`` after the quantizer (with its gradient), ``features`` before it, or ``decoded``, the output
            of a decoder that predicts features.
        channels: ``[first, last)`` of the channels of codes or features, for one branch of several; default: all.
        head: What maps them to the channels of the target: ``none``, ``linear``, or ``mlp`` with one hidden layer.
    """

    def __init__(self, weight: float, source: str, channels: Sequence[int] | None, head: str) -> None:
        super().__init__(weight)
        if source not in SOURCES:
            raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {source!r}")
        if head not in HEADS:
            raise ValueError(f"head must be one of {', '.join(HEADS)}, got {head!r}")
        if source == "decoded" and (head != "none" or channels is not None):
            raise ValueError(
                "with source=decoded the decoder's output is compared as it is: write head=none and channels=null, "
                f"got head={head} and channels={channels}"
            )
        if channels is not None and not (len(channels) == 2 and 0 <= channels[0] < channels[1]):
            raise ValueError(f"channels must be [first, last) with first < last, got {list(channels)}")
        self.source = source
        self.channels = slice(*channels) if channels is not None else slice(None)
        self.head_kind = head
        self.head: nn.Module | None = None

    @property
    @abstractmethod
    def target_dim(self) -> int:
        """Channels of what the latents are compared with."""

    def attach(self, tokenizer: Tokenizer) -> None:
        """Build the head."""
        if self.source == "decoded":
            if tokenizer.decoder.output != "features":
                raise ValueError(
                    f"source=decoded compares features, but {type(tokenizer.decoder).__name__} decodes images: choose "
                    "a decoder whose output is features, or write source=codes"
                )
            self.head = nn.Identity()
            return
        width = tokenizer.quantizer.dim
        if self.channels.stop is not None and self.channels.stop > width:
            raise ValueError(f"channels must end at or below the {width} of the quantizer, got {self.channels.stop}")
        self.head = _head(self.head_kind, len(range(width)[self.channels]), self.target_dim)

    def latents(self, reconstruction: Reconstruction) -> Float[Tensor, "b e *grid"]:
        """The chosen channels behind the head, in float32."""
        if self.head is None:
            raise ValueError(f"{type(self).__name__} has no head yet: call loss.attach(tokenizer) before training")
        chosen = {
            "codes": reconstruction.quantized.codes,
            "features": reconstruction.features,
            "decoded": reconstruction.images,
        }[self.source]
        latents = self.head(chosen[:, self.channels].float())
        if latents.shape[1] != self.target_dim:
            raise ValueError(
                f"{type(self).__name__} compares with features of {self.target_dim} channels, the decoder predicts "
                f"{latents.shape[1]}: set the decoder's number of output channels to {self.target_dim}"
            )
        return latents


def _head(kind: str, dim: int, target_dim: int) -> nn.Module:
    if kind == "linear":
        return Projection(dim, target_dim)
    if kind == "mlp":
        return nn.Sequential(Projection(dim, target_dim), nn.GELU(), Projection(target_dim, target_dim))
    if dim != target_dim:
        raise ValueError(f"head=none needs {target_dim} channels, the latents have {dim}: write head=linear")
    return nn.Identity()
