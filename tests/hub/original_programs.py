"""Small models of original programs that are packages, with random weights and codebooks that are used."""

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

PIXELS = 1e-5
# Of an original that decodes straight-through codes, which a lookup differs from by rounding.
ROUNDED = 1e-4


@torch.no_grad()
def assert_same(
    tokenizer, images, indices, decoded, tolerance=PIXELS, restore=lambda images: images, used=9, texts=None
):
    """Equal indices on all tokens; pixels in the original's range, relative to their largest value."""
    found = tokenizer.encode(images)
    assert torch.equal(found.indices, indices.reshape(found.indices.shape))
    assert len(found.indices.unique()) >= used
    ours = restore(tokenizer.decode_indices(found.indices, images.shape[2:], texts))
    torch.testing.assert_close(ours, decoded, atol=tolerance * max(1.0, decoded.abs().max().item()), rtol=0)


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


def pictures(size=32, channels=3):
    return torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(2)) * 2 - 1


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
        spread_codes(table.weight.data, self.features(pictures(channels=config["in_channels"])))

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
def vit_vqgan(
    width,
    num_heads,
    depth=1,
    patch_size=8,
    outside=False,
    head_dim=64,
    hidden=None,
    channels=3,
    unit_norm=True,
    num_quantizers=1,
):
    """Weights by the names of enhancing-transformers, and indices and images by the formulas of its paper.

    The last norms are parts of the transformers, or lie outside of them.
    """
    generator = torch.Generator().manual_seed(0)
    weights = {}

    def make(name, *shape):
        weights[name] = torch.randn(shape, generator=generator) * (1.5 / max(shape[-1], 1)) ** 0.5

    hidden, inside = hidden or 2 * width, head_dim * num_heads
    count = (32 // patch_size) ** 2
    for part, position in (("encoder", "en"), ("decoder", "de")):
        make(f"{part}.{position}_pos_embedding", 1, count, width)
        norms = [f"{part}.norm" if outside else f"{part}.transformer.norm"]
        for layer in range(depth):
            layers = f"{part}.transformer.layers.{layer}"
            norms += [f"{layers}.0.norm", f"{layers}.1.norm"]
            make(f"{layers}.0.fn.to_qkv.weight", 3 * inside, width)
            if num_heads > 1 or inside != width:
                make(f"{layers}.0.fn.to_out.weight", width, inside)
                make(f"{layers}.0.fn.to_out.bias", width)
            for number, (rows, columns) in ((0, (hidden, width)), (2, (width, hidden))):
                make(f"{layers}.1.fn.net.{number}.weight", rows, columns)
                make(f"{layers}.1.fn.net.{number}.bias", rows)
        for norm in norms:
            make(f"{norm}.weight", width)
            make(f"{norm}.bias", width)
    make("encoder.to_patch_embedding.0.weight", width, channels, patch_size, patch_size)
    make("encoder.to_patch_embedding.0.bias", width)
    make("decoder.to_pixel.1.weight", width, channels, patch_size, patch_size)
    make("decoder.to_pixel.1.bias", channels)
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
            mixed = rearrange((query @ key.mT * head_dim**-0.5).softmax(-1) @ value, "b h n d -> b n (h d)")
            out = f"{layers}.0.fn.to_out"
            tokens = tokens + (linear(out, mixed) if f"{out}.weight" in weights else mixed)
            hidden = linear(f"{layers}.1.fn.net.0", norm(f"{layers}.1.norm", tokens)).tanh()
            tokens = tokens + linear(f"{layers}.1.fn.net.2", hidden)
        return norm(f"{part}.norm" if outside else f"{part}.transformer.norm", tokens)

    embedding = [weights[f"encoder.to_patch_embedding.0.{each}"] for each in ("weight", "bias")]
    patches = F.conv2d((pictures(channels=channels) + 1) / 2, *embedding, stride=patch_size)
    tokens = patches.flatten(2).mT + weights["encoder.en_pos_embedding"]
    features = linear("pre_quant", transformer("encoder", tokens))
    spread_codes(weights["quantizer.embedding.weight"], features.mT)
    codes, rest, found = weights["quantizer.embedding.weight"], features, []
    codes = F.normalize(codes, dim=-1) if unit_norm else codes
    for _ in range(num_quantizers):
        rows = F.normalize(rest, dim=-1) if unit_norm else rest
        found.append(torch.cdist(rows.double(), codes.double()).argmin(-1))
        rest = rest - codes[found[-1]]
    indices = torch.stack(found, -1)
    quantized = linear("post_quant", codes[indices].sum(-2))
    decoded = transformer("decoder", quantized + weights["decoder.de_pos_embedding"])
    decoded = decoded.mT.unflatten(2, patches.shape[2:])
    pixels = [weights[f"decoder.to_pixel.1.{each}"] for each in ("weight", "bias")]
    return weights, indices, F.conv_transpose2d(decoded, *pixels, stride=patch_size)


@torch.no_grad()
def emu3(**changes):
    """Emu3 of transformers with statistics of its own for batch normalisation."""
    modeling = pytest.importorskip("transformers.models.emu3.modeling_emu3")
    config = {
        "codebook_size": 64,
        "base_channels": 32,
        "channel_multiplier": [1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [1],
        "hidden_size": 64,
        **changes,
    }
    original = modeling.Emu3VQVAE(modeling.Emu3VQVAEConfig(**config))
    randomise(original)
    generator = torch.Generator().manual_seed(3)
    for name, buffer in original.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
        elif name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    frames = pictures(channels=original.config.in_channels)[:, None].repeat(
        1, original.config.temporal_downsample_factor, 1, 1, 1
    )
    features = original.quant_conv(original.encoder(frames).movedim(1, 2))
    spread_codes(original.quantize.embedding.weight.data, features)
    return original
