"""Soft assignments against the dense formulas, differentiated by autograd in double precision."""

import pytest
import torch
import torch.nn.functional as F

from vistok.ops import nearest_code, soft, soft_assignment, soft_codes, soft_one_hot

METRICS = ("euclidean", "dot")
ROWS, CODES, DIM, WIDTH = 37, 150, 5, 4


@pytest.fixture(autouse=True, params=["one tile", "many tiles"])
def tiles(request, monkeypatch):
    if request.param == "many tiles":
        monkeypatch.setattr("vistok.ops.soft.tile_shape", lambda *_: (16, 40))


def inputs(*shapes):
    return [torch.randn(*shape, requires_grad=True) for shape in shapes]


def in_double(*tensors):
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def dense_scores(rows, keys, metric):
    return rows @ keys.T if metric == "dot" else -(rows[:, None] - keys).square().sum(-1)


def dense_assignment(scores, temperature):
    log_p = F.log_softmax(scores / temperature, -1)
    return -(log_p.exp() * log_p).sum(-1).mean(), log_p.exp().mean(0)


def dense_codes(scores, values, temperature):
    assignment = F.softmax(scores / temperature, -1)
    indices = scores.argmax(-1)
    one_hot = F.one_hot(indices, len(values)) - assignment.detach() + assignment
    # The values see the hard part alone, everything else the soft one.
    return F.one_hot(indices, len(values)).to(assignment) @ values + (
        one_hot - one_hot.detach()
    ) @ values.detach(), indices


def assert_gradients_equal(tensors, doubles, rtol=1e-4):
    for tensor, double in zip(tensors, doubles, strict=True):
        torch.testing.assert_close(
            tensor.grad.double(), double.grad, rtol=rtol, atol=rtol * double.grad.abs().max().item()
        )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("parts", ["both", "sample", "mean"])
def test_assignments_and_their_gradients_equal_the_dense_formulas(metric, temperature, parts):
    ours = inputs((ROWS, DIM), (CODES, DIM))
    dense = in_double(*ours)
    weights = torch.randn(CODES)
    entropy, probability = soft_assignment(*ours, temperature, metric)
    exact_entropy, exact_probability = dense_assignment(dense_scores(*dense, metric), temperature)
    torch.testing.assert_close(entropy.double(), exact_entropy, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(probability.double(), exact_probability, rtol=1e-4, atol=1e-6)
    ((entropy if parts != "mean" else 0) + ((probability * weights).sum() if parts != "sample" else 0)).backward()
    exact = exact_entropy if parts != "mean" else 0
    (exact + ((exact_probability * weights).sum() if parts != "sample" else 0)).backward()
    assert_gradients_equal(ours, dense, 1e-3)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("with_bias", [False, True])
def test_one_hot_codes_and_their_gradients_equal_the_dense_formulas(metric, temperature, with_bias):
    ours = inputs((ROWS, DIM), (CODES, DIM), (CODES, WIDTH), *([(CODES,)] if with_bias else []))
    dense = in_double(*ours)
    weights = torch.randn(ROWS, WIDTH)
    codes, indices = soft_one_hot(*ours[:3], temperature, metric, bias=ours[3] if with_bias else None)
    scores = dense_scores(*dense[:2], metric) + (dense[3] if with_bias else 0)
    exact_codes, exact_indices = dense_codes(scores, dense[2], temperature)
    assert torch.equal(indices, exact_indices)
    assert torch.equal(codes, ours[2][indices])
    (codes * weights).sum().backward()
    (exact_codes * weights.double()).sum().backward()
    assert_gradients_equal(ours, dense)


@pytest.mark.parametrize("metric", METRICS)
def test_both_heads_at_once_equal_each_on_its_own(metric):
    rows, codebook = inputs((ROWS, DIM), (CODES, DIM))
    weights, mean_weights = torch.randn(ROWS, DIM), torch.randn(CODES)

    def loss(codes, entropy, probability):
        return (codes * weights).sum() + 0.7 * entropy + (probability * mean_weights).sum()

    fused = soft_codes(rows, codebook, codebook, 0.8, 0.05, metric)
    fused_gradients = torch.autograd.grad(loss(fused.codes, *fused[2:]), (rows, codebook))
    codes, indices = soft_one_hot(rows, codebook, codebook, 0.8, metric)
    entropy, probability = soft_assignment(rows, codebook, 0.05, metric)
    assert torch.equal(fused.indices, indices)
    assert torch.equal(fused.codes, codes)
    torch.testing.assert_close(fused.sample_entropy, entropy)
    torch.testing.assert_close(fused.mean_probability, probability)
    for ours, apart in zip(
        fused_gradients, torch.autograd.grad(loss(codes, entropy, probability), (rows, codebook)), strict=True
    ):
        torch.testing.assert_close(ours, apart, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_indices_are_those_of_the_search_for_the_nearest_code(metric):
    rows, codebook = torch.randn(100, DIM), torch.randn(CODES, DIM)
    indices = soft_one_hot(rows, codebook, codebook, metric=metric)[1]
    assert torch.equal(indices, nearest_code(rows, codebook, metric))
    assert torch.equal(indices[:1], soft_one_hot(rows[:1], codebook, codebook, metric=metric)[1])


def test_noise_is_that_of_gumbel_and_the_same_for_the_same_seed():
    # With equal scores for all rows the share of each code is its probability.
    logits = torch.tensor([0.0, 1.0, 2.0])
    rows, values = torch.zeros(4000, 1), torch.eye(3)

    def indices(seed):
        return soft_one_hot(rows, torch.zeros(3, 1), values, bias=logits, noise_seed=torch.tensor(seed))[1]

    assert torch.equal(indices(1), indices(1))
    assert not torch.equal(indices(1), indices(2))
    share = torch.bincount(indices(1), minlength=3) / len(rows)
    torch.testing.assert_close(share, logits.softmax(-1), rtol=0, atol=0.03)


def test_codes_and_gradients_with_noise_equal_the_dense_formulas_with_the_same_noise(monkeypatch):
    drawn = []
    draw = soft._add_gumbel_

    def record(scores, generator, buffer):
        before = scores.clone()
        noisy = draw(scores, generator, buffer)
        drawn.append((noisy - before).double())
        return noisy

    monkeypatch.setattr(soft, "_add_gumbel_", record)
    ours = inputs((ROWS, DIM), (CODES, DIM), (CODES, WIDTH))
    dense = in_double(*ours)
    weights = torch.randn(ROWS, WIDTH)
    codes, indices = soft_one_hot(*ours, 0.5, noise_seed=torch.tensor(5))
    tiles = list(drawn)
    drawn.clear()
    (codes * weights).sum().backward()
    for again, first in zip(drawn, tiles, strict=True):
        torch.testing.assert_close(again, first, rtol=0, atol=1e-5)
    across = -(-CODES // len(tiles[0]))
    columns = [torch.cat(tiles[start : start + across]) for start in range(0, len(tiles), across)]
    noise = torch.cat(columns, 1).T[:ROWS]
    exact_codes, exact_indices = dense_codes(dense_scores(*dense[:2], "dot") + noise, dense[2], 0.5)
    assert torch.equal(indices, exact_indices)
    assert torch.equal(codes, ours[2][indices])
    (exact_codes * weights.double()).sum().backward()
    assert_gradients_equal(ours, dense)


def test_the_mean_probability_sums_to_one_far_from_all_codes():
    entropy, probability = soft_assignment(1e3 * torch.randn(ROWS, DIM), torch.randn(CODES, DIM), 0.01)
    torch.testing.assert_close(probability.sum(), torch.tensor(1.0))
    assert entropy > -1e-5


def test_autocast_changes_nothing():
    rows, codebook = inputs((ROWS, DIM), (CODES, DIM))
    expected = torch.autograd.grad(soft_assignment(rows, codebook, 0.1)[0], (rows, codebook))
    with torch.autocast("cpu", torch.bfloat16):
        gradients = torch.autograd.grad(soft_assignment(rows, codebook, 0.1)[0], (rows, codebook))
    assert all(torch.equal(ours, other) for ours, other in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    rows, codebook = torch.randn(4, 2), torch.randn(5, 2)
    with pytest.raises(ValueError, match="temperature must be positive"):
        soft_assignment(rows, codebook, temperature)
    with pytest.raises(ValueError, match="temperature must be positive"):
        soft_one_hot(rows, codebook, codebook, temperature)
