"""The convolutional trunk and its mirror image."""

import pytest
import torch
from golden import golden
from golden_trunks import LLAMAGEN, TAMING, load_projections, load_trunk

from vistok import Tokenizer
from vistok.decoder import CNNDecoder
from vistok.encoder import CNNEncoder
from vistok.layers import AttentionBlock, ResidualBlock, fold_patches, normalisation, unfold_patches
from vistok.quantizer import GroupedQuantizer, MultiScaleQuantizer, ResidualQuantizer, VectorQuantizer

F16 = {"patch_size": 1, "channel_multipliers": (1, 1, 2, 2, 4), "attention": "last", "z_channels": 256}
F8 = {**F16, "channel_multipliers": (1, 2, 2, 4)}


@pytest.mark.parametrize("attention", ["none", "last"])
@pytest.mark.parametrize(("patch_size", "multipliers"), [(1, (1, 1, 2)), (4, (1, 2)), (8, (1,))])
def test_decoder_mirrors_encoder(patch_size, multipliers, attention):
    arguments = {
        "patch_size": patch_size,
        "base_channels": 32,
        "channel_multipliers": multipliers,
        "num_blocks": 1,
        "attention": attention,
    }
    encoder, decoder = CNNEncoder(**arguments), CNNDecoder(**arguments)
    features = encoder(torch.randn(2, 3, 32, 16))
    assert features.shape == (2, encoder.dim, 32 // encoder.factor, 16 // encoder.factor)
    assert decoder.dim == encoder.dim
    assert decoder(features).shape == (2, 3, 32, 16)


def test_folding_is_pixel_unshuffle_and_unfolding_its_inverse():
    images = torch.randn(2, 3, 16, 24)
    folded = fold_patches(images, 8)
    assert torch.equal(folded, torch.nn.functional.pixel_unshuffle(images, 8))
    assert torch.equal(unfold_patches(folded, 8), images)


def test_decoding_to_another_size_is_an_error():
    decoder = CNNDecoder(base_channels=32, num_blocks=1)
    with pytest.raises(ValueError, match=r"a grid of \(2, 2\) decodes to \(16, 16\) pixels, not to \(20, 20\)"):
        decoder(torch.randn(1, decoder.dim, 2, 2), size=(20, 20))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_channels": 40}, "multiples of 32"),
        ({"patch_size": 0}, "patch_size"),
        ({"channel_multipliers": []}, "channel_multipliers"),
        ({"num_blocks": 0}, "num_blocks must be a positive number"),
        ({"z_channels": 0}, "z_channels must be a positive number"),
        ({"attention": "everywhere"}, "attention must be none, middle, last or a list .* got 'everywhere'"),
        ({"attention": []}, r"attention must be none, middle, last or a list .* got \[\]"),
        ({"attention": [16]}, "set resolution"),
        ({"attention": [16], "resolution": 256}, r"must be chosen from \[32\]"),
        ({"attention": "last", "resolution": 256}, "set resolution=null"),
        ({"attention": "last", "middle": False}, "set middle=null"),
        ({"middle_attention": True}, "middle_attention=True contradicts attention=none: set middle_attention=null"),
        ({"attention": "middle", "middle_attention": False}, "middle_attention=False contradicts attention=middle"),
        ({"num_groups": 0}, "num_groups must be a positive number of groups of channels, got 0"),
        ({"base_channels": 40, "num_groups": 16}, "channels must be multiples of 16 for group normalisation, got 40"),
        ({"channels": 2}, "channels must be 1, 3 or 4, got 2"),
    ],
)
@pytest.mark.parametrize("part", [CNNEncoder, CNNDecoder])
def test_impossible_arguments_are_errors(part, arguments, message):
    with pytest.raises(ValueError, match=message):
        part(**arguments)


@pytest.mark.parametrize(
    ("arguments", "kinds"),
    [
        ({}, "r r r"),
        ({"middle": True}, "r r r rr"),
        ({"attention": "middle"}, "r r r rar"),
        ({"attention": "last"}, "r r ra rar"),
        ({"attention": [16], "resolution": 64}, "r r ra rar"),
        ({"attention": [64, 32], "resolution": 64}, "ra ra r rar"),
        ({"attention": [32], "resolution": 64, "middle_attention": False, "middle": True}, "r ra r rr"),
        ({"attention": [32, 16], "resolution": 64}, "r ra ra rar"),
    ],
)
def test_attention_stands_where_it_is_asked_for(arguments, kinds):
    arguments = {"patch_size": 1, "base_channels": 32, "channel_multipliers": (1, 1, 1), "num_blocks": 1, **arguments}
    letters = {ResidualBlock: "r", AttentionBlock: "a"}
    found = [letters.get(type(block), "") for block in CNNEncoder(**arguments).blocks]
    assert "".join(found) == kinds.replace(" ", "")
    *levels, middle = kinds.split() if len(kinds.split()) == 4 else [*kinds.split(), ""]
    found = [letters.get(type(block), "") for block in CNNDecoder(**arguments).blocks]
    assert "".join(found) == middle + "".join(reversed(levels))


def test_the_default_trunk_ends_before_a_last_convolution():
    encoder = CNNEncoder(base_channels=32, num_blocks=1)
    names = [f"{name}.{kind}" for name in ("norm1", "conv1", "norm2", "conv2") for kind in ("weight", "bias")]
    assert list(encoder.state_dict()) == [
        "conv_in.weight",
        "conv_in.bias",
        *(f"blocks.0.{name}" for name in names),
        "norm_out.weight",
        "norm_out.bias",
    ]
    assert encoder.dim == 32


def test_z_channels_are_those_of_the_features():
    encoder, decoder = (part(base_channels=32, num_blocks=1, z_channels=5) for part in (CNNEncoder, CNNDecoder))
    features = encoder(torch.randn(1, 3, 16, 8))
    assert features.shape == (1, 5, 2, 1)
    assert (encoder.dim, decoder.dim) == (5, 5)
    assert decoder(features).shape == (1, 3, 16, 8)


@pytest.mark.parametrize(
    ("encoder", "decoder", "millions"),
    [
        pytest.param(F16, F16, (29_298_176, 42_449_795), id="taming_f16"),
        pytest.param(F16 | {"num_blocks": 4}, F16 | {"num_blocks": 5}, (46_752_256, 59_903_875), id="ibq"),
    ],
)
def test_published_trunks_have_as_many_parameters(encoder, decoder, millions):
    with torch.device("meta"):
        parts = CNNEncoder(**encoder), CNNDecoder(**decoder)
    assert tuple(sum(weight.numel() for weight in part.parameters()) for part in parts) == millions


@pytest.mark.parametrize(
    ("trunk", "codebook", "parameters"),
    [
        pytest.param(F16, (16384, 8), 71_883_403, id="llamagen_f16"),
        pytest.param(F8, (16384, 8), 70_109_835, id="llamagen_f8"),
        pytest.param(F16 | {"attention": [16], "resolution": 256}, (16384, 256), 76.1e6, id="taming_f16_16384"),
        pytest.param(F16 | {"attention": "middle"}, (8192, 256), 68.7e6, id="chameleon"),
        pytest.param(F8 | {"z_channels": 4}, (16384, 4), 67.7e6, id="latent_diffusion_f8"),
        pytest.param(
            F8 | {"channel_multipliers": (1, 2, 4), "attention": "middle", "z_channels": 3},
            (8192, 3),
            55.3e6,
            id="latent_diffusion_f4",
        ),
        pytest.param(
            {**F8, "channel_multipliers": (1, 2, 2, 4, 6), "attention": "none", "middle": True, "z_channels": 64},
            (8192, 64),
            146.2e6,
            id="openmuse",
        ),
    ],
)
def test_published_tokenizers_have_as_many_parameters(trunk, codebook, parameters):
    with torch.device("meta"):
        tokenizer = Tokenizer(CNNEncoder(**trunk), VectorQuantizer(*codebook), CNNDecoder(**trunk))
    count = sum(weight.numel() for weight in tokenizer.parameters())
    assert count == parameters if isinstance(parameters, int) else abs(count - parameters) <= 0.06e6


def tokenizer_of(weights, quantizer, names, **trunk):
    arguments = {"patch_size": 1, "base_channels": 32, "channel_multipliers": (1, 2), "z_channels": 32, **trunk}
    num_blocks = arguments.pop("num_blocks", 1)
    tokenizer = Tokenizer(
        CNNEncoder(**arguments, num_blocks=num_blocks), quantizer, CNNDecoder(**arguments, num_blocks=num_blocks + 1)
    )
    load_trunk(tokenizer.encoder, weights, names, "encoder.")
    load_trunk(tokenizer.decoder, weights, names, "decoder.")
    load_projections(tokenizer, weights)
    return tokenizer.eval()


@torch.no_grad()
def assert_same(tokenizer, io, indices):
    """Equal indices, and equal pixels up to the straight-through rounding of the original."""
    found = tokenizer.encode(io["x"])
    assert torch.equal(found.indices, indices.reshape(found.indices.shape))
    assert len(found.indices.unique()) > 8
    torch.testing.assert_close(tokenizer.decode_indices(found.indices), io["decoded"], atol=1e-4, rtol=0)


def test_llamagen_is_reproduced():
    weights, io, _ = golden("llamagen")
    quantizer = VectorQuantizer(64, 8, distance="cosine")
    quantizer.table.data = weights["quantize.embedding.weight"]
    tokenizer = tokenizer_of(weights, quantizer, LLAMAGEN, attention="last")
    assert_same(tokenizer, io, io["indices"])


def test_vqgan_lc_is_reproduced():
    weights, io, _ = golden("vqgan_lc")
    quantizer = VectorQuantizer(64, 8, projection="linear", table="frozen", table_dim=24, init="normal")
    quantizer.table.data = weights["tok_embeddings.weight"]
    for name in ("weight", "bias"):
        getattr(quantizer.projection, name).data = weights[f"codebook_projection.{name}"]
    tokenizer = tokenizer_of(weights, quantizer, TAMING, attention=[16], resolution=32)
    assert_same(tokenizer, io, io["indices"])


def test_optvq_with_nearest_codes_is_reproduced():
    weights, io, _ = golden("optvq_nearest")
    part = {"_target_": "vistok.quantizer.VectorQuantizer", "projection": "linear", "init": "normal"}
    quantizer = GroupedQuantizer(part, groups=4, shared=True, codebook_size=64, dim=16)
    quantizer.quantizers[0].table.data = weights["quantize.embedding.weight"]
    for name in ("weight", "bias"):
        getattr(quantizer.quantizers[0].projection, name).data = weights[f"quantize.proj.{name}"]
    tokenizer = tokenizer_of(weights, quantizer, TAMING, attention=[16], resolution=32)
    assert_same(tokenizer, io, io["indices"].movedim(1, -1))


def test_rq_vae_is_reproduced():
    weights, io, _ = golden("rqvae_shared")
    part = {"_target_": "vistok.quantizer.VectorQuantizer", "table": "ema"}
    quantizer = ResidualQuantizer(part, depth=3, shared=True, codebook_size=64, dim=16)
    quantizer.quantizers[0].table.data = weights["quantizer.codebooks.0.weight"][:64]
    tokenizer = tokenizer_of(weights, quantizer, TAMING, attention=[16], resolution=32)
    assert_same(tokenizer, io, io["codes"])


@torch.no_grad()
def test_var_is_reproduced():
    weights, io, config = golden("var_shared")
    part = {"_target_": "vistok.quantizer.VectorQuantizer"}
    quantizer = MultiScaleQuantizer(part, scales=config["v_patch_nums"], phi=1, codebook_size=64, dim=8)
    quantizer.quantizers[0].table.data = weights["quantize.embedding.weight"]
    for name in ("weight", "bias"):
        getattr(quantizer.phi[0], name).data = weights[f"quantize.quant_resi.qresi.{name}"]
    arguments = {"patch_size": 1, "base_channels": 32, "channel_multipliers": (1, 1, 2, 2, 4), "z_channels": 8}
    encoder, decoder = (
        CNNEncoder(attention="last", **arguments, num_blocks=2),
        CNNDecoder(attention="last", **arguments, num_blocks=3),
    )
    load_trunk(encoder, weights, TAMING, "encoder.")
    load_trunk(decoder, weights, TAMING, "decoder.")

    def project(features, name):
        return torch.conv2d(features, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1)

    features = project(encoder(io["x"]), "quant_conv")
    torch.testing.assert_close(features, io["f"], atol=1e-5, rtol=0)
    quantized = quantizer.eval()(features)
    assert torch.equal(quantized.indices, torch.cat([io[f"idx.{scale}"] for scale in range(4)], 1))
    decoded = decoder(project(quantized.codes, "post_quant_conv"))
    torch.testing.assert_close(decoded.clamp(-1, 1), io["decoded"].clamp(-1, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("affine", [False, True])
def test_normalisation_is_exact_in_every_memory_format(affine):
    norm = normalisation(64, affine=affine).eval()
    features = 3 + 0.01 * torch.randn(2, 64, 16, 16, generator=torch.Generator().manual_seed(0))
    exact = torch.nn.functional.group_norm(features.double(), 32, eps=1e-6).float()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        found = norm(features.contiguous(memory_format=memory_format))
        torch.testing.assert_close(found, exact, atol=1e-3, rtol=0)
