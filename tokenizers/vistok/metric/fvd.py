"""The network of the Frechet video distance (FVD).

T. Unterthiner et al.: Towards Accurate Generative Models of Video: A New Metric & Challenges,
https://arxiv.org/abs/1812.01717: the Frechet distance of the logits of an I3D network that was trained on Kinetics-400.
The distance itself is ``fvd`` of `vistok.metric.distances`.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vistok.hub.files import sha256
from vistok.loss.frozen import Frozen
from vistok.metric.extractor import Features
from vistok.metric.precision import full_float32
from vistok.metric.weights import WeightsNotFoundError, find_weights

I3D_FILE = "i3d_torchscript.pt"
# It halves the frames three times, rounding up, and then takes means over two.
I3D_MIN_FRAMES = 9


class I3D(Frozen):
    """The I3D network in the TorchScript file ``i3d_torchscript.pt`` of StyleGAN-V, which CD-FVD takes too.

    The file is loaded by `torch.jit.load`. That runs no Python and unpickles nothing, but what the file says is
    executed as operations of torch, some of which read files: use one that you trust.

    Args:
        file: Its path, or its name in the folder of weights.
        weights: Folder of the weights; default: the environment variable ``VISTOK_WEIGHTS``.
        network: The network, in place of the file; called as
            ``network(pixels, rescale=True, resize=True, return_features=True)``.

    Attributes:
        protocol: Network, file and its SHA-256, and resize, to be written beside every number.

    Raises:
        WeightsNotFoundError: If the file is not there.
        ValueError: If it is no TorchScript file.
    """

    def __init__(
        self, file: str | Path = I3D_FILE, weights: str | Path | None = None, network: nn.Module | None = None
    ) -> None:
        source: dict[str, Any] = {"weights": "given by the caller"}
        if network is None:
            path = _find(Path(file).expanduser(), weights)
            network = _load(path)
            source = {"weights": path.name, "sha256": sha256(path)}
        # In a list, because a module of TorchScript refuses some of what is asked of modules.
        super().__init__(nn.ModuleList([network]))
        self.protocol: dict[str, Any] = {
            "extractor": "I3D, Kinetics-400, logits (TorchScript of StyleGAN-V)",
            **source,
            "extractor_resize": "224x224, by the network itself",
        }

    def forward(self, pixels: Float[Tensor, "b 3 t h w"]) -> Features:
        """Features of videos of values in [0, 255]."""
        with full_float32(pixels.device):
            return Features(self.network[0](pixels.float(), rescale=True, resize=True, return_features=True))


def _find(file: Path, weights: str | Path | None) -> Path:
    if file.is_file():
        return file
    try:
        return find_weights(str(file), weights)
    except WeightsNotFoundError as error:
        raise WeightsNotFoundError(f"{error}; or write fvd=/path/to/{I3D_FILE}") from None


def _load(path: Path) -> nn.Module:
    with warnings.catch_warnings():
        # Torch would rather have another format, but this file is what published numbers were measured with.
        warnings.filterwarnings("ignore", ".*torch.jit.load. is deprecated", FutureWarning)
        try:
            return torch.jit.load(path, map_location="cpu")
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path} is no TorchScript file ({reason}): FVD needs {I3D_FILE}") from error
