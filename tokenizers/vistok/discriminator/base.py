"""What every discriminator offers."""

from abc import ABC, abstractmethod

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vistok.config import Configurable


class Discriminator(Configurable, nn.Module, ABC):
    """Images to logits, positive where they look real.

    Attributes:
        channels: Channels of the images.
        layout: ``image`` judges every frame of a video on its own, ``video`` judges videos and takes nothing else.
    """

    channels: int
    layout: str = "image"

    def forward(self, images: Float[Tensor, "b c *size"]) -> Float[Tensor, "n *logits"]:
        """Logits of images ``(b c H W)`` or videos ``(b c T H W)`` in [-1, 1]; one or several for each.

        Raises:
            ValueError: If the images have another layout or number of channels.
        """
        if images.shape[1] != self.channels or images.ndim not in ((5,) if self.layout == "video" else (4, 5)):
            expected = "videos (b, {}, T, H, W)" if self.layout == "video" else "images (b, {}, H, W) or videos"
            raise ValueError(
                f"{type(self).__name__} takes {expected.format(self.channels)}, got {tuple(images.shape)}: choose "
                "another discriminator, or set its channels"
            )
        if self.layout == "image" and images.ndim == 5:
            images = rearrange(images, "b c t h w -> (b t) c h w")
        return self.logits(images)

    @abstractmethod
    def logits(self, images: Float[Tensor, "b c *size"]) -> Float[Tensor, "b *logits"]:
        """Logits of images, or of videos if that is the layout."""
