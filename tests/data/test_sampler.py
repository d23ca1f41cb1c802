"""The order of an epoch."""

from vistok.data.sampler import EpochBatchSampler


def flat(sampler: EpochBatchSampler) -> list[int]:
    return [index for batch in sampler for _, index in batch]


def test_an_epoch_has_every_sample_once():
    assert sorted(flat(EpochBatchSampler(12, 4))) == list(range(12))


def test_order_depends_on_seed_and_epoch_only():
    first, again, other = EpochBatchSampler(50, 5, seed=1), EpochBatchSampler(50, 5, seed=1), EpochBatchSampler(50, 5)
    assert list(first) == list(first) == list(again)
    assert list(first) != list(other)
    again.set_epoch(1)
    assert flat(first) != flat(again)
    assert {epoch for batch in again for epoch, _ in batch} == {1}


def test_start_at_leaves_out_batches_once():
    sampler = EpochBatchSampler(20, 4)
    whole = list(sampler)
    sampler.start_at(3)
    assert list(sampler) == whole[3:]
    assert list(sampler) == whole
    sampler.start_at(3)
    assert len(sampler) == 5


def test_iterator_that_is_never_used_does_not_use_up_the_position():
    sampler = EpochBatchSampler(20, 4)
    whole = list(sampler)
    sampler.start_at(3)
    iter(sampler)
    assert list(sampler) == whole[3:]


def test_training_ranks_share_the_order_of_one_process():
    whole = list(EpochBatchSampler(26, 6))
    ranks = [list(EpochBatchSampler(26, 2, rank=rank, world_size=3)) for rank in range(3)]
    assert [len(rank) for rank in ranks] == [4, 4, 4]
    for step, joined in enumerate(whole):
        assert sorted(joined) == sorted(sample for rank in ranks for sample in rank[step])


def test_evaluation_ranks_have_every_sample_once_without_padding():
    ranks = [EpochBatchSampler(11, 2, 0, False, rank, 2, drop_last=False) for rank in range(2)]
    assert [flat(rank) for rank in ranks] == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9]]
    assert [len(rank) for rank in ranks] == [len(list(rank)) for rank in ranks] == [3, 3]
