"""Small models of original programs that are packages, with random weights and codebooks that are used."""

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


def randomise(module, seed=0):
    """Draw all weights such that signals neither vanish nor explode, norms not at one and biases not at zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = noise * (1.5 / parameter[0].numel()) ** 0.5
        else:
            parameter.data = noise * 0.1 + (parameter.data.mean() > 0.5).float()
    return module.eval().requires_grad_(False)


def spread_codes(table, features):
    """Codes around the features, so that most are chosen; their lengths differ."""
    generator = torch.Generator().manual_seed(1)
    rows = features.movedim(1, -1).flatten(0, -2)
    table.copy_(rows.mean(0) + rows.std(0) * torch.randn(table.shape, generator=generator))


def pictures(size=32):
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(2)) * 2 - 1


class Taming(nn.Module):
    """VQModel and GumbelVQ of taming-transformers, of the parts in the package taming-transformers-rom1504."""

    def __init__(self, embed_dim=16, n_embed=64, gumbel=False, **changes):
        super().__init__()
        model = pytest.importorskip("taming.modules.diffusionmodules.model")
        config = {
            "ch": 32,
            "out_ch": 3,
            "ch_mult": (1, 2),
            "num_res_blocks": 1,
            "attn_resolutions": [16],
            "in_channels": 3,
            "resolution": 32,
            "z_channels": 32,
            "double_z": False,
            **changes,
        }
        z_channels = config["z_channels"]
        self.encoder, self.decoder = model.Encoder(**config), model.Decoder(**config)
        self.quant_conv = nn.Conv2d(z_channels, embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)
        self.quantize = nn.Module()
        if gumbel:
            self.quantize.proj = nn.Conv2d(z_channels, n_embed, 1)
            self.quantize.embed = nn.Embedding(n_embed, embed_dim)
        else:
            self.quantize.embedding = nn.Embedding(n_embed, embed_dim)
        if changes.get("attn_type") == "none":
            for part in (self.encoder, self.decoder):
                part.mid.attn_1 = nn.Identity()
        randomise(self)
        table = self.quantize.embed if gumbel else self.quantize.embedding
        spread_codes(table.weight.data, self.features(pictures(config["resolution"])))

    def features(self, images):
        return self.quant_conv(self.encoder(images))

    def indices(self, images, score):
        """Index with the largest score; score of features ``(n d)`` and codes ``(k d)``."""
        features = self.features(images)
        if hasattr(self.quantize, "proj"):
            return self.quantize.proj(features).argmax(1)
        rows = features.movedim(1, -1)
        return score(rows.flatten(0, -2), self.quantize.embedding.weight).argmax(-1).view(rows.shape[:-1])

    def images(self, indices):
        table = self.quantize.embed if hasattr(self.quantize, "proj") else self.quantize.embedding
        return self.decoder(self.post_quant_conv(table(indices).movedim(-1, 1)))


def closeness(rows, codes):
    return -torch.cdist(rows.double(), codes.double())


def product(rows, codes):
    return rows.double() @ codes.double().T


@torch.no_grad()
def vit_vqgan(width, num_heads, depth=1, patch_size=8, outside=False):
    """Weights by the names of enhancing-transformers, and indices and images by the formulas of its paper.

    The last norms are parts of the transformers, or lie outside of them.
    """
    generator = torch.Generator().manual_seed(0)
    weights = {}

    def make(name, *shape):
        weights[name] = torch.randn(shape, generator=generator) * (1.5 / max(shape[-1], 1)) ** 0.5

    count = (32 // patch_size) ** 2
    for part, position in (("encoder", "en"), ("decoder", "de")):
        make(f"{part}.{position}_pos_embedding", 1, count, width)
        norms = [f"{part}.norm" if outside else f"{part}.transformer.norm"]
        for layer in range(depth):
            layers = f"{part}.transformer.layers.{layer}"
            norms += [f"{layers}.0.norm", f"{layers}.1.norm"]
            make(f"{layers}.0.fn.to_qkv.weight", 3 * 64 * num_heads, width)
            make(f"{layers}.0.fn.to_out.weight", width, 64 * num_heads)
            make(f"{layers}.0.fn.to_out.bias", width)
            for number, (rows, columns) in ((0, (2 * width, width)), (2, (width, 2 * width))):
                make(f"{layers}.1.fn.net.{number}.weight", rows, columns)
                make(f"{layers}.1.fn.net.{number}.bias", rows)
        for norm in norms:
            make(f"{norm}.weight", width)
            make(f"{norm}.bias", width)
    make("encoder.to_patch_embedding.0.weight", width, 3, patch_size, patch_size)
    make("encoder.to_patch_embedding.0.bias", width)
    make("decoder.to_pixel.1.weight", width, 3, patch_size, patch_size)
    make("decoder.to_pixel.1.bias", 3)
    for name, rows, columns in (("pre_quant", 8, width), ("post_quant", width, 8)):
        make(f"{name}.weight", rows, columns)
        make(f"{name}.bias", rows)
    make("quantizer.embedding.weight", 64, 8)

    def linear(name, tokens):
        return F.linear(tokens, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(name, tokens):
        return F.layer_norm(tokens, (width,), weights[f"{name}.weight"], weights[f"{name}.bias"])

    def transformer(part, tokens):
        for layer in range(depth):
            layers = f"{part}.transformer.layers.{layer}"
            qkv = linear(f"{layers}.0.fn.to_qkv", norm(f"{layers}.0.norm", tokens))
            query, key, value = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=num_heads)
            mixed = (query @ key.mT * 64**-0.5).softmax(-1) @ value
            tokens = tokens + linear(f"{layers}.0.fn.to_out", rearrange(mixed, "b h n d -> b n (h d)"))
            hidden = linear(f"{layers}.1.fn.net.0", norm(f"{layers}.1.norm", tokens)).tanh()
            tokens = tokens + linear(f"{layers}.1.fn.net.2", hidden)
        return norm(f"{part}.norm" if outside else f"{part}.transformer.norm", tokens)

    embedding = [weights[f"encoder.to_patch_embedding.0.{each}"] for each in ("weight", "bias")]
    patches = F.conv2d((pictures() + 1) / 2, *embedding, stride=patch_size)
    tokens = patches.flatten(2).mT + weights["encoder.en_pos_embedding"]
    features = linear("pre_quant", transformer("encoder", tokens))
    spread_codes(weights["quantizer.embedding.weight"], features.mT)
    codes = F.normalize(weights["quantizer.embedding.weight"], dim=-1)
    indices = (F.normalize(features, dim=-1) @ codes.T).argmax(-1)
    decoded = transformer("decoder", linear("post_quant", codes[indices]) + weights["decoder.de_pos_embedding"])
    decoded = decoded.mT.unflatten(2, patches.shape[2:])
    pixels = [weights[f"decoder.to_pixel.1.{each}"] for each in ("weight", "bias")]
    return weights, indices, F.conv_transpose2d(decoded, *pixels, stride=patch_size)
