"""Evaluate a tokenizer on a set of images in one streaming pass."""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vistok.data.transforms import OWN_SIZE
from vistok.evaluation.measures import IMAGE_METRICS, ImageMeasures
from vistok.evaluation.models import Model, device_of, dtype_of
from vistok.evaluation.positions import PositionEntropy, codebook_tables, principal_plane
from vistok.evaluation.protocol import RECOMMENDED, Protocol, check_protocol, describe
from vistok.evaluation.references import References
from vistok.evaluation.result import Evaluation
from vistok.loss.text import TextFeatures, text_features
from vistok.metric.codebook_usage import CodebookUsage
from vistok.metric.distances import INCEPTION_DISTANCES
from vistok.metric.feature_cache import FeatureCache
from vistok.metric.fvd import I3D_FILE
from vistok.metric.image import num_frames
from vistok.tokenizer import Tokenizer

T = TypeVar("T")
CODEBOOK_METRICS = (
    "utilisation",
    "perplexity",
    "entropy_bits",
    "dead_codes",
    "distinct_codes",
    "tokens",
    "expected_uniform_utilisation",
)
RATES = ("bits_per_pixel", "coded_bits_per_pixel")
NO_INDICES = "this model gives images and no indices"
MEBIBYTE = 2**20
# Of the functions of others: no decoder overshoots [-1, 1] by so much, one that gives 0 to 255 does.
MAX_VALUE = 16.0
# Images this dark have no reconstruction without a value below 0.
LOW = -0.5
# Codebooks whose map the report shows.
MAX_MAPS = 8


@torch.inference_mode()
def evaluate(
    model: Model,
    batches: Iterable[Mapping[str, Any]],
    *,
    protocol: Mapping[str, Any],
    rules: Protocol = RECOMMENDED,
    lpips: str | Sequence[str] | None = "protocol",
    rfid: bool = True,
    distances: str | Sequence[str] | None = (),
    fdd: str | None = None,
    cmmd: str | None = None,
    fvd: str | None = I3D_FILE,
    weights: str | Path | None = None,
    device: torch.device | str | None = None,
    references: bool = True,
    examples: int = 8,
    train_usage: Mapping[str, float] | None = None,
    cache: FeatureCache | str | Path | None = None,
    text_encoder: nn.Module | None = None,
) -> Evaluation:
    """Measure reconstructions, codebook usage and speed of a tokenizer, or of any other autoencoder.

    One pass in one process; only the images of the report and of the references stay in memory. The model runs in the
    precision of the surrounding autocast, every metric in float32, on 8-bit-rounded images unless the rules say
    otherwise.

    Args:
        model: A tokenizer, or any function from images ``(b c H W)`` in [-1, 1] to images, whose codes and rates are
            then not measured. A module is evaluated in evaluation mode; the modes of its parts are restored.
        batches: Dicts with ``images`` float ``(b c H W)``, or videos ``(b c T H W)`` whose frames are measured as
            images, in [-1, 1], all of one size unless the protocol's ``size`` is ``own``, and if known ``keys`` (one
            name per image or video) and ``bad`` (one entry per sample the source could not read).
        protocol: Where the images come from: at least ``dataset``, ``split``, ``resize`` and ``crop``. The rest is
            added here.
        rules: How reconstructions are measured, see ``configs/protocol``.
        lpips: ``vgg``, ``alex``, several of them, or None for no LPIPS; ``protocol``: those of the rules.
        rfid: Whether to compute rFID.
        distances: What else to compute on Inception's features: ``sfid``, ``kid``, ``precision_recall``,
            ``inception_score``, one or several; None: all of them if rFID is computed, none otherwise.
        fdd: Model of timm whose features FDD compares, such as ``vit_large_patch14_dinov2.lvd142m``.
        cmmd: CLIP of timm for CMMD, such as ``vit_large_patch14_clip_quickgelu_336.openai``.
        fvd: Of videos: file of the network of FVD, a path or a name in the folder of weights; None: no FVD.
        weights: Folder of the weights of LPIPS, Inception and the models of timm; default: the environment variable
            ``VISTOK_WEIGHTS``. Where they are missing, so is the metric, with the reason.
        device: Where to run; default: where the model is. A module is moved there.
        references: Whether to measure trivial codecs on the same images.
        examples: How many worst, best and random reconstructions to keep.
        train_usage: Codebook metrics measured in training, kept beside the held-out ones as ``train_*``.
        cache: Keeps the features of the originals for the next evaluation on them, see
            `vistok.metric.feature_cache`, or the folder where they are kept without limit; None: they are not kept.
        text_encoder: Of tokenizers that decode with the help of the batches' ``texts``, see `vistok.loss.TextFeatures`.

    Raises:
        ValueError: If the protocol lacks an entry, there are no images, an image does not fit the tokenizer or is
            outside [-1, 1], a reconstruction has another shape or is not finite, or an argument is out of range.
    """
    check_protocol(protocol)
    if distances is None:
        distances = INCEPTION_DISTANCES if rfid else ()
    distances = [distances] if isinstance(distances, str) else distances
    if unknown := [name for name in distances if name not in INCEPTION_DISTANCES]:
        raise ValueError(f"distances are {', '.join(INCEPTION_DISTANCES)}; got {unknown}")
    if examples < 0:
        raise ValueError(f"examples must not be negative, got {examples}: examples=0 shows none")
    if lpips != "protocol":
        rules = dataclasses.replace(rules, lpips=lpips)
    wanted = {name for name in distances if name != "rfid"} | ({"rfid"} if rfid else set())
    device = torch.device(device) if device is not None else device_of(model)
    module = model if isinstance(model, nn.Module) else nn.Identity()
    modes = {part: part.training for part in module.modules()}
    module.to(device).eval()
    try:
        options = {"rules": rules, "distances": wanted, "fdd": fdd, "cmmd": cmmd, "fvd": fvd}
        options |= {"weights": weights, "examples": examples, "cache": cache}
        texts = text_features(text_encoder, model.decoder) if isinstance(model, Tokenizer) else None
        run = _Run(model, device, references, options, texts, protocol.get("size") == OWN_SIZE)
        for batch in batches:
            run.update(batch)
        return run.result(protocol, train_usage or {})
    finally:
        # Not `train`, which would set a part to training that its owner keeps in evaluation mode.
        for part, training in modes.items():
            part.training = training


class _Run:
    """Everything accumulated in one pass."""

    def __init__(
        self,
        model: Model,
        device: torch.device,
        references: bool,
        options: Mapping[str, Any],
        texts: TextFeatures | None,
        own_size: bool,
    ) -> None:
        self.model, self.device, self.references, self.options = model, device, references, options
        self.texts = texts.to(device) if texts is not None else None
        self.tokenizer = model if isinstance(model, Tokenizer) else None
        self.own_size = own_size
        self.shape: tuple[int, ...] = ()
        self.what = "images"
        self.keys: list[str] = []
        self.bad = 0
        steps = ("encode", "decode") if self.tokenizer is not None else ("reconstruct",)
        self.speed: dict[str, list[float]] = {name: [] for name in steps}
        self.peak_bytes = 0
        # Lowest and highest value of the reconstructions of a function, and of its images.
        self.ranges = [(math.inf, -math.inf), (math.inf, -math.inf)]
        self.measures: ImageMeasures | None = None
        self.usage: CodebookUsage | None = None
        self.pixels, self.bits = 0, 0.0
        codebooks = self.tokenizer.quantizer.num_codebooks if self.tokenizer is not None else 0
        self.positions = PositionEntropy(codebooks)

    def update(self, batch: Mapping[str, Any]) -> None:
        self.bad += len(batch.get("bad", ()))
        images = batch["images"].to(self.device)
        if not len(images):
            return
        keys = list(batch.get("keys") or (str(len(self.keys) + i) for i in range(len(images))))
        self._check_images(images, keys)
        texts = self.texts(batch) if self.texts is not None else None
        grid = self._grid(images)
        if not self.shape:
            self._start(images, grid, texts)
        names = _names(keys, images)
        self.keys += names
        decoded = self._reconstruct(images, batch, texts)
        _check_finite(decoded, keys)
        if self.measures is not None:
            if decoded.shape != images.shape:
                raise ValueError(
                    f"the model gave {tuple(decoded.shape)} for {self.what} {tuple(images.shape)}: "
                    "reconstructions have the shape of what they reconstruct"
                )
            self.measures.update(decoded, images, names)

    def _reconstruct(self, images: Tensor, batch: Mapping[str, Any], texts: Tensor | None) -> Tensor:
        tokenizer = self.tokenizer
        if tokenizer is None:
            # It may write into its argument, and originals must stay what they are.
            own = images.clone()
            decoded = self._timed("reconstruct", num_frames(images), lambda: self.model(own))
            self._check_range(decoded, images)
            return decoded
        labels = tokenizer.labels_of(batch)
        labels = labels.to(self.device) if labels is not None else None
        quantized = self._timed("encode", num_frames(images), lambda: tokenizer.encode(images, labels))
        if self.usage is not None:
            self.usage.update(quantized.indices)
            if not self.own_size:
                self.positions.update(quantized.indices)
        pixels = num_frames(images) * math.prod(images.shape[-2:])
        self.pixels += pixels
        self.bits += pixels * tokenizer.bits_per_pixel(images.shape[2:])
        codes, size = quantized.codes, images.shape[2:]
        return self._timed("decode", num_frames(images), lambda: tokenizer.decode(codes, size, texts))

    def _check_images(self, images: Tensor, keys: Sequence[str]) -> None:
        if not images.is_floating_point() or images.ndim not in (4, 5):
            raise ValueError(
                f"evaluate takes float images (b c H W) or videos (b c T H W), got {images.dtype} {tuple(images.shape)}"
            )
        self.what = "images" if images.ndim == 4 else "videos"
        if len(keys) != len(images):
            raise ValueError(f"a batch has {len(images)} {self.what} but {len(keys)} keys")
        alike = slice(1, -2 if self.own_size else None)
        fits = images.shape[alike] == (0, *self.shape)[alike]
        if self.shape and not fits:
            raise ValueError(
                f"all {self.what} must have one shape, got {tuple(images.shape[1:])} after {self.shape}: "
                "resize and crop them alike"
            )
        low, high = images.aminmax()
        # Also true for NaN. The margin is for resize filters that overshoot by a rounding.
        if not (low >= -1.001 and high <= 1.001):
            raise ValueError(
                f"{self.what} must be in [-1, 1], got values from {low:.4g} to {high:.4g}: use pixels / 127.5 - 1"
            )

    def _check_range(self, decoded: Any, images: Tensor) -> None:
        """Of the functions of others: whether they give what they were given."""
        if not isinstance(decoded, Tensor) or not decoded.is_floating_point():
            got = decoded.dtype if isinstance(decoded, Tensor) else type(decoded).__name__
            raise ValueError(
                f"a model must give a float tensor of {self.what} in [-1, 1] for {self.what} {tuple(images.shape)}, "
                f"got {got}"
            )
        for number, values in enumerate((decoded, images)):
            low, high = values.aminmax()
            lowest, highest = self.ranges[number]
            self.ranges[number] = min(lowest, float(low)), max(highest, float(high))
        low, high = self.ranges[0]
        if max(-low, high) > MAX_VALUE:
            raise ValueError(
                f"the model gave values from {low:.4g} to {high:.4g}: reconstructions are in [-1, 1] as the "
                f"{self.what} it gets, pixels / 127.5 - 1"
            )

    def _grid(self, images: Tensor) -> tuple[int, ...]:
        """Of a tokenizer, that of the codes; else empty."""
        size = tuple(images.shape[2:])
        try:
            return self.tokenizer.grid(size) if self.tokenizer is not None else ()
        except ValueError as error:
            advice = "set data.native to a multiple of its patches" if self.own_size else "resize or crop them"
            raise ValueError(f"{self.what} of {size} do not fit this tokenizer ({error}): {advice}") from error

    def _start(self, images: Tensor, grid: tuple[int, ...], texts: Tensor | None) -> None:
        tokenizer, size, rate = self.tokenizer, tuple(images.shape[2:]), math.inf
        self.shape = tuple(images.shape[1:])
        if tokenizer is not None:
            rate = tokenizer.bits_per_pixel(size)
            # Scales of images of several sizes have several lengths.
            scales = () if self.own_size else tokenizer.scale_lengths(grid)
            usage = CodebookUsage.of(tokenizer.quantizer, scales, sync_on_compute=False)
            self.usage = usage.to(self.device) if usage is not None else None
        if tokenizer is None or tokenizer.output == "images":
            references = None
            if self.references:
                references = References(size[-2:], None if self.own_size else grid, images.shape[1], rate)
            self.measures = ImageMeasures(self.shape, self.device, references=references, **self.options)
        # The first run allocates memory and chooses kernels: it is not timed.
        if tokenizer is not None:
            tokenizer.decode(tokenizer.encode(images).codes, size, texts)
        else:
            self.model(images.clone())

    def _timed(self, name: str, count: int, function: Callable[[], T]) -> T:
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        self._synchronize()
        start = time.perf_counter()
        result = function()
        self._synchronize()
        self.speed[name].append(count / max(time.perf_counter() - start, 1e-9))
        if on_gpu:
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated(self.device))
        return result

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def result(self, protocol: Mapping[str, Any], train_usage: Mapping[str, float]) -> Evaluation:
        if not self.keys:
            raise ValueError(
                f"there was no image or video to evaluate ({self.bad} samples were unreadable): check the data source "
                "and split"
            )
        evaluation = Evaluation(
            metrics={},
            missing={},
            protocol=self._protocol(protocol),
            codebook_sizes=tuple(self.tokenizer.quantizer.codebook_sizes) if self.tokenizer is not None else (),
            per_image={"key": self.keys},
            bad=self.bad,
        )
        self._add_images(evaluation)
        self._add_codes(evaluation)
        metrics = evaluation.metrics
        metrics |= {f"{name}_images_per_second": median(values) for name, values in self.speed.items()}
        if peak_bytes := self.peak_bytes or _peak_resident_bytes():
            metrics["peak_memory_mib"] = peak_bytes / MEBIBYTE
        else:
            evaluation.missing["peak_memory_mib"] = "this system does not say"
        metrics |= {f"train_{name}": float(train_usage[name]) for name in CODEBOOK_METRICS if name in train_usage}
        return evaluation

    def _add_images(self, evaluation: Evaluation) -> None:
        measures = self.measures
        if measures is None:
            reason = "the decoder gives the features of a teacher, not images"
            evaluation.missing |= dict.fromkeys((*IMAGE_METRICS, *INCEPTION_DISTANCES), reason)
            return
        metrics, evaluation.notes = measures.compute()
        (low, high), (lowest, _) = self.ranges
        if low >= 0 and lowest < LOW:
            evaluation.notes["psnr"] = (
                f"is of reconstructions from {low:.3g} to {high:.3g}, none below 0: a model must give [-1, 1], as it "
                "gets, not [0, 1]"
            )
        evaluation.metrics |= metrics
        evaluation.missing |= measures.missing
        evaluation.per_image |= measures.per_image
        for name, examples in measures.examples().items():
            setattr(evaluation, name, examples)
        if measures.references is not None:
            evaluation.references = measures.reference_values()
            evaluation.missing |= {f"reference {name}": why for name, why in measures.references.missing.items()}

    def _add_codes(self, evaluation: Evaluation) -> None:
        if self.tokenizer is None or self.usage is None:
            reason = "a continuous tokenizer has no codes" if self.tokenizer is not None else NO_INDICES
            evaluation.missing |= dict.fromkeys((*CODEBOOK_METRICS, *RATES), reason)
            return
        values, evaluation.usage = self.usage.compute(), self.usage.counts()
        evaluation.metrics |= {name: float(values[name]) for name in CODEBOOK_METRICS}
        evaluation.metrics["bits_per_pixel"] = self.bits / self.pixels
        evaluation.metrics["coded_bits_per_pixel"] = self.usage.coded_bits() / self.pixels
        if "dead_bits" in values:
            evaluation.metrics["dead_bits"] = float(values["dead_bits"])
        evaluation.position_entropy = self.positions.compute()
        if self.positions.left_out:
            seen, of = self.positions.images, self.positions.images + self.positions.left_out
            evaluation.notes["position_entropy"] = f"is of {seen} of {of} {self.what}"
        evaluation.shared_bits = self.positions.shared_bits()
        evaluation.codebook_maps = [
            principal_plane(table) if table is not None and table.shape[1] > 1 else torch.zeros(0, 2)
            for table in codebook_tables(self.tokenizer.quantizer)[:MAX_MAPS]
        ]
        if len(evaluation.usage) > 1:
            evaluation.per_codebook = _columns(values, "_per_codebook")
        evaluation.per_scale = _columns(values, "_per_scale")
        evaluation.per_bit = _columns(values, "_per_bit")

    def _protocol(self, given: Mapping[str, Any]) -> dict[str, Any]:
        networks = self.measures.protocol if self.measures is not None else {}
        rules = self.options["rules"]
        found = describe(self.shape, len(self.keys), self.device, dtype_of(self.model), rules)
        return {**given, **found, **networks, **({"size": OWN_SIZE} if self.own_size else {})}


def _columns(values: Mapping[str, Tensor], suffix: str) -> dict[str, list[float]]:
    return {name.removesuffix(suffix): value.tolist() for name, value in values.items() if name.endswith(suffix)}


def _peak_resident_bytes() -> int:
    """The most this process has had in memory at once; 0 where the system does not say."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _names(keys: Sequence[str], images: Tensor) -> list[str]:
    """Names of the images, or of all frames of videos."""
    if images.ndim == 4:
        return list(keys)
    return [f"{key} frame {number}" for key in keys for number in range(images.shape[2])]


def _check_finite(decoded: Tensor, keys: Sequence[str]) -> None:
    bad = ~torch.isfinite(decoded).flatten(1).all(1)
    if bad.any():
        raise ValueError(f"the reconstruction of {keys[int(bad.nonzero()[0])]!r} holds NaN or infinite values")
