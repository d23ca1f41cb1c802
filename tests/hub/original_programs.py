"""Small models of original programs that are packages, with random weights and codebooks that are used."""

import pytest
import torch
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
