"""Checkpoints of original programs give the same indices and images here."""

import math
import os
import re
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from golden import golden
from golden_checkpoints import imported
from original_programs import (
    PIXELS,
    ROUNDED,
    Taming,
    assert_same,
    closeness,
    emu3,
    pictures,
    product,
    randomise,
    spread_codes,
    vit_vqgan,
)
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import vistok
from vistok.hub.importers import FAMILIES, import_checkpoint, list_pretrained
from vistok.hub.importers.base import Checkpoint


def unit_range(images):
    return images * 2 - 1


GOLDEN = {
    "llamagen": ("llamagen:vq-16", {}),
    "vqgan_lc": ("vqgan_lc:100k-f16", {}),
    "optvq_nearest": ("optvq:16x16x4", {"indices": lambda io: io["indices"].movedim(1, -1)}),
    "rqvae_shared": ("rqvae:imagenet", {"indices": lambda io: io["codes"]}),
    "maskgit_vqgan": ("maskgit:imagenet-f16", {"unit": True}),
    "maskbit_lfq": ("maskbit:10bit", {"unit": True}),
    "titok_nonlegacy": ("titok:bl-64-vq8k", {"unit": True}),
    "tatitok_vq": ("tatitok:bl-32-vq", {"unit": True}),
    "gsq": ("gsq:f8-d64-g16-v8k", {"indices": lambda io: io["codes"]}),
    "cosmos_di": ("cosmos:di8x8", {"tolerance": ROUNDED}),
    # The images of the file are in [0, 1], although published models take [-1, 1].
    "bsq": ("bsqvit:18bit", {"restore": lambda images: images.clamp(0, 1)}),
    "infinity_bsq8": (
        "infinity:d16",
        {
            "options": {"scales": [1, 2, 3, 4]},
            "indices": lambda io: torch.cat([io[f"bits.{number}"].flatten(0, -2) for number in range(4)]),
            "used": 2,
        },
    ),
    "var_shared": (
        "var:vae-f16",
        {
            "options": {"scales": [1, 2, 3, 4]},
            "indices": lambda io: torch.cat([io[f"idx.{number}"] for number in range(4)], 1),
            "restore": lambda images: images.clamp(-1, 1),
            # Before the original clamps them, the largest pixel is 3.4.
            "tolerance": 3.4 * PIXELS,
        },
    ),
    "fqgan_dual": ("fqgan:dual-f16", {"indices": lambda io: torch.stack([io["idx_vis"], io["idx_sem"]], -1)}),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_outputs_are_reproduced(tmp_path, name):
    weights, io, _ = golden(name)
    family, how = GOLDEN[name]
    tokenizer = imported(family, weights, tmp_path, **how.get("options", {}))
    unit = how.get("unit", False)
    assert_same(
        tokenizer,
        unit_range(io["x"]) if unit else io["x"],
        how.get("indices", lambda io: io["indices"])(io),
        io["decoded"],
        how.get("tolerance", PIXELS),
        how.get("restore", (lambda images: images / 2 + 0.5) if unit else (lambda images: images)),
        how.get("used", 9),
        io.get("text"),
    )


@pytest.mark.parametrize("names", ["qresi_ls.{}", "{}"])
def test_convolutions_of_var_may_be_spread_or_separate(tmp_path, names):
    weights, io, _ = golden("var_shared")
    shared = {each: weights.pop(f"quantize.quant_resi.qresi.{each}") for each in ("weight", "bias")}
    for number in range(4):
        weights |= {f"quantize.quant_resi.{names.format(number)}.{each}": shared[each] for each in shared}
    tokenizer = imported("var", weights, tmp_path, scales=[1, 2, 3, 4])
    assert len(tokenizer.quantizer.phi) == 4
    assert torch.equal(tokenizer.encode(io["x"]).indices, torch.cat([io[f"idx.{number}"] for number in range(4)], 1))


@pytest.mark.parametrize("name", ["var_shared", "fqgan_dual", "gsq", "tatitok_vq"])
def test_a_family_that_shares_names_with_others_is_recognised(tmp_path, name):
    weights, _, _ = golden(name)
    family, how = GOLDEN[name]
    options = how.get("options", {})
    torch.save(weights, tmp_path / "model.pt")
    found = import_checkpoint(tmp_path / "model.pt", **options).state_dict()
    named = imported(family, weights, tmp_path, **options).state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in named.items())


TAMING = {
    "vqgan": ("taming", {}, closeness),
    "without attention": ("taming", {"attn_type": "none", "attn_resolutions": []}, closeness),
    "attention at two levels": ("taming", {"ch_mult": (1, 1, 2), "attn_resolutions": [16, 8]}, closeness),
    "attention at a fine level": (
        "taming",
        {"ch_mult": (1, 2, 2), "attn_resolutions": [16], "embed_dim": 4},
        closeness,
    ),
    "gumbel": ("taming", {"gumbel": True, "embed_dim": 32}, closeness),
    "ibq": ("ibq", {"num_res_blocks": 2}, product),
}


@pytest.mark.parametrize("name", TAMING)
def test_taming_transformers_is_reproduced(tmp_path, name):
    family, changes, score = TAMING[name]
    original = Taming(**changes)
    images = pictures()
    indices = original.indices(images, score)
    # As Lightning saves it: with the discriminator, and callbacks by their classes.
    content = {
        "state_dict": {**original.state_dict(), "loss.discriminator.main.0.weight": torch.ones(2)},
        "callbacks": {Namespace: {"best_model_path": ""}},
        "hyper_parameters": Namespace(lr=1e-4),
    }
    assert_same(imported(family, content, tmp_path), images, indices, original.images(indices))


@pytest.mark.parametrize("averaged", [False, True])
def test_open_magvit2_is_reproduced(tmp_path, averaged):
    model = pytest.importorskip("open_magvit2.taming.modules.diffusionmodules.improved_model")
    sizes = {"ch": 32, "out_ch": 3, "in_channels": 3, "num_res_blocks": 2, "z_channels": 6, "ch_mult": (1, 2, 2)}
    original = torch.nn.Module()
    for name, part in (("encoder", model.Encoder), ("decoder", model.Decoder)):
        setattr(original, name, part(**sizes, resolution=32, double_z=False))
    weights = randomise(original).state_dict()
    mask = original.encoder(pictures()) > 0
    indices = (mask.long() * (2 ** torch.arange(6)).view(-1, 1, 1)).sum(1)
    if averaged:
        other = {name: torch.randn_like(tensor) for name, tensor in weights.items()}
        means = {f"model_ema.{name.replace('.', '')}": tensor for name, tensor in weights.items()}
        weights = {**other, **means, "model_ema.decay": torch.tensor(0.999)}
    tokenizer = imported("magvit2:256", {"state_dict": weights}, tmp_path, weights="ema" if averaged else "raw")
    assert_same(tokenizer, pictures(), indices, original.decoder(torch.where(mask, 1.0, -1.0)))


VIT_VQGAN = {
    "wide heads": {"width": 64, "num_heads": 2},
    "deeper, norms outside": {"width": 128, "num_heads": 2, "depth": 2, "patch_size": 4, "outside": True},
}


@pytest.mark.parametrize("name", VIT_VQGAN)
def test_vit_vqgan_is_reproduced(tmp_path, name):
    weights, indices, decoded = vit_vqgan(**VIT_VQGAN[name])
    tokenizer = imported("vitvqgan:small", {"state_dict": weights}, tmp_path)
    assert_same(tokenizer, pictures(), indices, decoded, restore=lambda images: images / 2 + 0.5)


class Unchanged(torch.nn.Module):
    """In the place of a normalisation that the codes modulate."""

    def forward(self, features, _):
        return features


@pytest.mark.parametrize("ch_mult", [(1, 2), (1, 1, 2)])
def test_simvq_is_reproduced(tmp_path, ch_mult):
    model = pytest.importorskip("open_magvit2.taming.modules.diffusionmodules.improved_model")
    sizes = {"ch": 32, "out_ch": 3, "in_channels": 3, "num_res_blocks": 1, "z_channels": 8, "ch_mult": ch_mult}
    original = torch.nn.Module()
    for name, part in (("encoder", model.Encoder), ("decoder", model.Decoder)):
        setattr(original, name, part(**sizes, resolution=32, double_z=False))
    # SimVQ has a copy of this trunk without adaptive normalisation.
    original.decoder.adaptive = torch.nn.ModuleList(Unchanged() for _ in ch_mult)
    original.quantize = torch.nn.Module()
    original.quantize.embedding, original.quantize.embedding_proj = torch.nn.Embedding(64, 8), torch.nn.Linear(8, 8)
    randomise(original)
    features = original.encoder(pictures())
    spread_codes(original.quantize.embedding.weight.data, features)
    codes = original.quantize.embedding_proj(original.quantize.embedding.weight)
    rows = features.movedim(1, -1)
    indices = closeness(rows.flatten(0, -2), codes).argmax(-1).view(rows.shape[:-1])
    tokenizer = imported("simvq:1k", {"state_dict": original.state_dict()}, tmp_path)
    assert_same(tokenizer, pictures(), indices, original.decoder(codes[indices].movedim(-1, 1)), used=4)


@pytest.mark.parametrize("channels", [(64, 1), (128, 2)])
def test_dall_e_is_reproduced_from_its_pickled_modules(tmp_path, channels):
    dall_e = pytest.importorskip("dall_e")
    width, num_blocks = channels
    encoder = dall_e.Encoder(n_hid=width, n_blk_per_group=num_blocks, vocab_size=512)
    decoder = dall_e.Decoder(n_hid=width, n_blk_per_group=num_blocks, vocab_size=512, n_init=16)
    for part in (encoder, decoder):
        randomise(part)
    images = pictures()
    mapped = dall_e.map_pixels((images + 1) / 2)
    # Scores of mean zero, so that many codes are chosen.
    encoder.blocks.output.conv.b.data -= encoder(mapped).mean((0, 2, 3))
    torch.save(encoder, tmp_path / "encoder.pkl")
    torch.save(decoder, tmp_path / "decoder.pkl")
    indices = encoder(mapped).argmax(1)
    logits = decoder(torch.nn.functional.one_hot(indices, 512).movedim(-1, 1).float())
    decoded = dall_e.unmap_pixels(logits[:, :3].sigmoid())
    tokenizer = import_checkpoint(tmp_path)
    assert_same(tokenizer, images, indices, decoded, restore=lambda images: (images / 2 + 0.5).clamp(0, 1))


def janus(**changes):
    modeling = pytest.importorskip("transformers.models.janus.modeling_janus")
    config = {
        "embed_dim": 8,
        "num_embeddings": 64,
        "latent_channels": 32,
        "base_channels": 32,
        "channel_multiplier": [1, 2],
        "num_res_blocks": 1,
        "image_size": 32,
        **changes,
    }
    config["num_patches"] = 32 >> (len(config["channel_multiplier"]) - 1)
    original = randomise(modeling.JanusVQVAE(modeling.JanusVQVAEConfig(**config)))
    spread_codes(original.quantize.embedding.weight.data, original.quant_conv(original.encoder(pictures())))
    return original


@pytest.mark.parametrize("changes", [{}, {"channel_multiplier": [1, 1, 2], "num_res_blocks": 2, "latent_channels": 16}])
def test_janus_of_transformers_is_reproduced(tmp_path, changes):
    original = janus(**changes)
    # Its encoder forgets to scale the features: directions as in the original program.
    features = torch.nn.functional.normalize(original.quant_conv(original.encoder(pictures())), dim=1).movedim(1, -1)
    codes = torch.nn.functional.normalize(original.quantize.embedding.weight, dim=-1)
    indices = (features.double() @ codes.double().T).argmax(-1)
    content = {f"model.vqmodel.{name}": tensor for name, tensor in original.state_dict().items()}
    content["model.language_model.norm.weight"] = torch.ones(3)
    tokenizer = imported("llamagen:janus-pro-1b", content, tmp_path)
    assert_same(tokenizer, pictures(), indices, original.decode(indices.flatten(1)))


EMU3 = {
    "images": {},
    "eight frames": {
        "channel_multiplier": [1, 1, 2],
        "num_res_blocks": 2,
        "attn_resolutions": [2],
        "temporal_downsample_factor": 8,
    },
    "attention in the middle": {"attn_resolutions": [], "temporal_downsample_factor": 2},
}


@torch.no_grad()
@pytest.mark.parametrize("name", EMU3)
def test_emu3_of_transformers_is_reproduced(tmp_path, name):
    original = emu3(**EMU3[name])
    sizes = torch.tensor([[32, 32]] * 2)
    indices = torch.stack(original.encode(pictures(), image_sizes=sizes, return_dict=True).image_tokens)
    tokenizer = imported("emu3:vision-tokenizer", original.state_dict(), tmp_path)
    # Modulated by the codes like MoVQ, whose original differs from itself in double precision by more than PIXELS.
    assert_same(tokenizer, pictures(), indices, original.decode(indices), ROUNDED)


def test_chameleon_of_transformers_lacks_a_decoder_and_the_error_says_so(tmp_path):
    weights = {name: tensor for name, tensor in Taming().state_dict().items() if not name.startswith("decoder.")}
    with pytest.raises(ValueError, match="has no decoder, like those of transformers' Chameleon, which only encodes"):
        imported("chameleon:vqgan", weights, tmp_path)


DIFFUSERS = {
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "latent_channels": 4,
}
WITHOUT_ATTENTION = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "mid_block_add_attention": False,
}


@pytest.mark.parametrize(
    "changes", [{}, {"norm_type": "spatial"}, WITHOUT_ATTENTION], ids=["vq", "movq", "no_attention"]
)
def test_vq_model_of_diffusers_is_reproduced(tmp_path, changes):
    diffusers = pytest.importorskip("diffusers")
    original = randomise(diffusers.VQModel(**DIFFUSERS | changes, num_vq_embeddings=64, vq_embed_dim=4))
    latents = original.encode(pictures()).latents
    spread_codes(original.quantize.embedding.weight.data, latents)
    indices = original.quantize(latents)[2][2].view(2, 16, 16)
    codes = original.quantize.get_codebook_entry(indices.flatten(), (2, 16, 16, 4))
    original.save_pretrained(tmp_path)
    decoded = original.decode(codes, force_not_quantize=True).sample
    # With spatial normalisation the original differs from itself in double precision by more than PIXELS.
    tolerance = ROUNDED if changes == {"norm_type": "spatial"} else PIXELS
    assert_same(import_checkpoint(tmp_path), pictures(), indices, decoded, tolerance)


@pytest.mark.parametrize("projections", [True, False])
def test_autoencoder_kl_of_diffusers_is_reproduced(tmp_path, projections):
    diffusers = pytest.importorskip("diffusers")
    changes = {"use_quant_conv": projections, "use_post_quant_conv": projections, "scaling_factor": 0.5}
    original = randomise(diffusers.AutoencoderKL(**DIFFUSERS, **changes))
    original.save_pretrained(tmp_path)
    tokenizer = import_checkpoint(tmp_path)
    mean = original.encode(pictures()).latent_dist.mean
    with torch.no_grad():
        codes = tokenizer.encode(pictures()).codes
        torch.testing.assert_close(codes, mean, atol=PIXELS, rtol=0)
        decoded = original.decode(mean).sample
        scale = max(1.0, decoded.abs().max().item())
        torch.testing.assert_close(tokenizer.decode(mean), decoded, atol=PIXELS * scale, rtol=0)
    assert tokenizer.preprocessing["scaling_factor"] == 0.5


@torch.no_grad()
def test_a_third_party_vq_vae_reaches_its_quality():
    if "VISTOK_TEST_DATA" not in os.environ:
        pytest.skip("VISTOK_TEST_DATA")
    folder = Path(os.environ["VISTOK_TEST_DATA"])
    tokenizer = vistok.load("vqvae:nimblebox", path=folder / "checkpoints" / "nimblebox_vqvae.pt")
    ratios = []
    for path in sorted((folder / "kodak24").glob("*.png"))[:12]:
        picture = pil_to_tensor(Image.open(path)).float()
        decoded = tokenizer.decode_indices(tokenizer.encode(picture[None] / 127.5 - 1).indices)[0]
        error = ((decoded.clamp(-1, 1) + 1) * 127.5).round() - picture
        ratios.append(10 * math.log10(255**2 / error.square().mean()))
    assert len(ratios) == 12
    assert round(sum(ratios) / 12, 2) == 27.05


def llamagen_like(**changes):
    """A small checkpoint with LlamaGen's names, made of our own weights."""
    torch.manual_seed(0)
    trunk = {"patch_size": 1, "base_channels": 32, "num_blocks": 1, "channel_multipliers": (1, 2), "z_channels": 8}
    parts = {
        "encoder": vistok.encoder.CNNEncoder(**trunk, attention="last"),
        "decoder": vistok.decoder.CNNDecoder(**trunk, attention="last"),
    }
    # In the order in which the blocks run: level 0, then 1 with attention, then the middle; and the reverse.
    names = {
        "encoder": [
            "conv_blocks.0.res.0",
            "conv_blocks.0.downsample",
            "conv_blocks.1.res.0",
            "conv_blocks.1.attn.0",
            "mid.0",
            "mid.1",
            "mid.2",
        ],
        "decoder": [
            "mid.0",
            "mid.1",
            "mid.2",
            "conv_blocks.0.res.0",
            "conv_blocks.0.attn.0",
            "conv_blocks.0.upsample",
            "conv_blocks.1.res.0",
        ],
    }
    weights = {}
    for name, part in parts.items():
        for key, tensor in part.state_dict().items():
            if key.startswith("blocks."):
                _, number, leaf = key.split(".", 2)
                key = f"{names[name][int(number)]}.{leaf}".replace("shortcut", "nin_shortcut")
                key = key.replace("projection", "proj_out")
            if ".qkv." in key:
                weights |= {
                    f"{name}.{key.replace('.qkv.', f'.{letter}.')}": each
                    for letter, each in zip("qkv", tensor.chunk(3), strict=True)
                }
            else:
                weights[f"{name}.{key}"] = tensor
    for name, shape in (("quant_conv", (4, 8)), ("post_quant_conv", (8, 4))):
        weights |= {f"{name}.weight": torch.randn(*shape, 1, 1), f"{name}.bias": torch.randn(shape[0])}
    return {**weights, "quantize.embedding.weight": torch.randn(32, 4), **changes}


def test_a_tokenizer_within_a_larger_model_is_found(tmp_path):
    weights = llamagen_like()
    alone = imported("llamagen", weights, tmp_path)
    inside = {f"gen_vision_model.{name}": tensor for name, tensor in weights.items()}
    inside["language_model.layers.0.weight"] = torch.ones(3)
    within = imported("llamagen", inside, tmp_path)
    assert all(torch.equal(tensor, within.state_dict()[name]) for name, tensor in alone.state_dict().items())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_what_training_puts_before_names_is_left_out(tmp_path, prefix):
    wrapped = {"model": {f"{prefix}{name}": tensor for name, tensor in llamagen_like().items()}}
    assert imported("llamagen", wrapped, tmp_path).vocab_size == 32


def test_moving_averages_are_taken_when_asked_for(tmp_path):
    content = {"model": llamagen_like(), "ema": {name: tensor + 1 for name, tensor in llamagen_like().items()}}
    raw, ema = (imported("llamagen", content, tmp_path, weights=weights) for weights in ("raw", "ema"))
    assert torch.equal(ema.quantizer.table, raw.quantizer.table + 1)
    with pytest.raises(ValueError, match="has no moving averages: use weights=raw"):
        imported("llamagen", {"model": llamagen_like()}, tmp_path, weights="ema")


def test_half_precision_is_widened(tmp_path):
    tokenizer = imported("llamagen", {key: each.bfloat16() for key, each in llamagen_like().items()}, tmp_path)
    assert {tensor.dtype for tensor in tokenizer.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stranger.weight": torch.ones(2)}, r"1 tensors have no place in the model: \['stranger.weight'\]"),
        ({"quantize.embedding.weight": torch.ones(32, 5)}, r"to_codes.weight is \(4, 8, 1, 1\).*expected \(5, 8\)"),
        ({"quant_conv.bias": torch.full((4,), torch.nan)}, "to_codes.bias holds NaN or infinite values"),
    ],
)
def test_tensors_that_do_not_fit_are_errors_that_name_them(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        imported("llamagen", llamagen_like(**changes), tmp_path)


def test_a_missing_tensor_is_named(tmp_path):
    weights = llamagen_like()
    del weights["decoder.conv_in.bias"]
    with pytest.raises(ValueError, match=r"has no tensor decoder\.conv_in\.bias"):
        imported("llamagen", weights, tmp_path)


def test_a_family_is_recognised_by_the_names_of_its_tensors(tmp_path):
    torch.save(llamagen_like(), tmp_path / "model.pt")
    assert import_checkpoint(tmp_path / "model.pt").vocab_size == 32
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="is of none of the families llamagen, "):
        import_checkpoint(tmp_path / "other.pt")


def test_programs_with_the_same_names_are_told_apart_by_the_user(tmp_path):
    torch.save(dict.fromkeys((*FAMILIES["ibq"].marks,), torch.ones(2)), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="may be of any of the families taming, ibq, chameleon"):
        import_checkpoint(tmp_path / "model.pt")


def test_an_option_without_effect_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="levels has no effect on this checkpoint; it takes size"):
        imported("llamagen", llamagen_like(), tmp_path, levels=[3])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"unit_norm": "no"}, "unit_norm must be true or false, got 'no'"),
        ({"unit_norm": 1}, "unit_norm must be true or false, got 1"),
        ({"size": -3}, r"size must be a side in pixels, or \[height, width\], got -3"),
        ({"size": [256]}, r"or \[height, width\], got \[256\]"),
        ({"size": "256"}, "size must be a side in pixels"),
    ],
)
def test_an_option_of_another_kind_is_an_error(tmp_path, option, message):
    with pytest.raises(ValueError, match=message):
        imported("llamagen", llamagen_like(), tmp_path, **option)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"num_heads": 2.5}, "num_heads must be a positive integer, got 2.5"),
        ({"levels": 8}, r"levels must be a list of positive integers such as \[8, 5, 5\], got 8"),
        ({"levels": [8, 0, 5]}, "levels must be a list of positive integers"),
        ({"scales": "1,2"}, "scales must be a list of positive integers"),
    ],
)
def test_counts_and_lists_are_of_positive_integers(option, message):
    checkpoint = Checkpoint({}, options=option)
    with pytest.raises(ValueError, match=message):
        checkpoint.option(*option, None)


def test_preprocessing_is_recorded(tmp_path):
    tokenizer = imported("llamagen", llamagen_like(), tmp_path, size=128)
    assert imported("llamagen", llamagen_like(), tmp_path, size=[128, 64]).preprocessing["size"] == [128, 64]
    assert tokenizer.preprocessing == {
        "size": [128, 128],
        "channels": 3,
        "resize": {"filter": "bicubic", "mode": "adm"},
        "crop": "center",
        "range": [-1, 1],
    }


def test_load_takes_the_name_of_a_published_checkpoint_and_a_file(tmp_path):
    torch.save(llamagen_like(), tmp_path / "model.pt")
    tokenizer = vistok.load("llamagen:vq-16", path=tmp_path / "model.pt", dtype=torch.bfloat16)
    assert tokenizer.encode(torch.zeros(1, 3, 8, 8, dtype=torch.bfloat16)).codes.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="llamagen has no checkpoint 'vq-17': choose one of vq-16, vq-8"):
        vistok.load("llamagen:vq-17", path=tmp_path / "model.pt")


def test_an_imported_tokenizer_is_the_same_from_its_bundle(tmp_path):
    tokenizer = imported("llamagen", llamagen_like(), tmp_path)
    loaded = vistok.load(vistok.save(tokenizer, tmp_path / "bundle", origin={"licence": "MIT"}))
    images = pictures()
    assert torch.equal(loaded.encode(images).indices, tokenizer.encode(images).indices)
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert 'license_name: "MIT"' in card
    assert "## Origin\n\n- licence: MIT" in card


def test_names_of_published_checkpoints_are_unique_and_complete():
    listed = list_pretrained()
    assert len({each.name for each in listed}) == len(listed)
    assert all(each.source and each.licence for each in listed)
    # A file on the hub is fetched by its name; None says that the name is not known.
    assert all(each.file is None or each.file.strip() for each in listed)
    assert {each.name.partition(":")[0] for each in listed} == set(FAMILIES)


@pytest.mark.parametrize("name", [each.name for each in list_pretrained() if each.file is None])
def test_a_checkpoint_whose_file_name_is_not_known_is_asked_for(name):
    with pytest.raises(FileNotFoundError, match=r"download its file from \S+, and pass path="):
        vistok.load(name)


def test_arguments_of_the_hub_reach_the_download_of_a_published_checkpoint(tmp_path, monkeypatch):
    torch.save(llamagen_like(), tmp_path / "model.pt")
    asked = []

    def hf_hub_download(repository, file, **given):
        asked.append((repository, file, given))
        return tmp_path / "model.pt"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    vistok.load("llamagen:vq-16", token="secret", local_files_only=True)
    given = {"token": "secret", "local_files_only": True}
    assert asked == [("FoundationVision/LlamaGen", "vq_ds16_c2i.pt", given)]
    with pytest.raises(ValueError, match=r"token has no effect on the local \S+model\.pt: leave it out"):
        vistok.load("llamagen:vq-16", path=tmp_path / "model.pt", token="secret")


def run_command(monkeypatch, capsys, *arguments):
    """What ``vistok SUBCOMMAND ...`` prints."""
    from vistok.cli import main

    monkeypatch.setattr("sys.argv", ["vistok", *map(str, arguments)])
    main()
    return capsys.readouterr().out


@pytest.fixture
def _main_module(monkeypatch):
    # The command line leaves the name of its module there.
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)


@pytest.mark.usefixtures("_main_module")
def test_convert_makes_a_bundle_that_names_its_origin(tmp_path, monkeypatch, capsys):
    torch.save({"model": llamagen_like()}, tmp_path / "model.pt")
    command = ["convert", tmp_path / "model.pt", tmp_path / "bundle", "--family", "llamagen:vq-16"]
    assert "codebook_size=32" in run_command(monkeypatch, capsys, *command, "--option", "size=64")
    assert vistok.load(tmp_path / "bundle").default_size == (64, 64)
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert "- source: FoundationVision/LlamaGen" in card
    assert "- sha256: " in card


@pytest.mark.usefixtures("_main_module")
def test_convert_reports_what_is_wrong_in_one_line(tmp_path, monkeypatch, capsys):
    torch.save({"weight": torch.ones(2)}, tmp_path / "model.pt")
    with pytest.raises(SystemExit, match="2"):
        run_command(monkeypatch, capsys, "convert", tmp_path / "model.pt", tmp_path / "bundle")
    assert re.search(r"^error: .* is of none of the families", capsys.readouterr().err)
    assert not (tmp_path / "bundle").exists()
    torch.save(llamagen_like(), tmp_path / "model.pt")
    with pytest.raises(SystemExit, match="2"):
        run_command(monkeypatch, capsys, "convert", tmp_path / "model.pt", tmp_path)
    assert "choose another folder, or replace it (overwrite=True, --overwrite)" in capsys.readouterr().err


@pytest.mark.usefixtures("_main_module")
def test_list_prints_a_line_for_each_checkpoint(monkeypatch, capsys):
    lines = run_command(monkeypatch, capsys, "list").splitlines()
    assert len(lines) == 1 + len(list_pretrained())
    assert lines[1].split()[:3] == ["llamagen:vq-16", "71.9", "MIT"]
    assert len(run_command(monkeypatch, capsys, "list", "movq").splitlines()) == 4
