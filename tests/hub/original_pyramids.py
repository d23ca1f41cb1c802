"""Reference quantizers of programs that are no packages, around trunks of taming-transformers, by their formulas."""

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from original_programs import Taming, pictures, randomise, spread_codes
from torch import nn


class Trunks(nn.Module):
    """Encoder and decoder of taming-transformers without its quantizer, and convolutions around it."""

    def __init__(self, code_channels, kernel=1, **changes):
        super().__init__()
        trunk = Taming(**changes)
        self.encoder, self.decoder = trunk.encoder, trunk.decoder
        z_channels = trunk.quant_conv.in_channels
        self.quant_conv = nn.Conv2d(z_channels, code_channels, kernel, padding=kernel // 2)
        self.post_quant_conv = nn.Conv2d(code_channels, z_channels, kernel, padding=kernel // 2)


class RQVAE(Trunks):
    """RQ-VAE: `patch` is the number of rows and columns of features that a stack of codes stands for."""

    def __init__(self, sizes, embed_dim=8, patch=1, shared=False, **changes):
        super().__init__(embed_dim, **changes)
        dim = patch**2 * embed_dim
        self.patch, self.shared = patch, shared
        self.quantizer = nn.Module()
        books = [nn.Embedding(size + 1, dim, padding_idx=size) for size in sizes]
        self.quantizer.codebooks = nn.ModuleList([books[0]] * len(sizes) if shared else books)
        for book in books:
            book.register_buffer("cluster_size_ema", torch.ones(len(book.weight) - 1))
            book.register_buffer("embed_ema", torch.ones(len(book.weight) - 1, dim))
        randomise(self)
        features = self.features(pictures())
        for number, book in enumerate(self.quantizer.codebooks):
            spread_codes(book.weight.data, features.movedim(-1, 1) / 2**number)
            # The padding is the nearest of all, and never chosen.
            book.weight.data[-1] = features.flatten(0, 2).mean(0)

    def features(self, images):
        """Features ``(b h w (p q c))``."""
        features = self.quant_conv(self.encoder(images))
        return rearrange(features, "b c (h p) (w q) -> b h w (p q c)", p=self.patch, q=self.patch)

    def encode(self, images):
        rest, indices = self.features(images), []
        for book in self.quantizer.codebooks:
            table = book.weight[:-1]
            indices.append(torch.cdist(rest.double(), table.double()).argmin(-1))
            rest = rest - table[indices[-1]]
        return torch.stack(indices, -1)

    def decode(self, indices):
        codes = sum(book(each) for book, each in zip(self.quantizer.codebooks, indices.unbind(-1), strict=True))
        codes = rearrange(codes, "b h w (p q c) -> b c (h p) (w q)", p=self.patch, q=self.patch)
        return self.decoder(self.post_quant_conv(codes))


class VAR(Trunks):
    """VAR: `phi` names the convolutions of its quantizer as the program does, by the number it is configured with."""

    def __init__(self, scales, share=4, ratio=0.5, znorm=False, kernel=3, **changes):
        super().__init__(8, kernel, z_channels=8, attn_resolutions=[16], **changes)
        self.ratio, self.znorm = ratio, znorm
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(64, 8)
        self.quantize.register_buffer("ema_vocab_hit_SV", torch.zeros(len(scales), 64))
        self.scales = [(each, each) if isinstance(each, int) else each for each in scales]
        count = share or len(scales)
        phi = [nn.Conv2d(8, 8, 3, padding=1) for _ in range(count)] if ratio else []
        if share == 1 and phi:
            self.quantize.quant_resi = nn.Module()
            self.quantize.quant_resi.qresi = phi[0]
        elif share:
            self.quantize.quant_resi = nn.Module()
            self.quantize.quant_resi.qresi_ls = nn.ModuleList(phi)
        else:
            self.quantize.quant_resi = nn.ModuleList(phi)
        self.convolutions = phi and (lambda number: phi[number])
        first = 1 / 3 / count if count == 4 else 1 / 2 / count
        self.ticks = np.linspace(first, 1 - first, count)
        randomise(self)
        spread_codes(self.quantize.embedding.weight.data, self.quant_conv(self.encoder(pictures())))

    def add(self, number, indices, size):
        """What the codes ``(b h w)`` of a scale add to the features."""
        codes = self.quantize.embedding(indices).movedim(-1, 1)
        if number < len(self.scales) - 1:
            codes = F.interpolate(codes, size, mode="bicubic")
        if not self.ratio:
            return codes
        at = number / (len(self.scales) - 1) if len(self.scales) > 1 else 0
        phi = self.convolutions(int(np.argmin(np.abs(self.ticks - at))))
        return codes * (1 - self.ratio) + phi(codes) * self.ratio

    def encode(self, images):
        rest, found = self.quant_conv(self.encoder(images)), []
        size = rest.shape[2:]
        for number, cells in enumerate(self.scales):
            rows = F.interpolate(rest, cells, mode="area").movedim(1, -1).double()
            table = self.quantize.embedding.weight.double()
            if self.znorm:
                rows, table = F.normalize(rows, dim=-1), F.normalize(table, dim=-1)
            indices = torch.cdist(rows, table).argmin(-1)
            rest = rest - self.add(number, indices, size)
            found.append(indices)
        return found

    def decode(self, maps):
        size = maps[-1].shape[1:]
        codes = sum(self.add(number, each, size) for number, each in enumerate(maps))
        # The original clamps the images.
        return self.decoder(self.post_quant_conv(codes))

    def checkpoint(self):
        """Weights by the names of the program, where self-attention has one layer for queries, keys and values."""
        weights = self.state_dict()
        for name in [name for name in weights if ".q." in name]:
            parts = [weights.pop(name.replace(".q.", f".{letter}.")) for letter in "qkv"]
            weights[name.replace(".q.", ".qkv.")] = torch.cat(parts)
        return weights
