"""Convolutional decoder: the mirror image of `vistok.encoder.CNNEncoder`."""

from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from vistok.decoder.base import Decoder
from vistok.layers import (
    AttentionBlock,
    CodeNorm,
    NearestUpsample,
    ResidualBlock,
    Upsample,
    attends_in_the_middle,
    attention_levels,
    check_feature_patches,
    middle_blocks,
    normalisation,
    recompute,
    refining_blocks,
    takes_codes,
    trunk_widths,
    unfold_patches,
)


class ConvolutionalDecoder(Decoder):
    """What convolutional decoders share: a convolution, blocks, normalisation, swish, a convolution.

    Blocks and normalisations that are modulated by the codes get them.

    Args:
        channels: Channels of an image.
        patch_size: Side of the patches that the last layer unfolds, in pixels.
        num_levels: Number of resolutions.
        gradient_checkpointing: Compute the activations of each block again in the backward pass.
    """

    conv_in: nn.Conv2d
    blocks: nn.Sequential
    norm_out: nn.Module
    conv_out: nn.Conv2d

    def __init__(self, channels: int, patch_size: int, num_levels: int, gradient_checkpointing: bool) -> None:
        super().__init__()
        self.channels = channels
        self.patch_size = patch_size
        self.factor = patch_size * 2 ** (num_levels - 1)
        self.gradient_checkpointing = gradient_checkpointing
        self.code_dim: int | None = None

    @override
    def set_code_dim(self, code_dim: int) -> None:
        self.code_dim = code_dim
        for module in self.modules():
            if isinstance(module, CodeNorm):
                module.set_code_dim(code_dim)

    @override
    def forward(
        self,
        features: Float[Tensor, "b e h w"],
        codes: Float[Tensor, "b d h w"] | None = None,
        size: Sequence[int] | None = None,
    ) -> Float[Tensor, "b c H W"]:
        """Images of the size of the grid times `factor`; `codes` are only for modulation, `size` is only checked.

        Raises:
            ValueError: If the decoder is modulated by the codes, and there are none or `set_code_dim` was not called.
        """
        self.image_size(features.shape[2:], size)
        if takes_codes(self) and (codes is None or self.code_dim is None):
            raise ValueError(
                f"{type(self).__name__} is modulated by the codes: call decoder.set_code_dim(dim) once, as Tokenizer "
                "does, and then decoder(features, codes=codes)"
            )
        hidden = self.conv_in(features)
        for block in (*self.blocks, self.norm_out):
            inputs = (hidden, codes) if takes_codes(block) else (hidden,)
            hidden = recompute.call(block, *inputs, gradient_checkpointing=self.gradient_checkpointing)
        return unfold_patches(self.conv_out(F.silu(hidden)), self.patch_size)

    @property
    @override
    def last_layer(self) -> Tensor:
        return self.conv_out.weight


class CNNDecoder(ConvolutionalDecoder):
    """Residual blocks from the coarsest resolution to the finest.

    Args:
        channels: Channels of an image.
        patch_size: Side of the patches that the last layer unfolds, in pixels.
        base_channels: Channels at the finest resolution, a multiple of 32.
        channel_multipliers: Channels of each resolution from finest to coarsest, in units of `base_channels`.
        num_blocks: Residual blocks per resolution; one more than in the encoder, in the papers.
        attention: ``none``; ``middle`` for self-attention in the middle, which precedes the coarsest resolution;
            ``last`` for self-attention at the coarsest resolution too; or a list such as ``[16]``, as for
            `vistok.encoder.CNNEncoder`.
        resolution: Side of the images that a list is stated for, in pixels.
        middle: Whether there are residual blocks in the middle; null: if there is attention.
        middle_attention: Whether there is self-attention between them; null: if there is attention anywhere.
        resample_with_conv: Whether convolutions follow the nearest neighbours that double the grid.
        num_groups: Groups of the normalisations.
        z_channels: Channels of the features; null: those of the coarsest resolution.
        feature_patch_size: Side of the patches of features that are unfolded from channels first, as
            `vistok.encoder.CNNEncoder` folds them.
        dropout: Dropout rate inside the residual blocks.
        gradient_checkpointing: Compute the activations of each block again in the backward pass.
    """

    # Makes the normalisation of a number of channels, over `num_groups` groups.
    norm: Callable[..., nn.Module] = staticmethod(normalisation)

    def __init__(
        self,
        channels: int = 3,
        patch_size: int = 8,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (1,),
        num_blocks: int = 3,
        attention: str | Sequence[int] = "none",
        resolution: int | None = None,
        middle: bool | None = None,
        middle_attention: bool | None = None,
        resample_with_conv: bool = True,
        num_groups: int = 32,
        z_channels: int | None = None,
        feature_patch_size: int = 1,
        dropout: float = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        widths = trunk_widths(channels, base_channels, channel_multipliers, num_blocks, z_channels, patch_size)
        levels = attention_levels(attention, len(widths), patch_size, resolution)
        super().__init__(channels, patch_size, len(widths), gradient_checkpointing)
        width = widths[-1]
        check_feature_patches(feature_patch_size)
        self.feature_patch_size = feature_patch_size
        self.factor *= feature_patch_size
        self.dim = (z_channels or width) * feature_patch_size**2
        in_the_middle = attends_in_the_middle(attention, middle_attention)
        norm = partial(self.norm, num_groups=num_groups)
        block = partial(ResidualBlock, dropout=dropout, norm=norm)
        attend = partial(AttentionBlock, norm=norm)
        double = Upsample if resample_with_conv else NearestUpsample
        self.conv_in = nn.Conv2d(z_channels or width, width, 3, padding=1)
        self.blocks = nn.Sequential(
            *middle_blocks(width, block, attend if in_the_middle else None, middle),
            *refining_blocks(widths, num_blocks, block, double, attend, levels),
        )
        self.norm_out = norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], channels * patch_size**2, 3, padding=1)

    @override
    def forward(
        self,
        features: Float[Tensor, "b e h w"],
        codes: Float[Tensor, "b d h w"] | None = None,
        size: Sequence[int] | None = None,
    ) -> Float[Tensor, "b c H W"]:
        side = self.feature_patch_size
        if side == 1:
            return super().forward(features, codes, size)
        self.image_size(features.shape[2:], size)
        if codes is not None:
            codes = F.interpolate(codes, scale_factor=float(side), mode="nearest")
        return super().forward(unfold_patches(features, side), codes)
