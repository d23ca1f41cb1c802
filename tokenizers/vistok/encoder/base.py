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
        layout: ``image`` for features ``(b e h w)`` of images ``(b c H W)``; ``sequence`` for features ``(b e n)`` of
            images; ``video`` for features ``(b e t h w)`` of videos ``(b c T H W)``, and ``(b e h w)`` of images, which
            are the first frames of videos.
        time_factor: Frames per feature after the first frame, for ``video``.
    """

    dim: int
    channels: int
    factor: int
    layout: str = "image"
    time_factor: int = 1

    @abstractmethod
    def forward(self, images: Float[Tensor, "b c *size"]) -> Float[Tensor, "b e *grid"]:
        """Features of images in [-1, 1]."""

    def grid(self, size: Sequence[int]) -> tuple[int, ...]:
        """Shape of the feature grid of an image of `size` pixels ``(H, W)`` or a video ``(T, H, W)``.

        Raises:
            ValueError: If a side is not a positive multiple of `factor`, or the frames after the first are not a
                multiple of `time_factor`.
        """
        *frames, height, width = self._checked_size(size)
        return *(1 + (count - 1) // self.time_factor for count in frames), height // self.factor, width // self.factor

    def _checked_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """`size` as a tuple, if it is allowed."""
        size = tuple(size)
        if len(size) != 2 and not (self.layout == "video" and len(size) == 3):
            allowed = "(H, W) or videos of size (T, H, W)" if self.layout == "video" else "(H, W)"
            raise ValueError(f"{type(self).__name__} takes images of size {allowed}, got {size}")
        *frames, height, width = size
        if any(side <= 0 or side % self.factor for side in (height, width)):
            below = tuple(max(side // self.factor, 1) * self.factor for side in (height, width))
            above = tuple(-(-side // self.factor) * self.factor for side in (height, width))
            raise ValueError(
                f"image size must be a multiple of {self.factor} pixels, got {height}x{width}: "
                f"crop to {below[0]}x{below[1]} or resize to {above[0]}x{above[1]}"
            )
        if any(count < 1 or (count - 1) % self.time_factor for count in frames):
            below = max(frames[0] - 1, 0) // self.time_factor * self.time_factor + 1
            raise ValueError(
                f"a video must have one frame more than a multiple of {self.time_factor}, got {frames[0]}: "
                f"cut it to {below} frames or extend it to {below + self.time_factor}"
            )
        return size
