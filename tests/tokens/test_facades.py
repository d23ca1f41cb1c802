"""Tokenizers called as public generators call them."""

import pytest
import torch

from vistok import Tokenizer
from vistok.decoder import CNNDecoder, TiTokDecoder
from vistok.encoder import CNNEncoder, TiTokEncoder
from vistok.quantizer import FSQ, MultiScaleQuantizer, ResidualQuantizer, VectorQuantizer
from vistok.tokens.facades import OneDimensionalTokenizer, RQTokenizer, TamingTokenizer, TiTokTokenizer, VARTokenizer

CNN = {"base_channels": 32, "patch_size": 2, "num_blocks": 1}
PREPROCESSING = {"size": [16, 16]}


def of_grid(quantizer):
    torch.manual_seed(0)
    return Tokenizer(CNNEncoder(**CNN), quantizer, CNNDecoder(**CNN), preprocessing=PREPROCESSING).eval()


@pytest.fixture
def images():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def plain():
    return of_grid(VectorQuantizer(codebook_size=16, dim=4))


@pytest.fixture
def residual():
    return of_grid(ResidualQuantizer(VectorQuantizer(codebook_size=16, dim=4), depth=3))


@pytest.fixture
def pyramid():
    return of_grid(MultiScaleQuantizer(VectorQuantizer(codebook_size=16, dim=4), scales=[1, 2, 4, 8]))


def test_taming_trains_on_the_flat_indices_of_the_third_entry(plain, images):
    facade = TamingTokenizer(plain)
    quant, loss, info = facade.encode(images)
    indices = info[2].view(quant.shape[0], -1)
    assert loss.ndim == 0
    assert torch.equal(indices, plain.flatten(plain.encode(images).indices))


def test_taming_decodes_entries_of_a_shape_with_channels_last(plain, images):
    facade = TamingTokenizer(plain)
    quant, _, info = facade.encode(images)
    bhwc = (quant.shape[0], quant.shape[2], quant.shape[3], quant.shape[1])
    entries = facade.quantize.get_codebook_entry(info[2].reshape(-1), shape=bhwc)
    assert torch.allclose(entries, quant)
    assert torch.allclose(facade.decode(entries), plain.decode_indices(plain.encode(images).indices), atol=1e-6)


def test_llamagen_decodes_flat_indices_with_the_shape_of_the_codes(plain, images):
    facade = TamingTokenizer(plain)
    _, _, [_, _, indices] = facade.encode(images)
    decoded = facade.decode_code(indices.reshape(2, -1), [2, 4, 8, 8])
    assert torch.equal(decoded, plain.decode_indices(plain.encode(images).indices))
    assert torch.equal(decoded, facade.decode_code(indices.int(), [2, 8, 8, 4], channel_first=False))


def test_llamagens_entries_keep_the_order_of_the_axes_that_it_asks_for(plain, images):
    facade = TamingTokenizer(plain)
    quant, _, (_, _, indices) = facade.encode(images)
    first = facade.quantize.get_codebook_entry(indices, (2, 4, 8, 8), channel_first=True)
    last = facade.quantize.get_codebook_entry(indices, (2, 8, 8, 4), channel_first=False)
    assert torch.equal(first, last.permute(0, 3, 1, 2))
    assert torch.equal(facade.quantize.get_codebook_entry(indices), last.flatten(0, 2))
    assert torch.allclose(first, quant)


def test_indices_without_a_grid_need_a_shape(plain):
    with pytest.raises(ValueError, match="pass shape"):
        TamingTokenizer(plain).decode_code(torch.zeros(2, 64, dtype=torch.int64))


def test_rar_round_trips_images_from_zero_to_one(plain, images):
    facade = OneDimensionalTokenizer(plain)
    tokens = facade.encode((images + 1) / 2)
    assert tokens.shape == (2, 64)
    decoded = facade.decode_tokens(tokens)
    expected = plain.decode_indices(plain.encode(images).indices)
    assert torch.allclose(decoded, ((expected + 1) / 2).clamp(0, 1), atol=1e-6)


def test_titok_gives_indices_in_a_dict_and_codes_of_one_row(images):
    settings = {"image_size": 16, "patch_size": 8, "width": 32, "depth": 1, "num_heads": 2, "num_tokens": 5}
    encoder = TiTokEncoder(**settings)
    tokenizer = Tokenizer(encoder, FSQ(levels=[3, 3]), TiTokDecoder(**settings), preprocessing=PREPROCESSING)
    facade = TiTokTokenizer(tokenizer)
    codes, found = facade.encode((images + 1) / 2)
    assert codes.shape == (2, 2, 1, 5)
    assert found["min_encoding_indices"].shape == (2, 1, 5)
    assert torch.allclose(facade.decode(codes), facade.decode_tokens(found["min_encoding_indices"]), atol=1e-6)


def test_rq_transformer_gets_codes_and_what_each_depth_adds(residual, images):
    facade = RQTokenizer(residual)
    codes = facade.get_codes(images)
    assert codes.shape == (2, 8, 8, 3)
    embeddings, _ = facade.get_code_emb_with_depth(codes.view(2, 64, 3))
    assert embeddings.shape == (2, 64, 3, 4)
    sums = residual.encode(images).codes.flatten(2).movedim(1, -1)
    assert torch.allclose(embeddings.sum(2), sums, atol=1e-6)
    assert torch.equal(facade.decode_code(codes), residual.decode_indices(codes))


def test_rq_transformer_gets_soft_targets_around_its_codes(residual, images):
    facade = RQTokenizer(residual)
    soft, codes = facade.get_soft_codes(images, temp=0.5)
    assert soft.shape == (2, 8, 8, 3, 16)
    assert torch.allclose(soft.sum(-1), torch.ones(2, 8, 8, 3), atol=1e-5)
    assert torch.equal(codes, facade.get_codes(images))
    assert torch.equal(soft.argmax(-1), codes)


def test_rq_transformers_drawn_codes_are_the_nearest_ones_when_it_is_cold(residual, images):
    facade = RQTokenizer(residual)
    torch.manual_seed(0)
    _, drawn = facade.get_soft_codes(images, temp=1e-9, stochastic=True)
    assert (drawn == facade.get_codes(images)).float().mean() > 0.99
    _, warm = facade.get_soft_codes(images, temp=10.0, stochastic=True)
    assert (warm == drawn).float().mean() < 0.5


def test_soft_targets_of_stages_without_a_table_are_refused(images):
    facade = RQTokenizer(of_grid(ResidualQuantizer(FSQ(levels=[3, 3]), depth=2)))
    with pytest.raises(ValueError, match="is for get_soft_codes"):
        facade.get_soft_codes(images)


def test_var_gets_a_list_of_scales_and_decodes_it(pyramid, images):
    facade = VARTokenizer(pyramid)
    scales = facade.img_to_idxBl(images, v_patch_nums=[1, 2, 4, 8])
    assert [each.shape for each in scales] == [(2, 1), (2, 4), (2, 16), (2, 64)]
    whole = facade.idxBl_to_img(scales, same_shape=True, last_one=True)
    assert torch.equal(whole, pyramid.decode_indices(pyramid.encode(images).indices).clamp(-1, 1))
    steps = facade.idxBl_to_img(scales, same_shape=True)
    assert len(steps) == 4
    assert torch.equal(steps[-1], whole)


def test_vars_inputs_in_training_are_those_of_its_sampling_loop(pyramid, images):
    facade = VARTokenizer(pyramid)
    scales = facade.img_to_idxBl(images)
    teacher = facade.quantize.idxBl_to_var_input(scales)
    assert teacher.shape == (2, 4 + 16 + 64, facade.Cvae)
    f_hat = torch.zeros(2, facade.Cvae, 8, 8)
    inputs = []
    for si, (indices, side) in enumerate(zip(scales, (1, 2, 4, 8), strict=True)):
        h = facade.quantize.embedding(indices).transpose(1, 2).reshape(2, facade.Cvae, side, side)
        f_hat, following = facade.quantize.get_next_autoregressive_input(si, 4, f_hat, h)
        inputs.append(following.view(2, facade.Cvae, -1).transpose(1, 2))
    assert torch.allclose(torch.cat(inputs[:-1], 1), teacher, atol=1e-5)
    assert torch.allclose(facade.fhat_to_img(f_hat), facade.idxBl_to_img(scales, last_one=True), atol=1e-5)


@pytest.mark.parametrize("facade", [TamingTokenizer, TiTokTokenizer, VARTokenizer])
def test_a_tokenizer_of_another_kind_is_refused(facade, residual):
    with pytest.raises(ValueError, match="this tokenizer has ResidualQuantizer"):
        facade(residual)


def test_scales_of_another_pyramid_are_refused(pyramid, images):
    with pytest.raises(ValueError, match="this tokenizer has the scales"):
        VARTokenizer(pyramid).img_to_idxBl(images, v_patch_nums=[1, 2, 3])
