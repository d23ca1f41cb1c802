"""Entropy of positions and the plane of a codebook, by hand."""

import pytest
import torch

from vistok.evaluation import positions
from vistok.evaluation.positions import PositionEntropy, codebook_tables, principal_plane
from vistok.quantizer import BSQ, FSQ, GroupedQuantizer, MultiScaleQuantizer, ResidualQuantizer, VectorQuantizer


def test_a_position_that_never_changes_has_no_entropy():
    entropy = PositionEntropy(1)
    indices = torch.zeros(8, 2, 3, dtype=torch.int64)
    indices[:, 1, 2] = torch.arange(8)
    indices[:, 0, 1] = torch.arange(8) % 2
    entropy.update(indices[:5])
    entropy.update(indices[5:])
    assert torch.equal(entropy.compute(), torch.tensor([[0.0, 1, 0], [0, 0, 3]]))


def test_several_codebooks_are_meaned():
    entropy = PositionEntropy(2)
    entropy.update(torch.stack([torch.arange(4), torch.zeros(4, dtype=torch.int64)], -1)[:, None])
    assert entropy.compute().tolist() == [1.0]


def test_images_beyond_the_limit_are_left_out(monkeypatch):
    monkeypatch.setattr(positions, "MAX_INDICES", 12)
    entropy = PositionEntropy(1)
    for _ in range(4):
        entropy.update(torch.zeros(2, 3, dtype=torch.int64))
    assert (entropy.images, entropy.left_out) == (4, 4)


def test_nothing_seen_is_empty():
    assert PositionEntropy(1).compute().shape == (0,)


def test_the_plane_has_the_directions_of_largest_variance():
    grid = torch.cartesian_prod(torch.arange(-3.0, 4), torch.arange(-1.0, 2))
    turned = torch.linalg.qr(torch.randn(5, 5)).Q
    plane = principal_plane(torch.nn.functional.pad(grid, (0, 3)) @ turned + 7)
    assert plane.abs().sort(0).values == pytest.approx(grid.abs().sort(0).values, abs=1e-4)


def shared(*columns):
    entropy = PositionEntropy(len(columns))
    entropy.update(torch.stack(columns, -1).view(8, -1, len(columns)))
    return entropy.shared_bits()


def test_codebooks_share_the_bits_that_one_tells_of_the_other():
    first = torch.randint(0, 16, (8000,))
    other = torch.randint(0, 16, (8000,))
    # The third is known from the first but for its lowest bit, and tells three of the four bits of it.
    bits = shared(first, other, first // 2)
    assert bits == pytest.approx(bits.T)
    assert bits.diag().tolist() == pytest.approx([4, 4, 3], abs=0.01)
    assert bits[0, 1].item() == pytest.approx(0, abs=0.02)
    assert bits[0, 2].item() == pytest.approx(3, abs=0.02)


def test_too_few_pairs_do_not_look_like_something_shared():
    # 8000 pairs of 16 million: nearly every one occurs once, which alone would be mutual information of 12 bits.
    assert shared(torch.randint(0, 4096, (8000,)), torch.randint(0, 4096, (8000,)))[0, 1] < 0.02


def test_only_the_first_codebooks_and_evenly_spread_tokens_are_paired(monkeypatch):
    monkeypatch.setattr(positions, "MAX_SHARING", 3)
    monkeypatch.setattr(positions, "MAX_PAIRS", 100)
    column = torch.arange(8000) // 80
    bits = shared(column, column, column, column)
    assert bits.shape == (3, 3)
    assert bits[0, 0].item() == pytest.approx(torch.tensor(100.0).log2().item(), abs=0.01)


def test_huge_codebooks_do_not_overflow():
    column = torch.randint(0, 4, (8000,)) * 2**45
    assert shared(column, column)[0, 1].item() == pytest.approx(2, abs=0.02)


def test_every_codebook_of_a_composite_has_its_table():
    groups = GroupedQuantizer(FSQ([5, 3]), 2)
    stages = ResidualQuantizer(VectorQuantizer(16, 4), 3, shared=True)
    nested = GroupedQuantizer(ResidualQuantizer(VectorQuantizer(16, 4), 2, shared=False), 2)
    for quantizer in (groups, stages, nested):
        tables = codebook_tables(quantizer)
        assert [len(table) for table in tables] == list(quantizer.codebook_sizes)
    assert codebook_tables(stages)[0] is not None
    assert all(torch.equal(table, codebook_tables(stages)[0]) for table in codebook_tables(stages))
    assert not torch.equal(*codebook_tables(nested)[:2])
    assert [len(table) for table in codebook_tables(MultiScaleQuantizer(VectorQuantizer(16, 4), [1, 2, 3, 4]))] == [16]


def test_codebooks_without_a_table_have_none():
    assert codebook_tables(BSQ(8, index_bits=4)) == [None, None]
