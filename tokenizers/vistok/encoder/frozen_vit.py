"""Pretrained networks as encoders: DINOv2, CLIP, SigLIP, MAE and all other models of timm.

L. Wang et al.: Image Understanding Makes for A Good Tokenizer for Image Generation, https://arxiv.org/abs/2411.04406.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor
from typing_extensions import override

from vistok.encoder.base import Encoder

HUB = "hub"


class TimmEncoder(Encoder):
    """Spatial features of a model of timm, frozen or trained further.

    Images are brought to the mean and standard deviation that the model was trained with; with 1 or 4 channels all take
    the average of these, and pretrained weights of the first layer are adapted as timm does. Transformers take images
    of any multiple of their patches, by interpolated positions.

    The weights belong to the tokenizer: a bundle holds them, and loading it needs neither `pretrained` nor `weights`.

    Args:
        model: Name as in ``timm.list_models()``, for example ``vit_base_patch14_dinov2``.
        pretrained: Start from pretrained weights; false: from random ones.
        weights: Where they are: a file ``.safetensors`` or ``.pth``, or a folder with ``<model>.safetensors`` (default:
            the environment variable ``VISTOK_WEIGHTS``); ``hub``: timm downloads them from the Hugging Face hub.
        frozen: No gradient, and evaluation mode always; false: the model is trained with the tokenizer.
        levels: Which levels (blocks of a transformer, stages of a convolutional network) give features, ascending, from
            the end if negative. Several are concatenated on the grid of the coarsest one. Levels of a transformer are
            normalised by its last layer, and what follows the last level used is left out.
        factor: Pixels per feature along each axis; null: those of the model. Images are resized where it differs: with
            16, a model of patches of 14 pixels sees images of 256 pixels as 224.
        channels: Channels of an image.
        gradient_checkpointing: Compute the activations of each block again in the backward pass; not if `frozen`.

    Raises:
        ValueError: If the model does not exist or has no spatial features, or an argument has no effect.
        WeightsNotFoundError: If the pretrained weights are not where they were looked for.
    """

    SOURCES: Mapping[str, Any] = {"pretrained": False, "weights": None}

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: str = "vit_base_patch14_dinov2",
        pretrained: bool = True,
        weights: str | None = None,
        frozen: bool = True,
        levels: Sequence[int] = (-1,),
        factor: int | None = None,
        channels: int = 3,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if channels not in (1, 3, 4):
            raise ValueError(f"channels must be 1, 3 or 4, got {channels}")
        if weights is not None and not pretrained:
            raise ValueError(f"weights={weights} has no effect with pretrained=false: set pretrained=true")
        if gradient_checkpointing and frozen:
            raise ValueError(
                "gradient_checkpointing has no effect on a frozen model: set frozen=false, or leave it out"
            )
        self.channels = channels
        self.frozen = frozen
        self.model = create(model, channels, pretrained, weights)
        info: Any = getattr(self.model, "feature_info", None)
        if not info or not hasattr(self.model, "forward_intermediates"):
            raise ValueError(f"model={model} has no spatial features in timm: choose another one")
        self.levels = [level % len(info) for level in levels if -len(info) <= level < len(info)]
        if not levels or self.levels != sorted(set(self.levels)) or len(self.levels) < len(levels):
            raise ValueError(
                f"levels must be ascending numbers below {len(info)}, from the end if negative, for model={model}; got "
                f"{list(levels)}"
            )
        self.dim = sum(info[level]["num_chs"] for level in self.levels)
        self.stride = max(info[level]["reduction"] for level in self.levels)
        self.factor = self.stride if factor is None else factor
        if self.factor < 1:
            raise ValueError(f"factor must be a positive number of pixels, or null; got {factor}")
        self.model.prune_intermediate_layers(self.levels, prune_norm=False, prune_head=True)
        self.model.set_grad_checkpointing(gradient_checkpointing)
        self.model.requires_grad_(not frozen)
        for name in ("mean", "std"):
            values = torch.tensor(self.model.pretrained_cfg[name])
            values = values if channels == 3 else values.mean().expand(channels)
            self.register_buffer(name, values.view(-1, 1, 1).clone())
        self.train()

    @override
    def train(self, mode: bool = True) -> "TimmEncoder":
        """Set the mode; a frozen model stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.model.eval()
        return self

    @override
    def forward(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b e h w"]:
        """Features of images; the grid is the image size over `factor`."""
        height, width = (side * self.stride for side in self.grid(images.shape[2:]))
        if (height, width) != images.shape[2:]:
            images = F.interpolate(images, (height, width), mode="bicubic", antialias=True)
        inputs = ((images + 1) / 2 - self.mean) / self.std
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self.model.forward_intermediates(inputs, self.levels, norm=True, intermediates_only=True)
        grid = maps[-1].shape[2:]
        return torch.cat([F.adaptive_avg_pool2d(each, grid) for each in maps], 1)


def create(name: str, channels: int, pretrained: bool, weights: str | None) -> Any:
    """A model of timm without its classifier, see `TimmEncoder`."""
    # Imported late: a tokenizer without it loads in a fraction of the time.
    import timm

    if not timm.is_model(name):
        raise ValueError(f"model={name!r} is no model of timm: choose one of timm.list_models()")
    options: dict[str, Any] = {"pretrained": pretrained, "in_chans": channels, "num_classes": 0}
    if pretrained and weights != HUB:
        options["pretrained_cfg_overlay"] = {"state_dict": read(name, weights)}
    try:
        # Of transformers; convolutional networks take images of any size anyway.
        return timm.create_model(name, dynamic_img_size=True, **options)
    except TypeError:
        return timm.create_model(name, **options)


def read(name: str, weights: str | None) -> dict[str, Tensor]:
    """Pretrained weights from a local file, see `TimmEncoder`; nothing in it is executed."""
    # Imported late: the package of the metrics is not needed to load a tokenizer.
    from vistok.metric.weights import find_weights

    path = Path(weights).expanduser() if weights is not None else None
    if path is None or not path.is_file():
        path = find_weights(f"{name}.safetensors", path)
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
