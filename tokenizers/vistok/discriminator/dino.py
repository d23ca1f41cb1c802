"""A discriminator on the features of a frozen vision transformer.

A. Sauer et al.: StyleGAN-T, https://arxiv.org/abs/2301.09515; it also trained the tokenizer of VAR,
https://arxiv.org/abs/2404.02905. Differences: images are always resized to what the transformer takes, never cropped to
it, and batch normalisation takes its statistics over the whole batch instead of over eight images.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from typing_extensions import override

from vistok.discriminator.base import Discriminator
from vistok.loss.backbone import FrozenBackbone


class DINODiscriminator(Discriminator):
    """One logit per token and depth, ``(b n)``: small convolutional heads on the features of a frozen transformer.

    Only the heads are trained. The transformer is in no state dict and no optimiser and always in evaluation mode, but
    the gradient passes through it to the images.

    Args:
        channels: Channels of an image, 1, 3 or 4; one is repeated, four are composited over white.
        model: A vision transformer of timm.
        pretrained: Its weights, see `vistok.loss.FrozenBackbone`.
        image_size: Side in pixels that images are resized to, a multiple of the patch size.
        layers: Blocks that are read out, besides the embedding of the patches.
        kernel_size: Tokens that the second convolution of a head spans in raster order, odd.

    Raises:
        ValueError: If an argument is out of range, or the model is no vision transformer.
        WeightsNotFoundError: If the weights are not there.
    """

    def __init__(
        self,
        channels: int = 3,
        model: str = "vit_small_patch16_224.dino",
        pretrained: str | None = None,
        image_size: int = 224,
        layers: Sequence[int] = (2, 5, 8, 11),
        kernel_size: int = 9,
    ) -> None:
        super().__init__()
        if channels not in (1, 3, 4):
            raise ValueError(f"channels must be 1, 3 or 4, got {channels}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
        self.channels = channels
        self.backbone = _Readouts(model, pretrained, image_size)
        self.layers = self.backbone.keep(layers)
        width = self.backbone.network.embed_dim
        self.heads = nn.ModuleList(_head(width, kernel_size) for _ in range(len(self.layers) + 1))

    @override
    def logits(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b n"]:
        readouts = self.backbone(images, self.layers)
        return torch.cat([head(tokens).flatten(1) for head, tokens in zip(self.heads, readouts, strict=True)], dim=1)


class _Readouts(FrozenBackbone):
    """Patch embeddings and outputs of blocks of a transformer, each with its class token added to every position."""

    def keep(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Drop what lies behind the last of some blocks; their numbers in increasing order."""
        if not isinstance(self.network, VisionTransformer):
            raise ValueError(f"{self.model} is no vision transformer of timm: use model=vit_small_patch16_224.dino")
        depth = len(self.network.blocks)
        if not layers or not set(layers) <= set(range(depth)):
            raise ValueError(f"layers must be some of 0 to {depth - 1}, got {list(layers)}")
        self.network.blocks = self.network.blocks[: max(layers) + 1]
        return tuple(sorted(set(layers)))

    def forward(self, images: Tensor, layers: Sequence[int]) -> list[Float[Tensor, "b e n"]]:
        network = self.network
        tokens = network.norm_pre(network._pos_embed(network.patch_embed(self._inputs(images))))
        stages = [tokens]
        for depth, block in enumerate(network.blocks):
            tokens = block(tokens)
            if depth in layers:
                stages.append(tokens)
        first = network.num_prefix_tokens
        # Without a class token there is nothing to add.
        return [(tokens[:, first:] + tokens[:, : min(first, 1)].sum(1, keepdim=True)).mT for tokens in stages]


class _Residual(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return (super().forward(input) + input) / math.sqrt(2)


def _head(width: int, kernel_size: int) -> nn.Sequential:
    return nn.Sequential(
        *_block(width, 1), _Residual(*_block(width, kernel_size)), spectral_norm(nn.Conv1d(width, 1, 1))
    )


def _block(width: int, kernel_size: int) -> tuple[nn.Module, ...]:
    return (
        spectral_norm(nn.Conv1d(width, width, kernel_size, padding=kernel_size // 2, padding_mode="circular")),
        # There is no evaluation in which running averages would be used.
        nn.BatchNorm1d(width, eps=1e-6, track_running_stats=False),
        nn.LeakyReLU(0.2),
    )
