"""The generator: causality, published sizes, and sampling that agrees with its likelihood."""

import math

import pytest
import torch

from vistok.layers import transformer
from vistok.prior import GPT, Sampling, generate
from vistok.prior.layers import FEW_ROWS, multiply, product_with, rotate, rotation
from vistok.prior.sampling import Decoder

TINY = {"width": 32, "depth": 2, "num_heads": 2, "dropout": 0.0}
FORMS = {
    "one codebook": {"codebook_sizes": [11], "grid": [2, 3]},
    "sequence": {"codebook_sizes": [11], "grid": [5]},
    "groups in one sequence": {"codebook_sizes": [5, 7], "grid": [2, 2]},
    "residual depth": {"codebook_sizes": [6, 6, 6], "grid": [2, 2], "form": "depth", "head_depth": 1},
    "factors in a depth transformer": {
        "codebook_sizes": [64],
        "grid": [2, 2],
        "form": "depth",
        "head_depth": 1,
        "factors": [2, 4],
    },
    "factors in one sequence": {"codebook_sizes": [64], "grid": [2, 2], "factors": [2, 4]},
}


def make(num_classes=3, **options):
    torch.manual_seed(0)
    prior = GPT(num_classes=num_classes, **TINY | options).eval()
    torch.nn.init.normal_(prior.head.weight, std=0.5)
    if prior.head_positions is not None:
        torch.nn.init.normal_(prior.head_positions, std=0.5)
    return prior


def random_tokens(prior, batch=2):
    generator = torch.Generator().manual_seed(1)
    columns = [torch.randint(size, (batch, prior.num_positions), generator=generator) for size in prior.codebook_sizes]
    return torch.stack(columns, -1).flatten(1)


@pytest.fixture(params=FORMS.values(), ids=FORMS)
def prior(request):
    return make(**request.param)


def test_a_token_changes_the_likelihood_of_itself_and_of_later_tokens_only(prior):
    tokens = random_tokens(prior, 1)
    labels = torch.tensor([1])
    before = prior(tokens, labels)
    for position in range(prior.length):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % min(prior.codebook_sizes)
        after = prior(changed, labels)
        assert torch.allclose(before[:, :position], after[:, :position], atol=1e-5)
        assert not torch.allclose(before[:, position], after[:, position], atol=1e-5)


def test_probabilities_of_a_token_sum_to_one(prior):
    tokens = random_tokens(prior, 1)
    labels = torch.tensor([0])
    last = prior.length - 1
    size = prior.codebook_sizes[-1]
    every = tokens.repeat(size, 1)
    every[:, last] = torch.arange(size)
    total = prior(every, labels.expand(size))[:, last].neg().exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-5)


def test_steps_with_cached_keys_and_values_equal_the_whole_sequence_at_once(prior):
    x = torch.randn(3, prior.num_steps, prior.width, generator=torch.Generator().manual_seed(0))
    heads = prior.num_heads, prior.num_steps, prior.width // prior.num_heads
    decoder = Decoder(prior.blocks, (3, *heads), x)
    with torch.inference_mode():
        steps = [decoder(x[:, step], step, prior.rotation(step, step + 1)) for step in range(prior.num_steps)]
        for block in prior.blocks:
            x = block(x, prior.rotation(0, prior.num_steps))
    assert torch.allclose(torch.stack(steps, 1), x, atol=1e-5)


@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1, 8])
@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-1)])
def test_products_of_few_rows_are_those_of_a_linear_layer(rows, dtype, precision):
    torch.manual_seed(0)
    x, weights = torch.randn(rows, 24, dtype=dtype), torch.randn(2, 40, 24, dtype=dtype).unbind()
    for product in (multiply, product_with(weights, rows)):
        for weight in weights:
            assert torch.allclose(product(x, weight), torch.nn.functional.linear(x, weight), atol=precision)


def test_greedy_tokens_and_logits_are_those_of_the_llama_of_transformers():
    transformers = pytest.importorskip("transformers")
    prior = make(codebook_sizes=[11], grid=[7])
    config = transformers.LlamaConfig(
        vocab_size=15,
        hidden_size=32,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=14,
    )
    llama = transformers.LlamaForCausalLM(config).eval()
    tensors = {
        "model.embed_tokens.weight": torch.cat([prior.token_embedding.weight, prior.class_embedding.weight]),
        "model.norm.weight": prior.norm.weight,
        # Rows of classes, which are never the most likely.
        "lm_head.weight": torch.cat([prior.head.weight, torch.zeros(4, 32)]),
    }
    for number, block in enumerate(prior.blocks):
        name = f"model.layers.{number}."
        projections = zip("qkv", block.attention.qkv.weight.chunk(3), strict=True)
        tensors |= {f"{name}self_attn.{letter}_proj.weight": weight for letter, weight in projections}
        gate, up = block.mlp.gate_and_up.weight.chunk(2)
        tensors |= {
            f"{name}self_attn.o_proj.weight": block.attention.out.weight,
            f"{name}mlp.gate_proj.weight": gate,
            f"{name}mlp.up_proj.weight": up,
            f"{name}mlp.down_proj.weight": block.mlp.down.weight,
            f"{name}input_layernorm.weight": block.attention_norm.weight,
            f"{name}post_attention_layernorm.weight": block.mlp_norm.weight,
        }
    llama.load_state_dict(tensors)
    labels = torch.arange(3)
    tokens = generate(prior, labels, Sampling(temperature=0))
    with torch.inference_mode():
        logits = llama(torch.cat([11 + labels[:, None], tokens[:, :-1]], 1)).logits[..., :11]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
        assert torch.allclose(prior(tokens, labels).flatten(), losses, atol=1e-4)
    assert torch.equal(logits.argmax(-1), tokens)


def test_greedy_sampling_takes_the_most_likely_part_each_time(prior):
    tokens = generate(prior, torch.tensor([0, 2]), Sampling(temperature=0))
    rows = prior.to_rows(tokens)
    labels = torch.tensor([0, 2])
    for part in range(prior.num_parts):
        for step in range(prior.num_positions):
            losses = []
            for code in range(prior.part_sizes[part]):
                other = rows.clone()
                other[:, step, part] = code + prior._starts[part]
                losses.append(prior.part_losses(other, labels)[:, step, part])
            best = torch.stack(losses, 1).min(1).values
            assert torch.allclose(prior.part_losses(rows, labels)[:, step, part], best, atol=1e-5)


def test_guidance_of_scale_one_point_five_equals_the_formula_on_whole_sequences(prior):
    scale = 1.5
    labels = torch.tensor([1])
    tokens = generate(prior, labels, Sampling(temperature=0, guidance=scale))
    rows = prior.to_rows(tokens)
    for index in range(prior.num_positions * prior.num_parts):
        step, part = divmod(index, prior.num_parts)
        guided = []
        for code in range(prior.part_sizes[part]):
            other = rows.clone()
            other[:, step, part] = code + prior._starts[part]
            given = -prior.part_losses(other, labels)[0, step, part]
            none = -prior.part_losses(other)[0, step, part]
            guided.append((none + scale * (given - none)).item())
        chosen = int(rows[0, step, part] - prior._starts[part])
        assert guided[chosen] == pytest.approx(max(guided), abs=1e-4)


def test_samples_are_inside_their_codebooks_and_follow_the_seed(prior):
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return generate(prior, torch.tensor([0, 1, 2, 3]), Sampling(top_k=4, top_p=0.9), generator=generator)

    tokens = draw(0)
    assert tokens.shape == (4, prior.length)
    by_codebook = tokens.unflatten(1, (-1, len(prior.codebook_sizes)))
    assert (by_codebook >= 0).all()
    assert (by_codebook < torch.tensor(prior.codebook_sizes)).all()
    assert torch.equal(tokens, draw(0))
    assert not torch.equal(tokens, draw(1))


def test_compiled_steps_draw_the_same_tokens(prior):
    labels = torch.tensor([0, 1])
    plain = generate(prior, labels, Sampling(temperature=0, guidance=2))
    compiled = generate(prior, labels, Sampling(temperature=0, guidance=2), compile="eager")
    assert torch.equal(plain, compiled)


def test_every_parameter_gets_a_gradient(prior):
    prior.train()(random_tokens(prior, 8), torch.arange(8) % 3).mean().backward()
    without = [name for name, value in prior.named_parameters() if value.grad is None]
    assert without == []


def test_rows_and_tokens_are_inverse_to_each_other(prior):
    tokens = random_tokens(prior)
    assert torch.equal(prior.to_tokens(prior.to_rows(tokens)), tokens)


def test_factors_are_the_least_significant_bits_first():
    prior = make(codebook_sizes=[2**18], grid=[1], factors=[6, 12], form="depth", head_depth=1)
    rows = prior.to_rows(torch.tensor([[5 + (100 << 6)]]))
    assert (rows - prior._starts).tolist() == [[[5, 100]]]


def test_llamagen_b_has_the_published_number_of_parameters():
    with torch.device("meta"):
        prior = GPT([16384], [16, 16], 1000)
    assert round(sum(value.numel() for value in prior.parameters()) / 1e6) == 111


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        prior = make(**FORMS["residual depth"], gradient_checkpointing=checkpointing).train()
        prior.label_dropout = 0
        prior(random_tokens(prior), torch.tensor([0, 1])).mean().backward()
        gradients.append([value.grad for value in prior.parameters()])
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(*gradients, strict=True))


def test_a_rotation_depends_on_the_difference_of_places_only():
    cosines, sines = rotation((12,), 8)
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 8)

    def product(i, j):
        return (rotate(q, (cosines[i], sines[i])) * rotate(k, (cosines[j], sines[j]))).sum()

    assert product(3, 1).item() == pytest.approx(product(9, 7).item(), abs=1e-5)


def test_a_rotation_by_tables_is_that_of_the_vision_transformers():
    cosines, sines = rotation((12,), 8)
    x = torch.randn(2, 3, 13, 8, generator=torch.Generator().manual_seed(0))
    angles = torch.atan2(sines[:, 4:], cosines[:, 4:])
    assert torch.allclose(rotate(x, (cosines, sines)), transformer.rotate(x, angles), atol=1e-5)


def test_dropped_labels_are_learned_as_no_class():
    prior = make(codebook_sizes=[4], grid=[2], label_dropout=0.999).train()
    assert torch.equal(prior.start(torch.tensor([0, 1]), 2), prior.start(torch.tensor([3, 3]), 2))


def test_top_p_keeps_the_token_that_crosses_the_threshold():
    logits = torch.tensor([[math.log(0.5), math.log(0.3), math.log(0.2)]]).repeat(2000, 1)
    drawn = Sampling(top_p=0.6).draw(logits, torch.Generator().manual_seed(0))
    share = drawn.bincount(minlength=3) / 2000
    assert share[2] == 0
    assert share[0].item() == pytest.approx(0.625, abs=0.05)


def test_draws_follow_the_probabilities_and_leave_out_what_has_none():
    logits = torch.randn(40, generator=torch.Generator().manual_seed(0))
    logits[[0, 7, 39]] = -math.inf
    drawn = Sampling(temperature=0.5).draw(logits.repeat(200_000, 1), torch.Generator().manual_seed(1))
    share = drawn.bincount(minlength=40) / len(drawn)
    assert (share[[0, 7, 39]] == 0).all()
    # Four standard deviations of a share of one half.
    assert (share - (logits / 0.5).softmax(0)).abs().max() < 4 * 0.5 / len(drawn) ** 0.5


def test_numbers_that_are_not_finite_are_an_error_and_draw_nothing():
    prior = make(**FORMS["residual depth"])
    prior.blocks[-1].mlp.down.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="load it with dtype=float32"):
        generate(prior, torch.tensor([0]))


def test_many_images_at_once_are_the_same_as_one_by_one(prior):
    labels = torch.arange(8) % 3
    together = generate(prior, labels, Sampling(temperature=0, guidance=2))
    alone = [generate(prior, labels[number : number + 1], Sampling(temperature=0, guidance=2)) for number in range(8)]
    assert torch.equal(together, torch.cat(alone))


def test_every_cache_has_memory_of_its_own_so_that_a_compiled_step_copies_none():
    prior = make(**FORMS["one codebook"])
    decoder = Decoder(prior.blocks, (2, 2, prior.num_steps, 16), torch.randn(2, prior.width))
    places = {tensor.untyped_storage().data_ptr() for cache in decoder.caches for tensor in cache}
    assert len(places) == 2 * len(prior.blocks)


def test_top_k_one_is_greedy():
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Sampling(top_k=1).draw(logits), logits.argmax(-1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "depth", "head_depth": 1}, "write form=flat"),
        ({"head_depth": 1}, "needs head_depth=0"),
        ({"factors": [2, 2]}, "divide tokens of one codebook with 16 codes"),
        ({"num_heads": 3}, "multiple of num_heads"),
        ({"form": "tree"}, "form must be flat or depth"),
        ({"grid": [3, 3, 3]}, "multiple of 6"),
    ],
)
def test_impossible_models_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GPT(**{"codebook_sizes": [8], "grid": [2, 2], **TINY, **options})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": torch.tensor([4])}, "labels are 0 to 2"),
        ({}, "either labels or num_images"),
        ({"num_images": 1, "sampling": Sampling(guidance=2)}, "needs labels"),
    ],
)
def test_impossible_samples_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(make(codebook_sizes=[4], grid=[2]), **arguments)


@pytest.mark.parametrize("options", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"temperature": 0, "top_k": 2}])
def test_impossible_settings_of_sampling_are_refused(options):
    with pytest.raises(ValueError, match="temperature"):
        Sampling(**options)


@pytest.mark.parametrize("options", [{"guidance": math.inf}, {"temperature": math.nan}, {"top_p": math.nan}])
def test_settings_of_sampling_that_are_no_numbers_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Sampling(**options)
