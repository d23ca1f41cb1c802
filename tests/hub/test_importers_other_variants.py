"""Checkpoints of programs with other quantizers and backbones, in other configurations than the published ones."""

import json

import pytest
import torch
import torch.nn.functional as F
from golden_checkpoints import imported
from original_backbones import BSQViT, Cosmos, TiTok
from original_programs import PIXELS, ROUNDED, assert_same, emu3, pictures, randomise, vit_vqgan
from original_pyramids import RQVAE, VAR, Trunks
from original_trunks import MaskGIT

import vistok
from vistok.hub.importers import import_checkpoint

RQVAES = {
    "a shared codebook": {"sizes": (64, 64, 64), "shared": True},
    "codebooks of other sizes": {"sizes": (64, 32, 48)},
    "one depth": {"sizes": (64,)},
    "codes of 2x2 features": {"sizes": (64, 64), "patch": 2, "embed_dim": 4},
    "codes of 4x4 features, shared": {"sizes": (64, 64, 64), "patch": 4, "embed_dim": 3, "shared": True},
    "a wide first level": {"sizes": (64, 64), "ch_mult": (2, 3), "attn_resolutions": [16]},
}


@torch.no_grad()
@pytest.mark.parametrize("name", RQVAES)
def test_rq_vae_is_reproduced(tmp_path, name):
    original = RQVAE(**RQVAES[name])
    indices = original.encode(pictures())
    tokenizer = imported("rqvae", {"state_dict": original.state_dict()}, tmp_path)
    assert_same(tokenizer, pictures(), indices, original.decode(indices))
    assert tokenizer.factor == 2 * RQVAES[name].get("patch", 1)
    loaded = vistok.load(vistok.save(tokenizer, tmp_path / "bundle"))
    assert torch.equal(loaded.encode(pictures()).indices, tokenizer.encode(pictures()).indices)


def test_moving_averages_of_rq_vae_are_its_other_state_dict(tmp_path):
    raw, averaged = (RQVAE((64, 64), embed_dim=dim) for dim in (8, 4))
    content = {"state_dict": raw.state_dict(), "state_dict_ema": averaged.state_dict()}
    assert imported("rqvae", content, tmp_path, weights="ema").quantizer.dim == 4


VARS = {
    "four convolutions": {"scales": (1, 2, 3, 5, 8, 16)},
    "one convolution": {"scales": (1, 2, 4, 16), "share": 1},
    "a convolution for each scale": {"scales": (1, 2, 4, 8, 16), "share": 0},
    "two convolutions and a scale between them": {"scales": (1, 4, 16), "share": 2},
    "another share": {"scales": (1, 3, 16), "share": 1, "ratio": 0.2},
    "no convolutions": {"scales": (1, 4, 16), "ratio": 0},
    "the closest direction": {"scales": (1, 2, 4, 16), "znorm": True},
    "1x1 convolutions around the quantizer": {"scales": (1, 2, 16), "share": 1, "kernel": 1},
    "a whole map at every scale": {"scales": (16, 16), "share": 1},
}


@torch.no_grad()
@pytest.mark.parametrize("name", VARS)
def test_var_is_reproduced(tmp_path, name):
    original = VAR(**VARS[name])
    maps = original.encode(pictures())
    options = {"scales": list(VARS[name]["scales"])}
    if original.ratio not in (0, 0.5):
        options["phi_ratio"] = original.ratio
    if original.znorm:
        options["znorm"] = True
    tokenizer = imported("var", original.checkpoint(), tmp_path, **options)
    indices = torch.cat([each.flatten(1) for each in maps], 1)
    assert_same(tokenizer, pictures(), indices, original.decode(maps))


def test_var_has_the_maps_of_both_published_sizes(tmp_path):
    original = VAR((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
    quantizer = imported("var", original.checkpoint(), tmp_path).quantizer
    assert quantizer.scale_sizes((16, 16)) == [(side, side) for side in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)]
    assert quantizer.scale_sizes((32, 32)) == [(side, side) for side in (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)]


def test_the_tokenizer_is_found_in_what_training_of_var_saves(tmp_path):
    weights = VAR((1, 4, 16), share=1).checkpoint()
    alone = imported("var", weights, tmp_path, scales=[1, 4, 16]).state_dict()
    content = {"epoch": 1, "trainer": {"var_wo_ddp": {"pos_1LC": torch.ones(3)}, "vae_local": weights}, "args": {}}
    within = imported("var", content, tmp_path, scales=[1, 4, 16]).state_dict()
    assert all(torch.equal(within[name], each) for name, each in alone.items())


def test_sizes_of_other_convolutions_of_var_are_refused(tmp_path):
    original = VAR((1, 16), share=1, kernel=5)
    with pytest.raises(ValueError, match="around the quantizer are 5x5, only 1x1 and 3x3 are supported"):
        imported("var", original.checkpoint(), tmp_path, scales=[1, 16])


def infinity(bits, multipliers, images):
    """Weights of Infinity with its own names, and the bits and images of its schedules."""
    original = Trunks(bits, z_channels=bits, ch_mult=multipliers, attn_resolutions=[])
    randomise(original)
    # Means of other signs: those of the coarsest map are the signs of the channels' means.
    features = original.encoder(images)
    original.encoder.conv_out.bias -= features.mean((0, 2, 3)) - features.std() * torch.linspace(-1, 1, bits)
    weights = {name: each for name, each in original.state_dict().items() if name.startswith(("encoder.", "decoder."))}
    return original, weights


@torch.no_grad()
@pytest.mark.parametrize(
    ("bits", "multipliers", "size", "schedule"),
    [
        (18, (1, 1, 1, 1, 1), (128, 96), [(1, 1), (2, 2), (4, 3), (8, 6)]),
        (20, (1, 1, 1, 1, 1), (64, 64), [(1, 1), (2, 2), (4, 4)]),
        # Of the published size: the last map of the schedule of 3 : 2 for 256 x 256 pixels.
        (16, (1, 1, 1, 1, 1), (336, 224), [(1, 1), (2, 2), (3, 2), (6, 4), (9, 6), (15, 10), (21, 14)]),
        (14, (1, 1, 1, 1), (64, 64), [(2, 2), (4, 4), (8, 8)]),
    ],
)
def test_infinity_is_reproduced_with_its_schedules(tmp_path, bits, multipliers, size, schedule):
    images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(3)) * 2 - 1
    original, weights = infinity(bits, multipliers, images)
    features = rest = original.encoder(images)
    codes, found = torch.zeros_like(rest), []
    for cells in schedule:
        signs = F.interpolate(rest, cells, mode="area") > 0
        added = torch.where(signs, bits**-0.5, -(bits**-0.5))
        added = F.interpolate(added, features.shape[2:], mode="bilinear")
        rest, codes = rest - added, codes + added
        found.append(signs.movedim(1, -1).flatten(1, 2))
    tokenizer = imported("infinity:d16", {"vae": weights}, tmp_path)
    indices = torch.cat(found, 1).long()
    assert_same(tokenizer, images, indices, original.decoder(codes), used=2)


def test_what_infinity_puts_before_its_quantizer_is_no_constant(tmp_path):
    _, weights = infinity(8, (1, 1, 1, 1, 1), pictures())
    weights |= {"quantizer.lfq.mask": torch.ones(8), "quantizer.layernorm.weight": torch.ones(8)}
    with pytest.raises(ValueError, match=r"have no place in the model: \['quantizer\.layernorm\.weight'\]"):
        imported("infinity", weights, tmp_path)


TITOKS = {
    "other sizes of both parts": {"widths": (64, 128), "depths": (2, 1), "tokens": 9},
    "larger patches in the decoder": {"patches": (4, 8), "dim": 8},
    "smaller patches in the decoder": {"patches": (16, 8), "size": 64, "widths": (192, 128), "heads": (3, 2)},
    "codes of any length": {"unit_norm": False, "dim": 20},
    "few channels and codes of any length": {"unit_norm": False, "dim": 6, "codes": 40},
    "many channels of unit length": {"dim": 32},
}


@torch.no_grad()
@pytest.mark.parametrize("name", TITOKS)
def test_titok_is_reproduced(tmp_path, name):
    original = TiTok(**TITOKS[name])
    images = pictures(original.size)
    indices = original.encode(images)
    # As save_pretrained writes it, beside the weights.
    config = {"model": {"vq_model": {"use_l2_norm": original.unit_norm}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = imported("titok", original.state_dict(), tmp_path)
    assert_same(tokenizer, images, indices, original.decode(indices), restore=lambda images: images / 2 + 0.5)


@torch.no_grad()
def test_heads_that_tensors_do_not_tell_are_options(tmp_path):
    original = TiTok(widths=(64, 96), heads=(4, 6))
    indices = original.encode(pictures())
    options = {"num_heads": 4, "num_heads_decoder": 6}
    tokenizer = imported("titok", original.state_dict(), tmp_path, **options)
    assert_same(tokenizer, pictures(), indices, original.decode(indices), restore=lambda images: images / 2 + 0.5)
    with pytest.raises(ValueError, match=r"64 channels of the encoder are not 5 heads of one width.*option num_heads"):
        imported("titok", original.state_dict(), tmp_path, num_heads=5)


@torch.no_grad()
def test_titok_with_a_decoder_of_pixels_is_reproduced(tmp_path):
    teacher = MaskGIT(multipliers=(1, 1, 1, 2), dim=10)
    original = TiTok(legacy=True, tokens=16, depths=(2, 2), pixel_decoder=PixelDecoder(teacher))
    weights = {
        name.replace("pixel_decoder.decoder.", "pixel_decoder."): each for name, each in original.state_dict().items()
    }
    indices = original.encode(pictures())
    tokenizer = imported("titok", weights, tmp_path)
    assert_same(tokenizer, pictures(), indices, original.decode(indices), restore=lambda images: images / 2 + 0.5)


class PixelDecoder(torch.nn.Module):
    def __init__(self, teacher):
        super().__init__()
        self.conv_in, self.decoder, self.teacher = teacher.decoder.conv_in, teacher.decoder, [teacher]

    def forward(self, codes):
        return self.teacher[0].decode(codes)


@torch.no_grad()
@pytest.mark.parametrize("dim", [6, 16])
def test_titok_with_a_variance_keeps_the_mean(tmp_path, dim):
    original = TiTok(kind="vae", dim=dim)
    mean = original.features(pictures()).chunk(2, 1)[0]
    tokenizer = imported("titok", original.state_dict(), tmp_path)
    torch.testing.assert_close(tokenizer.encode(pictures()).codes, mean, atol=PIXELS, rtol=0)
    decoded = original.decode_codes(mean.mT)
    torch.testing.assert_close(tokenizer.decode(mean, (32, 32)) / 2 + 0.5, decoded, atol=PIXELS * 3, rtol=0)


BSQ_VITS = {
    "other sizes of both parts": {"widths": (64, 128), "depths": (1, 2), "ratio": 3.0, "bits": 18, "hidden": 64},
    "thirty-six bits in groups": {"bits": 36, "group": 9, "patch": 4},
    "one layer after the decoder": {"hidden": None, "bits": 10, "group": 5},
    "no normalisation before": {"ln_pre": False},
    "scales of the branches": {"scales": True, "depths": (2, 2)},
    "codes of ones": {"unit_norm": False},
    "a codebook": {"codes": 64, "search_norm": False},
    "a codebook of directions": {"codes": 64, "search_norm": True},
}


@torch.no_grad()
@pytest.mark.parametrize("name", BSQ_VITS)
def test_bsq_vit_is_reproduced(tmp_path, name):
    original = BSQViT(**BSQ_VITS[name])
    indices, codes = original.encode(pictures())
    options = {"unit_norm": original.search_norm} if "codes" in BSQ_VITS[name] else {}
    if not original.unit_norm:
        options["unit_norm"] = False
    content = {"ema_state_dict": {f"module.module.{key}": each for key, each in original.state_dict().items()}}
    tokenizer = imported("bsqvit", content, tmp_path, weights="ema", **options)
    assert_same(tokenizer, pictures(), indices, original.decode(codes))


def test_directions_of_bsq_vit_are_told_by_codes_of_one_length(tmp_path):
    weights = BSQViT(codes=64).state_dict()
    with pytest.raises(ValueError, match="whether codes have unit length: pass l2_norm as option unit_norm"):
        imported("bsqvit", weights, tmp_path)
    weights["quantize.embedding.weight"] = F.normalize(weights["quantize.embedding.weight"], dim=-1)
    assert imported("bsqvit", weights, tmp_path).quantizer.choices["distance"] == "cosine"


COSMOS = {
    "no halving behind the patches": {"halvings": 0},
    "every level halves": {"halvings": 2},
    "three levels, two halvings": {"multipliers": (2, 4, 2), "halvings": 2, "blocks": 2, "patch": 2},
    "attention at two levels": {"multipliers": (1, 1, 2), "attention": (0, 2), "patch": 2},
    "other levels": {"dim": 4, "levels": (7, 5, 5, 3)},
    "six other levels": {"levels": (3, 4, 5, 6, 7, 8)},
    "pixels of patches": {"method": "rearrange", "patch": 2},
    "no patches": {"patch": 1, "halvings": 2},
    "a codebook": {"codes": 64, "dim": 5},
    "one channel": {"channels": 1, "patch": 4},
    "residual scalars": {"depth": 3},
    "residual scalars of other levels": {"depth": 2, "dim": 4, "levels": (7, 5, 5, 3)},
}
DI = (8, 8, 8, 5, 5, 5)


@torch.no_grad()
@pytest.mark.parametrize("constants", [True, False], ids=["TorchScript", "options"])
@pytest.mark.parametrize("name", COSMOS)
def test_cosmos_is_reproduced(tmp_path, name, constants):
    changes = COSMOS[name]
    original = Cosmos(**changes)
    images = pictures(channels=changes.get("channels", 3))
    indices, codes = original.encode(images)
    weights, options = original.state_dict(), {}
    if constants:
        # What an archive holds besides: the wavelets of both parts, and the levels.
        wavelets = torch.ones(2) if original.method == "rearrange" else torch.full((2,), 0.5**0.5)
        weights |= {f"encoder.patcher.{each}": torch.arange(2) for each in ("_arange",)}
        weights |= {"encoder.patcher.wavelets": wavelets, "decoder.unpatcher.wavelets": wavelets}
        stages = [""] if original.depth is None else [f"layers.{number}." for number in range(original.depth)]
        for stage in stages if "codes" not in changes else ():
            weights |= {
                f"quantizer.{stage}_levels": torch.tensor(original.levels),
                f"quantizer.{stage}_basis": torch.ones(6),
            }
    else:
        if "codes" not in changes and original.levels != DI:
            options["levels"] = list(original.levels)
        if original.method == "rearrange":
            options["patching"] = "fold"
        if original.depth is not None:
            options["num_quantizers"] = original.depth
    tokenizer = imported("cosmos", weights, tmp_path, **options)
    assert_same(tokenizer, images, indices, original.decode(codes), used=5)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_archives_of_cosmos_tell_levels_and_patches(tmp_path):
    original = Cosmos(levels=(7, 5, 5, 3, 4, 6), method="rearrange", patch=2)
    for part in (original.encoder, original.decoder):
        part.patcher = torch.nn.Module()
        part.patcher.register_buffer("wavelets", torch.ones(2), persistent=False)
    original.quantizer.register_buffer("_levels", torch.tensor(original.levels, dtype=torch.int32), persistent=False)
    indices, codes = original.encode(pictures())
    torch.jit.trace(original, pictures()).save(tmp_path / "autoencoder.jit")
    tokenizer = import_checkpoint(tmp_path / "autoencoder.jit", "cosmos")
    assert_same(tokenizer, pictures(), indices, original.decode(codes))


@torch.no_grad()
@pytest.mark.parametrize(
    "changes", [{"z_channels": 10, "dim": 10}, {"dim": 16, "variance": True}, {"dim": 3, "variance": True}]
)
def test_continuous_cosmos_is_reproduced(tmp_path, changes):
    original = Cosmos(**changes)
    tokenizer = imported("cosmos:ci8x8", original.state_dict(), tmp_path)
    assert imported("cosmos", original.state_dict(), tmp_path).quantizer.codebook_sizes == ()
    features = original.features(pictures())
    torch.testing.assert_close(tokenizer.encode(pictures()).codes, features, atol=PIXELS, rtol=0)
    decoded = original.decode(features)
    scale = max(1.0, decoded.abs().max().item())
    torch.testing.assert_close(tokenizer.decode(features), decoded, atol=PIXELS * scale, rtol=0)


def test_cosmos_asks_for_levels_that_tensors_do_not_tell(tmp_path):
    weights = Cosmos(dim=5, levels=(8, 8, 8, 8, 8)).state_dict()
    with pytest.raises(ValueError, match="pass their numbers of levels as option levels, or an empty list"):
        imported("cosmos:di8x8", weights, tmp_path)
    assert imported("cosmos:ci8x8", weights, tmp_path).quantizer.codebook_sizes == ()
    # Six channels are finite scalars in the published models, and would be continuous in others.
    with pytest.raises(ValueError, match="tensors do not tell whether the 6 channels are finite scalars"):
        imported("cosmos", Cosmos(z_channels=6).state_dict(), tmp_path)
    with pytest.raises(ValueError, match=r"levels=\[8, 8\] are of 2 channels, but the codes have 5"):
        imported("cosmos", weights, tmp_path, levels=[8, 8])


VIT_VQGANS = {
    "narrow heads": {"width": 64, "num_heads": 3, "head_dim": 16, "hidden": 96},
    "one head as wide as the tokens": {"width": 64, "num_heads": 1},
    "codes of any length": {"width": 64, "num_heads": 2, "unit_norm": False},
    "residual codes": {"width": 64, "num_heads": 2, "num_quantizers": 3},
    "one channel": {"width": 64, "num_heads": 2, "channels": 1},
}


@pytest.mark.parametrize("name", VIT_VQGANS)
def test_vit_vqgan_is_reproduced_in_other_configurations(tmp_path, name):
    changes = VIT_VQGANS[name]
    weights, indices, decoded = vit_vqgan(**changes)
    options = {key: changes[key] for key in ("head_dim", "unit_norm", "num_quantizers") if key in changes}
    tokenizer = imported("vitvqgan", {"state_dict": weights}, tmp_path, **options)
    images = pictures(channels=changes.get("channels", 3))
    assert_same(tokenizer, images, indices, decoded, restore=lambda images: images / 2 + 0.5)


def test_heads_of_another_width_are_asked_for(tmp_path):
    weights, _, _ = vit_vqgan(64, 3, head_dim=16)
    with pytest.raises(ValueError, match="has 48 channels, no heads of 64: pass theirs as option head_dim"):
        imported("vitvqgan", {"state_dict": weights}, tmp_path)


@torch.no_grad()
@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [
        ({"n_hid": 64, "n_blk_per_group": 3}, {"n_hid": 64, "n_blk_per_group": 1, "n_init": 32}),
        ({"n_hid": 128, "n_blk_per_group": 1}, {"n_hid": 64, "n_blk_per_group": 2, "n_init": 128}),
    ],
)
def test_encoder_and_decoder_of_dall_e_may_differ(tmp_path, encoder, decoder):
    dall_e = pytest.importorskip("dall_e")
    parts = dall_e.Encoder(**encoder, vocab_size=700), dall_e.Decoder(**decoder, vocab_size=700)
    for part in parts:
        randomise(part)
    images = pictures()
    mapped = dall_e.map_pixels((images + 1) / 2)
    parts[0].blocks.output.conv.b.data -= parts[0](mapped).mean((0, 2, 3))
    for part, name in zip(parts, ("encoder.pkl", "decoder.pkl"), strict=True):
        torch.save(part, tmp_path / name)
    indices = parts[0](mapped).argmax(1)
    decoded = dall_e.unmap_pixels(parts[1](F.one_hot(indices, 700).movedim(-1, 1).float())[:, :3].sigmoid())
    tokenizer = import_checkpoint(tmp_path)
    assert_same(tokenizer, images, indices, decoded, restore=lambda images: (images / 2 + 0.5).clamp(0, 1))


EMU3 = {
    "a wide first level, attention everywhere": {"channel_multiplier": [2, 2], "attn_resolutions": [0, 1]},
    "three levels, attention at the middle one": {
        "channel_multiplier": [1, 2, 2],
        "attn_resolutions": [1],
        "num_res_blocks": 2,
        "codebook_size": 100,
    },
    "eight channels of codes": {"embed_dim": 8, "latent_channels": 8},
    "one channel of images": {"in_channels": 1, "out_channels": 1},
}


@torch.no_grad()
@pytest.mark.parametrize("name", EMU3)
def test_emu3_is_reproduced_in_other_configurations_and_by_both_names(tmp_path, name):
    original = emu3(**EMU3[name])
    images = pictures(channels=original.config.in_channels)
    sizes = torch.tensor([[32, 32]] * 2)
    indices = torch.stack(original.encode(images, image_sizes=sizes, return_dict=True).image_tokens)
    weights = original.state_dict()
    within = {f"model.vqmodel.{name}": each for name, each in weights.items()}
    tokenizer = imported("emu3", {**within, "model.text_model.norm.weight": torch.ones(3)}, tmp_path)
    assert_same(tokenizer, images, indices, original.decode(indices), ROUNDED, used=5)
    theirs = imported("emu3", {authors_name(name): each for name, each in weights.items()}, tmp_path).state_dict()
    assert all(torch.equal(each, theirs[key]) for key, each in tokenizer.state_dict().items())


def authors_name(name):
    """The name of a tensor of Emu3 by its authors, of the one in transformers."""
    name = name.replace("middle_block.attn_norm.", "mid.attn_1.norm.").replace("middle_block.", "mid.")
    name = name.replace("down_block.", "").replace("up_block.", "").replace("attn_norms.0.", "attn.0.norm.")
    name = name.replace("attn_norms.1.", "attn.1.norm.").replace("attn_norms.2.", "attn.2.norm.")
    return name.replace("_proj.", ".").replace("attn_1.out.", "attn_1.proj_out.").replace(".out.", ".proj_out.")
