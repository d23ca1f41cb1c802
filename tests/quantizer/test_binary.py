"""What LFQ and BSQ share: indices, their parts and their order, and the checks of the arguments."""

import math

import jaxtyping
import pytest
import torch

from vistok.ops import binary_entropy
from vistok.quantizer import BSQ, LFQ

KINDS = [LFQ, BSQ]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def test_worked_example_of_both_bit_orders(kind):
    features = torch.tensor([0.3, -2.0, 0.1, -0.2]).view(1, 4, 1)
    assert kind(4, bit_order="lsb_first").eval()(features).indices.item() == 0b0101
    assert kind(4, bit_order="msb_first").eval()(features).indices.item() == 0b1010


def test_index_j_holds_the_channels_from_j_times_index_bits(kind):
    features = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0, 1.0]).view(1, 6, 1)
    quantizer = kind(6, index_bits=3, bit_order="msb_first").eval()
    assert quantizer.codebook_sizes == (8, 8)
    assert quantizer(features).indices.tolist() == [[[0b101, 0b001]]]
    assert kind(6, index_bits=3, bit_order="lsb_first").eval()(features).indices.tolist() == [[[0b101, 0b100]]]


def test_one_bit_per_index_gives_the_bits(kind):
    features = torch.randn(2, 5, 3, 4)
    indices = kind(5, index_bits=1).eval()(features).indices
    assert torch.equal(indices, (features > 0).long().movedim(1, -1))


@pytest.mark.parametrize(("bits", "index_bits"), [(28, None), (36, None), (62, None), (64, 32), (128, 2), (63, 9)])
def test_wide_codes_survive_the_round_trip_exactly(kind, bits, index_bits):
    quantizer = kind(bits, index_bits=index_bits, batch_entropy="bit").eval()
    quantized = quantizer(torch.randn(4, bits, 30))
    assert quantizer.bits == bits
    assert quantizer.codebook is None
    assert quantized.indices.shape == (4, *quantizer.indices_shape((30,)))
    assert torch.equal(quantizer.indices_to_codes(quantized.indices), quantized.codes)
    assert torch.equal(quantizer.codes_to_indices(quantized.codes), quantized.indices)


def test_zero_is_negative_and_signs_survive_any_magnitude(kind):
    features = torch.tensor([0.0, 1e30, -1e30, 1e-38]).view(1, 4, 1)
    assert kind(4, index_bits=1).eval()(features).indices.flatten().tolist() == [0, 1, 0, 1]


def test_there_is_no_table_above_20_bits_or_with_several_codebooks(kind):
    assert kind(10).codebook.shape == (1024, 10)
    assert kind(21).codebook is None
    assert kind(10, index_bits=5).codebook is None


def test_codes_of_training_are_exact_even_for_huge_features(kind):
    features = torch.randn(3, 6, 50) * 1e6
    quantizer = kind(6).train()
    quantized = quantizer(features)
    assert torch.equal(quantized.codes, quantizer.indices_to_codes(quantized.indices))


def test_a_loss_of_weight_zero_is_left_out(kind):
    features = torch.randn(2, 6, 5)
    for arguments, names in (
        ({}, ["sample_entropy", "batch_entropy", "commitment"]),
        ({"entropy_weight": 0.0}, ["commitment"]),
        ({"gamma": 0.0}, ["sample_entropy", "commitment"]),
        ({"commitment_weight": 0.0}, ["sample_entropy", "batch_entropy"]),
    ):
        quantizer = kind(6, **{"commitment_weight": 0.25, **arguments})
        assert list(quantizer.loss_weights) == names
        assert list(quantizer(features).losses) == names
        assert quantizer.eval()(features).losses.keys() == set(names)


@pytest.mark.parametrize(("mode", "group", "size"), [("full", None, 12), ("group", None, 6), ("group", 4, 4)])
def test_the_groups_of_the_batch_entropy(kind, mode, group, size):
    # Two codes that differ everywhere: every group of channels sees two values.
    features = torch.stack([torch.full((12,), 100.0), torch.full((12,), -100.0)]).unsqueeze(-1)
    sharp = {"temperature": 0.01} if kind is LFQ else {"inv_temperature": 1e4}
    quantizer = kind(12, batch_entropy=mode, entropy_group=group, **sharp)
    assert quantizer(features).losses["batch_entropy"].item() == pytest.approx(12 / size * math.log(2), abs=1e-5)


def test_entropy_in_chunks_is_part_of_one_compiled_graph(monkeypatch):
    # The shape checks of the test run cannot be traced.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    monkeypatch.setitem(binary_entropy.CHUNK_ELEMENTS, "cpu", 64)
    torch.compiler.reset()
    quantizer = LFQ(6, index_bits=3).train()
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    features = torch.randn(1, 6, 7).requires_grad_()
    gradients = []
    for quantized in (expected := quantizer(features), actual := compiled(features)):
        total = torch.stack([quantized.codes.sum(), *quantized.losses.values()]).sum()
        gradients.append(torch.autograd.grad(total, features)[0])
    assert torch.equal(actual.indices, expected.indices)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 0}, "bits must be an integer"),
        ({"bits": 12, "index_bits": 5}, "divide the 12 bits.*got 5: write one of 1, 2, 3, 4, 6, 12"),
        ({"bits": 66, "batch_entropy": "bit"}, "at most 62, got None: write one of 1, 2, 3, 6, 11, 22, 33$"),
        ({"bits": 8, "bit_order": "big_endian"}, "bit_order must be one of lsb_first, msb_first; got 'big_endian'"),
        ({"bits": 8, "batch_entropy": "exact"}, "batch_entropy must be one of full, group, bit; got 'exact'"),
        ({"bits": 8, "batch_entropy": "bit", "entropy_group": 4}, "entropy_group=4 has no effect"),
        ({"bits": 8, "batch_entropy": "group", "entropy_group": 3}, "entropy_group one of 1, 2, 4, 8"),
        ({"bits": 24, "batch_entropy": "full"}, "batch_entropy=bit, or batch_entropy=group with entropy_group one of"),
        ({"bits": 8, "entropy_weight": -0.1}, "entropy_weight must be a number of at least 0, got -0.1"),
    ],
)
def test_wrong_arguments_are_named_with_what_to_write(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


def test_the_commitment_loss_pulls_the_features_to_their_codes(kind):
    quantizer = kind(bits=6, entropy_weight=0, commitment_weight=1.0).train()
    features = torch.randn(2, 6, 5, requires_grad=True)
    quantized = quantizer(features)
    quantized.losses["commitment"].backward()
    points = features.detach().double().requires_grad_()
    codes = quantizer.indices_to_codes(quantized.indices).double()
    (
        quantizer.points(points.movedim(1, -1).flatten(0, 1)) - codes.movedim(1, -1).flatten(0, 1)
    ).square().mean().backward()
    assert features.grad.abs().min() > 0
    torch.testing.assert_close(features.grad.double(), points.grad, rtol=1e-4, atol=1e-6)


def test_zero_is_negative_as_a_code_too(kind):
    quantizer = kind(bits=4).eval()
    zeros = torch.zeros(1, 4, 2)
    assert torch.equal(quantizer.codes_to_indices(zeros), quantizer(zeros).indices)
