"""Transformer that decodes an image from a short sequence of tokens; sources as in `vistok.encoder.titok`."""

from collections.abc import Sequence

from einops.layers.torch import Rearrange
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from vistok.decoder.base import Decoder
from vistok.layers.transformer import (
    LatentTransformer,
    Transformer,
    check_patches,
    initialise,
    patch_grid,
    random_tokens,
)


def check_teacher(
    teacher_codebook_size: int | None, pixel_decoder: Decoder | None, channels: int, patch_size: int
) -> None:
    """Refuse a teacher that does not fit, with a ValueError that says which would."""
    if teacher_codebook_size is not None and teacher_codebook_size < 1:
        raise ValueError(f"teacher_codebook_size must be positive, or null, got {teacher_codebook_size}")
    if pixel_decoder is None:
        return
    if teacher_codebook_size is None:
        raise ValueError("pixel_decoder decodes the codes of a teacher: set teacher_codebook_size, or drop it")
    got = pixel_decoder.layout, pixel_decoder.channels, pixel_decoder.factor
    if got != ("image", channels, patch_size):
        raise ValueError(
            f"pixel_decoder must have layout image, channels {channels} and factor {patch_size}, "
            f"got {got[0]}, {got[1]} and {got[2]}"
        )


class TiTokDecoder(Decoder):
    """Mask tokens, one per patch, attend to the latent tokens and become the image.

    With `teacher_codebook_size`, each patch becomes logits over the codebook of a teacher instead of pixels: this is
    the first stage of the paper, whose teacher is the tokenizer of MaskGIT. With `pixel_decoder` as well, the expected
    code of the teacher is decoded to pixels: its second stage.

    With `text_dim`, the mask tokens attend to features of a text too, those of CLIP's text transformer in TA-TiTok
    (D. Kim et al.: Democratizing Text-to-Image Masked Generative Models with Compact Text-Aware One-Dimensional Tokens,
    https://arxiv.org/abs/2501.07730).

    Args:
        channels: Channels of an image.
        patch_size: Side of the patches, in pixels.
        image_size: Side or ``[H, W]`` of the training images, in pixels; the positions of other sizes are bicubic
            samples of those of this one.
        num_tokens: Longest sequence; its beginning decodes too.
        width: Channels of a token, a multiple of `num_heads`.
        depth: Number of blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden channels of the perceptrons, in units of `width`.
        teacher_codebook_size: Codes of the teacher whose logits are predicted (MaskGIT: 1024); None to predict pixels.
        pixel_decoder: Decoder of the teacher's codes; its factor must be `patch_size`.
        text_dim: Channels of the features of a text (TA-TiTok: 768); None: it takes no texts.
        text_length: Features of the longest text (TA-TiTok: 77); None without `text_dim`.
        gradient_checkpointing: Recompute each block in the backward pass.
    """

    layout = "sequence"

    def __init__(
        self,
        channels: int = 3,
        patch_size: int = 16,
        image_size: int | Sequence[int] = 256,
        num_tokens: int = 64,
        width: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        teacher_codebook_size: int | None = None,
        pixel_decoder: Decoder | None = None,
        text_dim: int | None = None,
        text_length: int | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_patches(channels, patch_size)
        check_teacher(teacher_codebook_size, pixel_decoder, channels, patch_size)
        self.channels = channels
        self.factor = patch_size
        self.dim = width
        self.num_tokens = num_tokens
        if any(number is not None and number < 1 for number in (text_dim, text_length)) or (
            (text_dim is None) != (text_length is None)
        ):
            raise ValueError(
                "text_dim and text_length are positive numbers for texts, or both null, got "
                f"{text_dim} and {text_length}"
            )
        self.text_dim = text_dim
        self.teacher_codebook_size = teacher_codebook_size
        self.training_grid = patch_grid(image_size, patch_size)
        transformer = Transformer(width, depth, num_heads, mlp_ratio, gradient_checkpointing=gradient_checkpointing)
        self.trunk = LatentTransformer(transformer, patch_size, image_size, num_tokens)
        self.mask_token = random_tokens(1, width)
        if teacher_codebook_size is None:
            # Channels are the fastest axis, unlike in `unfold_patches`: the order of the published weights.
            unfold = Rearrange("b (p q c) h w -> b c (h p) (w q)", p=patch_size, q=patch_size)
            self.head = nn.Sequential(nn.Conv2d(width, channels * patch_size**2, 1), unfold)
            self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)
        else:
            self.output = "features" if pixel_decoder is None else "images"
            self.head = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.Tanh())
            self.conv_out = nn.Conv2d(2 * width, teacher_codebook_size, 1)
        if text_dim is not None and text_length is not None:
            self.from_texts = nn.Linear(text_dim, width)
            self.text_positions = random_tokens(text_length, width)
        self.apply(initialise)
        self.pixel_decoder = pixel_decoder
        if teacher_codebook_size is not None and pixel_decoder is not None:
            self.teacher_codebook = random_tokens(teacher_codebook_size, pixel_decoder.dim)

    @override
    def image_size(self, grid: Sequence[int], size: Sequence[int] | None = None) -> tuple[int, ...]:
        """Size in pixels that a sequence of latent tokens decodes to: `size`, or that of the training images.

        Raises:
            ValueError: If the sequence is longer than `num_tokens`, or a side is not a multiple of `factor`.
        """
        (length,) = grid
        if not 1 <= length <= self.num_tokens:
            raise ValueError(f"a sequence has 1 to num_tokens={self.num_tokens} tokens, got {length}")
        rows, columns = self.training_grid if size is None else patch_grid(size, self.factor)
        return rows * self.factor, columns * self.factor

    @override
    def forward(
        self,
        features: Float[Tensor, "b e n"],
        codes: Float[Tensor, "b d n"] | None = None,
        size: Sequence[int] | None = None,
        texts: Float[Tensor, "b m t"] | None = None,
    ) -> Float[Tensor, "b c H W"]:
        """Images of `size` pixels (default: that of the training images), or a teacher's logits; `codes` are unused.

        Raises:
            ValueError: If a decoder with `text_dim` gets no `texts`, or longer ones than `text_length`, or one without
                gets some.
        """
        height, width = (side // self.factor for side in self.image_size(features.shape[2:], size))
        patches = self.mask_token.expand(len(features), height * width, -1).unflatten(1, (height, width))
        patches, _ = self.trunk(patches, features.mT, self._context(texts))
        outputs = self.conv_out(self.head(patches.movedim(-1, 1)))
        if self.pixel_decoder is None:
            return outputs
        expected = outputs.softmax(1).movedim(1, -1) @ self.teacher_codebook
        return self.pixel_decoder(expected.movedim(-1, 1))

    def _context(self, texts: Tensor | None) -> Float[Tensor, "b m e"] | None:
        """Tokens of the texts."""
        self.check_texts(texts)
        if texts is None:
            return None
        length = len(self.text_positions)
        if texts.shape[1] > length:
            raise ValueError(f"texts have at most text_length={length} features, got {texts.shape[1]}: cut them")
        return self.from_texts(texts) + self.text_positions[: texts.shape[1]]

    @property
    @override
    def last_layer(self) -> Tensor:
        return self.conv_out.weight if self.pixel_decoder is None else self.pixel_decoder.last_layer
