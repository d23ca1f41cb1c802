"""Tokenizers with the calls that public generators make, so that vistok drops into their code bases.

The calls are those of the programs named in each class; where a program draws on a loss of its tokenizer, it gets the
quantizer's own losses, weighted and added.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vistok.quantizer import MultiScaleQuantizer, ResidualQuantizer, VectorQuantizer
from vistok.quantizer.base import Quantized, Quantizer
from vistok.quantizer.binary import BinaryQuantizer
from vistok.tokenizer import Tokenizer


class Facade(nn.Module):
    """A tokenizer under another program's calls, in evaluation mode whatever the program says.

    Args:
        tokenizer: What does the work.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.eval()

    def train(self, mode: bool = True) -> "Facade":
        """Stay in evaluation mode, also inside a generator that trains."""
        return super().train(False)

    def loss(self, quantized: Quantized) -> Float[Tensor, ""]:
        """The losses of the quantizer, weighted and added."""
        return _loss(self.tokenizer.quantizer, quantized)

    def require(self, fits: bool, what: str) -> None:
        """Raise a ValueError unless the tokenizer fits."""
        if not fits:
            raise ValueError(
                f"{type(self).__name__} is for {what}, this tokenizer has {type(self.tokenizer.quantizer).__name__} "
                f"with {self.tokenizer.quantizer.num_codebooks} codebooks on features of layout "
                f"{self.tokenizer.encoder.layout}"
            )


class CodeTable(nn.Module):
    """A codebook with the calls of ``torch.nn.Embedding``.

    Args:
        quantizer: With one codebook.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    @property
    def weight(self) -> Float[Tensor, "k d"]:
        """All codes.

        Raises:
            ValueError: If there are too many to list.
        """
        if self.quantizer.codebook is None:
            raise ValueError(f"the {self.quantizer.codebook_size} codes of this tokenizer are not kept as a table")
        return self.quantizer.codebook

    def forward(self, input: Int[Tensor, "b *grid"]) -> Float[Tensor, "b *grid d"]:
        """Codes of indices."""
        return self.quantizer.indices_to_codes(input.long()).movedim(1, -1)


class TamingTokenizer(Facade):
    """As taming-transformers, LlamaGen, Halton-MaskGIT and Janus call their ``VQModel``; images in [-1, 1].

    Args:
        tokenizer: Of images, with one codebook.

    Attributes:
        quantize: Has ``get_codebook_entry``.

    Raises:
        ValueError: If the tokenizer is another.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        quantizer = tokenizer.quantizer
        plain = quantizer.num_codebooks == 1 and not quantizer.scale_lengths((1, 1))
        self.require(tokenizer.encoder.layout == "image" and plain, "grids with one codebook")
        self.quantize = CodebookEntries(tokenizer)

    def encode(self, x: Float[Tensor, "b c H W"]) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """``(codes (b d h w), loss, (perplexity, encodings, indices (b*h*w,)))``; the two in between are None."""
        quantized = self.tokenizer.encode(x)
        return quantized.codes, self.loss(quantized), (None, None, quantized.indices.flatten())

    def decode(self, quant: Float[Tensor, "b d h w"]) -> Float[Tensor, "b c H W"]:
        """Images of codes."""
        return self.tokenizer.decode(quant)

    def decode_code(
        self, code_b: Int[Tensor, "..."], shape: Sequence[int] | None = None, channel_first: bool = True
    ) -> Float[Tensor, "b c H W"]:
        """Images of indices of any shape; `shape` is ``(b d h w)``, or ``(b h w d)`` with ``channel_first=False``."""
        if shape is None and code_b.ndim != 3:
            raise ValueError(f"indices {tuple(code_b.shape)} do not tell their grid: pass shape=(b, d, h, w)")
        if shape is not None:
            b, *grid = _without_channels(shape, channel_first)
            code_b = code_b.reshape(b, *grid)
        return self.tokenizer.decode_indices(code_b.long())

    def forward(self, input: Float[Tensor, "b c H W"]) -> tuple[Tensor, Tensor]:
        """``(images, loss)``."""
        quant, loss, _ = self.encode(input)
        return self.decode(quant), loss


class CodebookEntries(nn.Module):
    """The ``VectorQuantizer`` of taming, LlamaGen and diffusers.

    Args:
        tokenizer: With one codebook.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.quantizer = tokenizer.quantizer
        self.embedding = CodeTable(tokenizer.quantizer)

    def forward(self, z: Float[Tensor, "b d h w"]) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """``(codes (b d h w), loss, (perplexity, encodings, indices (b*h*w,)))``; the two in between are None."""
        quantized = self.quantizer(z)
        return quantized.codes, _loss(self.quantizer, quantized), (None, None, quantized.indices.flatten())

    @property
    def n_e(self) -> int:
        """Number of codes."""
        return self.quantizer.codebook_size

    @property
    def e_dim(self) -> int:
        """Channels of a code."""
        return self.quantizer.dim

    def get_codebook_entry(
        self, indices: Int[Tensor, "..."], shape: Sequence[int] | None = None, channel_first: bool | None = None
    ) -> Tensor:
        """Codes of indices.

        Args:
            indices: Of any shape.
            shape: None gives rows ``(n d)``.
            channel_first: None: `shape` is ``(b h w d)`` and the result ``(b d h w)``, as in taming. True: both are
                ``(b d h w)``; False: both are ``(b h w d)``; as in LlamaGen.
        """
        flat = indices.flatten().long()
        if shape is None:
            return self.quantizer.indices_to_codes(flat[None])[0].T
        b, *grid = _without_channels(shape, bool(channel_first))
        codes = self.quantizer.indices_to_codes(flat.view(b, *grid))
        return codes.movedim(1, -1) if channel_first is False else codes


def _without_channels(shape: Sequence[int], channel_first: bool) -> tuple[int, ...]:
    return (shape[0], *(shape[2:] if channel_first else shape[1:-1]))


def _loss(quantizer: Quantizer, quantized: Quantized) -> Float[Tensor, ""]:
    weighted = (quantizer.loss_weights[name] * value for name, value in quantized.losses.items())
    return sum(weighted, quantized.codes.new_zeros(()))


class OpenMAGVIT2Tokenizer(Facade):
    """As the generator of Open-MAGVIT2 calls its ``VQModel``; images in [-1, 1].

    Args:
        tokenizer: Of images, with one codebook of bits whose first channel is the least significant one, as `LFQ`.
        factors: Channels of the two parts of a code that the generator predicts, such as ``(6, 12)``
            (``factorized_bits`` there); None: it predicts whole codes.

    Attributes:
        quantize: Has ``get_codebook_entry``.

    Raises:
        ValueError: If the tokenizer is another, or `factors` do not divide its code.
    """

    def __init__(self, tokenizer: Tokenizer, factors: Sequence[int] | None = None) -> None:
        super().__init__(tokenizer)
        quantizer = tokenizer.quantizer
        fits = isinstance(quantizer, BinaryQuantizer) and quantizer.bit_order == "lsb_first"
        one = quantizer.num_codebooks == 1 and tokenizer.encoder.layout == "image"
        self.require(fits and one, "grids with one codebook of bits, bit_order=lsb_first")
        if factors is not None and (len(factors) != 2 or sum(factors) != quantizer.dim or min(factors) < 1):
            raise ValueError(f"factors must be two numbers of bits that add up to {quantizer.dim}, got {list(factors)}")
        self.factors = factors
        self.quantize = BitEntries(quantizer, factors)

    def encode(self, x: Float[Tensor, "b c H W"]) -> tuple[Tensor, Tensor, Any, None]:
        """``(codes (b d h w), loss, indices (b*h*w,), None)``; with factors, indices of both parts as a tuple."""
        quantized = self.tokenizer.encode(x)
        indices: Any = quantized.indices.flatten()
        if self.factors:
            indices = indices % 2 ** self.factors[0], indices >> self.factors[0]
        return quantized.codes, self.loss(quantized), indices, None

    def decode(self, quant: Float[Tensor, "b d h w"]) -> Float[Tensor, "b c H W"]:
        """Images of codes."""
        return self.tokenizer.decode(quant)


class BitEntries(nn.Module):
    """The look-up of Open-MAGVIT2's ``LFQ``.

    Args:
        quantizer: With one codebook of bits.
        factors: See `OpenMAGVIT2Tokenizer`.
    """

    def __init__(self, quantizer: Quantizer, factors: Sequence[int] | None) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.factors = factors

    def get_codebook_entry(
        self, x: Int[Tensor, "..."], bhwc: Sequence[int], order: str | None = None
    ) -> Float[Tensor, "b d h w"]:
        """Codes of indices; with factors, the first channels of those of ``order="pre"``, or the last of ``"post"``."""
        b, *grid = _without_channels(bhwc, False)
        x = x.long().view(b, *grid)
        if self.factors is None:
            return self.quantizer.indices_to_codes(x)
        first = self.factors[0]
        if order == "pre":
            return self.quantizer.indices_to_codes(x)[:, :first]
        return self.quantizer.indices_to_codes(x << first)[:, first:]


class DiffusersTokenizer(Facade):
    """As the pipelines of diffusers call their ``VQModel``.

    Args:
        tokenizer: Of images, with one codebook.
        unit_range: Whether images are in [0, 1], as for aMUSEd, or in [-1, 1], as for VQ-Diffusion.

    Attributes:
        quantize: Is called with features; has ``get_codebook_entry``.
        config: What the pipelines ask of it.

    Raises:
        ValueError: If the tokenizer is another.
    """

    def __init__(self, tokenizer: Tokenizer, unit_range: bool = True) -> None:
        super().__init__(tokenizer)
        self.quantize = TamingTokenizer(tokenizer).quantize
        self.unit_range = unit_range
        doublings = round(math.log2(tokenizer.factor))
        self.require(2**doublings == tokenizer.factor, "images that are 2, 4, 8, 16 ... times as large as their grid")
        self.config = SimpleNamespace(
            block_out_channels=(0,) * (doublings + 1),  # only counted, for the side of a cell
            latent_channels=tokenizer.quantizer.dim,
            vq_embed_dim=tokenizer.quantizer.dim,
            num_vq_embeddings=tokenizer.vocab_size,
            force_upcast=False,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of images and features."""
        return next(self.tokenizer.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the pipeline runs."""
        return next(self.tokenizer.parameters()).device

    def encode(self, x: Float[Tensor, "b c H W"]) -> SimpleNamespace:
        """Features before the quantizer: ``.latents (b d h w)``."""
        images = x * 2 - 1 if self.unit_range else x
        return SimpleNamespace(latents=self.tokenizer.to_codes(self.tokenizer.encoder(images)))

    def decode(
        self, h: Tensor, force_not_quantize: bool = False, return_dict: bool = True, shape: Sequence[int] | None = None
    ) -> Any:
        """Images, as ``.sample`` or as the first of a tuple.

        Args:
            h: Indices, whose grid `shape` ``(b h w d)`` tells; or features ``(b d h w)``.
            force_not_quantize: Whether features are codes already; without effect on indices.
            return_dict: False: a tuple.
            shape: Of the codes of indices.
        """
        if not h.is_floating_point():
            h = self.quantize.get_codebook_entry(h, shape)
        elif not force_not_quantize:
            h = self.quantize(h)[0]
        images = self.tokenizer.decode(h)
        images = (images + 1) / 2 if self.unit_range else images
        return SimpleNamespace(sample=images) if return_dict else (images,)


class OneDimensionalTokenizer(Facade):
    """As RAR and the MaskGIT of 1d-tokenizer call their ``PretrainedTokenizer``; images in [0, 1].

    Args:
        tokenizer: Of grids or sequences.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self.codebook_size = tokenizer.vocab_size

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "b c H W"]) -> Any:
        """Indices ``(b, n)``."""
        return self.tokenizer.flatten(self.tokenizer.encode(x * 2 - 1).indices)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Float[Tensor, "b c H W"]:
        """Images of indices ``(b n)`` or ``(b h w)``, as `decode_tokens`."""
        return self.decode_tokens(codes)

    @torch.no_grad()
    def decode_tokens(
        self, tokens: Int[Tensor, "b ..."], text_guidance: Float[Tensor, "b m t"] | None = None
    ) -> Float[Tensor, "b c H W"]:
        """Images in [0, 1] of the training size; `text_guidance` are features of texts, for TA-TiTok."""
        indices = self.tokenizer.unflatten(tokens.flatten(1).long())
        return self._to_unit(self.tokenizer.decode_indices(indices, self.tokenizer.default_size, text_guidance))

    def _to_unit(self, images: Tensor) -> Tensor:
        return ((images + 1) / 2).clamp(0, 1)


class TiTokTokenizer(OneDimensionalTokenizer):
    """As 1d-tokenizer's TiTok is called; images in [0, 1].

    Args:
        tokenizer: Of sequences, with one codebook.

    Raises:
        ValueError: If the tokenizer is another.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        one = tokenizer.quantizer.num_codebooks == 1
        self.require(tokenizer.encoder.layout == "sequence" and one, "sequences with one codebook")

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "b c H W"]) -> tuple[Tensor, dict[str, Tensor]]:
        """``(codes (b d 1 n), {"min_encoding_indices": (b 1 n), "quantizer_loss": scalar})``."""
        quantized = self.tokenizer.encode(x * 2 - 1)
        found = {"min_encoding_indices": quantized.indices[:, None], "quantizer_loss": self.loss(quantized)}
        return quantized.codes[:, :, None], found

    @torch.no_grad()
    def decode(self, codes: Float[Tensor, "b d 1 n"]) -> Float[Tensor, "b c H W"]:
        """Images of codes, of the training size."""
        return self._to_unit(self.tokenizer.decode(codes.squeeze(2), self.tokenizer.default_size))


class RQTokenizer(Facade):
    """As RQ-Transformer calls its ``RQVAE``; images in [-1, 1].

    Args:
        tokenizer: Of images, with a residual quantizer.

    Raises:
        ValueError: If the tokenizer is another.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        quantizer = tokenizer.quantizer
        fits = isinstance(quantizer, ResidualQuantizer) and quantizer.num_codebooks == quantizer.count > 1
        self.require(fits and tokenizer.encoder.layout == "image", "residual stacks on grids")

    @torch.no_grad()
    def get_codes(self, xs: Float[Tensor, "b c H W"]) -> Int[Tensor, "b h w depth"]:
        """Indices of images."""
        return self.tokenizer.encode(xs).indices

    @torch.no_grad()
    def get_soft_codes(
        self, xs: Float[Tensor, "b c H W"], temp: float = 1.0, stochastic: bool = False
    ) -> tuple[Float[Tensor, "b h w depth k"], Int[Tensor, "b h w depth"]]:
        """``(probabilities, codes)``: each depth's softmax of negative squared distances over `temp`, and its code.

        The codes are the nearest ones, or with `stochastic` drawn from the probabilities; the next depth takes what
        they leave.

        Raises:
            ValueError: If a depth does not take the nearest code of a table by its Euclidean distance.
        """
        quantizer: Any = self.tokenizer.quantizer
        stages = [quantizer.part(depth) for depth in range(quantizer.num_codebooks)]
        plain = all(isinstance(stage, VectorQuantizer) and stage.choices["distance"] == "euclidean" for stage in stages)
        self.require(plain, "get_soft_codes, so for residual stacks of VectorQuantizer(distance='euclidean'),")
        rest = self.tokenizer.to_codes(self.tokenizer.encoder(xs)).movedim(1, -1).float()
        soft, codes = [], []
        for stage in stages:
            # Not by products, whose rounding could prefer another code than `get_codes`.
            distances = torch.cdist(rest.flatten(0, 2), stage.codebook, compute_mode="donot_use_mm_for_euclid_dist")
            probabilities = (-distances.square() / temp).softmax(-1)
            code = torch.multinomial(probabilities, 1)[:, 0] if stochastic else distances.argmin(-1)
            rest = rest - stage.codebook[code].view_as(rest)
            soft.append(probabilities.unflatten(0, rest.shape[:3]))
            codes.append(code.unflatten(0, rest.shape[:3]))
        return torch.stack(soft, -2), torch.stack(codes, -1)

    @torch.no_grad()
    def decode_code(self, code: Int[Tensor, "b h w depth"]) -> Float[Tensor, "b c H W"]:
        """Images of indices of all or of the first depths."""
        return self.tokenizer.decode_indices(code)

    @torch.no_grad()
    def get_code_emb_with_depth(self, code: Int[Tensor, "b *grid depth"]) -> tuple[Tensor, None]:
        """``(codes (b *grid depth d), None)``: what each depth adds to the sum."""
        # The look-up accepts the first depths of a code: what a depth adds is the difference that it makes.
        sums = [self.tokenizer.quantizer.indices_to_codes(code[..., :end]) for end in range(1, code.shape[-1] + 1)]
        added = [sums[0], *(after - before for before, after in pairwise(sums))]
        return torch.stack([each.movedim(1, -1) for each in added], -2), None


class VARTokenizer(Facade):
    """As VAR calls its ``VQVAE``; images in [-1, 1], of the training size.

    Args:
        tokenizer: Of images, with a pyramid of one codebook.

    Attributes:
        quantize: Has ``idxBl_to_var_input``, ``get_next_autoregressive_input``, ``embed_to_fhat`` and ``embedding``.

    Raises:
        ValueError: If the tokenizer is another.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        quantizer = tokenizer.quantizer
        fits = isinstance(quantizer, MultiScaleQuantizer) and quantizer.num_codebooks == 1
        self.require(fits and tokenizer.encoder.layout == "image", "pyramids of one codebook on grids")
        self.quantize = PyramidInputs(tokenizer)
        self.vocab_size = tokenizer.vocab_size
        self.Cvae = quantizer.dim

    @torch.no_grad()
    def img_to_idxBl(  # noqa: N802 - the name is VAR's
        self, inp_img_no_grad: Float[Tensor, "b c H W"], v_patch_nums: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Indices ``(b side*side)`` of each scale; in VAR's progressive training of the first ``prog_si + 1``.

        Raises:
            ValueError: If `v_patch_nums` are not the tokenizer's own scales.
        """
        if v_patch_nums is not None and list(v_patch_nums) != list(self.quantize.v_patch_nums):
            raise ValueError(
                f"v_patch_nums={list(v_patch_nums)}: this tokenizer has the scales {list(self.quantize.v_patch_nums)}"
            )
        scales = self.tokenizer.encode(inp_img_no_grad).indices.split(self.quantize.lengths, 1)
        return list(scales if self.quantize.prog_si < 0 else scales[: self.quantize.prog_si + 1])

    @torch.no_grad()
    def idxBl_to_img(self, ms_idx_Bl: list[Tensor], same_shape: bool = True, last_one: bool = False) -> Any:  # noqa: N802, N803
        """Images of all scales, or a list of the images of the first scale, of the first two and so on.

        Raises:
            ValueError: With ``same_shape=False``: all images have the size of the whole.
        """
        return self.embed_to_img(self.quantize.embed(ms_idx_Bl), same_shape, last_one)

    @torch.no_grad()
    def embed_to_img(self, ms_h_BChw: list[Tensor], all_to_max_scale: bool = True, last_one: bool = False) -> Any:  # noqa: N803
        """The same of the codes ``(b d side side)`` of each scale."""
        f_hats = self.quantize.embed_to_fhat(ms_h_BChw, all_to_max_scale)
        return self.fhat_to_img(f_hats[-1]) if last_one else [self.fhat_to_img(f_hat) for f_hat in f_hats]

    @torch.no_grad()
    def img_to_reconstructed_img(
        self, x: Float[Tensor, "b c H W"], v_patch_nums: Sequence[int] | None = None, last_one: bool = False
    ) -> Any:
        """What images become through all scales, or a list as of `idxBl_to_img`."""
        return self.idxBl_to_img(self.img_to_idxBl(x, v_patch_nums), True, last_one)

    @torch.no_grad()
    def fhat_to_img(self, f_hat: Float[Tensor, "b d h w"]) -> Float[Tensor, "b c H W"]:
        """Images in [-1, 1] of the sum of the scales."""
        return self.tokenizer.decode(f_hat).clamp(-1, 1)


class PyramidInputs(nn.Module):
    """What VAR asks of its ``VectorQuantizer2``: the inputs of its transformer.

    Args:
        tokenizer: With a pyramid; grids are those of its training size.

    Attributes:
        embedding: The codebook.
        v_patch_nums: Sides of the scales, or ``(h, w)`` of those that are not square.
        prog_si: The last scale of VAR's progressive training, which sets it; -1: all.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        assert isinstance(tokenizer.quantizer, MultiScaleQuantizer)
        self.quantizer = tokenizer.quantizer
        self.embedding = CodeTable(tokenizer.quantizer.part(0))
        self.grid = tokenizer.grid()
        self.sizes = self.quantizer.scale_sizes(self.grid)
        self.lengths = self.quantizer.scale_lengths(self.grid)
        self.v_patch_nums = tuple(size[0] if len(set(size)) == 1 else size for size in self.sizes)
        self.prog_si = -1

    def embed(self, ms_idx_Bl: list[Tensor]) -> list[Tensor]:  # noqa: N803
        """Codes ``(b d side side)`` of the first scales, before they are enlarged."""
        found = zip(ms_idx_Bl, self.sizes, strict=False)
        return [self.embedding(indices).movedim(-1, 1).unflatten(2, size) for indices, size in found]

    def embed_to_fhat(self, ms_h_BChw: list[Tensor], all_to_max_scale: bool = True, last_one: bool = False) -> Any:  # noqa: N803
        """Sums ``(b d h w)`` of the codes of the first scale, of the first two and so on, or only that of all.

        Raises:
            ValueError: With ``all_to_max_scale=False``: the sums have the grid of the whole.
        """
        if not all_to_max_scale:
            raise ValueError(
                "images of the first scales have the size of the whole: pass all_to_max_scale=True (same_shape=True)"
            )
        f_hats = [self.quantizer.enlarge(ms_h_BChw[0], 0, self.grid)]
        for number, codes in enumerate(ms_h_BChw[1:], 1):
            f_hats.append(f_hats[-1] + self.quantizer.enlarge(codes, number, self.grid))
        return f_hats[-1] if last_one else f_hats

    def idxBl_to_var_input(self, gt_ms_idx_Bl: list[Tensor]) -> Float[Tensor, "b n d"]:  # noqa: N802, N803
        """Input of the transformer for the scales after the first: the sum of the scales before, reduced to each."""
        sums = self.embed_to_fhat(self.embed(gt_ms_idx_Bl[:-1]))
        inputs = [self.quantizer.reduce(each, number).flatten(2) for number, each in enumerate(sums, 1)]
        return torch.cat(inputs, 2).movedim(1, -1)

    def get_next_autoregressive_input(
        self,
        si: int,
        SN: int,  # noqa: N803
        f_hat: Float[Tensor, "b d h w"],
        h_BChw: Float[Tensor, "b d h2 w2"],  # noqa: N803
    ) -> tuple[Float[Tensor, "b d h w"], Float[Tensor, "b d h3 w3"]]:
        """The sum with the codes of scale `si` of `SN`, and the same reduced to the next scale."""
        f_hat = f_hat + self.quantizer.enlarge(h_BChw, si, self.grid)
        return f_hat, (self.quantizer.reduce(f_hat, si + 1) if si < SN - 1 else f_hat)
