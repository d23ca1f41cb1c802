"""Pretrained networks that losses and metrics look through."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn


class Frozen(nn.Module):
    """A network that is only read: in evaluation mode and float32 whatever its parent does.

    It follows this module to its device but is no submodule of it. So its weights are in no state dict and no
    optimiser, DDP does not broadcast them, and casting the parent to half precision leaves them alone.

    Args:
        network: Taken over: its parameters stop requiring gradients. Gradients still flow through it to its input.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        # A module inside a tuple is not registered.
        self._hidden = (network.float().eval().requires_grad_(False),)
        self.train(False)

    @property
    def network(self) -> Any:
        """The network."""
        return self._hidden[0]

    def train(self, mode: bool = True) -> "Frozen":
        """Stay in evaluation mode whatever the parent does."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Frozen":
        super()._apply(fn, recurse)
        # Take the device of what the parent asked for, never its dtype.
        probe = next(self.network.parameters())
        self.network.to(fn(probe.new_empty(0)).device)
        return self


@contextmanager
def full_precision(images: Tensor) -> Iterator[None]:
    """Leave autocast on the device of `images`."""
    with torch.autocast(images.device.type, enabled=False):
        yield


def rgb_frames(images: Float[Tensor, "b c *size"]) -> Float[Tensor, "n 3 h w"]:
    """What a network for RGB images sees of images or videos in [-1, 1].

    Args:
        images: ``(b c H W)``, or videos ``(b c T H W)``, whose frames become images: ``n = b * T``. One channel is
            repeated to three; four channels are RGB and alpha, composited over white.

    Raises:
        ValueError: If the shape is another.
    """
    if images.ndim == 5:
        images = rearrange(images, "b c t h w -> (b t) c h w")
    if images.ndim != 4 or images.shape[1] not in (1, 3, 4):
        raise ValueError(
            "a network for RGB images sees images (b, c, H, W) or videos (b, c, T, H, W) with c = 1, 3 or 4, got "
            f"{tuple(images.shape)}: set the weights of lpips, gram and such terms to 0"
        )
    if images.shape[1] == 4:
        colour, alpha = images[:, :3], (images[:, 3:] + 1) / 2
        return colour * alpha + (1 - alpha)
    return images.expand(-1, 3, -1, -1)
