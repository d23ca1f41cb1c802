"""LPIPS, the learned perceptual distance.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", 2018,
https://arxiv.org/abs/1801.03924, version 0.1. Differences from the authors' package: no dropout before the 1x1 layers
(theirs is active whenever a parent calls ``train()``), and no gradient to the second argument.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from vistok.metric.weights import WeightsNotFoundError, find_weights, sha256

__all__ = ["LPIPS", "WeightsNotFoundError"]

# Mean and standard deviation of ImageNet for images in [-1, 1] instead of [0, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
EPSILON = 1e-10


class _Network(NamedTuple):
    """A trunk of torchvision: convolutions ``features.N`` by stage; the last activation of each stage is compared."""

    file: str
    stages: tuple[tuple[int, ...], ...]
    paddings: tuple[int, ...]
    first_stride: int
    pool_size: int
    pooled_stages: tuple[int, ...]
    min_side: int


_NETWORKS = {
    "vgg": _Network(
        file="vgg16_features.safetensors",
        stages=((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)),
        paddings=(1, 1, 1, 1, 1),
        first_stride=1,
        pool_size=2,
        pooled_stages=(1, 2, 3, 4),
        min_side=16,
    ),
    "alex": _Network(
        file="alexnet_features.safetensors",
        stages=((0,), (3,), (6,), (8,), (10,)),
        paddings=(2, 2, 1, 1, 1),
        first_stride=4,
        pool_size=3,
        pooled_stages=(1, 2),
        min_side=31,
    ),
}


class LPIPS(nn.Module):
    """Perceptual distance of image pairs, frozen, in float32.

    The weights are plain tensors: they follow the module to its device but are no parameters or buffers. So they are
    in no state dict and no optimiser, DDP does not broadcast them, and casting the parent to half precision leaves
    them alone.

    Args:
        net: ``vgg`` (the usual training loss) or ``alex`` (the authors' choice for reporting).
        weights: Folder with ``vgg16_features.safetensors`` and ``lpips_vgg_lin.safetensors``, or the same with
            ``alexnet`` and ``alex``. Default: the environment variable ``VISTOK_WEIGHTS``.

    Attributes:
        min_side: Shortest side of an image the network takes, in pixels.
        protocol: Network, files and their SHA-256, to be written beside every number.

    Raises:
        ValueError: If `net` is unknown or a file lacks a tensor.
        WeightsNotFoundError: If a file is not there.
    """

    def __init__(self, net: str = "vgg", weights: str | Path | None = None) -> None:
        super().__init__()
        if net not in _NETWORKS:
            raise ValueError(f"net must be vgg or alex, got {net!r}")
        self.net = net
        self._network = _NETWORKS[net]
        self.min_side = self._network.min_side
        features_file = find_weights(self._network.file, weights)
        linear_file = find_weights(f"lpips_{net}_lin.safetensors", weights)
        layers = [layer for stage in self._network.stages for layer in stage]
        names = [f"features.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
        self._weights = _take(load_file(features_file), names, features_file)
        self._weights |= _take(load_file(linear_file), [f"lin{i}.model.1.weight" for i in range(5)], linear_file)
        self.protocol = {
            "network": f"LPIPS v0.1, {net}",
            "weights": {file.name: sha256(file) for file in (features_file, linear_file)},
        }
        self.train(False)

    def train(self, mode: bool = True) -> "LPIPS":
        """Stay in evaluation mode whatever the parent does."""
        return super().train(False)

    def forward(self, images: Float[Tensor, "b c h w"], targets: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
        """Distance of each pair, in float32.

        Args:
            images: In [-1, 1], one or three channels; one channel is repeated. The gradient flows to these.
            targets: Likewise, without gradient.

        Raises:
            ValueError: If the images have another number of channels or are too small for the network.
        """
        if images.shape[1] not in (1, 3) or min(images.shape[2:]) < self.min_side:
            raise ValueError(
                f"LPIPS ({self.net}) takes images (b, 1 or 3, H, W) with sides of at least {self.min_side} pixels, "
                f"got {tuple(images.shape)}"
            )
        with torch.autocast(images.device.type, enabled=False):
            with torch.no_grad():
                target_features = self._features(targets.float())
            distances = images.new_zeros(len(images), dtype=torch.float32)
            for stage, (ours, theirs) in enumerate(zip(self._features(images.float()), target_features, strict=True)):
                weight = self._weights[f"lin{stage}.model.1.weight"]
                distances = distances + F.conv2d((ours - theirs).square(), weight).mean((1, 2, 3))
        return distances

    def _features(self, images: Tensor) -> list[Tensor]:
        network, taps = self._network, []
        shift, scale = (images.new_tensor(values).view(1, 3, 1, 1) for values in (SHIFT, SCALE))
        features = (images - shift) / scale
        for stage, layers in enumerate(network.stages):
            if stage in network.pooled_stages:
                features = F.max_pool2d(features, network.pool_size, stride=2)
            for layer in layers:
                features = F.conv2d(
                    features,
                    self._weights[f"features.{layer}.weight"],
                    self._weights[f"features.{layer}.bias"],
                    stride=network.first_stride if layer == 0 else 1,
                    padding=network.paddings[stage],
                ).relu()
            # vector_norm, unlike the square root of a sum, has a finite gradient where all channels are zero.
            taps.append(features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + EPSILON))
        return taps

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LPIPS":
        super()._apply(fn, recurse)
        # Take the device of what the parent asked for, never its dtype.
        self._weights = {name: weight.to(fn(weight).device) for name, weight in self._weights.items()}
        return self


def _take(tensors: Mapping[str, Tensor], names: list[str], file: Path) -> dict[str, Tensor]:
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ValueError(f"{file} lacks {len(missing)} tensors, the first is {missing[0]}; it has {sorted(tensors)}")
    return {name: tensors[name].float() for name in names}
