"""Everything that compares reconstructions with their originals, accumulated over a stream of images of one shape."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vistok.evaluation.examples import Extremes
from vistok.evaluation.references import References
from vistok.loss.lpips import LPIPS
from vistok.metric.image import MS_SSIM_MIN_SIDE, SSIM_MIN_SIDE, from_uint8, l1, ms_ssim, psnr, ssim, to_uint8
from vistok.metric.precision import full_float32
from vistok.metric.rfid import RFID
from vistok.metric.weights import WeightsNotFoundError

IMAGE_METRICS = ("psnr", "ssim", "ms_ssim", "l1", "lpips")


class ImageMeasures:
    """Image metrics, rFID, references and examples.

    Args:
        shape: ``(c, H, W)`` of an image.
        device: Where the images are.
        lpips: ``vgg``, ``alex`` or None.
        rfid: Whether to compute rFID.
        weights: Folder of the networks' weights.
        references: Trivial codecs to measure beside, or None.
        examples: How many worst and best images to keep.

    Attributes:
        missing: Metrics that are not measured, and why.
        per_image: Values of each image by metric.
        protocol: Networks of LPIPS and rFID.
    """

    def __init__(
        self,
        shape: Sequence[int],
        device: torch.device,
        *,
        lpips: str | None,
        rfid: bool,
        weights: str | Path | None,
        references: References | None,
        examples: int,
    ) -> None:
        channels, *size = shape
        self.missing: dict[str, str] = {}
        self.protocol: dict[str, Any] = {}
        self.references = references
        self.examples = Extremes(examples)
        self._measures: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"psnr": psnr, "l1": l1}
        for name, measure, smallest in (("ssim", ssim, SSIM_MIN_SIDE), ("ms_ssim", ms_ssim, MS_SSIM_MIN_SIDE)):
            if min(size) >= smallest:
                self._measures[name] = measure
            else:
                self.missing[name] = _too_small(smallest, size)
        self._rfid: RFID | None = None
        for name, wanted in (("lpips", lpips is not None), ("rfid", rfid)):
            if not wanted:
                self.missing[name] = "switched off"
            elif channels not in (1, 3):
                self.missing[name] = f"needs 1 or 3 channels, images have {channels}"
        try:
            if "lpips" not in self.missing:
                network = LPIPS(str(lpips), weights).to(device)
                if min(size) >= network.min_side:
                    self._measures["lpips"] = network
                    self.protocol["lpips"] = network.protocol
                else:
                    self.missing["lpips"] = _too_small(network.min_side, size)
        except WeightsNotFoundError as error:
            self.missing["lpips"] = str(error)
        try:
            if "rfid" not in self.missing:
                self._rfid = RFID(weights).to(device)
                self.protocol["rfid"] = self._rfid.protocol
        except WeightsNotFoundError as error:
            self.missing["rfid"] = str(error)
        self.per_image: dict[str, list[float]] = {name: [] for name in IMAGE_METRICS if name in self._measures}

    def update(
        self, reconstructions: Float[Tensor, "b c h w"], originals: Float[Tensor, "b c h w"], keys: Sequence[str]
    ) -> None:
        """Measure a batch."""
        with full_float32(originals.device):
            # Every metric sees what a file of 8 bits would hold.
            self._update(from_uint8(to_uint8(reconstructions)), from_uint8(to_uint8(originals)), keys)

    def _update(self, ours: Tensor, originals: Tensor, keys: Sequence[str]) -> None:
        for name, values in self.per_image.items():
            values += self._measures[name](ours, originals).tolist()
        if self._rfid is not None:
            self._rfid.update(ours, originals)
        if self.references is not None:
            self.references.update(originals)
        self.examples.update(keys, self.per_image["psnr"][-len(keys) :], originals, ours)

    def compute(self) -> tuple[dict[str, float], dict[str, str]]:
        """Means over all images, with rFID, and the notes to them."""
        metrics = {name: fmean(values) for name, values in self.per_image.items()}
        notes: dict[str, str] = {}
        if self._rfid is not None and self._rfid.count < 2:
            self.missing["rfid"] = "needs at least 2 images"
        elif self._rfid is not None:
            metrics["rfid"] = self._rfid.compute()
            if self._rfid.note:
                notes["rfid"] = self._rfid.note
        return metrics, notes


def _too_small(smallest: int, size: Sequence[int]) -> str:
    return f"needs sides of at least {smallest} pixels, images have {size[0]}x{size[1]}"
