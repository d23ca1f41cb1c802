"""Nearest codes."""

import pytest
import torch

from vistok.ops import nearest_code, nearest_codes, tile

METRICS = ("euclidean", "dot")


@pytest.fixture(params=["one tile", "many tiles"])
def tiles(request, monkeypatch):
    """Both with tables that fit in a tile and with tiles of 48 codes, which are no multiple of a group."""
    if request.param == "many tiles":
        monkeypatch.setattr(tile, "MAX_TILE_ROWS", 32)
        monkeypatch.setattr("vistok.ops.nearest.tile_shape", lambda *_: (32, 48))


def exact_scores(rows, codebook, metric):
    rows, codebook = rows.double(), codebook.double()
    return rows @ codebook.T if metric == "dot" else -(rows[:, None] - codebook).square().sum(-1)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (1, 2, 1), (5, 3, 2), (33, 321, 3), (100, 1000, 16)])
def test_it_equals_a_search_in_double_precision_up_to_rounding(n, k, d, metric):
    rows, codebook = torch.randn(n, d), torch.randn(k, d)
    scores = exact_scores(rows, codebook, metric)
    chosen = scores.gather(1, nearest_code(rows, codebook, metric)[:, None])[:, 0]
    torch.testing.assert_close(chosen, scores.amax(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("count", [1, 2, 5, 200])
def test_the_best_codes_equal_a_sort_in_double_precision_up_to_rounding(count, metric):
    rows, codebook = torch.randn(40, 6), torch.randn(200, 6)
    scores = exact_scores(rows, codebook, metric)
    indices = nearest_codes(rows, codebook, count, metric)
    torch.testing.assert_close(scores.gather(1, indices), scores.topk(count).values, rtol=1e-5, atol=1e-5)
    assert all(len(set(row)) == count for row in indices.tolist())


@pytest.mark.usefixtures("tiles")
def test_ties_go_to_the_lowest_index():
    codebook = torch.randn(100, 5).repeat(3, 1)
    assert nearest_code(torch.randn(200, 5), codebook).max() < 100
    assert nearest_code(torch.zeros(20, 5), torch.zeros(300, 5)).tolist() == [0] * 20
    first, second, third = nearest_codes(codebook[:100], codebook, 3).unbind(-1)
    assert torch.equal(first, torch.arange(100))
    assert torch.equal(second, first + 100)
    assert torch.equal(third, first + 200)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("d", [1, 4, 8, 16, 64, 257])
def test_a_row_does_not_depend_on_the_other_rows(d, metric):
    # Codes so close together that another order of summation changes most indices.
    rows, codebook = torch.randn(177, d), 1 + 1e-7 * torch.randn(1000, d)
    together = nearest_code(rows, codebook, metric)
    assert len(together.unique()) > 1
    for size in (1, 7, 64):
        apart = torch.cat([nearest_code(part, codebook, metric) for part in rows.split(size)])
        assert torch.equal(apart, together)


def test_no_rows_give_no_indices():
    assert nearest_code(torch.zeros(0, 4), torch.randn(8, 4)).shape == (0,)
    assert nearest_codes(torch.zeros(0, 4), torch.randn(8, 4), 3).shape == (0, 3)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30])
def test_rows_and_codes_out_of_range_get_an_index_inside_the_codebook(value, metric):
    rows = torch.randn(20, 2)
    expected = nearest_code(rows, torch.eye(2).repeat(25, 1), metric)
    rows[3, 0] = value
    indices = nearest_code(rows, torch.eye(2).repeat(25, 1), metric)
    assert 0 <= indices[3] < 50
    assert torch.equal(indices[4:], expected[4:])
    assert value == value or indices[3] == 0
    many = nearest_codes(rows, torch.full((50, 2), 1e30), 40, metric)
    assert ((many >= 0) & (many < 50)).all()


def test_autocast_and_matmul_precision_change_no_index():
    rows, codebook = torch.randn(100, 16), torch.randn(500, 16)
    expected = nearest_code(rows, codebook)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_code(rows, codebook), expected)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(nearest_code(rows, codebook), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_wrong_arguments_say_what_to_write():
    rows, codebook = torch.randn(4, 2), torch.randn(5, 2)
    with pytest.raises(ValueError, match="euclidean, dot; got 'cosine'"):
        nearest_code(rows, codebook, "cosine")
    with pytest.raises(ValueError, match="between 1 and the 5 codes, got 6"):
        nearest_codes(rows, codebook, 6)


def test_kernels_run_in_float32_proper_and_give_the_settings_back():
    def settings():
        backends = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
        values = [getattr(backend, "fp32_precision", None) for backend in backends]
        return [torch.get_float32_matmul_precision()] if None in values else values

    @tile.in_float32
    def kernel(rows):
        return (rows @ rows.T).dtype, settings()

    full = settings()
    torch.set_float32_matmul_precision("medium")
    try:
        reduced = settings()
        assert reduced != full
        with torch.autocast("cpu", torch.bfloat16):
            dtype, inside = kernel(torch.randn(3, 3))
        assert dtype == torch.float32
        assert set(inside) <= {"ieee", "highest"}
        assert settings() == reduced
    finally:
        torch.set_float32_matmul_precision("highest")
