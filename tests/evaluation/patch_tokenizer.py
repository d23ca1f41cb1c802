"""A tokenizer small enough to know what it must measure."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from vistok import Tokenizer
from vistok.decoder.base import Decoder
from vistok.encoder.base import Encoder
from vistok.quantizer.base import Quantized, Quantizer

PROTOCOL = {"dataset": "synthetic", "split": "val", "resize": "none", "crop": "none"}


class PatchMean(Encoder):
    """Mean colour of each patch, in [-1, 1]."""

    def __init__(self, factor=4, channels=3):
        super().__init__()
        self.factor, self.channels, self.dim = factor, channels, channels

    def forward(self, images):
        return F.avg_pool2d(images, self.factor)


class Repeat(Decoder):
    """Every patch has the colour of its code."""

    def __init__(self, factor=4, channels=3):
        super().__init__()
        self.factor, self.channels, self.dim = factor, channels, channels
        self.calls = 0

    def forward(self, features, codes=None, size=None):
        self.calls += 1
        return F.interpolate(features, scale_factor=self.factor)

    @property
    def last_layer(self):
        raise NotImplementedError


class Levels(Quantizer):
    """Two levels per channel: one codebook over all channels, or one per channel, or none at all."""

    def __init__(self, dim=3, kind="joint"):
        super().__init__()
        self.dim, self.kind, self.loss_weights = dim, kind, {}
        self.codebook_sizes = {"joint": (2**dim,), "separate": (2,) * dim, "continuous": ()}[kind]
        self.bits = math.inf if kind == "continuous" else float(dim)

    def forward(self, features, labels=None):
        positive = (features >= 0).long()
        if self.kind == "continuous":
            return Quantized(features, positive.movedim(1, -1)[..., :0], {})
        indices = positive.movedim(1, -1)
        if self.kind == "joint":
            indices = (indices * 2 ** torch.arange(self.dim)).sum(-1)
        return Quantized(positive.to(features.dtype) - 0.5, indices, {})

    def indices_to_codes(self, indices: torch.Tensor, grid: Sequence[int] | None = None):
        raise NotImplementedError

    def codes_to_indices(self, codes: torch.Tensor):
        raise NotImplementedError


def make_tokenizer(kind="joint", channels=3, factor=4, decoder=None):
    encoder, quantizer = PatchMean(factor, channels), Levels(channels, kind)
    return Tokenizer(encoder, quantizer, decoder or Repeat(factor, channels), projection="none").eval()


def make_batches(*sizes, channels=3, size=(32, 48)):
    """Smooth images, one batch per number, with keys ``a0 a1 ... b0 ...``."""
    batches = []
    for letter, count in zip("abcdefgh", sizes, strict=False):
        small = torch.rand(count, channels, 5, 5)
        images = F.interpolate(small, size, mode="bicubic").clamp(0, 1) * 2 - 1
        batches.append({"images": images, "keys": [f"{letter}{i}" for i in range(count)], "bad": []})
    return batches
