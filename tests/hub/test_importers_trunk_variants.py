"""Checkpoints of convolutional programs in other configurations than the published ones."""

import os
import pickle
import re

import numpy
import omegaconf
import pytest
import torch
import torch.nn.functional as F
from golden_checkpoints import imported
from original_programs import (
    PIXELS,
    ROUNDED,
    Taming,
    assert_same,
    closeness,
    pictures,
    product,
    randomise,
    spread_codes,
)
from original_trunks import GSQ, Adapter, MaskGIT, named, spread_groups

import vistok
from vistok.hub.importers import import_checkpoint, import_pretrained

TRUNKS = {
    "one level": {"ch_mult": (1,), "attn_resolutions": []},
    "one level that attends": {"ch_mult": (1,), "attn_resolutions": [32]},
    "a wide first level": {"ch_mult": (2, 2)},
    "a first level as wide as its multiplier": {"ch_mult": (3, 2), "num_res_blocks": 2},
    "widths that are no multiples of the first one": {"ch_mult": (2, 3), "attn_resolutions": []},
    "attention everywhere": {"ch_mult": (1, 1, 2), "attn_resolutions": [32, 16, 8], "num_res_blocks": 2},
    "grids of no power of two": {"ch_mult": (1, 2, 2), "resolution": 96, "attn_resolutions": [48, 24]},
    "attention in the middle only": {"ch_mult": (1, 2), "attn_resolutions": []},
    "no convolutions between resolutions": {"ch_mult": (1, 2, 2), "resamp_with_conv": False},
    "one channel": {"in_channels": 1, "out_ch": 1},
    "four channels": {"in_channels": 4, "out_ch": 4},
    "few channels of codes": {"z_channels": 5, "embed_dim": 3},
    "more codes than channels": {"z_channels": 4, "embed_dim": 12, "n_embed": 200},
    "four blocks": {"num_res_blocks": 4},
}


@pytest.mark.parametrize(("family", "score"), [("taming", closeness), ("ibq", product)])
@pytest.mark.parametrize("name", TRUNKS)
def test_the_architecture_is_read_from_the_tensors(tmp_path, name, family, score):
    original = Taming(**TRUNKS[name])
    images = pictures(channels=TRUNKS[name].get("in_channels", 3))
    indices = original.indices(images, score)
    tokenizer = imported(family, {"state_dict": original.state_dict()}, tmp_path)
    assert_same(tokenizer, images, indices, original.images(indices), used=3)
    assert tokenizer.preprocessing["channels"] == images.shape[1]


def test_chameleon_is_the_trunk_without_attention_but_in_the_middle(tmp_path):
    original = Taming(ch_mult=(1, 1, 2, 2), attn_resolutions=[], num_res_blocks=2, n_embed=256)
    indices = original.indices(pictures(), closeness)
    tokenizer = imported("chameleon", {"state_dict": original.state_dict()}, tmp_path)
    assert_same(tokenizer, pictures(), indices, original.images(indices))


@torch.no_grad()
@pytest.mark.parametrize(("dim", "changes"), [(4, {}), (6, {"ch_mult": (2, 2), "attn_resolutions": []})])
def test_autoencoders_with_a_kl_term_keep_the_mean(tmp_path, dim, changes):
    original = Taming(z_channels=4, **changes)
    width = original.encoder.conv_out.in_channels
    original.encoder.conv_out = randomise(torch.nn.Conv2d(width, 8, 3, padding=1))
    original.quant_conv = randomise(torch.nn.Conv2d(8, 2 * dim, 1))
    original.post_quant_conv = randomise(torch.nn.Conv2d(dim, 4, 1))
    weights = {key: each for key, each in original.state_dict().items() if not key.startswith("quantize.")}
    tokenizer = imported("ldm_kl", {"state_dict": {**weights, "loss.logvar": torch.zeros(())}}, tmp_path)
    mean = original.features(pictures())[:, :dim]
    torch.testing.assert_close(tokenizer.encode(pictures()).codes, mean, atol=PIXELS, rtol=0)
    decoded = original.decoder(original.post_quant_conv(mean))
    torch.testing.assert_close(tokenizer.decode(mean), decoded, atol=PIXELS * decoded.abs().max().item(), rtol=0)


def test_a_tokenizer_of_an_unusual_trunk_is_the_same_from_its_bundle(tmp_path):
    original = Taming(ch_mult=(2, 3), resamp_with_conv=False)
    tokenizer = imported("openmuse", without_middle_attention(original), tmp_path)
    loaded = vistok.load(vistok.save(tokenizer, tmp_path / "bundle"))
    found = tokenizer.encode(pictures())
    assert torch.equal(loaded.encode(pictures()).indices, found.indices)
    assert torch.equal(loaded.decode(found.codes), tokenizer.decode(found.codes))
    assert loaded.preprocessing["original_range"] == [0, 1]


def without_middle_attention(original):
    """Weights of a model without self-attention in the middle, which may attend at its levels."""
    for part in (original.encoder, original.decoder):
        part.mid.attn_1 = torch.nn.Identity()
    return original.state_dict()


def test_linear_attention_is_refused_by_name(tmp_path):
    weights = Taming().state_dict()
    for name in [name for name in weights if ".attn_1." in name]:
        del weights[name]
    weights["encoder.mid.attn_1.to_qkv.weight"] = torch.ones(192, 64, 1, 1)
    with pytest.raises(ValueError, match="its self-attention is linear"):
        imported("taming", weights, tmp_path)


def test_renumbered_indices_are_those_of_the_whole_codebook_when_asked_for(tmp_path):
    original = Taming()
    weights = {**original.state_dict(), "quantize.used": torch.arange(0, 64, 2), "colorize": torch.ones(3, 3, 1, 1)}
    with pytest.raises(ValueError, match="give whole_codebook=true"):
        imported("taming", weights, tmp_path)
    indices = original.indices(pictures(), closeness)
    tokenizer = imported("taming", weights, tmp_path, whole_codebook=True)
    assert_same(tokenizer, pictures(), indices, original.images(indices))


@torch.no_grad()
def test_renumbered_indices_of_the_gumbel_variant_are_those_of_the_program(tmp_path):
    quantize = pytest.importorskip("taming.modules.vqvae.quantize")
    original = Taming(gumbel=True, embed_dim=32)
    used = torch.randperm(64, generator=torch.Generator().manual_seed(3))[:24]
    numpy.save(tmp_path / "used.npy", used.numpy())
    theirs = quantize.GumbelQuantize(32, 32, 64, remap=str(tmp_path / "used.npy")).eval()
    theirs.proj, theirs.embed = original.quantize.proj, original.quantize.embed
    original.quantize = theirs
    # The original draws noise, also in evaluation: with a cold softmax of large scores it does not matter.
    theirs.proj.weight.mul_(1e6)
    theirs.proj.bias.mul_(1e6)
    codes, _, (_, _, indices) = theirs(original.features(pictures()))
    tokenizer = imported("taming", original.state_dict(), tmp_path)
    decoded = original.decoder(original.post_quant_conv(codes))
    assert_same(tokenizer, pictures(), indices, decoded, ROUNDED)
    assert tokenizer.vocab_size == 24


WRAPPED = {
    "within latent diffusion": lambda weights: {
        "state_dict": {
            **{f"first_stage_model.{name}": each for name, each in weights.items()},
            "model.diffusion_model.out.0.weight": torch.ones(2),
            "model_ema.diffusion_modelout0weight": torch.ones(2),
            "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight": torch.ones(2, 2),
        }
    },
    "compiled and distributed": lambda weights: {"model": {f"module._orig_mod.{k}": v for k, v in weights.items()}},
    "with a discriminator": lambda weights: {**weights, "loss.discriminator.main.0.weight": torch.ones(2)},
    "half precision": lambda weights: {name: each.half() for name, each in weights.items()},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_weights_are_found_in_what_programs_put_around_them(tmp_path, name):
    original = Taming()
    if name == "half precision":
        original.half().float()
    indices = original.indices(pictures(), closeness)
    tokenizer = imported("taming", WRAPPED[name](original.state_dict()), tmp_path)
    assert_same(tokenizer, pictures(), indices, original.images(indices))


@pytest.mark.parametrize("of_parts", [False, True], ids=["model_ema", "ema of each part"])
def test_moving_averages_are_found_by_either_way_of_naming_them(tmp_path, of_parts):
    original = Taming()
    indices = original.indices(pictures(), closeness)
    weights = {name: torch.randn_like(each) for name, each in original.state_dict().items()}
    for name, each in original.state_dict().items():
        part, _, rest = name.partition(".")
        kept = f"ema_{part}.{rest.replace('.', '')}" if of_parts else f"model_ema.{name.replace('.', '')}"
        weights |= {kept: each, f"{kept.partition('.')[0]}.decay": torch.tensor(0.9)}
    tokenizer = imported("taming", {"state_dict": weights}, tmp_path, weights="ema")
    assert_same(tokenizer, pictures(), indices, original.images(indices))
    raw = imported("taming", {"state_dict": weights}, tmp_path)
    assert not torch.equal(raw.quantizer.table, tokenizer.quantizer.table)


def test_the_weights_that_the_authors_use_are_taken_unless_others_are_asked_for(tmp_path):
    averaged = Taming().state_dict()
    raw = {name: torch.randn_like(each) for name, each in averaged.items()}
    both = raw | {f"model_ema.{name.replace('.', '')}": each for name, each in averaged.items()}

    def table(family, content, **options):
        return imported(family, {"state_dict": content}, tmp_path, **options).quantizer.table

    name = "quantize.embedding.weight"
    assert torch.equal(table("ibq:16384", both), averaged[name])
    assert torch.equal(table("ibq:16384", both, weights="raw"), raw[name])
    assert torch.equal(table("ibq:16384", raw), raw[name])
    assert torch.equal(table("ibq", both), raw[name])
    with pytest.raises(ValueError, match="has no moving averages: use weights=raw"):
        table("ibq:16384", raw, weights="ema")


# What OptVQ calls no connector, a projection and heads.
OPTVQ = {
    "no projection": {"projected": False, "heads": 2},
    "one head": {"projected": True, "heads": 1},
    "one head, no projection": {"projected": False, "heads": 1},
    "no 1x1 convolutions": {"projected": True, "heads": 4, "connector": False},
}


@torch.no_grad()
@pytest.mark.parametrize("name", OPTVQ)
def test_optvq_without_some_of_its_parts_is_reproduced(tmp_path, name):
    changes = OPTVQ[name]
    width, connector = 16 // changes["heads"], changes.get("connector", True)
    original = Taming(z_channels=16, embed_dim=16)
    if not connector:
        original.quant_conv = original.post_quant_conv = torch.nn.Identity()
    features = original.features(pictures())
    original.quantize.embedding = torch.nn.Embedding(64, width)
    table = original.quantize.embedding.weight
    spread_codes(table.data, features.unflatten(1, (-1, width)).transpose(1, 2).flatten(2, 3))
    if changes["projected"]:
        original.quantize.proj = randomise(torch.nn.Linear(width, width))
        table = original.quantize.proj(table)
    rows = features.movedim(1, -1).unflatten(-1, (-1, width))
    indices = closeness(rows.flatten(0, -2), table).argmax(-1).view(rows.shape[:-1])
    decoded = original.decoder(original.post_quant_conv(table[indices].flatten(-2).movedim(-1, 1)))
    tokenizer = imported("optvq", {"model": original.state_dict()}, tmp_path)
    assert_same(tokenizer, pictures(), indices, decoded, used=3)


@torch.no_grad()
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_vqgan_lc_with_any_projection_is_reproduced(tmp_path, layers):
    original = Taming(embed_dim=8)
    del original.quantize.embedding
    table_dim = 8 if layers == 0 else 24
    original.tok_embeddings = torch.nn.Embedding(64, table_dim)
    features = original.features(pictures())
    project = torch.nn.Identity()
    if layers:
        project = original.codebook_projection = torch.nn.Linear(table_dim, 8)
    if layers == 2:
        parts = torch.nn.Linear(table_dim, 256), torch.nn.ReLU(), torch.nn.Linear(256, 8)
        project = original.codebook_projection = torch.nn.Sequential(*parts)
    if layers:
        randomise(project)
    else:
        spread_codes(original.tok_embeddings.weight.data, features)
    table = project(original.tok_embeddings.weight)
    rows = features.movedim(1, -1)
    indices = closeness(rows.flatten(0, -2), table).argmax(-1).view(rows.shape[:-1])
    decoded = original.decoder(original.post_quant_conv(table[indices].movedim(-1, 1)))
    content = {**original.state_dict(), "cluster_size": torch.ones(64), "embed_avg": torch.ones(64, table_dim)}
    assert_same(imported("vqgan_lc", {"model": content}, tmp_path), pictures(), indices, decoded, used=4)


@torch.no_grad()
def test_vqgan_lc_compares_clip_codes_with_features_of_unit_length(tmp_path):
    original = Taming(embed_dim=768)
    weights = original.state_dict()
    features = F.normalize(original.features(pictures()), dim=1)
    table = weights.pop("quantize.embedding.weight")
    spread_codes(table, features)
    weights["tok_embeddings.weight"] = table
    rows = features.movedim(1, -1)
    indices = closeness(rows.flatten(0, -2), table).argmax(-1).view(rows.shape[:-1])
    assert_same(imported("vqgan_lc", weights, tmp_path), pictures(), indices, original.images(indices))
    weights["tok_embeddings.weight"] = original.quantize.embedding.weight
    indices = original.indices(pictures(), closeness)
    tokenizer = imported("vqgan_lc", weights, tmp_path, unit_features=False)
    assert_same(tokenizer, pictures(), indices, original.images(indices))


def llamagen_names(weights, num_levels):
    """Names of LlamaGen for weights of taming-transformers, whose levels of the decoder it numbers in reverse."""
    names = {
        r"^encoder\.down\.(\d)": r"encoder.conv_blocks.\1",
        r"\.block\.(\d)": r".res.\1",
        r"\.mid\.block_1": ".mid.0",
        r"\.mid\.attn_1": ".mid.1",
        r"\.mid\.block_2": ".mid.2",
    }
    renamed = {}
    for name, tensor in weights.items():
        for pattern, replacement in names.items():
            name = re.sub(pattern, replacement, name)
        level = re.match(r"decoder\.up\.(\d)", name)
        if level:
            name = name.replace(level[0], f"decoder.conv_blocks.{num_levels - 1 - int(level[1])}")
        renamed[name] = tensor
    return renamed


def direction(rows, codes):
    return F.normalize(rows.double(), dim=-1) @ F.normalize(codes.double(), dim=-1).T


LLAMAGEN = {
    "three levels": {"ch_mult": (1, 2, 2), "attn_resolutions": [8], "num_res_blocks": 2},
    "a wide first level": {"ch_mult": (2, 2)},
    "decoder of other widths": {"ch_mult": (1, 2), "decoder": (3, 1)},
    "grey": {"in_channels": 1, "out_ch": 1},
}


@torch.no_grad()
@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize("name", LLAMAGEN)
def test_llamagen_of_other_sizes_is_reproduced(tmp_path, name, unit_norm):
    changes = dict(LLAMAGEN[name])
    decoder = changes.pop("decoder", None)
    original = Taming(embed_dim=8, **changes)
    if decoder:
        original.decoder = Taming(embed_dim=8, **changes | {"ch_mult": decoder}).decoder
    images = pictures(channels=changes.get("in_channels", 3))
    indices = original.indices(images, direction if unit_norm else closeness)
    weights = llamagen_names(original.state_dict(), len(changes.get("ch_mult", (1, 2))))
    content = {"model": {**weights, "quantize.codebook_used": torch.zeros(65536)}}
    if unit_norm:
        table = original.quantize.embedding.weight
        table.copy_(F.normalize(table, dim=-1))
    tokenizer = imported("llamagen", content, tmp_path, **{} if unit_norm else {"unit_norm": False})
    assert_same(tokenizer, images, indices, original.images(indices), used=4)


@torch.no_grad()
@pytest.mark.parametrize("attends", [False, True])
@pytest.mark.parametrize("blocks", [1, 2])
def test_the_vqgan_of_open_muse_takes_images_in_the_unit_range(tmp_path, blocks, attends):
    original = Taming(ch_mult=(1, 2, 2), attn_resolutions=[16], num_res_blocks=blocks)
    content = original.state_dict() if attends else without_middle_attention(original)
    images = pictures()
    # Its encoder passes over the self-attention of a level that has one residual block.
    if blocks == 1:
        original.encoder.down[1].attn = torch.nn.ModuleList()
    table = original.quantize.embedding.weight
    spread_codes(table, original.features(images / 2 + 0.5))
    indices = original.indices(images / 2 + 0.5, closeness)
    tokenizer = imported("openmuse", content, tmp_path)
    assert_same(tokenizer, images, indices, original.images(indices), restore=lambda images: images / 2 + 0.5)
    assert tokenizer.preprocessing["original_range"] == [0, 1]


MAGVIT2 = {
    "a wide first level": {"ch_mult": (2, 2)},
    "one level": {"ch_mult": (1,), "z_channels": 9},
    "grey, three blocks": {"in_channels": 1, "out_ch": 1, "num_res_blocks": 3},
    "widths that are no multiples of the first one": {"ch_mult": (2, 3, 1)},
}


@torch.no_grad()
@pytest.mark.parametrize("name", MAGVIT2)
def test_open_magvit2_of_other_sizes_is_reproduced(tmp_path, name):
    model = pytest.importorskip("open_magvit2.taming.modules.diffusionmodules.improved_model")
    sizes = {"ch": 32, "out_ch": 3, "in_channels": 3, "num_res_blocks": 1, "z_channels": 6, "ch_mult": (1, 2)}
    sizes |= {"resolution": 32, "double_z": False} | MAGVIT2[name]
    original = randomise(named(encoder=model.Encoder(**sizes), decoder=model.Decoder(**sizes)))
    images = pictures(channels=sizes["in_channels"])
    mask = original.encoder(images) > 0
    indices = (mask.long() * (2 ** torch.arange(sizes["z_channels"])).view(-1, 1, 1)).sum(1)
    weights = {**original.state_dict(), "quantize.mask": torch.ones(6), "quantize.codebook": torch.ones(64, 6)}
    tokenizer = imported("magvit2", {"state_dict": weights}, tmp_path)
    assert_same(tokenizer, images, indices, original.decoder(torch.where(mask, 1.0, -1.0)), used=4)


def test_lfq_behind_projections_is_refused(tmp_path):
    model = pytest.importorskip("open_magvit2.taming.modules.diffusionmodules.improved_model")
    sizes = {"ch": 32, "out_ch": 3, "in_channels": 3, "num_res_blocks": 1, "z_channels": 6, "ch_mult": (1, 2)}
    sizes |= {"resolution": 32}
    weights = named(encoder=model.Encoder(**sizes), decoder=model.Decoder(**sizes)).state_dict()
    weights["quantize.project_in.weight"] = torch.ones(4, 6)
    with pytest.raises(ValueError, match=r"no place in the model: \['quantize.project_in.weight'\]"):
        imported("magvit2", weights, tmp_path)


MASKGIT = {
    "three levels": ("maskgit", {"multipliers": (1, 1, 2), "blocks": 2}),
    "a wide first level": ("maskgit", {"multipliers": (2, 3)}),
    "grey": ("maskgit", {"channels": 1, "dim": 12}),
    "bits": ("maskbit", {"maskbit": "new", "codes": 0, "halving": True, "multipliers": (1, 2, 2)}),
    "bits, pooling, other decoder": ("maskbit", {"maskbit": "new", "codes": 0, "decoder_blocks": 2}),
    "bits, legacy decoder": ("maskbit", {"maskbit": "legacy", "codes": 0, "multipliers": (1, 1, 2), "dim": 9}),
    "codes": ("maskbit", {"maskbit": "new", "halving": True, "multipliers": (2, 2)}),
    "unit codes": ("maskbit", {"maskbit": "new", "halving": True}),
}


@torch.no_grad()
@pytest.mark.parametrize("name", MASKGIT)
def test_maskgit_and_maskbit_of_other_sizes_are_reproduced(tmp_path, name):
    family, changes = MASKGIT[name]
    original = MaskGIT(**changes)
    images = pictures(channels=changes.get("channels", 3))
    features = original.encode(images / 2 + 0.5)
    rows, options = features.movedim(1, -1), {}
    if changes.get("codes") == 0:
        indices = ((rows > 0).long() * 2 ** torch.arange(rows.shape[-1])).sum(-1)
        codes = torch.where(features > 0, 1.0, -1.0)
    else:
        table = original.quantize.embedding.weight
        spread_codes(table, features)
        score = closeness
        content = {name: each.clone() for name, each in original.state_dict().items()}
        if name == "unit codes":
            options, score = {"unit_norm": True}, direction
        indices = score(rows.flatten(0, -2), table).argmax(-1).view(rows.shape[:-1])
        if name == "unit codes":
            table.copy_(F.normalize(table, dim=-1))
        codes = table[indices].movedim(-1, 1)
    content = content if changes.get("codes") != 0 else original.state_dict()
    tokenizer = imported(family, content, tmp_path, **options)
    assert_same(tokenizer, images, indices, original.decode(codes), restore=lambda images: images / 2 + 0.5, used=4)
    assert tokenizer.preprocessing["resize"]["filter"] == {"maskgit": "bicubic", "maskbit": "bilinear"}[family]


GSQ_TRUNKS = {
    "middle attention": {"middle_attention": True, "counts": (2, 1, 3), "decoder_counts": (1, 2, 2)},
    "middle attention, nothing adaptive": {
        "middle_attention": True,
        "adaptive": False,
        "depth": False,
        "counts": (1, 0, 2),
        "decoder_counts": (1, 2, 3),
    },
    "attention at the coarsest level": {"attended": (2,), "counts": (1, 2, 2), "adaptive": False},
    "attention everywhere": {
        "attended": (1, 2, 4),
        "multipliers": (1, 2, 2),
        "counts": (1, 2, 1, 2),
        "decoder_counts": (2, 1, 1, 1),
        "middle_attention": True,
    },
    "attention at a fine level": {"attended": (1,), "counts": (2, 1, 1), "depth": False},
    "a wide first level": {"multipliers": (2, 3), "adaptive": False},
    "no blocks in the middle": {"counts": (1, 1, 0), "decoder_counts": (1, 1, 0)},
    "four channels, one group": {"channels": 4, "groups": 1, "dim": 6},
}


@torch.no_grad()
@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize("name", GSQ_TRUNKS)
def test_gsq_of_other_sizes_is_reproduced(tmp_path, name, unit_norm):
    original = GSQ(**GSQ_TRUNKS[name])
    images = pictures(channels=GSQ_TRUNKS[name].get("channels", 3))
    features = original.encode(images)
    spread_groups(original, features)
    indices = original.indices(features, unit_norm)
    content = {"model_state_dict": original.state_dict()}
    tokenizer = imported("gsq", content, tmp_path, **{} if unit_norm else {"unit_norm": False})
    assert_same(tokenizer, images, indices, original.decode(indices), used=4)


@torch.no_grad()
def test_groups_of_one_channel_and_averaged_codebooks_take_the_nearest_code(tmp_path):
    original = GSQ(groups=8, codes=16)
    features = original.encode(pictures())
    table = original.quantizers.codebook.weight
    table.copy_(torch.rand(table.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    indices = original.indices(features, unit_norm=False)
    assert_same(imported("gsq", original.state_dict(), tmp_path), pictures(), indices, original.decode(indices))
    table.mul_(2)
    with pytest.raises(ValueError, match=r"only unit_norm=false and codes within \[-1, 1\] are supported"):
        imported("gsq", original.state_dict(), tmp_path)
    original = GSQ(groups=1)
    spread_groups(original, original.encode(pictures()))
    indices = original.indices(original.encode(pictures()), unit_norm=False)
    averages = {"quantizers.ema_count": torch.ones(64), "quantizers.ema_weight": torch.ones(64, 8)}
    tokenizer = imported("gsq", {**original.state_dict(), **averages}, tmp_path)
    assert_same(tokenizer, pictures(), indices, original.decode(indices), used=4)


@torch.no_grad()
@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize("built", [dict, omegaconf.DictConfig])
def test_the_configuration_that_gsq_pickles_tells_how_codes_are_compared(tmp_path, built, unit_norm):
    original = GSQ()
    features = original.encode(pictures())
    spread_groups(original, features)
    indices = original.indices(features, unit_norm)
    quantizer = built({"quantize_type": "gvq", "use_l2_norm": unit_norm, "num_group": 2})
    content = {"model_state_dict": original.state_dict()}
    content["config"] = pickle.dumps({"hidden_channels": 32, "quantizer_config": quantizer})
    assert_same(imported("gsq", content, tmp_path), pictures(), indices, original.decode(indices), used=4)
    content["config"] = pickle.dumps({"quantizer_config": built({"use_l1_norm": True})})
    with pytest.raises(ValueError, match=r"sum of their absolute values \(use_l1_norm=true\): not supported"):
        imported("gsq", content, tmp_path)


def test_nothing_that_the_configuration_of_gsq_asks_for_is_executed(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    content = {"model_state_dict": GSQ().state_dict(), "config": pickle.dumps({"quantizer_config": Hostile()})}
    with pytest.raises(ValueError, match=r"checkpoint\.pt cannot be imported as gsq: it asks for \w+\.system"):
        imported("gsq", content, tmp_path)
    with pytest.raises(ValueError, match="cannot be imported as gsq: it holds bytes that are no readable pickle"):
        imported("gsq", {**content, "config": b"pickled"}, tmp_path)
    # What other programs keep there is none of our business.
    imported("taming", {"state_dict": Taming().state_dict(), "config": b"pickled"}, tmp_path)
    assert not (tmp_path / "executed").exists()


FQGAN = {
    "dual": {"visual_head": "vis", "semantic_head": "sem"},
    "triple": {"visual_head": "vis", "semantic_head_mid": "sem_mid", "semantic_head_high": "sem_high"},
}


@torch.no_grad()
@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize("kind", FQGAN)
def test_fqgan_of_other_sizes_is_reproduced(tmp_path, kind, unit_norm):
    original = Taming(embed_dim=8, ch_mult=(2, 1, 2), attn_resolutions=[8])
    heads = FQGAN[kind]
    weights = llamagen_names(original.state_dict(), 3)
    others = ("encoder.norm_out", "encoder.conv_out", "quant", "post_quant")
    weights = {name: each for name, each in weights.items() if not name.startswith(others)}
    kept = []
    original.encoder.norm_out.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    original.encoder(pictures())
    indices, codes = [], []
    for seed, (head, name) in enumerate(heads.items()):
        adapter = randomise(Adapter(64, 64, 2, 8), seed)
        out = randomise(
            named(norm=torch.nn.GroupNorm(32, 64, eps=1e-6), conv=torch.nn.Conv2d(64, 32, 3, padding=1)), seed
        )
        project = randomise(torch.nn.Conv2d(32, 8, 1), seed)
        features = project(out.conv(F.silu(out.norm(adapter(kept[0])))))
        table = torch.empty(64, 8)
        spread_codes(table, features)
        rows = features.movedim(1, -1)
        score = direction if unit_norm else closeness
        indices.append(score(rows.flatten(0, -2), table).argmax(-1).view(rows.shape[:-1]))
        codes.append((F.normalize(table, dim=-1) if unit_norm else table)[indices[-1]].movedim(-1, 1))
        weights |= {f"encoder.{head}.0.{key}": each for key, each in adapter.state_dict().items()}
        for layer in ("norm", "conv"):
            state = getattr(out, layer).state_dict()
            weights |= {f"encoder.{layer}_out_{name}.{key}": each for key, each in state.items()}
        weights |= {f"quant_conv_{name}.{key}": each for key, each in project.state_dict().items()}
        weights |= {f"quantize_{name}.embedding.weight": table, f"quantize_{name}.codebook_used": torch.zeros(65536)}
    merge = randomise(torch.nn.Conv2d(8 * len(heads), 32, 1))
    weights |= {f"post_quant_conv.{key}": each for key, each in merge.state_dict().items()}
    tokenizer = imported("fqgan", {"model": weights}, tmp_path, **{} if unit_norm else {"unit_norm": False})
    decoded = original.decoder(merge(torch.cat(codes, 1)))
    assert_same(tokenizer, pictures(), torch.stack(indices, -1), decoded)


DIFFUSERS = {
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "latent_channels": 4,
}
VQ = {
    "eight groups": {"norm_num_groups": 8, "block_out_channels": (8, 24)},
    "spatial, sixteen groups in the encoder": {"norm_num_groups": 16, "norm_type": "spatial"},
    "attention in levels, none in the middle": {"mid_block_add_attention": False, "layers_per_block": 2},
    "codes of another width": {"vq_embed_dim": 7, "layers_per_block": 3},
    "one level": {
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
        "block_out_channels": (64,),
    },
    "narrowing": {"block_out_channels": (96, 64)},
    "three levels, swish": {
        "down_block_types": ("AttnDownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        "block_out_channels": (32, 32, 64),
        "act_fn": "swish",
    },
    "aMUSEd": {"lookup_from_codebook": True, "mid_block_add_attention": False, "force_upcast": True},
    "four channels": {"in_channels": 4, "out_channels": 4},
}


def vq_model(**changes):
    """A VQModel, what it takes for pictures, and its indices and images."""
    diffusers = pytest.importorskip("diffusers")
    original = randomise(diffusers.VQModel(**{**DIFFUSERS, "num_vq_embeddings": 64, "vq_embed_dim": 4, **changes}))
    unit = changes.get("lookup_from_codebook", False)
    images = pictures(channels=changes.get("in_channels", 3))
    latents = original.encode(images / 2 + 0.5 if unit else images).latents
    spread_codes(original.quantize.embedding.weight.data, latents)
    batch, dim, *grid = latents.shape
    indices = original.quantize(latents)[2][2].view(batch, *grid)
    codes = original.quantize.embedding(indices).movedim(-1, 1)
    shape = (batch, *grid, dim)
    decoded = original.decode(indices if unit else codes, force_not_quantize=True, shape=shape).sample
    return original, images, indices, decoded


@pytest.mark.parametrize("name", VQ)
def test_vq_model_of_diffusers_in_other_configurations_is_reproduced(tmp_path, name):
    original, images, indices, decoded = vq_model(**VQ[name])
    original.save_pretrained(tmp_path)
    tokenizer = import_checkpoint(tmp_path)
    unit = VQ[name].get("lookup_from_codebook", False)
    # With spatial normalisation the original differs from itself in double precision by more than PIXELS.
    tolerance = ROUNDED if "norm_type" in VQ[name] else PIXELS
    restore = (lambda images: images / 2 + 0.5) if unit else (lambda images: images)
    assert_same(tokenizer, images, indices, decoded, tolerance, restore)
    assert tokenizer.preprocessing.get("original_range") == ([0, 1] if unit else None)


def test_a_file_of_diffusers_needs_its_configuration_or_the_options_that_stand_for_it(tmp_path):
    original, images, indices, decoded = vq_model(**VQ["aMUSEd"] | VQ["eight groups"])
    original.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    restored = {"restore": lambda images: images / 2 + 0.5}
    assert_same(import_pretrained("diffusers:amused-256", file), images, indices, decoded, **restored)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="8 channels are no multiple of 32 groups: give norm_num_groups"):
        import_pretrained("diffusers", file)
    tokenizer = import_pretrained("diffusers:amused-256", file, norm_num_groups=8)
    assert_same(tokenizer, images, indices, decoded, **restored)


@torch.no_grad()
@pytest.mark.parametrize("present", ["use_quant_conv", "use_post_quant_conv"])
def test_autoencoder_kl_with_one_of_two_projections_is_reproduced(tmp_path, present):
    diffusers = pytest.importorskip("diffusers")
    absent = {"use_quant_conv": False, "use_post_quant_conv": False, present: True}
    facts = {"latents_mean": [0.1] * 4, "latents_std": [2.0] * 4, "shift_factor": 0.3}
    original = randomise(diffusers.AutoencoderKL(**DIFFUSERS, **absent, **facts))
    original.save_pretrained(tmp_path)
    tokenizer = import_checkpoint(tmp_path)
    mean = original.encode(pictures()).latent_dist.mean
    torch.testing.assert_close(tokenizer.encode(pictures()).codes, mean, atol=PIXELS, rtol=0)
    decoded = original.decode(mean).sample
    torch.testing.assert_close(tokenizer.decode(mean), decoded, atol=PIXELS * decoded.abs().max().item(), rtol=0)
    assert facts.items() <= tokenizer.preprocessing.items()


def test_the_pieces_of_a_model_are_joined_and_its_variants_left_out(tmp_path):
    original, images, indices, decoded = vq_model()
    original.save_pretrained(tmp_path, max_shard_size="300KB")
    original.half().save_pretrained(tmp_path, max_shard_size="300KB", variant="fp16")
    pieces = sorted(tmp_path.glob("*-of-*.safetensors"))
    assert len(pieces) > 4
    assert_same(import_checkpoint(tmp_path), images, indices, decoded)
    next(piece for piece in pieces if "fp16" not in piece.name).unlink()
    with pytest.raises(ValueError, match="others are missing"):
        import_checkpoint(tmp_path)


def test_a_variant_is_taken_where_it_is_alone_and_folders_of_a_pipeline_are_named(tmp_path):
    original, images, indices, decoded = vq_model()
    folder = tmp_path / "pipeline" / "vqvae"
    original.save_pretrained(folder, safe_serialization=False)
    # The same weights: half precision would move indices.
    (folder / "diffusion_pytorch_model.bin").rename(folder / "diffusion_pytorch_model.non_ema.bin")
    assert_same(import_checkpoint(folder), images, indices, decoded)
    with pytest.raises(FileNotFoundError, match="pass one of its folders vqvae"):
        import_checkpoint(tmp_path / "pipeline")


class SpatialNorm(torch.nn.Module):
    """Of SBER-MoVQGAN's decoder: a group normalisation that the codes scale and shift, by its names of tensors."""

    codes: torch.Tensor

    def __init__(self, norm, embed_dim):
        super().__init__()
        self.norm_layer = norm
        self.conv_y, self.conv_b = (torch.nn.Conv2d(embed_dim, norm.num_channels, 1) for _ in range(2))

    def forward(self, features):
        codes = torch.nn.functional.interpolate(SpatialNorm.codes, features.shape[-2:], mode="nearest")
        return self.norm_layer(features) * self.conv_y(codes) + self.conv_b(codes)


MOVQ = {
    "default": {},
    "attention everywhere": {"ch_mult": (1, 1, 2), "attn_resolutions": [32, 16, 8], "num_res_blocks": 2},
    "four channels of codes": {"embed_dim": 4, "z_channels": 4, "n_embed": 100, "ch_mult": (1, 2, 2)},
}


@torch.no_grad()
@pytest.mark.parametrize("name", MOVQ)
def test_movq_is_reproduced_and_recognised(tmp_path, name):
    original = Taming(**MOVQ[name])
    embed_dim = original.quantize.embedding.embedding_dim
    for module in list(original.decoder.modules()):
        for child, norm in list(module.named_children()):
            if isinstance(norm, torch.nn.GroupNorm) and not isinstance(module, SpatialNorm):
                setattr(module, child, SpatialNorm(norm, embed_dim))
    randomise(original.decoder, seed=3)
    indices = original.indices(pictures(), closeness)
    SpatialNorm.codes = original.quantize.embedding(indices).movedim(-1, 1)
    decoded = original.images(indices)
    imported("movq", {"state_dict": original.state_dict()}, tmp_path)
    # With spatial normalisation the original differs from itself in double precision by more than PIXELS.
    assert_same(import_checkpoint(tmp_path / "checkpoint.pt"), pictures(), indices, decoded, ROUNDED)


def test_spatial_normalisation_that_convolves_the_codes_is_refused(tmp_path):
    weights = Taming().state_dict()
    weights["decoder.up.0.block.0.norm1.conv.weight"] = torch.ones(4, 4, 3, 3)
    with pytest.raises(ValueError, match=r"convolve the codes \(add_conv=true\), which is not supported"):
        imported("movq", weights, tmp_path)
