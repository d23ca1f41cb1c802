"""Reconstruction FID: the Frechet distance between Inception features of images and of their reconstructions.

Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017. The
statistics are torchmetrics', with one choice fixed here: the extractor resizes to 299x299 as TensorFlow 1 did
(bilinear, no antialiasing), as ADM's evaluator and torch-fidelity do. Newer versions of torchmetrics antialias by
default, which gives other numbers.
"""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3

from vistok.metric.image import to_uint8
from vistok.metric.precision import full_float32
from vistok.metric.weights import find_weights, sha256

INCEPTION_FILE = "inception-2015-12-05.pth"
INCEPTION_DIM = 2048


class _Inception(NoTrainInceptionV3):
    num_features = INCEPTION_DIM


class RFID:
    """Streaming rFID of 8-bit images: float32 network, float64 statistics.

    This is not a module, so that the network never enters the state dict of what holds it: move it with `to`.

    Args:
        weights: Folder with ``inception-2015-12-05.pth``; default: the environment variable ``VISTOK_WEIGHTS``.
        network: Another feature extractor in place of Inception. It takes uint8 images ``(b 3 H W)``, returns features
            ``(b num_features)`` and has the attribute ``num_features``.

    Raises:
        WeightsNotFoundError: If the weights are not there.
    """

    def __init__(self, weights: str | Path | None = None, network: nn.Module | None = None) -> None:
        if network is None:
            path = find_weights(INCEPTION_FILE, weights)
            # Built here, because torchmetrics 1.6 does not pass a weights file on.
            network = _Inception("inception-v3-compat", [str(INCEPTION_DIM)], str(path))
            network.use_antialias = False
            self.protocol: dict[str, Any] = {
                "extractor": "Inception v3, TensorFlow 2015-12-05, pooled features (torch-fidelity port)",
                "weights": path.name,
                "sha256": sha256(path),
                "extractor_resize": "299x299, bilinear as in TensorFlow 1, no antialiasing",
            }
        else:
            self.protocol = {"extractor": type(network).__name__, "weights": "given by the caller"}
        self._fid = FrechetInceptionDistance(network.eval())
        self.feature_dim = len(self._fid.real_features_sum)
        self.protocol |= {
            "features": self.feature_dim,
            "precision": "float32 network, float64 statistics",
            "reference": "the originals of the same images, after resize and crop",
        }

    @property
    def count(self) -> int:
        """Number of image pairs seen."""
        return int(self._fid.fake_features_num_samples)

    @property
    def note(self) -> str | None:
        """What a reader of the number must know, or None."""
        if self.count >= self.feature_dim:
            return None
        return f"n = {self.count}, biased: fewer images than feature dimensions ({self.feature_dim})"

    def to(self, device: torch.device | str) -> "RFID":
        """Move the network and the statistics."""
        self._fid.to(device)
        return self

    def update(self, reconstructions: Float[Tensor, "b c h w"], originals: Float[Tensor, "b c h w"]) -> None:
        """Add image pairs in [-1, 1]; one channel is repeated to three.

        Raises:
            ValueError: If the images have neither one nor three channels.
        """
        if originals.shape[1] not in (1, 3):
            raise ValueError(f"rFID takes images of 1 or 3 channels, got {originals.shape[1]}: composite alpha first")
        with full_float32(originals.device), torch.no_grad():
            for images, real in ((originals, True), (reconstructions, False)):
                self._fid.update(to_uint8(images).expand(-1, 3, -1, -1), real=real)

    def compute(self) -> float:
        """The distance between everything seen.

        Raises:
            ValueError: If fewer than two images were seen.
        """
        if self.count < 2:
            raise ValueError(f"rFID needs at least 2 images, got {self.count}")
        return float(self._fid.compute())

    def reset(self) -> None:
        """Forget the images."""
        self._fid.reset()
