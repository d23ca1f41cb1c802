"""Losses between images and reconstructions."""

from vistok.loss.lpips import LPIPS
from vistok.loss.reconstruction import ReconstructionLoss

__all__ = ["LPIPS", "ReconstructionLoss"]
