"""LPIPS, the learned perceptual distance, and the networks under it.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", 2018,
https://arxiv.org/abs/1801.03924, version 0.1. Differences from the authors' package: no dropout before the 1x1 layers
(theirs is active whenever a parent calls ``train()``), and no gradient to the second argument.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchmetrics
import torchvision
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import get_weight

from vistok.hub.files import sha256
from vistok.loss.frozen import Frozen, full_precision
from vistok.metric.weights import WeightsNotFoundError, find_weights

__all__ = ["LPIPS", "LPIPSTrunk", "WeightsNotFoundError"]

# Mean and standard deviation of ImageNet for images in [-1, 1] instead of [0, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
EPSILON = 1e-10
TORCHVISION = "torchvision"


class _Network(NamedTuple):
    """A classifier of torchvision: `taps` are the layers of its ``features`` whose outputs are compared."""

    model: str
    published: str
    file: str
    taps: tuple[int, ...]
    min_side: int


_NETWORKS = {
    "vgg": _Network("vgg16", "VGG16_Weights.IMAGENET1K_V1", "vgg16_features.safetensors", (3, 8, 15, 22, 29), 16),
    "alex": _Network("alexnet", "AlexNet_Weights.IMAGENET1K_V1", "alexnet_features.safetensors", (1, 4, 7, 9, 11), 31),
    "squeeze": _Network(
        "squeezenet1_1",
        "SqueezeNet1_1_Weights.IMAGENET1K_V1",
        "squeezenet1_1_features.safetensors",
        (1, 4, 7, 9, 10, 11, 12),
        17,
    ),
}


class LPIPSTrunk(Frozen):
    """Activations of an ImageNet classifier after each of its stages, frozen, in float32.

    Args:
        net: ``vgg``, ``alex`` or ``squeeze``.
        weights: Folder with ``vgg16_features.safetensors`` (or ``alexnet``, ``squeezenet1_1``), or ``torchvision`` for
            torchvision's own weights, which are downloaded unless its cache holds them. Default: the folder of the
            environment variable ``VISTOK_WEIGHTS``.

    Attributes:
        min_side: Shortest side of an image the network takes, in pixels.
        file: Where the weights were read.

    Raises:
        ValueError: If `net` is unknown or the file lacks a tensor.
        WeightsNotFoundError: If the file is not there.
    """

    def __init__(self, net: str = "vgg", weights: str | Path | None = None) -> None:
        if net not in _NETWORKS:
            raise ValueError(f"net must be vgg, alex or squeeze, got {net!r}")
        network = _NETWORKS[net]
        if weights == TORCHVISION:
            tensors = _published_trunk(network)
            file = Path(torch.hub.get_dir(), "checkpoints", Path(get_weight(network.published).url).name)
        else:
            file = _find(network.file, weights)
            tensors = load_file(file)
        with torch.device("meta"):
            layers = getattr(torchvision.models, network.model)().features[: network.taps[-1] + 1]
        names = list(layers.state_dict())
        _refuse_missing([f"features.{name}" for name in names], tensors, file)
        layers.load_state_dict({name: tensors[f"features.{name}"] for name in names}, assign=True)
        super().__init__(layers)
        self.net = net
        self.file = file
        self.min_side = network.min_side

    def forward(self, images: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b e h2 w2"]]:
        """Features of images in [-1, 1] with one or three channels after each stage; one channel is repeated.

        Raises:
            ValueError: If the images have another number of channels or are too small for the network.
        """
        if images.shape[1] not in (1, 3) or min(images.shape[2:]) < self.min_side:
            raise ValueError(
                f"LPIPS ({self.net}) takes images (b, 1 or 3, H, W) with sides of at least {self.min_side} pixels, "
                f"got {tuple(images.shape)}"
            )
        features = []
        with full_precision(images):
            images = images.float()
            shift, scale = (images.new_tensor(values).view(1, 3, 1, 1) for values in (SHIFT, SCALE))
            activations = (images - shift) / scale
            for number, layer in enumerate(self.network):
                activations = layer(activations)
                if number in _NETWORKS[self.net].taps:
                    features.append(activations)
        return features


class LPIPS(Frozen):
    """Perceptual distance of image pairs, frozen, in float32.

    Args:
        net: ``vgg`` (the usual training loss), ``alex`` (the authors' choice for reporting) or ``squeeze``.
        weights: Folder with ``vgg16_features.safetensors`` and ``lpips_vgg_lin.safetensors``, or the same with
            ``alexnet`` and ``alex`` or ``squeezenet1_1`` and ``squeeze``; or ``torchvision`` for torchvision's own
            network, which is downloaded unless its cache holds it, under the 1x1 layers that come with torchmetrics.
            Default: the folder of the environment variable ``VISTOK_WEIGHTS``.

    Attributes:
        trunk: The network without the 1x1 layers.
        min_side: Shortest side of an image the network takes, in pixels.
        protocol: Network, files and their SHA-256, to be written beside every number.

    Raises:
        ValueError: If `net` is unknown or a file lacks a tensor.
        WeightsNotFoundError: If a file is not there.
    """

    def __init__(self, net: str = "vgg", weights: str | Path | None = None) -> None:
        trunk = LPIPSTrunk(net, weights)
        if weights == TORCHVISION:
            file = _published_heads_file(net)
            tensors = _published_heads(net)
        else:
            file = _find(_heads(net), weights)
            tensors = load_file(file)
        names = [f"lin{stage}.model.1.weight" for stage in range(len(_NETWORKS[net].taps))]
        _refuse_missing(names, tensors, file)
        super().__init__(nn.ParameterList(tensors[name] for name in names))
        self.trunk = trunk
        self.min_side = trunk.min_side
        self.protocol = {
            "network": f"LPIPS v0.1, {net}",
            "weights": {path.name: sha256(path) for path in (trunk.file, file)},
        }

    def forward(self, images: Float[Tensor, "b c h w"], targets: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
        """Distance of each pair, in float32.

        Args:
            images: In [-1, 1], one or three channels; one channel is repeated. The gradient flows to these.
            targets: Likewise, without gradient.

        Raises:
            ValueError: If the images have another number of channels or are too small for the network.
        """
        with torch.no_grad():
            target_features = self.trunk(targets)
        return self.distance(self.trunk(images), target_features)

    def distance(
        self, features: Sequence[Float[Tensor, "b _ _ _"]], target_features: Sequence[Float[Tensor, "b _ _ _"]]
    ) -> Float[Tensor, " b"]:
        """Distance of each pair of images of which `trunk` made these features."""
        distances = features[0].new_zeros(len(features[0]))
        weights = self.network.parameters()
        with full_precision(distances):
            for ours, theirs, weight in zip(features, target_features, weights, strict=True):
                error = (_unit_length(ours) - _unit_length(theirs)).square()
                distances = distances + F.conv2d(error, weight).mean((1, 2, 3))
        return distances


def _unit_length(features: Tensor) -> Tensor:
    # vector_norm, unlike the square root of a sum, has a finite gradient where all channels are zero.
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + EPSILON)


def published_files(net: str) -> dict[str, Callable[[], dict[str, Tensor]]]:
    """Names of the files of a network in a folder of weights, and what gives the tensors of each.

    The network is downloaded by torchvision unless its cache holds it; the 1x1 layers come with torchmetrics.
    """
    network = _NETWORKS[net]
    return {network.file: partial(_published_trunk, network), _heads(net): partial(_published_heads, net)}


def _published_trunk(network: _Network) -> dict[str, Tensor]:
    tensors = get_weight(network.published).get_state_dict(check_hash=True, weights_only=True, map_location="cpu")
    return {name: tensor for name, tensor in tensors.items() if name.startswith("features.")}


def _published_heads(net: str) -> dict[str, Tensor]:
    return torch.load(_published_heads_file(net), map_location="cpu", weights_only=True)


def _published_heads_file(net: str) -> Path:
    return Path(torchmetrics.__file__).parent / f"functional/image/lpips_models/{net}.pth"


def _heads(net: str) -> str:
    return f"lpips_{net}_lin.safetensors"


def _find(name: str, weights: str | Path | None) -> Path:
    try:
        return find_weights(name, weights)
    except WeightsNotFoundError as error:
        raise WeightsNotFoundError(f"{error}; in place of a folder, torchvision stands for its own weights") from None


def _refuse_missing(names: Sequence[str], tensors: dict[str, Tensor], file: Path) -> None:
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ValueError(f"{file} lacks {len(missing)} tensors, the first is {missing[0]}; it has {sorted(tensors)}")
