"""What every encoder offers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from vistok.config import Configurable


class Encoder(Configurable, nn.Module, ABC):
    """Images to features.

    Attributes:
        dim: Channels of the features.
        channels: Channels of the images.
        factor: Pixels per feature along each spatial axis.
    """

    dim: int
    channels: int
    factor: int

    @abstractmethod
    def forward(self, images: Float[Tensor, "b c *size"]) -> Float[Tensor, "b e *grid"]:
        """Features of images in [-1, 1]."""

    def grid(self, size: Sequence[int]) -> tuple[int, ...]:
        """Shape of the feature grid of an image of `size` pixels.

        Raises:
            ValueError: If a side is not a positive multiple of `factor`.
        """
        size = tuple(size)
        if len(size) != 2:
            raise ValueError(f"{type(self).__name__} takes images of size (H, W), got {size}")
        if any(side <= 0 or side % self.factor for side in size):
            below = tuple(max(side // self.factor, 1) * self.factor for side in size)
            above = tuple(-(-side // self.factor) * self.factor for side in size)
            raise ValueError(
                f"image size must be a multiple of {self.factor} pixels, got {size[0]}x{size[1]}: "
                f"crop to {below[0]}x{below[1]} or resize to {above[0]}x{above[1]}"
            )
        return tuple(side // self.factor for side in size)
