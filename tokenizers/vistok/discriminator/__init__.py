"""Discriminators: networks that learn to tell images from reconstructions."""

from vistok.discriminator.augmentation import AUGMENTATIONS, draw_augmentation
from vistok.discriminator.base import Discriminator
from vistok.discriminator.dino import DINODiscriminator
from vistok.discriminator.patch import PatchDiscriminator, VideoPatchDiscriminator
from vistok.discriminator.stylegan import StyleGANDiscriminator

__all__ = [
    "AUGMENTATIONS",
    "DINODiscriminator",
    "Discriminator",
    "PatchDiscriminator",
    "StyleGANDiscriminator",
    "VideoPatchDiscriminator",
    "draw_augmentation",
]
