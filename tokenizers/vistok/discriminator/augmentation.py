"""Differentiable augmentation of what a discriminator sees.

S. Zhao et al.: Differentiable Augmentation for Data-Efficient GAN Training, https://arxiv.org/abs/2006.10738.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Augmentation = Callable[[Float[Tensor, "b c *size"]], Float[Tensor, "b c *size"]]

AUGMENTATIONS = ("color", "translation", "cutout")
TRANSLATION = 1 / 8  # largest shift, as a share of the side
CUTOUT = 1 / 2  # side of the square that is blanked, as a share of the side


def draw_augmentation(kinds: Sequence[str], images: Float[Tensor, "b c *size"]) -> Augmentation:
    """Draw one random augmentation per image and return the function that applies them.

    It applies to any batch of that shape, so that images and their reconstructions are treated alike, and all frames of
    a video are. It is differentiable, twice too.

    Args:
        kinds: Any of ``color``, ``translation`` and ``cutout``, applied in this order whatever theirs; none of them
            gives the identity.
        images: ``(b c H W)`` or ``(b c T H W)``; only shape and device matter.
    """
    batch, device, sizes = len(images), images.device, (images.shape[-2], images.shape[-1])

    def draw(low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (batch,), device=device)

    steps: list[Augmentation] = []
    if "color" in kinds:
        brightness, saturation, contrast = torch.rand(3, batch, device=device)
        steps.append(lambda images: change_color(images, brightness - 0.5, 2 * saturation, contrast + 0.5))
    if "translation" in kinds:
        down, right = (draw(-round(size * TRANSLATION), round(size * TRANSLATION)) for size in sizes)
        steps.append(lambda images: shift(shift(images, down, -2), right, -1))
    if "cutout" in kinds:
        sides = [round(size * CUTOUT) for size in sizes]
        # The square may reach over the border: otherwise it would lie over the centre most often.
        top, left = (draw(-(side // 2), size - (side + 1) // 2) for side, size in zip(sides, sizes, strict=True))
        rows, columns = (
            _within(start, side, size) for start, side, size in zip((top, left), sides, sizes, strict=True)
        )
        blank = rows[:, :, None] & columns[:, None, :]
        steps.append(lambda images: images * ~blank.view(batch, *(1,) * (images.ndim - 3), *sizes))

    def apply(images: Float[Tensor, "b c *size"]) -> Float[Tensor, "b c *size"]:
        for step in steps:
            images = step(images)
        return images

    return apply


def change_color(
    images: Float[Tensor, "b c *size"],
    brightness: Float[Tensor, " b"],
    saturation: Float[Tensor, " b"],
    contrast: Float[Tensor, " b"],
) -> Float[Tensor, "b c *size"]:
    """Add `brightness`, then multiply the distance from grey by `saturation` and that from the mean by `contrast`."""
    shape = (-1, *(1,) * (images.ndim - 1))
    images = images + brightness.view(shape)
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * saturation.view(shape)
    mean = images.mean(tuple(range(1, images.ndim)), keepdim=True)
    return mean + (images - mean) * contrast.view(shape)


def shift(images: Float[Tensor, "b c *size"], by: Int[Tensor, " b"], axis: int) -> Float[Tensor, "b c *size"]:
    """Move each image along an axis by a number of pixels of its own; what enters is zero."""
    size = images.shape[axis]
    shape = [len(images), *(1,) * (images.ndim - 1)]
    shape[axis] = size
    source = torch.arange(size, device=images.device) - by[:, None]
    inside = (source >= 0) & (source < size)
    index = source.clamp(0, size - 1).view(shape).expand_as(images)
    return images.gather(axis, index) * inside.view(shape)


def _within(start: Int[Tensor, " b"], side: int, size: int) -> Bool[Tensor, "b size"]:
    offset = torch.arange(size, device=start.device) - start[:, None]
    return (offset >= 0) & (offset < side)
