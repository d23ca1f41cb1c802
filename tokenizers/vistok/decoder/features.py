"""Decoder that predicts the features of a teacher in place of an image: VQ-KD.

Z. Peng et al.: BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers, https://arxiv.org/abs/2208.06366;
L. Wang et al.: Image Understanding Makes for A Good Tokenizer for Image Generation, https://arxiv.org/abs/2411.04406.
"""

from collections.abc import Sequence

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from vistok.decoder.base import Decoder
from vistok.layers.transformer import Transformer, rotary_angles


class FeatureDecoder(Decoder):
    """A transformer and a perceptron with one hidden layer, from the codes to the features of a teacher.

    It has no pixels: its `channels` are those of the features, and its grid is that of the codes.

    Args:
        channels: Channels of the features of the teacher: 512 for CLIP ViT-B/16, 768 for DINOv2 ViT-B.
        width: Channels of a token, a multiple of `num_heads`.
        depth: Number of transformer blocks; 0: only the perceptron, which sees one position at a time.
        num_heads: Attention heads.
        mlp_ratio: Hidden channels of the perceptrons of the transformer, in units of `width`.
        gradient_checkpointing: Compute the activations of each block again in the backward pass.
    """

    output = "features"

    def __init__(
        self,
        channels: int = 512,
        width: int = 768,
        depth: int = 1,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels must be those of the features of the teacher, got {channels}")
        if gradient_checkpointing and not depth:
            raise ValueError("gradient_checkpointing has no effect with depth=0: there are no blocks")
        self.channels = channels
        self.factor = 1
        self.dim = width
        self.transformer = (
            Transformer(width, depth, num_heads, mlp_ratio, gradient_checkpointing=gradient_checkpointing)
            if depth
            else None
        )
        self.head = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, channels))

    @override
    def forward(
        self,
        features: Float[Tensor, "b e h w"],
        codes: Float[Tensor, "b d h w"] | None = None,
        size: Sequence[int] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Features of the teacher on the grid of the codes; `codes` and the `size` of the image are not needed."""
        height, width = features.shape[2:]
        tokens = rearrange(features, "b e h w -> b (h w) e")
        if self.transformer is not None:
            tokens = self.transformer(tokens, rotary_angles((height, width), self.transformer.head_dim, tokens.device))
        return rearrange(self.head(tokens), "b (h w) c -> b c h w", h=height)

    @property
    @override
    def last_layer(self) -> Tensor:
        layer = self.head[-1]
        assert isinstance(layer, nn.Linear)
        return layer.weight
