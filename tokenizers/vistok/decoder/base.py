"""What every decoder offers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from vistok.config import Configurable


class Decoder(Configurable, nn.Module, ABC):
    """Features to images.

    Attributes:
        dim: Channels of the features.
        channels: Channels of the images.
        factor: Pixels per feature along each spatial axis.
        output: ``images``, or ``features`` for decoders that predict those of a teacher.
    """

    dim: int
    channels: int
    factor: int
    output: str = "images"

    @abstractmethod
    def forward(
        self,
        features: Float[Tensor, "b e *grid"],
        codes: Float[Tensor, "b d *grid"] | None = None,
        size: Sequence[int] | None = None,
    ) -> Float[Tensor, "b c *size"]:
        """Images in about [-1, 1], not clamped.

        Args:
            features: Projected codes.
            codes: The codes themselves, for decoders that are modulated by them.
            size: Image size in pixels, where it does not follow from the features.
        """

    @property
    @abstractmethod
    def last_layer(self) -> Tensor:
        """Weight of the layer that produces the images."""
