"""The tokenizer: shapes, sequences and sizes."""

import pytest
import torch

import vistok
from vistok.decoder import CNNDecoder
from vistok.encoder import CNNEncoder
from vistok.quantizer import FSQ, VectorQuantizer


@pytest.fixture(params=["fsq", "vq"])
def tokenizer(request):
    quantizer = FSQ((8, 5, 5)) if request.param == "fsq" else VectorQuantizer(32, 4, init="normal")
    encoder = CNNEncoder(base_channels=32, num_blocks=1)
    decoder = CNNDecoder(base_channels=32, num_blocks=1)
    return vistok.Tokenizer(encoder, quantizer, decoder, preprocessing={"size": [32, 48]}).eval()


def images(*size, batch=2):
    return torch.rand(batch, 3, *size) * 2 - 1


@pytest.mark.parametrize("size", [(32, 48), (8, 8), (64, 16)])
def test_any_multiple_of_the_factor_is_encoded_and_decoded(tokenizer, size):
    quantized = tokenizer.encode(images(*size))
    assert quantized.indices.shape == (2, size[0] // 8, size[1] // 8)
    assert tokenizer.decode(quantized.codes).shape == (2, 3, *size)


def test_decoding_indices_equals_decoding_codes(tokenizer):
    quantized = tokenizer.encode(images(32, 48))
    assert torch.equal(tokenizer.decode_indices(quantized.indices), tokenizer.decode(quantized.codes))


def test_forward_is_encode_then_decode(tokenizer):
    batch = images(32, 48)
    reconstruction = tokenizer(batch)
    assert torch.equal(reconstruction.images, tokenizer.decode(tokenizer.encode(batch).codes))
    assert torch.equal(reconstruction.quantized.indices, tokenizer.encode(batch).indices)


def test_flatten_is_raster_order_and_unflatten_its_inverse(tokenizer):
    indices = tokenizer.encode(images(32, 48)).indices
    ids = tokenizer.flatten(indices)
    assert ids[1].tolist() == [int(i) for row in indices[1] for i in row]
    assert torch.equal(tokenizer.unflatten(ids), indices)
    assert torch.equal(tokenizer.unflatten(ids, size=(48, 32)), indices.reshape(2, 6, 4))


def test_offsets_change_nothing_with_one_codebook(tokenizer):
    indices = tokenizer.encode(images(32, 48)).indices
    assert torch.equal(tokenizer.flatten(indices, offsets=True), tokenizer.flatten(indices))


def test_sizes_of_sequences_and_vocabulary(tokenizer):
    assert tokenizer.sequence_length() == 24
    assert tokenizer.sequence_length((256, 256)) == 1024
    assert tokenizer.grid((64, 8)) == (8, 1)
    assert tokenizer.vocab_size == tokenizer.quantizer.codebook_size
    assert tokenizer.bits_per_pixel((256, 256)) == pytest.approx(tokenizer.quantizer.bits / 64)


def test_ids_of_a_wrong_length_are_an_error(tokenizer):
    with pytest.raises(
        ValueError, match=r"ids must be \(b, 24\) for images of \(32, 48\) pixels, got \(2, 23\): pass the size"
    ):
        tokenizer.unflatten(torch.zeros(2, 23, dtype=torch.int64))


def test_a_size_that_is_not_a_multiple_of_the_factor_says_what_to_do(tokenizer):
    message = "image size must be a multiple of 8 pixels, got 33x50: crop to 32x48 or resize to 40x56"
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(images(33, 50))
    with pytest.raises(ValueError, match=message):
        tokenizer.sequence_length((33, 50))


def test_images_of_another_layout_are_an_error(tokenizer):
    with pytest.raises(ValueError, match=r"images must be \(b, 3, H, W\), got \(2, 1, 32, 32\)"):
        tokenizer.encode(torch.zeros(2, 1, 32, 32))
    with pytest.raises(ValueError, match=r"images must be \(b, 3, H, W\), got \(3, 32, 32\)"):
        tokenizer.encode(torch.zeros(3, 32, 32))


def test_without_a_training_size_a_size_must_be_given():
    tokenizer = vistok.Tokenizer(CNNEncoder(base_channels=32), FSQ((8, 5)), CNNDecoder(base_channels=32))
    with pytest.raises(ValueError, match=r"no training size in its preprocessing: pass size=\(H, W\)"):
        tokenizer.sequence_length()


def test_parts_of_different_factors_are_refused():
    with pytest.raises(ValueError, match=r"factor 8.* factor 16.* must agree"):
        vistok.Tokenizer(CNNEncoder(base_channels=32), FSQ((8, 5)), CNNDecoder(patch_size=16, base_channels=32))


def test_parts_of_different_dims_need_the_projection():
    with pytest.raises(ValueError, match="projection=none needs equal dims, got encoder 32, quantizer 2, decoder 32"):
        vistok.Tokenizer(CNNEncoder(base_channels=32), FSQ((8, 5)), CNNDecoder(base_channels=32), projection="none")


def test_parts_of_equal_dims_work_without_projection():
    quantizer = VectorQuantizer(16, 32, init="normal")
    tokenizer = vistok.Tokenizer(
        CNNEncoder(base_channels=32), quantizer, CNNDecoder(base_channels=32), projection="none"
    )
    assert tokenizer(images(16, 16)).images.shape == (2, 3, 16, 16)


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channel_counts(channels):
    tokenizer = vistok.Tokenizer(
        CNNEncoder(channels=channels, base_channels=32), FSQ((8, 5)), CNNDecoder(channels=channels, base_channels=32)
    )
    assert tokenizer(torch.zeros(2, channels, 16, 16)).images.shape == (2, channels, 16, 16)


def test_every_parameter_gets_a_gradient(tokenizer):
    tokenizer.train()
    reconstruction = tokenizer(images(16, 16))
    (reconstruction.images.square().mean() + sum(reconstruction.quantized.losses.values())).backward()
    without = [name for name, parameter in tokenizer.named_parameters() if parameter.grad is None]
    assert without == []


def test_codes_of_one_fixed_length_cannot_be_cut_short(tokenizer):
    with pytest.raises(ValueError, match="has codes of one fixed length: do not pass length=5"):
        tokenizer.encode(images(16, 16), length=5)


SMALL = {"patch_size": 4, "base_channels": 32, "num_blocks": 1}


def test_projections_of_3x3_see_the_neighbours_of_a_position():
    parts = CNNEncoder(**SMALL), FSQ((8, 5)), CNNDecoder(**SMALL)
    tokenizer = vistok.Tokenizer(*parts, projection="conv3x3").eval()
    assert [part.kernel_size for part in (tokenizer.to_codes, tokenizer.from_codes)] == [(3, 3), (3, 3)]
    assert tokenizer(images(8, 12)).images.shape == (2, 3, 8, 12)


def test_only_linear_projections_are_whitened():
    tokenizer = vistok.Tokenizer(CNNEncoder(**SMALL), FSQ((8, 5)), CNNDecoder(**SMALL), projection="conv3x3")
    with pytest.raises(ValueError, match=r"only projection=linear can be whitened: set it, or module\.whiten=false"):
        tokenizer.whiten_projection(images(8, 8))


def test_projections_of_3x3_are_for_images():
    sizes = {"patch_size": 8, "image_size": 16, "num_tokens": 5, "width": 16, "depth": 1, "num_heads": 2}
    parts = vistok.encoder.TiTokEncoder(**sizes), FSQ((8, 5)), vistok.decoder.TiTokDecoder(**sizes)
    with pytest.raises(ValueError, match="projection=conv3x3 is for images, got features of layout sequence"):
        vistok.Tokenizer(*parts, projection="conv3x3")


def test_an_unknown_projection_is_an_error():
    with pytest.raises(ValueError, match="projection must be linear, conv3x3 or none, got '3x3'"):
        vistok.Tokenizer(CNNEncoder(**SMALL), FSQ((8, 5)), CNNDecoder(**SMALL), projection="3x3")


def test_texts_for_a_decoder_that_takes_none_are_an_error(tokenizer):
    codes = tokenizer.encode(images(8, 8)).codes
    with pytest.raises(ValueError, match="CNNDecoder takes no texts: leave out texts="):
        tokenizer.decode(codes, texts=torch.zeros(2, 3, 4))


@pytest.mark.parametrize(("shape", "size"), [((2, 24), None), ((2, 24), (32, 48)), ((24,), None), ((4, 6), None)])
def test_flattened_indices_are_answered_with_how_to_unflatten_them(tokenizer, shape, size):
    message = (
        r"indices must be \(b, h, w\), got \(.*\): call unflatten\(ids, size=\(H, W\)\) first if they are flattened, "
    )
    message += r"add the batch axis by indices\[None\] if"
    with pytest.raises(ValueError, match=message):
        tokenizer.decode_indices(torch.zeros(shape, dtype=torch.int64), size)


def test_indices_of_too_many_axes_are_an_error(tokenizer):
    with pytest.raises(ValueError, match=r"indices must be \(b, h, w\), got \(2, 1, 4, 6\)$"):
        tokenizer.decode_indices(torch.zeros(2, 1, 4, 6, dtype=torch.int64))


@pytest.mark.usefixtures("without_type_checks")
def test_codes_without_a_map_are_an_error(tokenizer):
    with pytest.raises(ValueError, match=r"CNNDecoder takes features \(b, e, h, w\), got a grid \(24,\)"):
        tokenizer.decode(tokenizer.encode(images(32, 48)).codes.flatten(2))


def test_an_int_is_the_side_of_a_square(tokenizer):
    quantized = tokenizer.encode(images(16, 16))
    ids = tokenizer.flatten(quantized.indices)
    assert tokenizer.grid(16) == (2, 2)
    assert tokenizer.sequence_length(16) == 4
    assert tokenizer.bits_per_pixel(16) == tokenizer.bits_per_pixel((16, 16))
    assert torch.equal(tokenizer.unflatten(ids, size=16), quantized.indices)
    assert torch.equal(tokenizer.decode_indices(quantized.indices, 16), tokenizer.decode(quantized.codes, (16, 16)))


@pytest.mark.parametrize(
    ("method", "field"),
    [("decode", "codes"), ("decode_indices", "indices"), ("indices_to_codes", "indices"), ("flatten", "indices")],
)
@pytest.mark.usefixtures("without_type_checks")
def test_all_that_encode_returns_in_the_place_of_a_field_is_answered_with_the_field(tokenizer, method, field):
    with pytest.raises(ValueError, match=rf"pass quantized\.{field}"):
        getattr(tokenizer, method)(tokenizer.encode(images(16, 16)))


def test_images_from_0_to_255_are_refused_in_evaluation(tokenizer):
    batch = (images(16, 16) + 1) * 127.5
    with pytest.raises(
        ValueError, match=r"images must be floats in \[-1, 1\], got values from .* use images / 127.5 - 1"
    ):
        tokenizer.encode(batch)
    assert torch.isfinite(tokenizer.train()(batch).images).all()  # where looking would make a GPU wait


def test_tokens_of_a_sequence_are_flat_already():
    sizes = {"patch_size": 8, "image_size": 16, "num_tokens": 5, "width": 16, "depth": 1, "num_heads": 2}
    tokenizer = vistok.Tokenizer(
        vistok.encoder.TiTokEncoder(**sizes), FSQ((8, 5)), vistok.decoder.TiTokDecoder(**sizes)
    ).eval()
    indices = tokenizer.encode(images(16, 16)).indices
    assert tokenizer.decode_indices(tokenizer.flatten(indices), (16, 16)).shape == (2, 3, 16, 16)
    with pytest.raises(
        ValueError, match=r"indices must be \(b, n\), got \(5,\): add the batch axis by indices\[None\]"
    ):
        tokenizer.decode_indices(indices[0], (16, 16))


def test_a_video_takes_indices_of_its_frames_or_of_one():
    sizes = {"base_channels": 32, "num_blocks": 1}
    tokenizer = vistok.Tokenizer(
        vistok.encoder.Causal3DEncoder(**sizes), FSQ((8, 5)), vistok.decoder.Causal3DDecoder(**sizes)
    ).eval()
    with pytest.raises(
        ValueError, match=r"\(b, t, h, w\) or \(b, h, w\), got \(2, 8\): .*unflatten\(ids, size=\(T, H, W\)"
    ):
        tokenizer.decode_indices(torch.zeros(2, 8, dtype=torch.int64))
