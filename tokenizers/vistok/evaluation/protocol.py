"""How the numbers of an evaluation are measured: one protocol per file of ``configs/protocol/``, saved beside them."""

import dataclasses
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vistok.metric.extractor import RESIZES
from vistok.metric.image import PSNR_CAP, ROUNDINGS, SSIM_WINDOWS

REQUIRED = ("dataset", "split", "resize", "crop")
PACKAGES = ("vistok", "torch", "torchvision", "torchmetrics", "torch-fidelity", "pillow")
LPIPS_NETS = ("vgg", "alex", "squeeze")
SSIM_TEXTS = {
    "gaussian": "Gaussian window 11x11 with sigma 1.5, data range {range:g}, reflected border, "
    "mean over channels and images (torchmetrics)",
    "gaussian_valid": "Gaussian window 11x11 with sigma 1.5, data range {range:g}, without 5 pixels at the border, "
    "mean over channels and images (as pytorch-msssim)",
    "uniform_valid": "uniform window 7x7, sample variances, data range {range:g}, without 3 pixels at the border, "
    "mean over channels and images (as scikit-image)",
}
VIDEO_TEXT = (
    "{count} of {frames} frames; images are their frames in every metric but FVD: those per image are means over all "
    "frames, and images per second are frames per second"
)
ROUNDING_TEXTS = {"nearest": "rounded to 8 bits", "truncate": "cut off to 8 bits", "none": "not rounded"}


@dataclass(frozen=True)
class Protocol:
    """Everything two programs must do alike for their numbers to be comparable.

    Args:
        name: Of the protocol.
        published_on: What the published numbers were measured on, in words: reference set, split, count, size.
        data: Settings of the data that belong to it, such as ``{resize_mode: adm}``; the centre is cropped.
        reference: ``originals``, or a file ``.npz`` with the ``mu`` and ``sigma`` that rFID compares with.
        rounding: Of reconstructions before image metrics: ``nearest``, ``truncate`` or ``none``.
        feature_rounding: The same before networks: LPIPS, and those of rFID and its kin.
        extractor_resize: Inception's own resize: ``tf1``, ``torch`` or ``clean``.
        ssim_window: ``gaussian``, ``gaussian_valid`` or ``uniform_valid``, see `vistok.metric.ssim`.
        ssim_data_range: 1, or another value where a script passes the wrong one.
        lpips: ``vgg``, ``alex`` or ``squeeze``, several of them, or None.
        inception_sha256: Refuse another file of Inception's weights; None takes any and states its hash.

    Raises:
        ValueError: If a choice is unknown.
    """

    name: str = "vistok"
    published_on: str = "any images"
    data: Mapping[str, Any] = field(default_factory=dict)
    reference: str = "originals"
    rounding: str = "nearest"
    feature_rounding: str = "nearest"
    extractor_resize: str = "tf1"
    ssim_window: str = "gaussian"
    ssim_data_range: float = 1.0
    lpips: str | Sequence[str] | None = "vgg"
    inception_sha256: str | None = None

    def __post_init__(self) -> None:
        for name, allowed in (
            ("rounding", ROUNDINGS),
            ("feature_rounding", ROUNDINGS),
            ("extractor_resize", RESIZES),
            ("ssim_window", SSIM_WINDOWS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        if unknown := [net for net in self.lpips_nets if net not in LPIPS_NETS]:
            raise ValueError(f"lpips must be of {', '.join(LPIPS_NETS)}, or null; got {unknown}")
        if self.ssim_data_range <= 0:
            raise ValueError(f"ssim_data_range must be positive, got {self.ssim_data_range}")

    @property
    def lpips_nets(self) -> tuple[str, ...]:
        """The networks of LPIPS."""
        if self.lpips is None or isinstance(self.lpips, str):
            return () if self.lpips is None else (self.lpips,)
        return tuple(self.lpips)

    @property
    def reference_file(self) -> str | None:
        """File of statistics that rFID compares with; None: the originals."""
        return None if self.reference == "originals" else self.reference

    def scoring(self) -> "Protocol":
        """What remains once there are reconstructions; two protocols of equal scoring give the same numbers on them."""
        return dataclasses.replace(self, name="", published_on="", data={})

    def features(self) -> "Protocol":
        """What the features of the networks depend on, see `scoring`."""
        unlike = dataclasses.replace(self.scoring(), rounding="nearest", lpips=None)
        return dataclasses.replace(unlike, ssim_window="gaussian", ssim_data_range=1.0)

    def describe(self) -> dict[str, Any]:
        """The entries of a saved protocol that follow from this one."""
        if self.rounding == self.feature_rounding == "nearest":
            rounding = "originals and reconstructions clamped and rounded to 8 bits before every metric"
        else:
            rounding = (
                f"reconstructions clamped, then {ROUNDING_TEXTS[self.rounding]} before image metrics, "
                f"{ROUNDING_TEXTS[self.feature_rounding]} before LPIPS and Inception; originals rounded to 8 bits"
            )
        ssim = f"per image, {SSIM_TEXTS[self.ssim_window].format(range=self.ssim_data_range)}"
        return {
            "protocol": self.name,
            "published_on": self.published_on,
            "rounding": rounding,
            "psnr": f"dB, per image over all channels, data range 1, mean over images, at most {PSNR_CAP:.0f}",
            "ssim": ssim,
            "ms_ssim": "per image, Gaussian window 11x11 with sigma 1.5, data range 1, reflected border, 5 scales",
            "l1": "mean absolute error in [0, 1]",
            "l2": "mean squared error in [0, 1]",
        }


RECOMMENDED = Protocol()


def check_protocol(protocol: Mapping[str, Any]) -> None:
    """Refuse a protocol that does not say where the images come from."""
    lacking = [name for name in REQUIRED if name not in protocol]
    if lacking:
        raise ValueError(
            f"protocol lacks {lacking}, got {sorted(protocol)}: add them, as 'none' where nothing was done"
        )


def describe(
    shape: Sequence[int], count: int, device: torch.device, dtype: torch.dtype, rules: Protocol = RECOMMENDED
) -> dict[str, Any]:
    """The part of the protocol that `evaluate` fixes or finds.

    Args:
        shape: ``(c, H, W)`` of an image, or ``(c, T, H, W)`` of a video.
        count: Number of images, or of frames of all videos.
        device: Where the tokenizer ran.
        dtype: Of its parameters.
        rules: What was followed.
    """
    channels, *size = shape
    videos = {"videos": VIDEO_TEXT.format(count=count // size[0], frames=size[0])} if len(size) == 3 else {}
    autocast = torch.is_autocast_enabled(device.type)
    precision = f"{dtype}".removeprefix("torch.")
    if autocast:
        precision += f" under {torch.get_autocast_dtype(device.type)} autocast".replace("torch.", "")
    return {
        "images": count,
        "size": list(size),
        "channels": channels,
        "value_range": "images in [-1, 1]",
        **rules.describe(),
        **videos,
        "codebook": "exact counts over all images: utilisation = share of codes used at least once, "
        "perplexity = exp of the entropy in nats, expected_uniform_utilisation = 1 - (1 - 1/K)^tokens",
        "bits_per_pixel": "bits of the codes over pixels, without entropy coding",
        "coded_bits_per_pixel": "bits of the codes over pixels after an adaptive arithmetic coder without context, one "
        "model per codebook and scale that starts at half an occurrence of every code",
        "throughput": "median over batches, first run left out, data loading left out",
        "peak_memory": "on a GPU what the allocator held at its peak while encoding and decoding, else what the whole "
        "process had resident at its peak; MiB",
        "precision": f"tokenizer {precision}; metrics float32",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
