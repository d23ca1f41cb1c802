"""Facades in the programs whose calls they answer: taming, Open-MAGVIT2 and diffusers themselves, loops of others."""

import importlib
import sys
import types

import pytest
import torch
from torch import nn

from vistok import Tokenizer
from vistok.decoder import CNNDecoder
from vistok.encoder import CNNEncoder
from vistok.quantizer import LFQ, MultiScaleQuantizer, ResidualQuantizer, VectorQuantizer
from vistok.tokens.facades import (
    DiffusersTokenizer,
    OneDimensionalTokenizer,
    OpenMAGVIT2Tokenizer,
    RQTokenizer,
    TamingTokenizer,
    VARTokenizer,
)

# The programs are of other years than what they import.
pytestmark = pytest.mark.filterwarnings("ignore")

CNN = {"base_channels": 32, "patch_size": 2, "num_blocks": 1}
PREPROCESSING = {"size": [16, 16]}
BITS = (2, 4)


def of_grid(quantizer):
    torch.manual_seed(0)
    return Tokenizer(CNNEncoder(**CNN), quantizer, CNNDecoder(**CNN), preprocessing=PREPROCESSING).eval()


def plain():
    return of_grid(VectorQuantizer(codebook_size=16, dim=4))


def taming_of_plain():
    return TamingTokenizer(plain())


def open_magvit2_of_bits():
    return OpenMAGVIT2Tokenizer(of_grid(LFQ(6)), factors=BITS)


class Classes(nn.Module):
    """A conditioning stage whose tokens are the classes themselves."""

    def encode(self, c):
        return c, None, (None, None, c)


@pytest.fixture
def images():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def taming(monkeypatch):
    """``Net2NetTransformer`` of taming-transformers-rom1504, without what its imports want of old libraries."""
    pytest.importorskip("taming")
    transformers = pytest.importorskip("transformers")

    def instantiate_from_config(config):
        module, name = config["target"].rsplit(".", 1)
        return getattr(importlib.import_module(module), name)(**config.get("params", {}))

    main = types.ModuleType("taming.main")
    main.instantiate_from_config = instantiate_from_config
    monkeypatch.setitem(sys.modules, "taming.main", main)
    monkeypatch.setattr(transformers, "top_k_top_p_filtering", None, raising=False)
    return importlib.import_module("taming.models.cond_transformer").Net2NetTransformer


def test_taming_trains_and_samples_its_transformer(taming, images):
    here = __name__
    size = {"vocab_size": 16, "block_size": 65, "n_layer": 1, "n_head": 2, "n_embd": 16}
    model = taming(
        {"target": "taming.modules.transformer.mingpt.GPT", "params": size},
        {"target": f"{here}.taming_of_plain"},
        "__is_unconditional__",
    )
    batch = {"image": images.movedim(1, -1)}
    loss = model.shared_step(batch, 0)
    loss.backward()
    assert model.transformer.head.weight.grad.abs().sum() > 0
    pictures = model.eval().log_images(batch, top_k=4)
    tokenizer = model.first_stage_model.tokenizer
    expected = tokenizer.decode_indices(tokenizer.encode(images).indices)
    assert torch.allclose(pictures["reconstructions"], expected, atol=1e-5)
    assert pictures["samples_nopix"].shape == images.shape


def test_open_magvit2_trains_and_samples_its_transformer(images):
    program = pytest.importorskip("open_magvit2.taming.models.cond_transformer_gpt")
    here = __name__
    size = {"vocab_size": 16, "block_size": 64, "spatial_n_layer": 1, "factorized_n_layer": 1, "n_head": 2, "dim": 16}
    factors = {"factorized_bits": list(BITS), "token_factorization": True, "class_num": 3}
    model = program.Net2NetTransformer(
        {"target": "open_magvit2.taming.modules.transformer.gpt.GPT", "params": size | factors},
        {"target": f"{here}.open_magvit2_of_bits"},
        {"target": f"{here}.Classes"},
        {"target": "open_magvit2.taming.modules.transformer.permuter.Identity"},
        cond_stage_key="class_label",
        token_factorization=True,
    )
    batch = {"image": images.movedim(1, -1), "class_label": torch.tensor([[0], [2]])}
    loss, _ = model.shared_step(batch, 0)
    loss.backward()
    assert loss.item() == pytest.approx(6 * torch.tensor(2.0).log().item())  # the heads start at zero
    model.eval()
    sampling = importlib.import_module("open_magvit2.sample")
    pair = {"temperature": [1.0, 1.0], "top_k": [0, 0], "top_p": [1.0, 1.0], "cfg_scale": [2.0, 2.0]}
    drawn = sampling.sample_classconditional(model, 2, 1, steps=64, dim_z=6, h=8, w=8, token_factorization=True, **pair)
    assert drawn["samples"].shape == images.shape
    tokenizer = model.first_stage_model.tokenizer
    quant, indices = model.encode_to_z(images)
    decoded = model.decode_to_img(indices, quant.shape)
    assert torch.allclose(decoded, tokenizer.decode_indices(tokenizer.encode(images).indices), atol=1e-5)


def test_open_magvit2_without_factors_looks_up_whole_codes(images):
    facade = OpenMAGVIT2Tokenizer(of_grid(LFQ(6)))
    quant, _, indices, _ = facade.encode(images)
    assert torch.equal(facade.quantize.get_codebook_entry(indices.view(2, -1), shape_of(quant)), quant)


def shape_of(quant):
    return quant.shape[0], *quant.shape[2:], quant.shape[1]


@pytest.mark.parametrize("factors", [(3, 4), (6,), (0, 6)])
def test_factors_that_do_not_divide_a_code_are_refused(factors):
    with pytest.raises(ValueError, match="add up to 6"):
        OpenMAGVIT2Tokenizer(of_grid(LFQ(6)), factors)


def test_the_order_of_bits_of_open_magvit2_is_its_own(images):
    program = pytest.importorskip("open_magvit2.taming.modules.vqvae.lookup_free_quantize")
    tokenizer = of_grid(LFQ(6))
    theirs = program.LFQ(codebook_size=64, dim=6, token_factorization=True, factorized_bits=list(BITS)).eval()
    features = tokenizer.to_codes(tokenizer.encoder(images))
    quantized, _, expected = theirs(features)
    quant, _, indices, _ = OpenMAGVIT2Tokenizer(tokenizer, BITS).encode(images)
    assert torch.equal(quant, quantized)
    assert all(torch.equal(*pair) for pair in zip(indices, expected, strict=True))


def test_amused_paints_with_the_tokens_of_a_tokenizer(images):
    diffusers = pytest.importorskip("diffusers")
    size = {"hidden_size": 8, "cond_embed_dim": 8, "micro_cond_encode_dim": 2, "micro_cond_embed_dim": 10}
    size |= {"encoder_hidden_size": 8, "vocab_size": 18, "codebook_size": 16, "in_channels": 8}
    size |= {"block_out_channels": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    size |= {"block_num_heads": 1, "num_res_blocks": 1, "sample_size": 8}
    torch.manual_seed(0)
    facade = DiffusersTokenizer(plain())
    parts = {"tokenizer": None, "text_encoder": None, "transformer": diffusers.UVit2DModel(**size).eval()}
    parts |= {"scheduler": diffusers.AmusedScheduler(mask_token_id=17), "vqvae": facade}
    texts = {"prompt_embeds": torch.zeros(1, 8), "encoder_hidden_states": torch.zeros(1, 3, 8)}
    options = texts | {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 1.0}
    pipeline = diffusers.AmusedPipeline(**parts)
    seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
    painted = pipeline(**options, generator=seeds[0], output_type="pt").images
    drawn = pipeline(**options, generator=seeds[1], output_type="latent").images
    assert torch.allclose(painted * 2 - 1, facade.tokenizer.decode_indices(drawn).clamp(-1, 1), atol=1e-5)
    again = diffusers.AmusedImg2ImgPipeline(**parts)
    options = {name: value for name, value in options.items() if name not in ("height", "width")}
    options |= {"num_inference_steps": 8, "strength": 0.25}
    kept = again(image=(images[:1] + 1) / 2, **options, generator=seeds[0], output_type="latent").images
    # Most tokens of the picture survive a weak change; by chance it would be one in 16.
    assert (kept == facade.tokenizer.encode(images[:1]).indices).float().mean() > 0.6


def test_amuseds_training_reads_tokens_from_features(images):
    facade = DiffusersTokenizer(plain())
    latents = facade.encode((images + 1) / 2).latents
    tokens = facade.quantize(latents)[2][2].reshape(2, 8, 8)
    assert torch.equal(tokens, facade.tokenizer.encode(images).indices)
    shape = (2, 8, 8, facade.config.latent_channels)
    decoded = facade.decode(tokens, force_not_quantize=True, shape=shape).sample
    assert torch.allclose(decoded * 2 - 1, facade.tokenizer.decode_indices(tokens), atol=1e-5)
    assert torch.allclose(facade.decode(latents, return_dict=False)[0], decoded, atol=1e-5)


def test_vq_diffusion_decodes_entries_of_its_sample(images):
    facade = DiffusersTokenizer(plain(), unit_range=False)
    sample = facade.tokenizer.encode(images).indices.flatten(1)
    entries = facade.quantize.get_codebook_entry(sample, shape=(2, 8, 8, facade.config.vq_embed_dim))
    decoded = facade.decode(entries, force_not_quantize=True).sample
    assert torch.allclose(decoded, facade.tokenizer.decode_indices(sample.view(2, 8, 8)), atol=1e-5)


def test_llamagens_extraction_keeps_the_order_of_pictures_and_views(images):
    facade = TamingTokenizer(plain())
    x_all = torch.cat([images[:1], torch.flip(images[:1], dims=[-1])])
    _, _, [_, _, indices] = facade.encode(x_all)
    codes = indices.reshape(1, 2, -1)
    expected = facade.tokenizer.encode(x_all).indices
    assert torch.equal(codes[0], expected.flatten(1))
    # Its sampler draws int32.
    samples = facade.decode_code(codes[0].int(), [2, 4, 8, 8])
    assert torch.equal(samples, facade.tokenizer.decode_indices(expected))


def test_halton_maskgit_decodes_grids_of_codes(images):
    facade = TamingTokenizer(plain())
    _, _, [_, _, code] = facade.encode(images)
    code = code.reshape(2, 8, 8)
    masked = torch.full_like(code, 16)
    clamped = torch.clamp(torch.where(torch.arange(8) > 3, masked, code), 0, 15)
    assert torch.equal(
        torch.clamp(facade.decode_code(clamped), -1, 1), facade.tokenizer.decode_indices(clamped).clamp(-1, 1)
    )


def test_1d_tokenizer_pretokenizes_views_and_decodes_what_rar_generates(images):
    facade = OneDimensionalTokenizer(plain()).requires_grad_(False)
    unit = (images + 1) / 2
    codes = facade.encode(torch.cat([unit, torch.flip(unit, dims=[-1])]))
    assert [len(each.tolist()) for each in codes] == [64] * 4
    generated = codes[:2]
    image = facade.decode_tokens(generated.view(2, -1))
    assert image.min() >= 0
    assert image.max() <= 1
    assert torch.equal(image, facade.decode(generated.view(2, 8, 8)))


class Pyramid(nn.Module):
    """A transformer of VAR's form with its calls and its loop of sampling; each scale only sees its own input."""

    def __init__(self, vae, patch_nums):
        super().__init__()
        self.vae, self.patch_nums = vae, patch_nums
        self.word_embed = nn.Linear(vae.Cvae, 8)
        self.head = nn.Linear(8, vae.vocab_size)
        self.start = nn.Parameter(torch.zeros(1, 1, 8))

    def forward(self, x):
        return self.head(torch.cat([self.start.expand(len(x), 1, 8), self.word_embed(x.float())], 1))

    @torch.no_grad()
    def infer(self, batch, more_smooth):
        f_hat = torch.zeros(batch, self.vae.Cvae, self.patch_nums[-1], self.patch_nums[-1])
        tokens, indices = self.start.expand(batch, 1, 8), []
        for si, pn in enumerate(self.patch_nums):
            logits = self.head(tokens)
            idx = logits.argmax(-1)
            indices.append(idx)
            if more_smooth:
                h = (logits * 1e4).softmax(-1) @ self.vae.quantize.embedding.weight.unsqueeze(0)
            else:
                h = self.vae.quantize.embedding(idx)
            h = h.transpose_(1, 2).reshape(batch, self.vae.Cvae, pn, pn)
            f_hat, tokens = self.vae.quantize.get_next_autoregressive_input(si, len(self.patch_nums), f_hat, h)
            if si != len(self.patch_nums) - 1:
                tokens = self.word_embed(tokens.view(batch, self.vae.Cvae, -1).transpose(1, 2))
        return self.vae.fhat_to_img(f_hat).add_(1).mul_(0.5), indices


@pytest.fixture
def var():
    quantizer = MultiScaleQuantizer(VectorQuantizer(codebook_size=16, dim=4), scales=[1, 2, 4, 8])
    return VARTokenizer(of_grid(quantizer))


@pytest.mark.parametrize("more_smooth", [False, True])
def test_vars_loop_of_sampling_makes_the_images_of_its_indices(var, more_smooth):
    torch.manual_seed(1)
    pictures, indices = Pyramid(var, (1, 2, 4, 8)).infer(2, more_smooth)
    assert torch.allclose(pictures * 2 - 1, var.idxBl_to_img(indices, same_shape=True, last_one=True), atol=1e-4)


def test_vars_step_of_training_gets_an_input_for_each_index_after_the_first_scale(var, images):
    model = Pyramid(var, (1, 2, 4, 8))
    var.train()  # as a part of a model in training
    gt = torch.cat(var.img_to_idxBl(images), dim=1)
    logits = model(var.quantize.idxBl_to_var_input(var.img_to_idxBl(images)))
    loss = nn.functional.cross_entropy(logits.view(-1, var.vocab_size), gt.view(-1))
    loss.backward()
    assert model.word_embed.weight.grad.abs().sum() > 0
    assert gt.shape == (2, 85)


def test_vars_progressive_training_sees_the_first_scales(var, images):
    var.quantize.prog_si = 1
    scales = var.img_to_idxBl(images)
    assert [each.shape[1] for each in scales] == [1, 4]
    assert var.quantize.idxBl_to_var_input(scales).shape == (2, 4, 4)


def test_vars_reconstructions_become_the_image_scale_by_scale(var, images):
    steps = var.img_to_reconstructed_img(images)
    whole = var.tokenizer.decode_indices(var.tokenizer.encode(images).indices).clamp(-1, 1)
    assert len(steps) == 4
    assert torch.allclose(steps[-1], whole, atol=1e-5)
    assert torch.equal(var.img_to_reconstructed_img(images, last_one=True), steps[-1])


def test_vars_grids_of_the_first_scales_only_are_refused(var, images):
    with pytest.raises(ValueError, match="same_shape=True"):
        var.idxBl_to_img(var.img_to_idxBl(images), same_shape=False)


def test_rq_transformer_embeds_partial_samples_row_by_row(images):
    facade = RQTokenizer(of_grid(ResidualQuantizer(VectorQuantizer(codebook_size=16, dim=4), depth=3)))
    xs = torch.zeros(2, 8, 8, 3, dtype=torch.long)
    xs[:, :2] = facade.get_codes(images)[:, :2]
    whole, _ = facade.get_code_emb_with_depth(xs.reshape(2, -1, 3))
    part, _ = facade.get_code_emb_with_depth(xs[:, :2].reshape(2, -1, 3))
    assert torch.allclose(whole[:, :16], part)
    table = [facade.tokenizer.quantizer.part(depth).codebook for depth in range(3)]
    expected = torch.stack([table[depth][xs.reshape(2, -1, 3)[..., depth]] for depth in range(3)], -2)
    assert torch.allclose(whole, expected, atol=1e-6)
    pixels = torch.cat([facade.decode_code(xs[i : i + 1]) for i in range(2)])
    assert pixels.shape == images.shape


@pytest.mark.parametrize("facade", [taming_of_plain, open_magvit2_of_bits])
def test_a_generator_that_trains_does_not_train_its_tokenizer(facade):
    generator = nn.ModuleDict({"tokenizer": facade()}).train()
    assert not any(module.training for module in generator["tokenizer"].modules())
