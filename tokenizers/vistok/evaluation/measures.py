"""Everything that compares reconstructions with their originals, accumulated over a stream of images of one shape."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vistok.evaluation.examples import Highest, draw
from vistok.evaluation.protocol import RECOMMENDED, Protocol
from vistok.evaluation.references import References
from vistok.evaluation.result import Example, Reference
from vistok.loss.lpips import LPIPS
from vistok.metric.distances import INCEPTION_DISTANCES, FeatureDistances
from vistok.metric.extractor import CMMD_SIDE, FDD_SIDE, BackboneFeatures, Inception
from vistok.metric.feature_cache import FeatureCache
from vistok.metric.fvd import I3D, I3D_FILE, I3D_MIN_FRAMES
from vistok.metric.image import (
    MS_SSIM_MIN_SIDE,
    from_pixels,
    from_uint8,
    l1,
    l2,
    ms_ssim,
    psnr,
    ssim,
    ssim_min_side,
    to_frames,
    to_pixels,
    to_uint8,
)
from vistok.metric.precision import full_float32
from vistok.metric.weights import WeightsNotFoundError

REFERENCE_IMAGES, REFERENCE_BATCH = 128, 32
IMAGE_METRICS = ("psnr", "ssim", "ms_ssim", "l1", "l2", "lpips")


class ImageMeasures:
    """Image metrics, distances of features, references and examples.

    Args:
        shape: ``(c, H, W)`` of an image or ``(c, T, H, W)`` of a video, whose frames are measured as images.
        device: Where the images are.
        rules: Roundings, windows and networks.
        distances: Which of `INCEPTION_DISTANCES` to measure.
        fdd: Model of timm for FDD, or None.
        cmmd: CLIP of timm for CMMD, or None.
        fvd: File of the network of FVD, see `vistok.metric.I3D`, or None; without effect on images.
        weights: Folder of the networks' weights.
        references: Trivial codecs to measure beside, or None.
        examples: How many worst, best and random images to keep.
        cache: Keeps the features of the originals, or the folder where they are kept without limit, or None.

    Attributes:
        missing: Metrics that are not measured, and why.
        per_image: Values of each image by metric.
        protocol: Networks of LPIPS and of the distances.

    Raises:
        ValueError: If the weights of Inception are not those of the rules, or their reference has no effect.
    """

    def __init__(
        self,
        shape: Sequence[int],
        device: torch.device,
        *,
        rules: Protocol = RECOMMENDED,
        distances: Collection[str] = ("rfid",),
        fdd: str | None = None,
        cmmd: str | None = None,
        fvd: str | None = I3D_FILE,
        weights: str | Path | None = None,
        references: References | None = None,
        examples: int = 0,
        cache: FeatureCache | str | Path | None = None,
    ) -> None:
        if rules.reference_file is not None and "rfid" not in distances:
            raise ValueError(f"protocol.reference={rules.reference} has no effect without rFID: write rfid=true")
        self.missing: dict[str, str] = {}
        self.protocol: dict[str, Any] = {}
        self.rules, self.references = rules, references
        self.cache = FeatureCache(cache) if isinstance(cache, str | Path) else cache
        self._worst, self._best, self._random = (Highest[Example](examples) for _ in range(3))
        # Trivial codecs are slow and need no large set: they are measured at the end, on a sample.
        self._sample = Highest[Tensor](REFERENCE_IMAGES if references is not None else 0)
        self._shape, self._device, self._weights = (shape[0], *shape[-2:]), device, weights
        self._measures: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
        self._smallest: dict[str, int] = {}  # side that an image needs for a metric, in pixels
        self._distances: dict[str, FeatureDistances] = {}
        self._add_image_metrics()
        self._add_lpips()
        inception = partial(Inception, weights, rules.extractor_resize)
        self._add_distances("rfid", inception, [name for name in INCEPTION_DISTANCES if name in distances])
        self.missing |= {name: "switched off" for name in INCEPTION_DISTANCES if name not in distances}
        for name, model, size in (("fdd", fdd, FDD_SIDE), ("cmmd", cmmd, CMMD_SIDE)):
            if model is None:
                self.missing[name] = f"no network was given: write {name}=MODEL"
            else:
                options = {"projected": name == "cmmd", "clamped": name == "fdd"}
                self._add_distances(name, partial(BackboneFeatures, model, weights, size, **options), [name])
        if len(shape) == 4:
            if fvd is None:
                self.missing["fvd"] = "switched off"
            elif shape[1] < I3D_MIN_FRAMES:
                self.missing["fvd"] = f"needs at least {I3D_MIN_FRAMES} frames, videos have {shape[1]}"
            else:
                self._add_distances("fvd", partial(I3D, fvd, weights), ["fvd"])
        self.per_image: dict[str, list[float]] = {name: [] for name in self._measures}
        self._leave_out(self._shape[1:])

    def _add_image_metrics(self) -> None:
        rules = self.rules
        window = {"window": rules.ssim_window, "data_range": rules.ssim_data_range}
        for name, measure, smallest in (
            ("psnr", psnr, 1),
            ("ssim", partial(ssim, **window), ssim_min_side(rules.ssim_window)),
            ("ms_ssim", ms_ssim, MS_SSIM_MIN_SIDE),
            ("l1", l1, 1),
            ("l2", l2, 1),
        ):
            self._measures[name] = partial(measure, rounding=rules.rounding)
            self._smallest[name] = smallest

    def _leave_out(self, size: Sequence[int]) -> None:
        """Give up metrics that an image of this size is too small for: a mean over the larger ones would mislead."""
        for name, smallest in self._smallest.items():
            if min(size) < smallest and name in self.per_image:
                del self.per_image[name]
                self.protocol.pop(name, None)
                self.missing[name] = f"needs sides of at least {smallest} pixels, images have {size[0]}x{size[1]}"

    def _add_lpips(self) -> None:
        """LPIPS of one network is called ``lpips``, those of several ``lpips_vgg`` and so on."""
        nets = self.rules.lpips_nets
        if not nets:
            self.missing["lpips"] = "switched off"
        for net in nets:
            name = "lpips" if len(nets) == 1 else f"lpips_{net}"
            if reason := self._needs_rgb():
                self.missing[name] = reason
                continue
            try:
                network = LPIPS(net, self._weights).to(self._device)
            except WeightsNotFoundError as error:
                self.missing[name] = str(error)
                continue
            self._smallest[name] = network.min_side
            self._measures[name] = partial(_on_pixels, network, self.rules.feature_rounding)
            self.protocol[name] = network.protocol

    def _add_distances(self, key: str, make: Callable[[], Any], names: Sequence[str]) -> None:
        if not names:
            return
        reason = self._needs_rgb()
        try:
            if reason is None:
                # Evaluation runs in one process, whose collectives would wait for the others forever.
                file = self.rules.reference_file if "rfid" in names else None
                distances = FeatureDistances(make(), names, file, self.cache, sync_on_compute=False)
                self._check_weights(distances)
                self._distances[key] = distances.to(self._device)
                self.protocol[key] = distances.protocol | {"distances": ", ".join(names)}
        except WeightsNotFoundError as error:
            reason = str(error)
        if reason is not None:
            self.missing |= dict.fromkeys(names, reason)

    def _check_weights(self, distances: FeatureDistances) -> None:
        wanted, got = self.rules.inception_sha256, distances.protocol.get("sha256")
        if wanted is not None and isinstance(distances.extractor, Inception) and got != wanted:
            raise ValueError(
                f"protocol {self.rules.name} wants Inception's weights of SHA-256 {wanted}, got {got}: set weights to "
                "the folder of that file, or protocol.inception_sha256=null"
            )

    def _needs_rgb(self) -> str | None:
        channels = self._shape[0]
        return None if channels in (1, 3) else f"needs 1 or 3 channels, images have {channels}"

    def update(
        self, reconstructions: Float[Tensor, "b c *size"], originals: Float[Tensor, "b c *size"], keys: Sequence[str]
    ) -> None:
        """Measure a batch of images or videos in [-1, 1]; there is a key for every image or frame."""
        with full_float32(originals.device):
            # The originals came from 8 bits; a resize may have left something between.
            originals = from_uint8(to_uint8(originals))
            if "fvd" in self._distances:
                self._distances["fvd"].update(
                    to_pixels(reconstructions, self.rules.feature_rounding), to_pixels(originals)
                )
            reconstructions, originals = to_frames(reconstructions), to_frames(originals)
            self._leave_out(reconstructions.shape[-2:])
            for name, values in self.per_image.items():
                values += self._measures[name](reconstructions, originals).tolist()
            if self._distances:
                pixels = to_pixels(reconstructions, self.rules.feature_rounding), to_pixels(originals)
                for name, distances in self._distances.items():
                    if name != "fvd":
                        distances.update(*pixels)
            for number, (key, value) in enumerate(zip(keys, self.per_image["psnr"][-len(keys) :], strict=True)):
                original, ours = originals[number], reconstructions[number]
                example = partial(_example, key, value, original, ours)
                self._worst.offer(-value, example)
                self._best.offer(value, example)
                self._random.offer(draw(key), example)
                self._sample.offer(draw(key), partial(_stored, original))

    def examples(self) -> dict[str, list[Example]]:
        """``worst`` and ``best`` by PSNR, the most extreme first and none in both, and ``random`` by their keys."""
        worst, best = self._worst.ranked(), self._best.ranked()
        return {
            "worst": list(worst.values()),
            "best": [example for number, example in best.items() if number not in worst],
            "random": list(self._random.ranked().values()),
        }

    def reference_values(self) -> list[Reference]:
        """The trivial codecs, measured on `REFERENCE_IMAGES` images chosen by a hash of their keys."""
        if self.references is None:
            return []
        sample = [original for _, original in sorted(self._sample.ranked().items())]
        size = REFERENCE_BATCH if len({original.shape for original in sample}) == 1 else 1
        for start in range(0, len(sample), size):
            self.references.update(from_uint8(torch.stack(sample[start : start + size])))
        values = self.references.compute()
        if self._sample.count > len(sample):
            values = [dataclasses.replace(value, images=len(sample)) for value in values]
        return values

    def compute(self) -> tuple[dict[str, float], dict[str, str]]:
        """Means over all images, with the distances, and the notes to them."""
        metrics = {name: fmean(values) for name, values in self.per_image.items()}
        notes: dict[str, str] = {}
        for distances in self._distances.values():
            metrics |= distances.compute()
            self.missing |= distances.missing
            notes |= {name: note for name, note in distances.notes.items() if name in metrics}
        return metrics, notes


def _example(key: str, value: float, original: Tensor, reconstruction: Tensor) -> Example:
    return Example(key, value, _stored(original), _stored(reconstruction))


def _stored(image: Tensor) -> Tensor:
    return to_uint8(image[None])[0].cpu()


def _on_pixels(network: LPIPS, rounding: str, reconstructions: Tensor, originals: Tensor) -> Tensor:
    return network(from_pixels(to_pixels(reconstructions, rounding)), originals)
