"""Any network of timm as a frozen judge or teacher."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vistok.loss.frozen import Frozen, full_precision, rgb_frames
from vistok.metric.weights import WeightsNotFoundError, find_weights

TIMM = "timm"


class FrozenBackbone(Frozen):
    """A network of timm, frozen, in float32. It sees images in [-1, 1] as its own preprocessing would give them.

    Videos are seen frame by frame, gray is repeated to RGB, alpha is composited over white, see
    `vistok.loss.frozen.rgb_frames`.

    Args:
        model: Name in timm, such as ``convnext_small.fb_in1k``.
        pretrained: File of weights, or folder with ``<model>.safetensors``; or ``timm`` for timm's own weights, which
            are downloaded unless its cache holds them. Default: the folder of the environment variable
            ``VISTOK_WEIGHTS``.
        size: Side of the square that images are resized to (bilinear, antialiased), in pixels. None leaves them at
            their size, for models that take any.

    Raises:
        ValueError: If timm has no such model, or `size` is None and the model takes one size only.
        WeightsNotFoundError: If there are no weights.
    """

    def __init__(self, model: str, pretrained: str | Path | None = None, size: int | None = 224) -> None:
        if not timm.is_model(model):
            similar = timm.list_models(f"*{model.split('.')[0].split('_')[0]}*")[:5]
            raise ValueError(f"timm has no model {model!r}; similar names: {', '.join(similar) or 'none'}")
        overlay = {} if pretrained == TIMM else {"file": str(_find(model, pretrained))}
        network: Any = timm.create_model(model, pretrained=True, pretrained_cfg_overlay=overlay)
        if hasattr(network, "set_input_size"):
            if size is None:
                raise ValueError(f"{model} takes one size only: write size={network.pretrained_cfg['input_size'][-1]}")
            network.set_input_size((size, size))
        super().__init__(network)
        self.model = model
        self.size = size
        self.mean, self.std = network.pretrained_cfg["mean"], network.pretrained_cfg["std"]

    def levels(self, images: Float[Tensor, "b c *size"], indices: Sequence[int]) -> list[Float[Tensor, "n e h w"]]:
        """Features of some levels: stages of a convolutional network or blocks of a transformer.

        Those of a transformer are normalised as its last ones are, and leave the class token out.

        Args:
            images: In [-1, 1].
            indices: Levels in increasing order, negative ones from the end.
        """
        with full_precision(images):
            return self.network.forward_intermediates(
                self._inputs(images), indices=list(indices), norm=True, stop_early=True, intermediates_only=True
            )

    def dense(self, images: Float[Tensor, "b c *size"], level: int | None) -> Float[Tensor, "n e h w"]:
        """Features of one level; None stands for the last one behind the classifier, which of CLIP is its projection.

        Raises:
            ValueError: If `level` is None and the model has no classifier.
        """
        if level is not None:
            return self.levels(images, [level])[0]
        classifier = self.network.get_classifier()
        if not isinstance(classifier, nn.Linear):
            raise ValueError(f"level=null needs a linear classifier, {self.model} has none: write level=-1")
        features = self.levels(images, [-1])[0]
        with full_precision(images):
            return classifier(features.movedim(1, -1)).movedim(-1, 1)

    def embedding(self, images: Float[Tensor, "b c *size"], logits: bool = False) -> Float[Tensor, "n e"]:
        """Pooled features of whole images, or the logits of their classes."""
        with full_precision(images):
            features = self.network.forward_features(self._inputs(images))
            return self.network.forward_head(features, pre_logits=not logits)

    def _inputs(self, images: Tensor) -> Tensor:
        frames = rgb_frames(images.float())
        if self.size is not None and frames.shape[2:] != (self.size, self.size):
            frames = F.interpolate(frames, (self.size, self.size), mode="bilinear", antialias=True)
        mean, std = (frames.new_tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return ((frames + 1) / 2 - mean) / std


def _find(model: str, pretrained: str | Path | None) -> Path:
    if pretrained is not None and Path(pretrained).is_file():
        return Path(pretrained)
    name = f"{model}.safetensors"
    try:
        return find_weights(name, pretrained)
    except WeightsNotFoundError:
        raise WeightsNotFoundError(
            f"there is no {name} in {pretrained or 'the folder of VISTOK_WEIGHTS'}: write pretrained=FILE or "
            "pretrained=FOLDER, set the environment variable VISTOK_WEIGHTS to its folder, or write pretrained=timm "
            "to let timm download it"
        ) from None
