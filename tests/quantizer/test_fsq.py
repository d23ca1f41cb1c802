"""Finite scalar quantization against its papers and the ports in use."""

import itertools
import math
import re

import jaxtyping
import pytest
import torch
import vector_quantize_pytorch as peer

import vistok
from vistok.config import config_of
from vistok.quantizer import FSQ

FORMS = [("tan", "tanh"), ("atanh", "tanh"), ("symmetric", "tanh"), ("symmetric", "clamp")]


def brute_force(value, level, form="tan", bound="tanh", eps=1e-3):
    """(digit, code, distance to the nearest rounding edge) of one value by the published formulas, in Python floats."""
    squash = math.tanh if bound == "tanh" else lambda x: min(max(x, -1.0), 1.0)
    if form == "symmetric":
        # 2411.19842, equation of section 3.2.
        position = (level - 1) * (squash(value) + 1) / 2 + 0.5
        digit = math.floor(position)
        return digit, 2 / (level - 1) * digit - 1, abs(position - round(position))
    # 2309.15505, appendix A.1.
    half = (level - 1) * (1 - eps if form == "tan" else 1 + eps) / 2
    offset = 0.5 if level % 2 == 0 else 0.0
    shift = math.tan(offset / half) if form == "tan" else math.atanh(offset / half)
    bounded = squash(value + shift) * half - offset
    return round(bounded) + level // 2, round(bounded) / (level // 2), abs(bounded + 0.5 - round(bounded + 0.5))


def rows_to_features(rows):
    return rows.T.unsqueeze(0).contiguous()


def features_to_rows(features):
    return features[0].T


@pytest.mark.parametrize(
    ("levels", "size"),
    [
        ((8, 6, 5), 240),
        ((8, 5, 5, 5), 1000),
        ((7, 5, 5, 5, 5), 4375),
        ((8, 8, 8, 6, 5), 15360),
        ((8, 8, 8, 5, 5, 5), 64000),
    ],
)
def test_codebook_sizes_are_those_of_table_1(levels, size):
    quantizer = FSQ(levels)
    assert quantizer.codebook_size == size
    assert quantizer.codebook.shape == (size, len(levels))
    assert len(quantizer.codebook.unique(dim=0)) == size


@pytest.mark.parametrize(("form", "bound"), FORMS)
def test_indices_and_codes_equal_a_brute_force_computation(form, bound):
    levels = (8, 5, 4, 3, 7)
    rows = (torch.randn(1000, len(levels)) * 1.5).double()
    quantized = FSQ(levels, form=form, bound=bound).eval()(rows_to_features(rows.float()))
    expected = [
        [brute_force(value, level, form, bound) for value, level in zip(row, levels, strict=True)]
        for row in rows.tolist()
    ]
    # No value lies so near to an edge that float32 could decide otherwise.
    assert min(edge for row in expected for _, _, edge in row) > 1e-6
    # Channel 0 is the fastest digit: index = d0 + 8 d1 + 40 d2 + 160 d3 + 480 d4.
    indices = [sum(d * b for (d, _, _), b in zip(row, (1, 8, 40, 160, 480), strict=True)) for row in expected]
    assert quantized.indices[0].tolist() == indices
    codes = torch.tensor([[code for _, code, _ in row] for row in expected])
    torch.testing.assert_close(features_to_rows(quantized.codes), codes, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("form", "bound", "expected"), [("tan", "tanh", 37), ("symmetric", "tanh", 37)])
def test_a_worked_example(form, bound, expected):
    # Levels 3, 5, 4 with digits (1, 2, 2): index 1 + 2 * 3 + 2 * 15.
    quantizer = FSQ((3, 5, 4), form=form, bound=bound).eval()
    quantized = quantizer(torch.tensor([0.2, -0.1, 0.1]).view(1, 3, 1))
    assert quantized.indices.item() == expected
    # Even levels: -2, -1, 0, 1 over 2, or -1, -1/3, 1/3, 1.
    assert quantized.codes.flatten().tolist() == pytest.approx([0, 0, 0 if form == "tan" else 1 / 3])
    # Digits (2, 3, 0): index 2 + 3 * 3; codes (2 - 1) / 1, (3 - 2) / 2, -1.
    codes = quantizer.indices_to_codes(torch.tensor([[11]]))
    assert codes.flatten().tolist() == [1.0, 0.5, -1.0]


def test_zero_is_a_level_unless_symmetric_levels_are_even():
    zeros = torch.zeros(1, 3, 1)
    for form in ("tan", "atanh"):
        quantized = FSQ((8, 5, 4), form=form).eval()(zeros)
        assert quantized.codes.flatten().tolist() == [0.0, 0.0, 0.0]
        assert quantized.indices.item() == 4 + 8 * 2 + 40 * 2
    # Half-way goes up, as in the paper's floor(x + 1/2).
    quantized = FSQ((8, 5, 2), form="symmetric").eval()(zeros)
    assert quantized.codes.flatten().tolist() == pytest.approx([1 / 7, 0, 1])


@pytest.mark.parametrize("bound", ["tanh", "clamp"])
def test_symmetric_levels_are_evenly_spaced_and_hold_both_ends(bound):
    for level in range(2, 40):
        codebook = FSQ((level,), form="symmetric", bound=bound).codebook.flatten()
        torch.testing.assert_close(codebook, torch.linspace(-1, 1, level))
        assert torch.equal(codebook, -codebook.flip(0))


@pytest.mark.parametrize("level", [2, 3, 4, 5, 8, 9])
def test_symmetric_quantization_is_odd(level):
    quantizer = FSQ((level,), form="symmetric").eval()
    features = torch.randn(1, 1, 2000) * 2
    torch.testing.assert_close(quantizer(-features).codes, -quantizer(features).codes, rtol=0, atol=0)


def test_two_symmetric_levels_are_the_sign():
    quantizer = FSQ((2, 2, 2), form="symmetric").eval()
    features = torch.randn(2, 3, 50)
    quantized = quantizer(features)
    assert torch.equal(quantized.codes, features.sign())
    bits = (features > 0).long()
    assert torch.equal(quantized.indices, bits[:, 0] + 2 * bits[:, 1] + 4 * bits[:, 2])


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (8, 8, 8, 6, 5), (3,) * 8, (4, 6, 9)])
@pytest.mark.parametrize(
    ("arguments", "peer_arguments"),
    [
        ({"form": "atanh"}, {}),
        ({"form": "symmetric"}, {"preserve_symmetry": True}),
        ({"form": "symmetric", "bound": "clamp"}, {"preserve_symmetry": True, "bound_hard_clamp": True}),
    ],
)
def test_indices_and_codes_equal_vector_quantize_pytorch(levels, arguments, peer_arguments):
    ours = FSQ(levels, **arguments).eval()
    theirs = peer.FSQ(list(levels), **peer_arguments).eval()
    features = torch.randn(1, len(levels), 100, 100)
    codes, indices = theirs(features)
    quantized = ours(features)
    assert torch.equal(quantized.indices, indices.long())
    torch.testing.assert_close(quantized.codes, codes, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.codebook, theirs.implicit_codebook, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("levels", "low", "high"), [((3,) * 8, 0.003, 0.005), ((8, 8, 8, 5, 5, 5), 0.011, 0.016)], ids=str
)
def test_the_two_published_forms_differ_for_one_vector_in_a_hundred(levels, low, high):
    features = torch.randn(1, len(levels), 200_000) * 2
    differ = FSQ(levels, form="tan").eval()(features).indices != FSQ(levels, form="atanh").eval()(features).indices
    assert low < differ.double().mean() < high


@pytest.mark.parametrize(("form", "bound"), FORMS)
def test_the_gradient_is_that_of_the_squashing_function(form, bound):
    levels, eps = (5, 8), 1e-3
    quantizer = FSQ(levels, form=form, bound=bound).train()
    features = torch.randn(1, 2, 200, requires_grad=True)
    codes = quantizer(features).codes
    torch.testing.assert_close(codes, quantizer.eval()(features).codes)
    codes.sum().backward()
    for channel, level in enumerate(levels):
        values = features.detach()[0, channel].double()
        if form == "symmetric":
            inside = (values.abs() <= 1).double()
            expected = 1 - values.tanh() ** 2 if bound == "tanh" else inside
        else:
            half = (level - 1) / 2 * (1 - eps if form == "tan" else 1 + eps)
            offset = 0 if level % 2 else 0.5
            shift = math.tan(offset / half) if form == "tan" else math.atanh(offset / half)
            expected = (1 - torch.tanh(values + shift) ** 2) * half / (level // 2)
        torch.testing.assert_close(features.grad[0, channel], expected.float())


def test_there_is_nothing_to_train_and_nothing_to_save():
    for form, bound in FORMS:
        quantizer = FSQ((4, 5), form=form, bound=bound)
        assert not list(quantizer.parameters())
        assert not quantizer.state_dict()


@pytest.mark.parametrize(("form", "bound"), FORMS)
def test_a_cast_of_the_module_does_not_change_the_indices(form, bound):
    # With a stored float constant, bfloat16 would round the margin (3.4965 to 3.5) and move the edges.
    features = torch.randn(1, 4, 20_000)
    quantizer = FSQ((8, 9, 5, 4), form=form, bound=bound).eval()
    before = quantizer(features)
    after = quantizer.to(torch.bfloat16)(features)
    assert torch.equal(before.indices, after.indices)
    assert torch.equal(before.codes, after.codes)


@pytest.mark.parametrize(("form", "bound"), FORMS)
@pytest.mark.parametrize("level", [3, 4, 8, 255, 65536])
def test_every_digit_survives_a_round_trip(form, bound, level):
    quantizer = FSQ((level, 3), form=form, bound=bound, eps=None if form == "symmetric" else 0.0)
    indices = torch.arange(quantizer.codebook_size).unsqueeze(0)
    assert torch.equal(quantizer.codes_to_indices(quantizer.indices_to_codes(indices)), indices)


@pytest.mark.parametrize(("form", "bound"), FORMS)
def test_extreme_features_get_the_outermost_digits(form, bound):
    levels = (3, 4, 5, 8, 17, 1000)
    for eps in (None,) if form == "symmetric" else (0.0, 1e-3):
        quantizer = FSQ(levels, form=form, bound=bound, eps=eps).eval()
        features = torch.tensor([-1e30, -50.0, 50.0, 1e30]).expand(1, len(levels), 4)
        assert quantizer(features).indices[0].tolist() == [
            0,
            0,
            quantizer.codebook_size - 1,
            quantizer.codebook_size - 1,
        ]


def steps_of(quantizer):
    return 2 / (torch.tensor(quantizer.levels) - 1).view(1, -1, 1)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_noise_replaces_the_rounding_of_the_given_share_of_elements(probability):
    quantizer = FSQ((5, 8), form="symmetric", noise_dropout=probability).train()
    # Far from the ends nothing is clamped.
    features = torch.randn(1, 2, 40_000) * 0.3
    quantized = quantizer(features)
    codes = quantizer.indices_to_codes(quantized.indices)
    noisy = (quantized.codes - codes).abs() > 1e-6
    assert noisy.double().mean() == pytest.approx(probability, abs=0.01)
    # Around the squashed feature, not around its code: uniform over one spacing, mean 0, standard deviation 1/sqrt(12).
    noise = (quantized.codes - features.tanh()) / steps_of(quantizer)
    for channel in range(2):
        samples = noise[0, channel][noisy[0, channel]]
        assert samples.abs().max() <= 0.5 + 1e-5
        assert samples.abs().max() > 0.49
        assert samples.mean().abs() < 0.02
        assert samples.std() == pytest.approx(12**-0.5, rel=0.03)


def test_the_noise_of_vector_quantize_pytorch_ignores_its_probability_and_the_spacing():
    theirs = peer.FSQ([8, 8], preserve_symmetry=True, noise_dropout=0.1).train()
    features = torch.randn(1, 20_000, 2) * 0.1
    codes, indices = theirs(features)
    moved = (codes - theirs.indices_to_codes(indices)).abs()
    assert (moved > 1e-6).double().mean() == pytest.approx(0.5, abs=0.02)
    # Half a spacing of eight levels is 1/7.
    assert moved.max() > 0.45


def test_noise_leaves_indices_evaluation_and_gradients_alone():
    noisy = FSQ((5, 8), form="symmetric", noise_dropout=0.5)
    plain = FSQ((5, 8), form="symmetric")
    features = torch.randn(2, 2, 500) * 2
    assert torch.equal(noisy.train()(features).indices, plain.train()(features).indices)
    assert torch.equal(noisy.eval()(features).codes, plain.eval()(features).codes)
    gradients = []
    for quantizer in (noisy, plain):
        leaf = features.clone().requires_grad_()
        codes = quantizer.train()(leaf).codes
        assert codes.abs().max() <= 1 + 1e-6
        codes.sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize(("form", "bound"), FORMS)
@pytest.mark.parametrize("level", [3, 4, 5, 8])
def test_stage_factors_are_the_largest_residual_within_the_stage_limits(form, bound, level):
    quantizer = FSQ((level,), form=form, bound=bound).eval()
    (limit,), (factor,) = quantizer.stage_limits, quantizer.stage_factors
    features = torch.linspace(-limit, limit, 200_001).view(1, 1, -1)
    largest = (features - quantizer(features).codes).abs().max().item()
    assert largest == pytest.approx(factor * limit, abs=1e-4)
    assert factor < 1


@pytest.mark.parametrize("level", range(2, 12))
def test_clamped_symmetric_levels_are_self_similar(level):
    # The residual of a range that reaches half a spacing beyond the ends is that range divided by L.
    quantizer = FSQ((level,), form="symmetric", bound="clamp")
    assert quantizer.stage_limits[0] == pytest.approx(1 + 1 / (level - 1), rel=1e-12)
    assert quantizer.stage_factors[0] == pytest.approx(1 / level, rel=1e-12)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("form", "bound"), [("tan", "tanh"), ("symmetric", "clamp")])
def test_it_compiles_into_one_graph(form, bound, training, monkeypatch):
    # The shape checks of the test run cannot be traced.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    torch.compiler.reset()
    quantizer = FSQ((8, 5, 4), form=form, bound=bound, noise_dropout=0.5 if form == "symmetric" else 0.0)
    quantizer.train(training)
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    features = torch.randn(2, 3, 4, 5)
    expected, got = quantizer(features), compiled(features)
    assert torch.equal(got.indices, expected.indices)
    if not quantizer.noise_dropout or not training:
        torch.testing.assert_close(got.codes, expected.codes)


@pytest.mark.parametrize("levels", [[], [1, 5], [2, 5], [True, 5], 8, "abc", "88"])
@pytest.mark.usefixtures("without_type_checks")
def test_impossible_levels_are_an_error(levels):
    message = f"levels must be a list of integers of at least 3, such as [8,5,5,5]; got {levels!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        FSQ(levels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"levels": [1], "form": "symmetric"}, "of at least 2, .* got \\[1\\]"),
        ({"levels": [65537, 3]}, "at most 65536 levels of a channel, got 65537"),
        ({"form": "round"}, "form must be one of tan, atanh, symmetric; got 'round'"),
        ({"bound": "sigmoid"}, "bound must be one of tanh, clamp; got 'sigmoid'"),
        ({"bound": "clamp"}, "bound=clamp needs form=symmetric, got form=tan"),
        ({"noise_dropout": 0.5, "form": "atanh"}, "noise_dropout needs form=symmetric, got form=atanh"),
        ({"noise_dropout": 1.5, "form": "symmetric"}, "noise_dropout is a probability, got 1.5"),
        ({"eps": 1e-3, "form": "symmetric"}, "leave eps out or write eps=null, got 0.001"),
        ({"eps": 0.25}, "eps must lie in \\[0, 0.25\\) with 5 levels, got 0.25"),
        ({"levels": [1001, 3]}, "eps must lie in \\[0, 0.001\\) with 1001 levels, got 0.001"),
    ],
)
def test_arguments_that_are_out_of_range_or_without_effect_are_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        FSQ(**{"levels": [5, 5], **arguments})


def test_more_than_62_bits_are_an_error():
    with pytest.raises(ValueError, match=r"need 63.0 bits, an index has at most 62: split them over several FSQ"):
        FSQ([8] * 21)


@pytest.mark.parametrize("levels", [[8] * 20, [4] * 31])
def test_indices_of_up_to_62_bits_are_exact(levels):
    quantizer = FSQ(levels)
    indices = torch.randint(2 ** int(quantizer.bits), (1, 1000))
    indices[0, 0] = quantizer.codebook_size - 1
    assert torch.equal(quantizer.codes_to_indices(quantizer.indices_to_codes(indices)), indices)
    assert quantizer.codebook is None


def test_all_settings_survive_their_config():
    for (form, bound), levels in itertools.product(FORMS, [[8, 5], [3, 4, 5]]):
        quantizer = FSQ(levels, form=form, bound=bound)
        features = torch.randn(1, len(levels), 100)
        rebuilt = vistok.build(config_of(quantizer))
        assert torch.equal(rebuilt.eval()(features).indices, quantizer.eval()(features).indices)
