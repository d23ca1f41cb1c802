"""Images as short sequences of tokens."""

import re

import pytest
import torch
from golden import golden

import vistok
from vistok.config import config_of
from vistok.decoder import CNNDecoder, MaskGITDecoder, TiTokDecoder
from vistok.encoder import TiTokEncoder
from vistok.layers.transformer import TransformerBlock
from vistok.quantizer import BSQ, FSQ, ResidualQuantizer, VectorQuantizer

TINY = {"patch_size": 8, "image_size": 16, "num_tokens": 5, "width": 16, "depth": 2, "num_heads": 2}


def pixel_decoder(**options):
    return CNNDecoder(**{"patch_size": 8, "base_channels": 32, "num_blocks": 1} | options)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("size", [(16, 16), (8, 32), (24, 8)])
@pytest.mark.parametrize("legacy", [False, True])
def test_images_of_every_size_become_sequences_of_one_length_and_images_again(channels, size, legacy):
    encoder, decoder = TiTokEncoder(channels, legacy=legacy, **TINY), TiTokDecoder(channels, **TINY)
    features = encoder(torch.randn(2, channels, *size))
    assert encoder.grid(size) == (5,)
    assert features.shape == (2, decoder.dim, 5)
    assert decoder(features, size=size).shape == (2, channels, *size)


def test_without_a_size_images_are_those_of_training():
    decoder = TiTokDecoder(**TINY | {"image_size": [16, 24]})
    assert decoder(torch.randn(1, 16, 5)).shape == (1, 3, 16, 24)


def test_a_tokenizer_of_sequences_decodes_what_it_encodes():
    tokenizer = vistok.Tokenizer(
        TiTokEncoder(**TINY), FSQ((5, 5)), TiTokDecoder(**TINY), preprocessing={"size": [16, 16]}
    ).eval()
    quantized = tokenizer.encode(torch.randn(2, 3, 16, 16))
    assert quantized.indices.shape == (2, 5)
    assert tokenizer.sequence_length() == 5
    assert torch.equal(tokenizer.decode_indices(quantized.indices), tokenizer.decode(quantized.codes))
    assert tokenizer.decode_indices(quantized.indices, (32, 8)).shape == (2, 3, 32, 8)


@pytest.mark.parametrize("length", [1, 4])
def test_the_beginning_of_a_sequence_decodes_too(length):
    decoder = TiTokDecoder(**TINY)
    features = torch.randn(2, 16, 5)
    images = decoder(features[:, :, :length])
    assert images.shape == (2, 3, 16, 16)
    assert not torch.allclose(images, decoder(features))


@pytest.mark.parametrize("length", [0, 6])
def test_a_sequence_that_is_too_short_or_long_is_an_error(length):
    with pytest.raises(ValueError, match=f"a sequence has 1 to num_tokens=5 tokens, got {length}"):
        TiTokDecoder(**TINY)(torch.randn(1, 16, length))


def test_legacy_features_are_the_same_numbers_in_memory_order():
    encoder, legacy = TiTokEncoder(**TINY), TiTokEncoder(legacy=True, **TINY)
    legacy.load_state_dict(encoder.state_dict())
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(legacy(images).flatten(1), encoder(images).mT.flatten(1))


def test_logits_of_a_teacher_are_features_and_not_images():
    decoder = TiTokDecoder(teacher_codebook_size=7, **TINY)
    assert decoder.output == "features"
    assert decoder(torch.randn(2, 16, 5), size=(8, 24)).shape == (2, 7, 1, 3)
    assert decoder.last_layer.shape[0] == 7


def test_a_pixel_decoder_decodes_the_expected_code_of_the_teacher():
    decoder = TiTokDecoder(teacher_codebook_size=7, pixel_decoder=pixel_decoder(), **TINY)
    logits = TiTokDecoder(teacher_codebook_size=7, **TINY)
    logits.load_state_dict({name: decoder.state_dict()[name] for name in logits.state_dict()})
    features = torch.randn(2, 16, 5)
    expected = torch.einsum("bkhw,ke->behw", logits(features).softmax(1), decoder.teacher_codebook)
    assert decoder.output == "images"
    torch.testing.assert_close(decoder(features), decoder.pixel_decoder(expected))
    assert decoder.last_layer is decoder.pixel_decoder.last_layer


def test_a_decoder_in_two_stages_is_built_from_its_config_again():
    decoder = TiTokDecoder(teacher_codebook_size=7, pixel_decoder=pixel_decoder(), **TINY)
    again = vistok.build(config_of(decoder))
    assert again.state_dict().keys() == decoder.state_dict().keys()
    assert isinstance(again.pixel_decoder, CNNDecoder)


@pytest.mark.parametrize(
    "options", [{}, {"teacher_codebook_size": 7}, {"teacher_codebook_size": 7, "pixel_decoder": pixel_decoder()}]
)
def test_every_parameter_gets_a_gradient(options):
    encoder, decoder = TiTokEncoder(**TINY), TiTokDecoder(**options, **TINY)
    decoder(encoder(torch.randn(1, 3, 16, 16))).square().sum().backward()
    for part in (encoder, decoder):
        assert [name for name, parameter in part.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("part", [TiTokEncoder, TiTokDecoder])
def test_gradient_checkpointing_recomputes_each_block_and_changes_nothing(part, monkeypatch):
    calls = []
    forward = TransformerBlock.forward
    monkeypatch.setattr(TransformerBlock, "forward", lambda self, *inputs: calls.append(0) or forward(self, *inputs))
    plain, checkpointing = part(**TINY), part(gradient_checkpointing=True, **TINY)
    checkpointing.load_state_dict(plain.state_dict())
    inputs = torch.randn(2, 3, 16, 16) if part is TiTokEncoder else torch.randn(2, 16, 5)
    results = []
    for model, expected in ((plain, 2), (checkpointing, 4)):
        calls.clear()
        outputs = model(inputs)
        outputs.square().sum().backward()
        assert len(calls) == expected
        results.append([outputs, *(parameter.grad for parameter in model.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 0}, "num_tokens must be positive, got 0"),
        ({"image_size": 20}, r"multiples of 8 pixels \(patch_size\), got 20"),
        ({"channels": 2}, "channels must be 1, 3 or 4, got 2"),
        ({"num_heads": 3}, "width must be a multiple of num_heads"),
    ],
)
@pytest.mark.parametrize("part", [TiTokEncoder, TiTokDecoder])
def test_impossible_arguments_are_errors(part, options, message):
    with pytest.raises(ValueError, match=message):
        part(**TINY | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pixel_decoder": pixel_decoder()}, "decodes the codes of a teacher: set teacher_codebook_size"),
        ({"teacher_codebook_size": 0}, "teacher_codebook_size must be positive, or null, got 0"),
        (
            {"teacher_codebook_size": 7, "pixel_decoder": pixel_decoder(patch_size=4)},
            r"must have layout image, channels 3 and factor 8, got image, 3 and 4",
        ),
    ],
)
def test_teachers_that_do_not_fit_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        TiTokDecoder(**TINY, **options)


def test_sizes_that_do_not_fit_are_errors():
    with pytest.raises(ValueError, match="crop to 8x8 or resize to 16x8"):
        TiTokEncoder(**TINY)(torch.randn(1, 3, 10, 8))
    with pytest.raises(ValueError, match=r"multiples of 8 pixels \(patch_size\), got \(20, 20\)"):
        TiTokDecoder(**TINY)(torch.randn(1, 16, 5), size=(20, 20))


SMALL, BASE, LARGE = (
    {"width": width, "depth": depth, "num_heads": num_heads}
    for width, depth, num_heads in ((512, 8, 8), (768, 12, 12), (1024, 24, 16))
)


@pytest.mark.parametrize(
    ("num_tokens", "encoder", "decoder", "legacy", "millions"),
    [
        (32, LARGE, LARGE, True, 641.1),
        (64, BASE, BASE, True, 204.8),
        (128, SMALL, SMALL, True, 83.7),
        (64, BASE, LARGE, False, 390.0),
        (128, BASE, LARGE, False, 390.2),
        (256, SMALL, LARGE, False, 330.3),
    ],
    ids=["L-32", "B-64", "S-128", "BL-64", "BL-128", "SL-256"],
)
def test_published_models_have_the_published_number_of_parameters(num_tokens, encoder, decoder, legacy, millions):
    with torch.device("meta"):
        teacher = {"teacher_codebook_size": 1024, "pixel_decoder": MaskGITDecoder()} if legacy else {}
        tokenizer = vistok.Tokenizer(
            TiTokEncoder(num_tokens=num_tokens, legacy=legacy, **encoder),
            BSQ(bits=12 if legacy else 64, index_bits=1),
            TiTokDecoder(num_tokens=num_tokens, **teacher, **decoder),
        )
    codebook = 4096 * 12 if legacy else 8192 * 64
    count = codebook + sum(parameter.numel() for parameter in tokenizer.parameters())
    assert round(count / 1e6, 1) == millions


# Names of TiTok (https://github.com/bytedance/1d-tokenizer) and ours.
NAMES = {
    r"transformer\.(\d+)\.": r"trunk.transformer.blocks.\1.",
    r"ln_(\d)\.": r"norm\1.",
    r"attn\.in_proj_": "attention.qkv.",
    r"attn\.out_proj": "attention.projection",
    r"mlp\.c_fc": "mlp.fc1",
    r"mlp\.c_proj": "mlp.fc2",
    r"ln_pre": "trunk.transformer.norm_in",
    r"ln_post": "trunk.transformer.norm_out",
    r"latent_token_positional_embedding": "trunk.latent_positions",
    r"positional_embedding": "trunk.positions.table",
    r"class_embedding": "trunk.class_token",
    r"patch_embed\.": "patch_embedding.",
    r"^latent_tokens": "encoder.latent_tokens",
    r"encoder\.conv_out": "to_codes",
    r"decoder\.decoder_embed": "from_codes",
    r"decoder\.ffn": "decoder.head",
    r"quantize\.embedding\.weight": "quantizer.table",
}


def renamed(name):
    for pattern, replacement in NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


@pytest.mark.parametrize("name", ["titok_nonlegacy", "tatitok_vq"])
def test_the_original_program_gives_the_same_indices_and_images(name):
    weights, io, _ = golden(name)
    options = {"image_size": 32, "num_tokens": 8, "width": 64, "depth": 2, "num_heads": 2}
    quantizer = VectorQuantizer(codebook_size=64, dim=12, distance="cosine")
    tokenizer = vistok.Tokenizer(
        TiTokEncoder(**options), quantizer, TiTokDecoder(**options), preprocessing={"size": [32, 32]}
    ).eval()
    weights = {renamed(key): tensor for key, tensor in weights.items()}
    # The conditioning on text and the usage of the codes are not part of the backbone.
    extra = {key for key in weights if "text_guidance" in key or "embed_prob" in key}
    own = tokenizer.state_dict()
    # A mask token and 1x1 convolutions have axes of length one more.
    weights = {key: tensor.view_as(own[key]) for key, tensor in weights.items() if key not in extra}
    assert own.keys() - weights.keys() == {"quantizer.initialised", "quantizer.updates"}
    tokenizer.load_state_dict(own | weights)
    quantized = tokenizer.encode(io["x"])
    assert torch.equal(quantized.indices, io["indices"][:, 0])
    if not extra:
        images = tokenizer.decode_indices(quantized.indices)
        torch.testing.assert_close(images, io["decoded"], rtol=0, atol=1e-5)


def test_the_first_tokens_of_a_sequence_are_codes_too():
    sizes = {"image_size": 32, "patch_size": 8, "num_tokens": 6, "width": 32, "depth": 1, "num_heads": 2}
    stack = ResidualQuantizer(VectorQuantizer(16, 4), depth=2)
    preprocessing = {"size": [32, 32]}
    tokenizer = vistok.Tokenizer(
        TiTokEncoder(**sizes), stack, TiTokDecoder(**sizes), preprocessing=preprocessing
    ).eval()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    whole, short = tokenizer.encode(images), tokenizer.encode(images, length=4)
    assert torch.equal(short.indices, whole.indices[:, :4])
    assert torch.equal(short.codes, whole.codes[..., :4])
    ids = tokenizer.flatten(short.indices)
    assert torch.equal(tokenizer.unflatten(ids), short.indices)
    assert tokenizer.decode_indices(short.indices).shape == images.shape
    with pytest.raises(ValueError, match="length must lie between 1 and 6, got 7"):
        tokenizer.encode(images, length=7)


TEXT = {"text_dim": 6, "text_length": 4}


@pytest.fixture
def with_texts():
    parts = TiTokEncoder(**TINY), FSQ((5, 5)), TiTokDecoder(**TINY, **TEXT)
    return vistok.Tokenizer(*parts, preprocessing={"size": [16, 16]}).eval()


@torch.no_grad()
def test_an_image_depends_on_its_text(with_texts):
    images, texts = torch.randn(2, 3, 16, 16), torch.randn(2, 4, 6)
    reconstruction = with_texts(images, texts=texts)
    indices = reconstruction.quantized.indices
    assert torch.equal(with_texts.decode_indices(indices, texts=texts), reconstruction.images)
    other = with_texts.decode_indices(indices, texts=torch.cat([texts[:1], texts[1:] + 1]))
    assert torch.equal(other[0], reconstruction.images[0])
    assert not torch.allclose(other[1], reconstruction.images[1])
    assert with_texts.decode_indices(indices, texts=texts[:, :2]).shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (None, r"decodes with the help of a text: pass its features as texts=\(b, length, 6\), got None"),
        (torch.zeros(2, 4, 5), r"texts=\(b, length, 6\), got \(2, 4, 5\)"),
        (torch.zeros(2, 5, 6), "texts have at most text_length=4 features, got 5"),
    ],
)
def test_texts_that_do_not_fit_are_errors(with_texts, texts, message):
    with pytest.raises(ValueError, match=message):
        with_texts.decode(torch.zeros(2, 2, 5), texts=texts)


@pytest.mark.parametrize("changes", [{"text_length": None}, {"text_dim": None}, {"text_dim": 0}])
def test_sizes_of_texts_come_together(changes):
    with pytest.raises(ValueError, match="text_dim and text_length are positive numbers for texts, or both null"):
        TiTokDecoder(**TINY | TEXT | changes)
