"""Reference models of programs that are no packages: TiTok, BSQ-ViT and Cosmos, by their formulas and names."""

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from original_programs import pictures, randomise, spread_codes
from torch import nn


class Block(nn.Module):
    """A block of CLIP's transformer, with scales of its branches if there are `scales`."""

    def __init__(self, width, heads, ratio=4.0, scales=False):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        hidden = int(ratio * width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, hidden), "c_proj": nn.Linear(hidden, width)})
        if scales:
            self.ls_1, self.ls_2 = nn.Module(), nn.Module()
            self.ls_1.gamma, self.ls_2.gamma = (nn.Parameter(torch.ones(width)) for _ in range(2))

    def forward(self, x):
        normed = self.ln_1(x)
        mixed = self.attn(normed, normed, normed, need_weights=False)[0]
        x = x + (mixed * self.ls_1.gamma if hasattr(self, "ls_1") else mixed)
        hidden = self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))
        return x + (hidden * self.ls_2.gamma if hasattr(self, "ls_2") else hidden)


class TiTok(nn.Module):
    """TiTok: `kind` is ``vq`` or ``vae``; with `legacy` the logits of a teacher instead of pixels."""

    def __init__(
        self,
        widths=(64, 64),
        depths=(1, 1),
        patches=(8, 8),
        heads=(2, 2),
        tokens=12,
        dim=12,
        size=32,
        codes=64,
        unit_norm=True,
        legacy=False,
        kind="vq",
        pixel_decoder=None,
    ):
        super().__init__()
        self.patches, self.size, self.unit_norm, self.legacy = patches, size, unit_norm, legacy
        self.latent_tokens = nn.Parameter(torch.randn(tokens, widths[0]))
        self.encoder, self.decoder = nn.Module(), nn.Module()
        for part, width, depth, patch, count in zip(
            (self.encoder, self.decoder), widths, depths, patches, heads, strict=True
        ):
            part.class_embedding = nn.Parameter(torch.randn(1, width))
            part.positional_embedding = nn.Parameter(torch.randn((size // patch) ** 2 + 1, width))
            part.latent_token_positional_embedding = nn.Parameter(torch.randn(tokens, width))
            part.ln_pre, part.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
            part.transformer = nn.ModuleList(Block(width, count) for _ in range(depth))
        self.encoder.patch_embed = nn.Conv2d(3, widths[0], patches[0], stride=patches[0])
        self.encoder.conv_out = nn.Conv2d(widths[0], dim * (2 if kind == "vae" else 1), 1)
        width, patch = widths[1], patches[1]
        self.decoder.mask_token = nn.Parameter(torch.randn(1, 1, width))
        self.decoder.decoder_embed = nn.Linear(dim, width)
        last = nn.Conv2d(2 * width, 96, 1) if legacy else None
        first = nn.Conv2d(width, 2 * width if legacy else 3 * patch**2, 1)
        self.decoder.ffn = nn.Sequential(first, nn.Tanh(), last) if legacy else nn.Sequential(first)
        if not legacy:
            self.decoder.conv_out = nn.Conv2d(3, 3, 3, padding=1)
        if kind == "vq":
            self.quantize = nn.Module()
            self.quantize.embedding = nn.Embedding(codes, dim)
        if pixel_decoder is not None:
            self.pixel_quantize = nn.Module()
            self.pixel_quantize.embedding = nn.Embedding(96, pixel_decoder.conv_in.in_channels)
        randomise(self)
        self.pixel_decoder = pixel_decoder
        if kind == "vq":
            spread_codes(self.quantize.embedding.weight.data, self.features(pictures(size)))

    @staticmethod
    def _run(part, tokens):
        for block in part.transformer:
            tokens = block(tokens)
        return part.ln_post(tokens)

    def features(self, images):
        """Features ``(b d n)`` of images in [-1, 1]."""
        part = self.encoder
        patches = part.patch_embed((images + 1) / 2).flatten(2).mT
        count = len(images)
        image = torch.cat([part.class_embedding.expand(count, 1, -1), patches], 1) + part.positional_embedding
        latents = (self.latent_tokens + part.latent_token_positional_embedding).expand(count, -1, -1)
        tokens = self._run(part, part.ln_pre(torch.cat([image, latents], 1)))[:, image.shape[1] :]
        # The first models read the numbers of tokens and channels in the wrong order.
        latents = tokens.reshape(count, tokens.shape[2], -1) if self.legacy else tokens.mT
        return part.conv_out(latents[..., None])[..., 0]

    def encode(self, images):
        rows, table = self.features(images).mT, self.quantize.embedding.weight
        if self.unit_norm:
            rows, table = F.normalize(rows, dim=-1), F.normalize(table, dim=-1)
        return torch.cdist(rows.double(), table.double()).argmin(-1)

    def decode(self, indices):
        codes = self.quantize.embedding(indices)
        return self.decode_codes(F.normalize(codes, dim=-1) if self.unit_norm else codes)

    def decode_codes(self, codes):
        """Images in [0, 1], or logits of a teacher, of codes ``(b n d)``."""
        part, count, side = self.decoder, len(codes), self.size // self.patches[1]
        tokens = part.decoder_embed(codes) + part.latent_token_positional_embedding
        masks = part.mask_token.expand(count, side**2, -1)
        image = torch.cat([part.class_embedding.expand(count, 1, -1), masks], 1) + part.positional_embedding
        tokens = self._run(part, part.ln_pre(torch.cat([image, tokens], 1)))[:, 1 : side**2 + 1]
        hidden = part.ffn(tokens.mT.unflatten(2, (side, side)))
        if self.legacy:
            if self.pixel_decoder is None:
                return hidden
            expected = torch.einsum("bkhw,kc->bchw", hidden.softmax(1), self.pixel_quantize.embedding.weight)
            return self.pixel_decoder(expected)
        patch = self.patches[1]
        return part.conv_out(rearrange(hidden, "b (p q c) h w -> b c (h p) (w q)", p=patch, q=patch))


class BSQViT(nn.Module):
    """BSQ-ViT, and its program's vector quantizer if there are `codes`: ``ball`` on a sphere, ``free`` elsewhere."""

    def __init__(
        self,
        widths=(64, 64),
        depths=(1, 1),
        heads=2,
        ratio=4.0,
        patch=8,
        size=32,
        bits=12,
        group=6,
        hidden=96,
        ln_pre=True,
        scales=False,
        unit_norm=True,
        codes=None,
        search_norm=True,
    ):
        super().__init__()
        self.patch, self.size, self.bits, self.group = patch, size, bits, group
        self.unit_norm, self.search_norm = unit_norm, search_norm
        self.encoder, self.decoder = nn.Module(), nn.Module()
        for part, width, depth in zip((self.encoder, self.decoder), widths, depths, strict=True):
            part.positional_embedding = nn.Parameter(torch.randn((size // patch) ** 2, width))
            part.ln_pre = nn.LayerNorm(width) if ln_pre else nn.Identity()
            part.transformer = nn.Module()
            part.transformer.resblocks = nn.ModuleList(Block(width, heads, ratio, scales) for _ in range(depth))
            part.ln_post = nn.LayerNorm(width)
        self.encoder.conv1 = nn.Linear(3 * patch**2, widths[0], bias=not ln_pre)
        if hidden:
            self.decoder.ffn = nn.Sequential(nn.Linear(widths[1], hidden), nn.Tanh())
        self.decoder.conv_out = nn.Linear(hidden or widths[1], 3 * patch**2)
        self.quant_embed, self.post_quant_embed = nn.Linear(widths[0], bits), nn.Linear(bits, widths[1])
        self.quantize = nn.Module()
        if codes:
            self.quantize.embedding = nn.Embedding(codes, bits)
        randomise(self)
        if codes:
            spread_codes(self.quantize.embedding.weight.data, self.features(pictures(size)).mT)
        else:
            self.quantize.register_buffer("basis", 2 ** torch.arange(bits - 1, -1, -1))
            self.quantize.register_buffer("group_basis", 2 ** torch.arange(group - 1, -1, -1))

    def _run(self, part, tokens):
        tokens = part.ln_pre(tokens + part.positional_embedding)
        for block in part.transformer.resblocks:
            tokens = block(tokens)
        return part.ln_post(tokens)

    def features(self, images):
        patches = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch, q=self.patch)
        return self.quant_embed(self._run(self.encoder, self.encoder.conv1(patches)))

    def encode(self, images):
        """Indices ``(b n)``, or of groups ``(b n g)``, and codes."""
        rows = self.features(images)
        if hasattr(self.quantize, "embedding"):
            table = self.quantize.embedding.weight
            if self.search_norm:
                rows, table = F.normalize(rows, dim=-1), F.normalize(table, dim=-1)
            indices = torch.cdist(rows.double(), table.double()).argmin(-1)
            return indices, table[indices]
        bits = rows > 0
        groups = rearrange(bits, "b n (g c) -> b n g c", c=self.group if self.bits > 24 else self.bits)
        basis = self.quantize.group_basis if self.bits > 24 else self.quantize.basis
        scale = self.bits**-0.5 if self.unit_norm else 1.0
        return (groups * basis).sum(-1), torch.where(bits, scale, -scale)

    def decode(self, codes):
        hidden = self._run(self.decoder, self.post_quant_embed(codes))
        if hasattr(self.decoder, "ffn"):
            hidden = self.decoder.ffn(hidden)
        patch, side = self.patch, self.size // self.patch
        patches = self.decoder.conv_out(hidden)
        return rearrange(patches, "b (h w) (c p q) -> b c (h p) (w q)", p=patch, q=patch, h=side)


def haar(images):
    """Bands of sums and differences of pairs along the width, then the height; the first one is the mean."""
    along_width = [(images[..., ::2] + sign * images[..., 1::2]) / 2 for sign in (1, -1)]
    return torch.cat([(x[..., ::2, :] + sign * x[..., 1::2, :]) / 2 for x in along_width for sign in (1, -1)], 1)


def inverse_haar(bands):
    means, height, width, both = bands.chunk(4, 1)
    rows = []
    for up in (1, -1):
        low, high = means + up * height, width + up * both
        rows.append(torch.stack([low + high, low - high], -1).flatten(-2))
    return torch.stack(rows, -2).flatten(-3, -2)


class Cosmos(nn.Module):
    """Cosmos for images: `levels` of finite scalars, `codes` of a codebook, or neither.

    The first `halvings` levels of the encoder, and as many of the decoder, change the resolution.
    """

    def __init__(
        self,
        multipliers=(1, 2),
        halvings=1,
        blocks=1,
        patch=4,
        method="haar",
        attention=(),
        z_channels=24,
        dim=6,
        levels=(8, 8, 8, 5, 5, 5),
        codes=None,
        channels=3,
        variance=False,
        width=32,
        depth=None,
    ):
        super().__init__()
        model = pytest.importorskip("taming.modules.diffusionmodules.model")
        self.halvings, self.patch, self.method, self.levels, self.variance = halvings, patch, method, levels, variance
        self.depth = depth
        widths = [width * each for each in multipliers]
        count = len(widths)

        def block(into, out):
            return model.ResnetBlock(in_channels=into, out_channels=out, dropout=0.0, temb_channels=0)

        def stage(into, out, number, attends):
            part = nn.Module()
            part.block = nn.ModuleList(block(into if each == 0 else out, out) for each in range(number))
            part.attn = nn.ModuleList(model.AttnBlock(out) for _ in range(number if attends else 0))
            return part

        self.encoder, self.decoder = nn.Module(), nn.Module()
        self.encoder.down, self.decoder.up = nn.ModuleList(), nn.ModuleList()
        for level, out in enumerate(widths):
            down = stage(([width, *widths])[level], out, blocks, level in attention)
            if level < halvings:
                down.downsample = model.Downsample(out, True)
            self.encoder.down.append(down)
            up = stage(widths[min(level + 1, count - 1)], out, blocks + 1, level in attention)
            if level >= count - halvings:
                up.upsample = model.Upsample(out, True)
            self.decoder.up.append(up)
        for part in (self.encoder, self.decoder):
            part.mid = nn.Module()
            part.mid.block_1, part.mid.block_2 = block(widths[-1], widths[-1]), block(widths[-1], widths[-1])
            part.mid.attn_1 = model.AttnBlock(widths[-1])
        pixels = channels * patch**2
        for part, into, first, last, out in (
            (self.encoder, pixels, width, widths[-1], z_channels),
            (self.decoder, z_channels, widths[-1], widths[0], pixels),
        ):
            part.conv_in = nn.Conv2d(into, first, 3, padding=1)
            part.norm_out = nn.GroupNorm(32, last, eps=1e-6)
            part.conv_out = nn.Conv2d(last, out, 3, padding=1)
        self.quant_conv = nn.Conv2d(z_channels, dim * (2 if variance else 1), 1)
        self.post_quant_conv = nn.Conv2d(dim, z_channels, 1)
        self.quantizer = nn.Module()
        if codes:
            self.quantizer.embedding = nn.Embedding(codes, dim)
        randomise(self)
        if codes:
            spread_codes(self.quantizer.embedding.weight.data, self.features(pictures(channels=channels)))

    def _stages(self, stages, hidden, resize):
        for stage in stages:
            for number, block in enumerate(stage.block):
                hidden = block(hidden, None)
                if len(stage.attn):
                    hidden = stage.attn[number](hidden)
            if hasattr(stage, resize):
                hidden = getattr(stage, resize)(hidden)
        return hidden

    @staticmethod
    def _middle(mid, hidden):
        return mid.block_2(mid.attn_1(mid.block_1(hidden, None)), None)

    def features(self, images):
        part = self.encoder
        if self.method == "haar":
            for _ in range(self.patch.bit_length() - 1):
                images = haar(images)
        else:
            images = rearrange(images, "b c (h p) (w q) -> b (c p q) h w", p=self.patch, q=self.patch)
        hidden = self._middle(part.mid, self._stages(part.down, part.conv_in(images), "downsample"))
        features = self.quant_conv(part.conv_out(F.silu(part.norm_out(hidden))))
        return features.chunk(2, 1)[0] if self.variance else features

    def encode(self, images):
        """Indices and codes."""
        features = self.features(images)
        if hasattr(self.quantizer, "embedding"):
            rows, table = features.movedim(1, -1), self.quantizer.embedding.weight
            indices = torch.cdist(rows.flatten(1, 2).double(), table.double()).argmin(-1)
            return indices, table[indices].mT.view_as(features)
        if self.depth is None:
            return self.quantize(features)
        indices, total = [], 0
        for _ in range(self.depth):
            stage_indices, codes = self.quantize(features - total)
            indices, total = [*indices, stage_indices], total + codes
        return torch.stack(indices, -1), total

    def quantize(self, features):
        levels = torch.tensor(self.levels).view(-1, 1, 1)
        half = (levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0)
        rounded = ((features + (offset / half).atanh()).tanh() * half - offset).round()
        basis = torch.tensor([1, *self.levels[:-1]]).cumprod(0).view(-1, 1, 1)
        return ((rounded + levels // 2).long() * basis).sum(1), rounded / (levels // 2)

    def forward(self, images):
        return self.decode(self.encode(images)[1])

    def decode(self, codes):
        part = self.decoder
        hidden = self._middle(part.mid, part.conv_in(self.post_quant_conv(codes)))
        hidden = self._stages(reversed(part.up), hidden, "upsample")
        patches = part.conv_out(F.silu(part.norm_out(hidden)))
        if self.method == "haar":
            for _ in range(self.patch.bit_length() - 1):
                patches = inverse_haar(patches)
            return patches
        return rearrange(patches, "b (c p q) h w -> b c (h p) (w q)", p=self.patch, q=self.patch)
