"""What an evaluation holds, and its form on disk."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass
class Reference:
    """A trivial codec measured on the same images.

    Attributes:
        name: What it does, with its settings.
        psnr: Mean over images, dB.
        ssim: Mean over images; None where the images are too small.
        bits_per_pixel: Bits it spends, not counting what every image shares.
        note: What a reader of the numbers must know.
        images: How many it was measured on; None: on all.
    """

    name: str
    psnr: float
    ssim: float | None
    bits_per_pixel: float
    note: str | None = None
    images: int | None = None


@dataclass
class Example:
    """One image and its reconstruction, uint8 ``(c H W)`` on the CPU."""

    key: str
    psnr: float
    original: Tensor
    reconstruction: Tensor


@dataclass
class Evaluation:
    """Numbers of one tokenizer on one set of images, and how they were measured.

    Attributes:
        metrics: Overall numbers. ``psnr`` (dB), ``ssim``, ``ms_ssim``, ``l1``, ``l2``, ``lpips`` (``lpips_vgg`` ... of
            several networks), ``rfid``, ``sfid``, ``kid``, ``precision``, ``recall``, ``inception_score``, ``fdd``,
            ``cmmd``, ``utilisation``, ``perplexity``, ``entropy_bits``, ``dead_codes``, ``distinct_codes``, ``tokens``,
            ``expected_uniform_utilisation``, ``dead_bits`` of binary codes, ``fvd`` of videos, ``bits_per_pixel``,
            ``coded_bits_per_pixel``, ``encode_images_per_second``, ``decode_images_per_second``, ``peak_memory_mib``;
            with ``train_`` in front what training measured.
        missing: Metrics that were not measured, and why.
        notes: What a reader of a metric must know.
        protocol: How everything was measured.
        references: Trivial codecs on the same images.
        codebook_sizes: Number of codes of each codebook; empty for continuous tokenizers.
        usage: Occurrences of each code, one tensor per codebook.
        per_codebook: The codebook metrics of each codebook, where there are several.
        per_scale: The codebook metrics of each scale of a multi-scale tokenizer.
        per_bit: ``ones`` (share) and ``entropy_bits`` of each bit of binary codes.
        per_image: Columns of equal length: ``key``, and per-image values of the image metrics.
        worst: Examples of the lowest PSNR, worst first.
        best: Examples of the highest PSNR, best first, without those in `worst`.
        random: Examples chosen by a hash of their keys, which is the same for every tokenizer.
        position_entropy: Bits of the indices at each position, mean over codebooks, in the shape of the positions;
            empty where it was not measured.
        shared_bits: What the codes of two codebooks at one position tell about each other, ``(c c)`` of the first
            codebooks, with their entropies on the diagonal; empty where there is one codebook.
        codebook_maps: The codes of each of the first codebooks on their two principal components, ``(k 2)``; empty
            where there is no such table.
        bad: Samples the data source could not read.
    """

    metrics: dict[str, float]
    missing: dict[str, str]
    protocol: dict[str, Any]
    notes: dict[str, str] = field(default_factory=dict)
    references: list[Reference] = field(default_factory=list)
    codebook_sizes: tuple[int, ...] = ()
    usage: list[Tensor] = field(default_factory=list)
    per_codebook: dict[str, list[float]] = field(default_factory=dict)
    per_scale: dict[str, list[float]] = field(default_factory=dict)
    per_bit: dict[str, list[float]] = field(default_factory=dict)
    per_image: dict[str, list[Any]] = field(default_factory=dict)
    worst: list[Example] = field(default_factory=list)
    best: list[Example] = field(default_factory=list)
    random: list[Example] = field(default_factory=list)
    position_entropy: Tensor = field(default_factory=lambda: torch.zeros(0))
    shared_bits: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    codebook_maps: list[Tensor] = field(default_factory=list)
    bad: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain types; numbers that are not finite become None; pictures, code counts and the maps are left out."""
        return _plain(
            {
                "metrics": self.metrics,
                "missing": self.missing,
                "notes": self.notes,
                "references": [vars(reference) for reference in self.references],
                "codebook_sizes": self.codebook_sizes,
                "per_codebook": self.per_codebook,
                "per_scale": self.per_scale,
                "per_bit": self.per_bit,
                "worst": [{"key": example.key, "psnr": example.psnr} for example in self.worst],
                "best": [{"key": example.key, "psnr": example.psnr} for example in self.best],
                "random": [{"key": example.key, "psnr": example.psnr} for example in self.random],
                "position_entropy": self.position_entropy,
                "shared_bits": self.shared_bits,
                "bad": self.bad,
                "protocol": self.protocol,
                "per_image": self.per_image,
            }
        )

    def missing_by_reason(self) -> dict[str, list[str]]:
        """The metrics that were not measured, by the reason why."""
        reasons: dict[str, list[str]] = {}
        for metric, reason in self.missing.items():
            reasons.setdefault(reason, []).append(metric)
        return reasons

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Evaluation":
        """The numbers of a saved evaluation, without pictures and code counts.

        Raises:
            ValueError: If this is not what `to_json` gives.
        """
        if not isinstance(data, Mapping) or not {"metrics", "protocol"} <= set(data):
            got = sorted(data) if isinstance(data, Mapping) else type(data).__name__
            raise ValueError(f"a saved evaluation has the keys metrics and protocol, got {got}")
        return cls(
            metrics={name: value for name, value in data["metrics"].items() if value is not None},
            missing=dict(data.get("missing", {})),
            protocol=dict(data["protocol"]),
            notes=dict(data.get("notes", {})),
            references=[Reference(**reference) for reference in data.get("references", [])],
            codebook_sizes=tuple(data.get("codebook_sizes", ())),
            per_codebook=dict(data.get("per_codebook", {})),
            per_scale=dict(data.get("per_scale", {})),
            per_bit=dict(data.get("per_bit", {})),
            per_image=dict(data.get("per_image", {})),
            position_entropy=torch.tensor(data.get("position_entropy", [])),
            shared_bits=torch.tensor(data.get("shared_bits", [])),
            bad=data.get("bad", 0),
        )


def read_evaluation(path: str | Path) -> Evaluation:
    """Evaluation saved as ``metrics.json``.

    Args:
        path: The file, or the folder that `write_report` wrote.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is no saved evaluation.
    """
    path = Path(path)
    file = path / "metrics.json" if path.is_dir() else path
    if not file.is_file():
        inside = ", ".join(sorted(str(found.parent) for found in path.glob("*/metrics.json")))
        raise FileNotFoundError(f"there is no evaluation {file}: write {inside or 'the folder of a report'}")
    try:
        return Evaluation.from_json(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no saved evaluation ({error}): write the metrics.json of a report") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
