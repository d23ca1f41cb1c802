"""Nearest code."""

import pytest
import torch

from vistok.ops import nearest_code


@pytest.mark.parametrize(("n", "k", "d"), [(1, 2, 1), (5, 3, 2), (33, 4097, 3), (300, 9000, 16)])
def test_it_equals_a_search_in_double_precision_up_to_rounding(n, k, d):
    rows, codebook = torch.randn(n, d), torch.randn(k, d)
    distances = (rows.double()[:, None] - codebook.double()[None]).square().sum(-1)
    chosen = distances.gather(1, nearest_code(rows, codebook)[:, None])[:, 0]
    torch.testing.assert_close(chosen, distances.amin(-1), rtol=1e-5, atol=1e-5)


def test_ties_go_to_the_lowest_index_across_tiles():
    codebook = torch.zeros(10000, 4)
    assert nearest_code(torch.zeros(20, 4), codebook).tolist() == [0] * 20


@pytest.mark.parametrize("d", [4, 8, 64])
def test_a_row_does_not_depend_on_the_other_rows(d):
    rows, codebook = torch.randn(777, d), torch.randn(2000, d)
    together = nearest_code(rows, codebook)
    for size in (1, 7, 64, 500):
        apart = torch.cat([nearest_code(part, codebook) for part in rows.split(size)])
        assert torch.equal(apart, together)


def test_no_rows_give_no_indices():
    assert nearest_code(torch.zeros(0, 4), torch.randn(8, 4)).shape == (0,)


def test_rows_that_are_not_finite_get_an_index_inside_the_codebook():
    rows = torch.tensor([[float("nan"), 0.0], [float("inf"), 0.0]])
    indices = nearest_code(rows, torch.randn(8, 2))
    assert ((indices >= 0) & (indices < 8)).all()
