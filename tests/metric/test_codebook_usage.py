"""Codebook usage: exact counts, whatever the batches and ranks."""

import math

import numpy as np
import pytest
import torch

import vistok.metric.codebook_usage as module
from vistok.metric import CodebookUsage


def measured(sizes, *batches):
    usage = CodebookUsage(sizes)
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
