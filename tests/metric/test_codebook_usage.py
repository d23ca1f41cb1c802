"""Codebook usage: exact counts, whatever the batches and ranks."""

import math

import numpy as np
import pytest
import torch

import vistok.metric.codebook_usage as module
from vistok.metric import CodebookUsage
from vistok.quantizer import FSQ, LFQ, Identity
from vistok.quantizer.residual import ResidualQuantizer


def measured(sizes, *batches, **arguments):
    usage = CodebookUsage(sizes, **arguments)
    for batch in batches:
        usage.update(batch)
    return usage.compute()


def test_values_equal_a_computation_in_numpy():
    indices = torch.randint(0, 40, (3, 5, 7))
    counts = np.bincount(indices.numpy().ravel(), minlength=64)
    share = counts[counts > 0] / counts.sum()
    nats = -(share * np.log(share)).sum()
    values = measured((64,), indices)
    assert values["utilisation"].item() == np.count_nonzero(counts) / 64
    assert values["perplexity"].item() == pytest.approx(math.exp(nats), rel=1e-12)
    assert values["entropy_bits"].item() == pytest.approx(nats / math.log(2), rel=1e-12)
    assert values["dead_codes"].item() == 64 - np.count_nonzero(counts)
    assert values["distinct_codes"].item() == np.count_nonzero(counts)
    assert values["tokens"].item() == 105


def test_every_code_used_alike_has_a_perplexity_of_the_codebook_size():
    values = measured((32,), torch.arange(32).repeat(3))
    assert values["perplexity"].item() == pytest.approx(32, rel=1e-12)
    assert values["utilisation"].item() == 1


def test_one_code_has_no_entropy():
    values = measured((32,), torch.zeros(9, dtype=torch.int64))
    assert values["entropy_bits"].item() == 0
    assert values["perplexity"].item() == 1


def test_the_result_does_not_depend_on_the_batches():
    indices = torch.randint(0, 16, (8, 4))
    whole, parts = measured((16,), indices), measured((16,), *indices)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_each_codebook_is_counted_by_its_own_column():
    indices = torch.stack([torch.zeros(4, dtype=torch.int64), torch.arange(4)], -1)
    values = measured((4, 8), indices)
    assert values["utilisation_per_codebook"].tolist() == [1 / 4, 4 / 8]
    assert values["perplexity_per_codebook"].tolist() == pytest.approx([1, 4])


def test_overall_values_join_the_codebooks():
    indices = torch.stack([torch.zeros(4, dtype=torch.int64), torch.arange(4)], -1)
    values = measured((4, 8), indices)
    assert values["utilisation"].item() == 5 / 12
    assert values["dead_codes"].item() == 7
    assert values["tokens"].item() == 8
    assert values["entropy_bits"].item() == pytest.approx(1)
    assert values["perplexity"].item() == pytest.approx(2)


def test_a_shorter_last_axis_leaves_the_last_codebooks_out():
    values = measured((4, 4, 4), torch.zeros(5, 2, dtype=torch.int64))
    assert values["tokens_per_codebook"].tolist() == [5, 5, 0]


def test_a_longer_last_axis_is_refused():
    with pytest.raises(ValueError, match="3 values on the last axis, but there are 2 codebooks"):
        CodebookUsage((4, 4)).update(torch.zeros(5, 3, dtype=torch.int64))


@pytest.mark.parametrize("wrong", [-1, 16])
def test_an_index_outside_the_codebook_is_named(wrong):
    with pytest.raises(ValueError, match=f"index {wrong} is outside codebook 0, which has the indices 0 to 15"):
        CodebookUsage((16,)).update(torch.tensor([0, wrong]))


def test_continuous_tokenizers_are_refused():
    with pytest.raises(ValueError, match="continuous tokenizers have no codes"):
        CodebookUsage(())


def test_expected_utilisation_is_what_uniform_draws_use():
    draws = [measured((50,), torch.randint(0, 50, (60,))) for _ in range(300)]
    mean = sum(values["utilisation"].item() for values in draws) / len(draws)
    assert draws[0]["expected_uniform_utilisation"].item() == pytest.approx(1 - (1 - 1 / 50) ** 60, rel=1e-12)
    assert mean == pytest.approx(draws[0]["expected_uniform_utilisation"].item(), abs=0.01)


def test_a_codebook_of_one_code_is_expected_to_be_used():
    assert measured((1,), torch.zeros(3, dtype=torch.int64))["expected_uniform_utilisation"].item() == 1


def test_codebooks_too_large_for_counters_give_the_same_values(monkeypatch):
    indices = torch.randint(0, 100, (4, 30))
    counted = measured((128,), *indices)
    monkeypatch.setattr(module, "MAX_COUNTERS", 64)
    kept = measured((128,), *indices)
    assert all(torch.equal(counted[name], kept[name]) for name in counted)


def test_a_codebook_of_2_to_the_62_is_counted():
    values = measured((2**62,), torch.tensor([0, 2**62 - 1, 7, 7]))
    assert values["entropy_bits"].item() == pytest.approx(1.5)
    assert values["utilisation"].item() == pytest.approx(3 / 2**62)
    assert values["distinct_codes"].item() == 3


def test_reset_forgets_everything():
    usage = CodebookUsage((4, 2**30))
    usage.update(torch.zeros(3, 2, dtype=torch.int64))
    usage.reset()
    usage.update(torch.ones(1, 2, dtype=torch.int64))
    assert usage.compute()["tokens"].item() == 2


def test_counts_of_two_ranks_are_summed():
    indices = torch.randint(0, 16, (2, 40, 2))
    sizes = (16, 2**30)
    ranks = [CodebookUsage(sizes) for _ in range(2)]
    for rank, part in zip(ranks, indices, strict=True):
        rank.update(part)

    def gather(value, group=None):
        # What all_gather returns on rank 0 for the state that is being synchronised.
        name = next(name for name in ranks[0]._defaults if same(getattr(ranks[0], name), value))
        other = getattr(ranks[1], name)
        return [value, torch.cat(other) if isinstance(other, list) else other]

    def same(state, value):
        return torch.equal(torch.cat(state) if isinstance(state, list) else state, value)

    ranks[0].sync(dist_sync_fn=gather, distributed_available=lambda: True)
    together = CodebookUsage(sizes)
    together.update(indices)
    assert all(torch.equal(*pair) for pair in zip(ranks[0].counts(), together.counts(), strict=True))


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
def test_each_scale_is_counted_alone(monkeypatch, large, depth):
    if large:
        monkeypatch.setattr(module, "MAX_COUNTERS", 8)
    sizes, lengths = (16, 32)[:depth], (1, 4, 9)
    indices = torch.randint(0, 16, (5, 14, depth))
    batches = (indices if depth > 1 else indices.squeeze(-1)).split(2)
    values = measured(sizes, *batches, scale_lengths=lengths)
    for scale, part in enumerate(indices.split(lengths, 1)):
        alone = measured(sizes, part if depth > 1 else part.squeeze(-1))
        for name in ("utilisation", "perplexity", "entropy_bits", "dead_codes", "distinct_codes", "tokens"):
            assert values[f"{name}_per_scale"][scale] == alone[name], name
    whole = measured(sizes, *batches)
    assert all(torch.equal(values[name], whole[name]) for name in whole)


def test_codes_of_the_first_scales_leave_the_others_out():
    values = measured((8,), torch.zeros(3, 5, dtype=torch.int64), scale_lengths=(1, 4, 9))
    assert values["tokens_per_scale"].tolist() == [3, 12, 0]


@pytest.mark.parametrize("shape", [(3, 15), (3, 2, 7), (14,)])
def test_indices_that_are_not_of_the_scales_are_refused(shape):
    with pytest.raises(ValueError, match=r"indices of 3 scales are \(b, 14\) or shorter"):
        CodebookUsage((8,), scale_lengths=(1, 4, 9)).update(torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("counters", [2**24, 4])
@pytest.mark.parametrize("order", ["lsb_first", "msb_first"])
def test_each_bit_is_counted_in_the_order_of_the_channels(monkeypatch, order, counters):
    monkeypatch.setattr(module, "MAX_COUNTERS", counters)
    bits = torch.rand(50, 6) < torch.tensor([0.5, 0.1, 0.9, 0.0, 1.0, 0.5])
    powers = torch.tensor([1, 2, 4]) if order == "lsb_first" else torch.tensor([4, 2, 1])
    indices = (bits.view(50, 2, 3) * powers).sum(-1)
    values = measured((8, 8), *indices, bit_order=order)
    ones = bits.double().mean(0)
    assert torch.equal(values["ones_per_bit"], ones)
    entropy = (torch.special.entr(ones) + torch.special.entr(1 - ones)) / math.log(2)
    torch.testing.assert_close(values["entropy_bits_per_bit"], entropy)
    assert values["dead_bits"].item() == 2


def test_bits_of_an_index_of_62_bits_are_exact():
    indices = torch.tensor([2**61, 2**61 + 1, 3 * 2**60, 0])
    ones = measured((2**62,), indices, bit_order="lsb_first")["ones_per_bit"]
    assert ones.nonzero().flatten().tolist() == [0, 60, 61]
    assert ones[[0, 60, 61]].tolist() == [1 / 4, 1 / 4, 3 / 4]


def test_bits_need_codebooks_of_powers_of_two_and_a_known_order():
    with pytest.raises(ValueError, match=r"binary codebooks have 2\*\*n codes, got \(8, 12\)"):
        CodebookUsage((8, 12), bit_order="lsb_first")
    with pytest.raises(ValueError, match="bit_order must be one of lsb_first, msb_first, or None; got 'big'"):
        CodebookUsage((8,), bit_order="big")


def test_a_quantizer_says_what_there_is_to_count():
    usage = CodebookUsage.of(LFQ(bits=6, index_bits=3, bit_order="msb_first"))
    assert usage is not None
    assert (usage.codebook_sizes, usage.bit_order) == ((8, 8), "msb_first")
    residual = CodebookUsage.of(ResidualQuantizer(LFQ(bits=4), depth=2))
    assert residual is not None
    assert (residual.codebook_sizes, residual.bit_order) == ((16, 16), "lsb_first")
    plain = CodebookUsage.of(ResidualQuantizer(FSQ((4, 4)), depth=2), scale_lengths=(1, 3))
    assert plain is not None
    assert (plain.bit_order, plain.scale_lengths) == (None, (1, 3))
    assert CodebookUsage.of(Identity(4)) is None
