"""Trunks of original programs that are no packages, re-implemented from their formulas, by their names of tensors."""

import torch
import torch.nn.functional as F
from original_programs import randomise, spread_codes
from torch import nn


def named(**modules):
    """A module with these parts."""
    whole = nn.Module()
    for name, module in modules.items():
        setattr(whole, name, module)
    return whole


def convolution(rows, columns, size=3, **options):
    return nn.Conv2d(rows, columns, size, padding=size // 2, **options)


class MaskGITBlock(nn.Module):
    """Where the number of channels changes, the 1x1 convolution sees the result of the block."""

    def __init__(self, width, out):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, width, eps=1e-6), nn.GroupNorm(32, out, eps=1e-6)
        self.conv1, self.conv2 = convolution(width, out, bias=False), convolution(out, out, bias=False)
        if width != out:
            self.nin_shortcut = convolution(out, out, 1, bias=False)

    def forward(self, x):
        hidden = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return hidden + (self.nin_shortcut(hidden) if hasattr(self, "nin_shortcut") else x)


class MaskGIT(nn.Module):
    """The VQGAN of MaskGIT and, with `maskbit`, of MaskBit, which may halve grids by convolutions.

    Args:
        maskbit: None, ``legacy`` or ``new``, which differ in the order of the levels of the decoder.
    """

    def __init__(
        self,
        channels=3,
        width=32,
        multipliers=(1, 2),
        blocks=1,
        decoder_blocks=None,
        dim=6,
        codes=64,
        maskbit=None,
        halving=False,
    ):
        super().__init__()
        self.maskbit, self.halving = maskbit, halving
        widths = [width * each for each in multipliers]
        counts = blocks, decoder_blocks or blocks

        def stack(into, out, count):
            return nn.ModuleList(MaskGITBlock(into if number == 0 else out, out) for number in range(count))

        kind = "res_blocks" if maskbit else "block"
        down, up = nn.ModuleList(), nn.ModuleList()
        for level, (into, out) in enumerate(zip([width, *widths], widths, strict=False)):
            down.append(named(**{kind: stack(into, out, counts[0])}))
            if halving and level + 1 < len(widths):
                down[-1].down_conv = nn.Conv2d(out, out, 3, stride=2)
            up.append(named(**{kind: stack(widths[min(level + 1, len(widths) - 1)], out, counts[1])}))
            if level:
                up[-1].upsample_conv = convolution(out, out)
        middles = [stack(widths[-1], widths[-1], count) for count in counts]
        if maskbit:
            middles = [named(res_blocks=each) for each in middles]
        self.encoder = named(
            conv_in=convolution(channels, width, bias=False),
            down=down,
            mid=middles[0],
            norm_out=nn.GroupNorm(32, widths[-1], eps=1e-6),
            conv_out=convolution(widths[-1], dim, 1),
        )
        self.decoder = named(
            conv_in=convolution(dim, widths[-1]),
            mid=middles[1],
            up=nn.ModuleList(reversed(up)) if maskbit == "new" else up,
            norm_out=nn.GroupNorm(32, widths[0], eps=1e-6),
            conv_out=convolution(widths[0], channels),
        )
        if codes:
            self.quantize = named(embedding=nn.Embedding(codes, dim))
        randomise(self)

    def _stack(self, module):
        return module.res_blocks if self.maskbit else module.block

    def encode(self, images):
        hidden = self.encoder.conv_in(images)
        for level, stage in enumerate(self.encoder.down):
            for block in self._stack(stage):
                hidden = block(hidden)
            if level + 1 < len(self.encoder.down):
                hidden = stage.down_conv(F.pad(hidden, (0, 1, 0, 1))) if self.halving else F.avg_pool2d(hidden, 2)
        for block in self.encoder.mid.res_blocks if self.maskbit else self.encoder.mid:
            hidden = block(hidden)
        return self.encoder.conv_out(F.silu(self.encoder.norm_out(hidden)))

    def decode(self, codes):
        hidden = self.decoder.conv_in(codes)
        for block in self.decoder.mid.res_blocks if self.maskbit else self.decoder.mid:
            hidden = block(hidden)
        for stage in self.decoder.up if self.maskbit == "new" else reversed(self.decoder.up):
            for block in self._stack(stage):
                hidden = block(hidden)
            if hasattr(stage, "upsample_conv"):
                hidden = stage.upsample_conv(F.interpolate(hidden, scale_factor=2.0))
        return self.decoder.conv_out(F.silu(self.decoder.norm_out(hidden)))


class GSQBlock(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.net = nn.Sequential(
            nn.GroupNorm(32, width),
            nn.SiLU(),
            convolution(width, out),
            nn.GroupNorm(32, out),
            nn.SiLU(),
            nn.Dropout2d(0.0),
            convolution(out, out),
        )
        self.skip = convolution(width, out, 1) if width != out else nn.Identity()

    def forward(self, x):
        return self.skip(x) + self.net(x)


class GSQAttention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.qkv_conv, self.proj_conv = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x):
        query, key, value = self.qkv_conv(self.norm(x)).flatten(2).chunk(3, 1)
        weights = (query.mT @ key * query.shape[1] ** -0.5).softmax(-1)
        return x + self.proj_conv((value @ weights.mT).view_as(x))


class GSQResize(nn.Module):
    """Halves by a strided convolution; doubles by depth to space, position before channel, or nearest neighbours."""

    def __init__(self, width, kind):
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(
            width, 4 * width if kind == "depth" else width, 3, stride=2 if kind == "halve" else 1, padding=1
        )

    def forward(self, x):
        if self.kind == "nearest":
            return self.conv(F.interpolate(x, scale_factor=2.0))
        out = self.conv(x)
        if self.kind == "depth":
            batch, _, height, width = out.shape
            out = out.view(batch, 2, 2, -1, height, width).permute(0, 3, 4, 1, 5, 2)
            out = out.reshape(batch, -1, 2 * height, 2 * width)
        return out


class GSQModulation(nn.Module):
    def __init__(self, width, dim):
        super().__init__()
        self.gamma, self.beta = nn.Linear(dim, width), nn.Linear(dim, width)

    def forward(self, x, codes):
        scale = (codes.flatten(2).var(-1) + 1e-6).sqrt()
        normal = F.group_norm(x, 32, eps=1e-6)
        return self.gamma(scale)[..., None, None] * normal + self.beta(codes.mean((2, 3)))[..., None, None]


class GSQ(nn.Module):
    """The FlexTokenizer of flex_gen.

    Args:
        counts: Residual blocks of each resolution of the encoder, and of its middle; `decoder_counts` likewise.
        attended: Factors by which grids are coarser, where self-attention follows the residual blocks.
    """

    def __init__(
        self,
        channels=3,
        width=32,
        multipliers=(1, 2),
        counts=(1, 1, 1),
        decoder_counts=(1, 1, 1),
        attended=(),
        middle_attention=False,
        adaptive=True,
        depth=True,
        dim=8,
        groups=2,
        codes=64,
    ):
        super().__init__()
        widths = [width * each for each in multipliers]

        def level(into, out, count, factor):
            change = [GSQBlock(into, out)] if into != out else []
            attention = factor in attended
            return change + [
                part for _ in range(count) for part in (GSQBlock(out, out), *([GSQAttention(out)] if attention else []))
            ]

        def middle(count):
            parts = [
                part for _ in range(count) for part in (GSQAttention(widths[-1]), GSQBlock(widths[-1], widths[-1]))
            ]
            return [part for part in parts[1:] if middle_attention or isinstance(part, GSQBlock)]

        coarsening = []
        for number, (into, out) in enumerate(zip([width, *widths], widths, strict=False)):
            coarsening += [GSQResize(into, "halve")] if number else []
            coarsening += level(into, out, counts[number], 2**number)
        refining = middle(decoder_counts[-1])
        into = widths[-1]
        for number in reversed(range(len(widths))):
            refining += [GSQModulation(into, dim)] if adaptive else []
            refining += level(into, widths[number], decoder_counts[number], 2**number)
            into = widths[number]
            refining += [GSQResize(into, "depth" if depth else "nearest")] if number else []
        self.encoder = named(
            conv_in=convolution(channels, width),
            blocks=nn.ModuleList([*coarsening, *middle(counts[-1])]),
            fianl_layers=nn.Sequential(nn.GroupNorm(32, widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], dim, 1)),
        )
        self.decoder = named(
            conv_in=convolution(dim, widths[-1]),
            blocks=nn.ModuleList(refining),
            final_layers=nn.Sequential(nn.GroupNorm(32, widths[0]), nn.SiLU(), convolution(widths[0], channels)),
        )
        self.quantizers = named(codebook=nn.Embedding(codes, dim // groups))
        randomise(self)

    def encode(self, images):
        hidden = self.encoder.conv_in(images)
        for block in self.encoder.blocks:
            hidden = block(hidden)
        return self.encoder.fianl_layers(hidden)

    def indices(self, features, unit_norm):
        """``(b h w g)``, of the closest directions or codes."""
        table = self.quantizers.codebook.weight
        rows = features.movedim(1, -1).unflatten(-1, (-1, table.shape[1])).double()
        table = table.double()
        if unit_norm:
            rows, table = F.normalize(rows, dim=-1), F.normalize(table, dim=-1)
        return torch.cdist(rows.flatten(0, -2), table).argmin(-1).view(rows.shape[:-1])

    def decode(self, indices):
        codes = self.quantizers.codebook(indices).flatten(-2).movedim(-1, 1).contiguous()
        hidden = self.decoder.conv_in(codes)
        for block in self.decoder.blocks:
            hidden = block(hidden, codes) if isinstance(block, GSQModulation) else block(hidden)
        return self.decoder.final_layers(hidden)


class Adapter(nn.Module):
    """A transformer of FQGAN over the positions of the grid."""

    def __init__(self, cells, width, depth, heads):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.zeros(cells, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.ModuleList(
            named(
                ln_1=nn.LayerNorm(width),
                attn=nn.MultiheadAttention(width, heads, batch_first=True),
                ln_2=nn.LayerNorm(width),
                mlp=nn.Sequential(),
            )
            for _ in range(depth)
        )
        for block in self.transformer:
            block.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
            block.mlp.add_module("gelu", nn.GELU())
            block.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x):
        tokens = self.ln_pre(x.flatten(2).mT + self.positional_embedding)
        for block in self.transformer:
            normal = block.ln_1(tokens)
            tokens = tokens + block.attn(normal, normal, normal, need_weights=False)[0]
            tokens = tokens + block.mlp(block.ln_2(tokens))
        return self.ln_post(tokens).mT.reshape(x.shape)


def spread_groups(original, features):
    """Codes of GSQ around the features of all groups."""
    table = original.quantizers.codebook.weight
    groups = features.shape[1] // table.shape[1]
    spread_codes(table.data, features.unflatten(1, (groups, -1)).transpose(1, 2).flatten(2, 3))
