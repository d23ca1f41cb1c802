"""Real bits: the closed form equals the sum over the tokens, and the coder reaches it and decodes back."""

import math

import pytest
import torch

from vistok.metric import CodebookUsage, adaptive_code_length, compress, decompress


def skewed(size, length):
    return (size * torch.rand(length) ** 3).long().clamp(max=size - 1)


def token_by_token(symbols, size):
    counts, bits = {}, 0.0
    for position, symbol in enumerate(symbols.tolist()):
        bits -= math.log2((counts.get(symbol, 0) + 0.5) / (position + size / 2))
        counts[symbol] = counts.get(symbol, 0) + 1
    return bits


@pytest.mark.parametrize("size", [1, 2, 16, 1000, 2**18, 2**24, 2**40])
def test_the_closed_form_is_the_sum_over_the_tokens(size):
    symbols = skewed(size, 500)
    counts = symbols.unique(return_counts=True)[1]
    assert adaptive_code_length(counts, size) == pytest.approx(token_by_token(symbols, size), rel=1e-6, abs=1e-6)


def test_unused_codes_may_be_listed_or_not():
    assert adaptive_code_length(torch.tensor([3, 0, 5, 0]), 4) == adaptive_code_length(torch.tensor([3, 5]), 4)


def test_no_tokens_cost_nothing():
    assert adaptive_code_length(torch.zeros(8, dtype=torch.int64), 8) == 0


def test_many_tokens_cost_their_entropy():
    counts = torch.tensor([600_000, 300_000, 100_000])
    share = counts / counts.sum()
    entropy = -(share * share.log2()).sum().item()
    assert adaptive_code_length(counts, 3) / 1e6 == pytest.approx(entropy, abs=1e-4)


@pytest.mark.parametrize("size", [1, 2, 5, 256, 1000, 2**14, 2**40])
def test_what_is_compressed_is_decoded_back(size):
    symbols = skewed(size, 700).tolist()
    assert decompress(compress(symbols, size), len(symbols), size) == symbols


@pytest.mark.parametrize("symbols", [[], [0], [7], [7] * 50, list(range(8))])
def test_edge_cases_are_decoded_back(symbols):
    assert decompress(compress(symbols, 8), len(symbols), 8) == symbols


@pytest.mark.parametrize("size", [2, 256, 2**14])
def test_the_coder_reaches_the_ideal_length(size):
    symbols = skewed(size, 2000)
    ideal = adaptive_code_length(symbols.unique(return_counts=True)[1], size)
    spent = 8 * len(compress(symbols.tolist(), size))
    assert ideal <= spent <= ideal + 2 + 8


@pytest.mark.parametrize("symbol", [-1, 8])
def test_a_symbol_outside_the_codebook_is_refused(symbol):
    with pytest.raises(ValueError, match="indices 0 to 7"):
        compress([0, symbol], 8)


def test_usage_adds_up_codebooks_and_scales():
    usage = CodebookUsage((4, 8), scale_lengths=(1, 3))
    indices = torch.stack([torch.randint(4, (5, 4)), torch.randint(8, (5, 4))], -1)
    usage.update(indices)
    parts = [(indices[:, :1], 0, 4), (indices[:, 1:], 0, 4), (indices[:, :1], 1, 8), (indices[:, 1:], 1, 8)]
    expected = sum(token_by_token(part[..., codebook].flatten(), size) for part, codebook, size in parts)
    assert usage.coded_bits() == pytest.approx(expected)


def test_usage_of_a_huge_codebook_has_a_coded_size():
    usage, symbols = CodebookUsage((2**40,)), skewed(2**40, 200)
    usage.update(symbols.view(2, 100))
    assert usage.coded_bits() == pytest.approx(token_by_token(symbols, 2**40), rel=1e-6)
