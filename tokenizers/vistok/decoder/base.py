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
        layout: Of the features, as for `vistok.encoder.Encoder`: ``image``, ``sequence`` or ``video``.
        time_factor: Frames per feature after the first frame, for ``video``.
        text_dim: Channels of the features ``(b length text_dim)`` that it takes as ``texts=``; None: it takes none.
        output: ``images``, or ``features`` for decoders that predict those of a teacher.
    """

    dim: int
    channels: int
    factor: int
    layout: str = "image"
    time_factor: int = 1
    text_dim: int | None = None
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

    def set_code_dim(self, code_dim: int) -> None:
        """Tell a decoder that is modulated by the codes how many channels they have.

        `Tokenizer` calls it once, when it puts the parts together; layers that depend on it are built then.
        """

    def check_texts(self, texts: Tensor | None) -> None:
        """Raise a ValueError if there are no text features although they are needed, or the other way round."""
        if self.text_dim is None and texts is not None:
            raise ValueError(f"{type(self).__name__} takes no texts: leave out texts=")
        if self.text_dim is not None and (texts is None or texts.ndim != 3 or texts.shape[2] != self.text_dim):
            raise ValueError(
                f"{type(self).__name__} decodes with the help of a text: pass its features as texts=(b, length, "
                f"{self.text_dim}), got {None if texts is None else tuple(texts.shape)}"
            )

    def image_size(self, grid: Sequence[int], size: Sequence[int] | None = None) -> tuple[int, ...]:
        """Size in pixels that features of shape `grid` decode to.

        Raises:
            ValueError: If `size` is given and is another, or the grid has another number of axes.
        """
        if len(grid) != 2 and not (self.layout == "video" and len(grid) == 3):
            axes = "(b, e, t, h, w) or (b, e, h, w)" if self.layout == "video" else "(b, e, h, w)"
            raise ValueError(f"{type(self).__name__} takes features {axes}, got a grid {tuple(grid)}")
        *frames, height, width = grid
        expected = *((count - 1) * self.time_factor + 1 for count in frames), height * self.factor, width * self.factor
        if size is not None and tuple(size) != expected:
            raise ValueError(f"a grid of {tuple(grid)} decodes to {expected} pixels, not to {tuple(size)}")
        return expected

    @property
    @abstractmethod
    def last_layer(self) -> Tensor:
        """Weight of the layer that produces the images."""
