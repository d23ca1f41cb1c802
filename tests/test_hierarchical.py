"""Several levels of codes: what each level sees, and that everything a tokenizer does works for all levels."""

import pytest
import torch

import vistok
from vistok.decoder import CNNDecoder
from vistok.encoder import CNNEncoder
from vistok.metric.codebook_usage import CodebookUsage
from vistok.quantizer import FSQ, ResidualQuantizer, VectorQuantizer

QUANTIZERS = {
    "fsq": FSQ((5, 5)),
    "vq_ema": VectorQuantizer(16, 4, table="ema", init="batch"),
    "rvq": ResidualQuantizer(VectorQuantizer(16, 4, init="normal"), depth=3, commitment="stage"),
    "different": [VectorQuantizer(16, 2, init="normal"), FSQ((8, 8))],
}


def make(quantizer="fsq", levels=2, **arguments):
    template = QUANTIZERS[quantizer]
    return vistok.HierarchicalTokenizer(
        CNNEncoder(patch_size=4, base_channels=32, num_blocks=1),
        template,
        CNNDecoder(patch_size=4, base_channels=32, num_blocks=1),
        levels=levels,
        width=32,
        num_blocks=1,
        preprocessing={"size": [16, 24]},
        **arguments,
    ).eval()


@pytest.fixture(params=QUANTIZERS)
def tokenizer(request):
    tokenizer = make(request.param)
    tokenizer.train()(images())
    tokenizer.quantizer.update()
    return tokenizer.eval()


def images(height=16, width=24, batch=2):
    return torch.rand(batch, 3, height, width) * 2 - 1


def test_codes_and_indices_are_those_of_the_levels_coarse_to_fine(tokenizer):
    quantized = tokenizer.encode(images())
    assert tokenizer.scale_lengths(tokenizer.grid()) == (2 * 3, 4 * 6)
    assert quantized.codes.shape == (2, tokenizer.quantizer.dim, 6 + 24)
    assert quantized.indices.shape[1:] == tokenizer.quantizer.indices_shape((4, 6))
    for level, (codes, indices) in enumerate(
        zip(quantized.codes.split((6, 24), 2), quantized.indices.split((6, 24), 1), strict=True)
    ):
        assert torch.equal(tokenizer.quantizer.part(level).indices_to_codes(indices), codes)


def test_decoding_indices_equals_decoding_codes(tokenizer):
    batch = images()
    quantized = tokenizer.encode(batch)
    decoded = tokenizer.decode(quantized.codes)
    assert torch.equal(tokenizer.decode_indices(quantized.indices), decoded)
    assert torch.equal(tokenizer(batch).images, decoded)


@pytest.mark.parametrize("size", [(16, 24), (32, 8)])
@pytest.mark.parametrize("levels", [2, 3])
def test_sequences_of_any_size_survive_flatten_and_unflatten(levels, size):
    tokenizer = make("rvq", levels)
    size = tuple(side * 2 ** (levels - 2) for side in size)
    indices = tokenizer.encode(images(*size)).indices
    ids = tokenizer.flatten(indices, offsets=True)
    assert ids.shape == (2, tokenizer.sequence_length(size))
    assert torch.equal(tokenizer.unflatten(ids, size, offsets=True), indices)
    assert tokenizer.decode_indices(indices, size).shape == (2, 3, *size)


def test_bits_are_those_of_all_levels():
    tokenizer = make("different")
    assert tokenizer.bits_per_pixel((16, 24)) == (4 * 6 + 6 * 24) / (16 * 24)
    assert tokenizer.vocab_size == 64


@pytest.mark.parametrize("length", [1, 2])
def test_the_first_levels_alone_are_encoded_and_decoded(tokenizer, length):
    batch = images()
    whole, short = tokenizer.encode(batch), tokenizer.encode(batch, length=length)
    kept = sum(tokenizer.scale_lengths(tokenizer.grid())[:length])
    assert torch.equal(short.indices, whole.indices[:, :kept])
    assert torch.equal(short.codes, whole.codes[:, :, :kept])
    assert torch.equal(tokenizer.unflatten(tokenizer.flatten(short.indices)), short.indices)
    assert torch.equal(tokenizer.decode_indices(short.indices), tokenizer.decode(short.codes))


def test_finer_codes_depend_on_coarser_ones():
    tokenizer = make()
    batch = images()
    before = tokenizer.encode(batch).indices.split((6, 24), 1)
    with torch.no_grad():
        # Other coarse codes of the same images.
        tokenizer.to_codes[0].weight.mul_(-1)
        tokenizer.to_codes[0].bias.mul_(-1)
        tokenizer.refine[0][0].weight.mul_(30)
    after = tokenizer.encode(batch).indices.split((6, 24), 1)
    assert not torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize("level", [0, 1])
def test_images_depend_on_the_codes_of_every_level(level):
    tokenizer = make()
    codes = tokenizer.encode(images()).codes
    other = codes.clone()
    other.split((6, 24), 2)[level].neg_()
    assert not torch.allclose(tokenizer.decode(codes), tokenizer.decode(other))


def test_every_parameter_gets_a_gradient(tokenizer):
    tokenizer.train()
    reconstruction = tokenizer(images())
    losses = reconstruction.quantized.losses
    assert losses.keys() == tokenizer.quantizer.loss_weights.keys()
    (reconstruction.images.square().mean() + sum(losses.values())).backward()
    without = [name for name, parameter in tokenizer.named_parameters() if parameter.grad is None]
    assert without == []


def test_an_update_reaches_the_codebook_of_every_level():
    tokenizer = make("vq_ema").train()
    tokenizer(images())
    before = [tokenizer.quantizer.part(level).codebook.clone() for level in range(2)]
    tokenizer.quantizer.update()
    after = [tokenizer.quantizer.part(level).codebook for level in range(2)]
    assert not torch.equal(before[0], before[1])
    assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_the_losses_of_the_levels_are_added():
    weights = make("vq_ema").quantizer.loss_weights
    alone = VectorQuantizer(16, 4, table="ema").loss_weights
    assert weights == {f"level{level}_{key}": weight for level in range(2) for key, weight in alone.items()}


def test_usage_is_counted_per_level():
    tokenizer = make()
    indices = tokenizer.encode(images()).indices
    usage = CodebookUsage.of(tokenizer.quantizer, tokenizer.scale_lengths(tokenizer.grid()))
    usage.update(indices)
    used = usage.compute()["distinct_codes_per_scale"]
    assert used.tolist() == [len(each.unique()) for each in indices.split((6, 24), 1)]


def test_whitening_gives_every_level_uncorrelated_features_of_variance_one():
    tokenizer = make(levels=3)
    batch = images(64, 64, batch=8)
    tokenizer.whiten_projection(batch)
    # The finer levels saw features in place of the codes of coarser ones, so only the coarsest is exact.
    coarsest = tokenizer(batch).features[:, :, :16].transpose(0, 1).flatten(1)
    torch.testing.assert_close(torch.cov(coarsest), torch.eye(2), atol=1e-2, rtol=0)
    assert torch.isfinite(tokenizer(batch).features).all()


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_loaded_bundle_gives_the_same_indices_and_images_bit_for_bit(tmp_path, quantizer):
    tokenizer = make(quantizer)
    batch = images()
    tokenizer.train()(batch)
    tokenizer.quantizer.update()
    tokenizer.eval()
    loaded = vistok.load(vistok.save(tokenizer, tmp_path / "bundle"))
    assert isinstance(loaded, vistok.HierarchicalTokenizer)
    expected = tokenizer.to(memory_format=torch.channels_last).encode(batch)
    assert torch.equal(loaded.encode(batch).indices, expected.indices)
    assert torch.equal(loaded.decode_indices(expected.indices), tokenizer.decode(expected.codes))


def test_quantizing_all_levels_as_one_sequence_equals_quantizing_each(tokenizer):
    quantizer = tokenizer.quantizer
    features = torch.randn(2, quantizer.dim, 5 * 6)
    whole = quantizer(features)
    again = quantizer.codes_to_indices(whole.codes).split((6, 24), 1)
    for level, each in enumerate(features.split((6, 24), 2)):
        part = quantizer.part(level)
        codes = whole.codes.split((6, 24), 2)[level]
        assert torch.equal(codes, part(each).codes)
        assert torch.equal(again[level], part.codes_to_indices(codes))
    assert torch.equal(quantizer.indices_to_codes(whole.indices), whole.codes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make(levels=1), "levels must be an integer of at least 2, got 1"),
        (lambda: make("different", levels=3), "one template for each of the 3 parts"),
        (lambda: make().encode(images(16, 20)), "multiple of 8 pixels with 2 levels, got 16x20"),
        (lambda: make().decode(torch.zeros(2, 2, 29)), r"2 levels end after 6, 30 tokens on the grid \(4, 6\)"),
        (lambda: make().encode(images(), length=3), "length must lie between 1 and 2, got 3"),
    ],
)
def test_what_does_not_fit_is_an_error_that_says_what_does(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_levels_of_different_dims_are_refused():
    encoder, decoder = CNNEncoder(base_channels=32), CNNDecoder(base_channels=32)
    with pytest.raises(ValueError, match=r"the quantizers of all levels need the same dim, got \[2, 3\]"):
        vistok.HierarchicalTokenizer(encoder, [FSQ((8, 5)), FSQ((8, 5, 5))], decoder)
