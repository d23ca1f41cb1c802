"""Entropies of codes of independent bits against the dense softmax over all codes."""

import math

import pytest
import torch

from vistok.ops import batch_entropy, binary_entropy, sample_entropy


def dense(logits):
    """Both entropies from the softmax over all sign vectors, in float64: positions times codes."""
    bits = logits.shape[-1]
    codes = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * bits).reshape(-1, bits)
    log_p = (logits @ codes.T / 2).log_softmax(-1)
    p = log_p.exp()
    mean = p.mean(0)
    return -(p * log_p).sum(-1).mean(), -torch.xlogy(mean, mean).sum()


def value_and_gradient(function, logits):
    logits = logits.clone().requires_grad_()
    value = function(logits)
    return value.detach(), torch.autograd.grad(value, logits)[0]


@pytest.mark.parametrize("bits", [1, 4, 7, 12])
@pytest.mark.parametrize("scale", [0.4, 4.0, 40.0])
def test_both_entropies_and_their_gradients_equal_those_of_the_dense_softmax(bits, scale):
    logits = torch.randn(60, bits) * scale
    for function, position in ((sample_entropy, 0), (lambda x: batch_entropy(x, bits), 1)):
        value, gradient = value_and_gradient(function, logits)
        expected, expected_gradient = value_and_gradient(lambda x, i=position: dense(x)[i], logits.double())
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)
        # Where a probability underflows in the dense softmax its derivative is 0 log 0.
        known = expected_gradient.isfinite()
        assert known.float().mean() > 0.9
        torch.testing.assert_close(gradient.double()[known], expected_gradient[known], rtol=1e-4, atol=1e-7)


def test_worked_example_of_two_positions_with_opposite_codes():
    # Each is certain, together they are two of the four codes; bit by bit they look like all four.
    logits = torch.tensor([[100.0, 100.0], [-100.0, -100.0]])
    assert sample_entropy(logits).item() == pytest.approx(0, abs=1e-12)
    assert batch_entropy(logits, 2).item() == pytest.approx(math.log(2), abs=1e-6)
    assert batch_entropy(logits, 1).item() == pytest.approx(2 * math.log(2), abs=1e-6)


def test_groups_are_the_sum_of_their_entropies_and_bounds_of_the_whole():
    logits = torch.randn(30, 8) * 5
    parts = sum(dense(part)[1] for part in logits.double().split(4, dim=-1))
    torch.testing.assert_close(batch_entropy(logits, 4).double(), parts, rtol=1e-6, atol=1e-6)
    full, pairs, single = (batch_entropy(logits, group) for group in (8, 2, 1))
    assert full < batch_entropy(logits, 4) < pairs < single


@pytest.mark.parametrize("bits", [14, 18, 22])
def test_the_uniform_distribution_over_many_codes_has_its_full_entropy(bits):
    # With log(p + 1e-5) or clamp(p, 1e-5) 18 bits give 11.2 or 11.5 nats.
    assert batch_entropy(torch.zeros(3, bits), bits).item() == pytest.approx(bits * math.log(2), abs=1e-4)
    assert sample_entropy(torch.zeros(3, bits)).item() == pytest.approx(bits * math.log(2), abs=1e-5)


def test_chunks_of_rows_change_neither_value_nor_gradient(monkeypatch):
    logits = torch.randn(50, 6) * 3
    whole, gradient = value_and_gradient(lambda x: batch_entropy(x, 3), logits)
    # 12 partial products a row for each of the two groups: 4 rows a chunk, the last of 2.
    monkeypatch.setitem(binary_entropy.CHUNK_ELEMENTS, "cpu", 4 * 12)
    parts, gradient_of_parts = value_and_gradient(lambda x: batch_entropy(x, 3), logits)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(gradient_of_parts, gradient)


@pytest.mark.parametrize("value", [0.0, 1e3, -1e30, torch.inf])
def test_extreme_logits_have_finite_entropies_and_gradients(value):
    for function in (sample_entropy, lambda x: batch_entropy(x, 9)):
        entropy, gradient = value_and_gradient(function, torch.full((4, 9), value))
        assert 0 <= entropy <= 9 * math.log(2) + 1e-5
        assert gradient.isfinite().all()


def test_the_largest_tensor_is_far_smaller_than_positions_times_codes():
    logits = (torch.randn(4096, 18) * 8).requires_grad_()
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        entropy = batch_entropy(logits, 18)
    entropy.backward()
    # 2**18 entries of the mean are needed anyway; 64 MiB of float32 are 2**24 elements.
    assert max(sizes) <= 2**18
    assert sum(sizes) < 2**22


@pytest.mark.parametrize(("bits", "group", "message"), [(6, 4, "divide the 6 bits, got 4"), (24, 24, "at most 22")])
def test_impossible_groups_are_refused(bits, group, message):
    with pytest.raises(ValueError, match=message):
        batch_entropy(torch.zeros(2, bits), group)
