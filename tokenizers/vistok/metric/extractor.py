"""Networks whose features the distances between sets of images are measured on.

An extractor takes values in [0, 255] and gives `Features`. Inception's own resize is half of what tells one FID from
another: see `RESIZES`.
"""

import difflib
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from vistok.hub.files import sha256
from vistok.loss.frozen import Frozen
from vistok.metric.image import from_pixels
from vistok.metric.precision import full_float32
from vistok.metric.weights import find_weights

INCEPTION_FILE = "inception-2015-12-05.pth"
INCEPTION_SIDE = 299
RESIZES = {
    "tf1": "299x299, bilinear as in TensorFlow 1, no antialiasing",
    "torch": "299x299, bilinear as in PyTorch (pixel centres), no antialiasing",
    "clean": "299x299, bicubic as in PIL, antialiased, not rounded (clean-fid)",
}
# ADM's evaluator takes the first channels of this layer; with 17x17 positions they are 2023 features.
SPATIAL_LAYER = "Mixed_6d"
SPATIAL_CHANNELS = 7
# Stein et al. resize to 224 pixels; CMMD's CLIP takes 336. Both are bicubic.
FDD_SIDE = 224
CMMD_SIDE = 336
# What timm notes of weights that were trained with another activation function than the plain name builds.
QUICK_GELU = "quickgelu"


class Features(NamedTuple):
    """Features of a batch, float32."""

    pooled: Float[Tensor, "b d"]
    spatial: Float[Tensor, "b s"] | None = None
    logits: Float[Tensor, "b k"] | None = None


@runtime_checkable
class Extractor(Protocol):
    """What gives features, and says which."""

    protocol: dict[str, Any]

    def __call__(self, pixels: Float[Tensor, "b 3 h w"]) -> Features:
        """Features of values in [0, 255]."""
        ...

    def to(self, device: torch.device) -> Any:
        """Move the network."""
        ...


class Inception(Frozen):
    """The Inception v3 of FID, in torch-fidelity's port, frozen, in float32.

    Args:
        weights: Folder with ``inception-2015-12-05.pth``; default: the environment variable ``VISTOK_WEIGHTS``.
        resize: ``tf1`` (ADM's evaluator, torch-fidelity), ``torch`` (pytorch-fid) or ``clean`` (clean-fid).
        network: The network with its weights, in place of those of the file.

    Attributes:
        protocol: Network, file and its SHA-256, and resize, to be written beside every number.

    Raises:
        WeightsNotFoundError: If the file is not there.
        ValueError: If the resize is unknown.
    """

    def __init__(
        self,
        weights: str | Path | None = None,
        resize: str = "tf1",
        network: FeatureExtractorInceptionV3 | None = None,
    ) -> None:
        if resize not in RESIZES:
            raise ValueError(f"resize must be one of {', '.join(RESIZES)}; got {resize!r}")
        source: dict[str, Any] = {"weights": "given by the caller"}
        if network is None:
            path = find_weights(INCEPTION_FILE, weights)
            network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
            source = {"weights": path.name, "sha256": sha256(path)}
        super().__init__(network)
        self.resize = resize
        # A file that was converted without its classifier has zeros there.
        self.has_logits = bool(network.fc.weight.any())
        self.protocol: dict[str, Any] = {
            "extractor": "Inception v3, TensorFlow 2015-12-05 (torch-fidelity port)",
            **source,
            "extractor_resize": RESIZES[resize],
        }

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Features:
        """Features of values in [0, 255]: pooled, of ADM's spatial layer, and logits without bias where they exist."""
        with full_float32(pixels.device):
            activations, spatial = self._inputs(pixels.float()), None
            for name, layer in self.network.named_children():
                if name == "fc":
                    break
                if name == SPATIAL_LAYER:
                    spatial = F.conv2d(activations, layer.branch1x1.conv.weight[:SPATIAL_CHANNELS]).flatten(1)
                activations = layer(activations)
            pooled = activations.flatten(1)
            return Features(pooled, spatial, pooled @ self.network.fc.weight.T if self.has_logits else None)

    def _inputs(self, pixels: Tensor) -> Tensor:
        size = (INCEPTION_SIDE, INCEPTION_SIDE)
        if self.resize == "torch":
            return F.interpolate(pixels, size, mode="bilinear", align_corners=False) / 127.5 - 1
        if self.resize == "clean":
            resized = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 255)
        else:
            resized = interpolate_bilinear_2d_like_tensorflow1x(pixels, size, align_corners=False)
        return (resized - 128) / 128


class BackboneFeatures:
    """Pooled features of a network of timm, such as DINOv2 (FDD) or the image tower of CLIP (CMMD).

    Position embeddings of another size than the model's own are resized by timm, antialiased; those of DINOv2's own
    code are not, so that its FDD differs a little.

    Args:
        model: Name in timm; its weights are ``<model>.safetensors``.
        weights: Folder of the weights; default: the environment variable ``VISTOK_WEIGHTS``.
        size: Side in pixels of the square that images are resized to: bicubic as in PIL, antialiased, not rounded.
        projected: Take what is behind the classifier, which of CLIP is its projection.
        clamped: Whether what the resize gives is clamped to [0, 255], as in dgm-eval's clean resize; CMMD's is not.

    Raises:
        ValueError: If timm has no such model, or the weights need another one.
        WeightsNotFoundError: If the weights are not there.
    """

    def __init__(
        self,
        model: str,
        weights: str | Path | None = None,
        size: int = FDD_SIDE,
        projected: bool = False,
        clamped: bool = True,
    ) -> None:
        # Imported late: timm is slow to import, and the other module imports this package.
        import timm

        from vistok.loss.backbone import FrozenBackbone

        if not timm.is_model(model):
            similar = difflib.get_close_matches(model, timm.list_models(pretrained=True), n=5, cutoff=0.4)
            raise ValueError(f"timm has no model {model!r}; similar names: {', '.join(similar) or 'none'}")
        config = timm.get_pretrained_cfg(model)
        if config is not None and QUICK_GELU in str(config.notes).lower() and QUICK_GELU not in model:
            same = model.replace("_clip_", f"_clip_{QUICK_GELU}_")
            raise ValueError(f"{model} has another activation than its weights were trained with: write {same}")
        path = find_weights(f"{model}.safetensors", weights)
        self.backbone = FrozenBackbone(model, path, size)
        self.size, self.projected, self.clamped = size, projected, clamped
        self.protocol: dict[str, Any] = {
            "extractor": f"timm {model}, {'projection' if projected else 'pooled features'}",
            "weights": path.name,
            "sha256": sha256(path),
            "extractor_resize": f"{size}x{size}, bicubic as in PIL, antialiased, not rounded"
            + ("" if clamped else ", not clamped"),
        }

    def __call__(self, pixels: Float[Tensor, "b 3 h w"]) -> Features:
        """Features of values in [0, 255]."""
        with full_float32(pixels.device):
            resized = F.interpolate(pixels.float(), (self.size, self.size), mode="bicubic", antialias=True)
            if self.clamped:
                resized = resized.clamp(0, 255)
            return Features(self.backbone.embedding(from_pixels(resized), logits=self.projected))

    def to(self, device: torch.device) -> "BackboneFeatures":
        """Move the network."""
        self.backbone.to(device)
        return self
