"""Gradient estimators against the matrices of the paper."""

import pytest
import torch

from vistok.quantizer.gradient import rotate, straight_through


def jacobian(function, row):
    return torch.autograd.functional.jacobian(lambda x: function(x.unsqueeze(0))[0], row)


def rotation_matrix(row, code):
    """The rotation in the plane of both vectors, built from an orthonormal basis instead of reflections."""
    u = row / row.norm()
    v = code / code.norm()
    cos = u @ v
    orthogonal = v - cos * u
    sin = orthogonal.norm()
    orthogonal = orthogonal / sin
    identity = torch.eye(len(row), dtype=row.dtype)
    plane = u.outer(u) + orthogonal.outer(orthogonal)
    return identity - plane + cos * plane + sin * (orthogonal.outer(u) - u.outer(orthogonal))


@pytest.fixture
def pair():
    return torch.randn(5).double(), torch.randn(5).double()


@pytest.mark.parametrize("tangential", [False, True])
def test_the_value_is_the_code(tangential):
    rows, codes = torch.randn(50, 4), torch.randn(50, 4)
    torch.testing.assert_close(rotate(rows, codes, tangential), codes, rtol=1e-6, atol=1e-6)


def test_the_first_variant_scales_and_rotates_the_gradient(pair):
    row, code = pair
    expected = code.norm() / row.norm() * rotation_matrix(row, code)
    torch.testing.assert_close(jacobian(lambda x: rotate(x, code.unsqueeze(0)), row), expected)


def test_the_second_variant_removes_the_radial_part(pair):
    row, code = pair
    u = row / row.norm()
    expected = code.norm() / row.norm() * rotation_matrix(row, code) @ (torch.eye(5).double() - u.outer(u))
    actual = jacobian(lambda x: rotate(x, code.unsqueeze(0), tangential=True), row)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(actual @ row, torch.zeros(5).double())


def test_both_estimators_agree_with_the_peer_library(pair):
    from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

    row, code = (tensor.float() for tensor in pair)
    ours = jacobian(lambda x: rotate(x, code.unsqueeze(0)), row)
    theirs = jacobian(lambda x: rotate_to(x, code.unsqueeze(0)), row)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tangential", [False, True])
@pytest.mark.parametrize("row", [[0.0, 0.0], [-1.0, -2.0], [1e-30, 0.0], [1e30, 1e30]])
def test_degenerate_pairs_keep_the_code_and_a_finite_gradient(row, tangential):
    rows = torch.tensor([row], requires_grad=True)
    codes = torch.tensor([[1.0, 2.0]])
    out = rotate(rows, codes, tangential)
    out.sum().backward()
    torch.testing.assert_close(out, codes)
    assert torch.isfinite(rows.grad).all()


def test_codes_get_no_gradient_from_the_estimators():
    codes = torch.randn(3, 4, requires_grad=True)
    rows = torch.randn(3, 4, requires_grad=True)
    for estimate in (straight_through, rotate):
        estimate(rows, codes).sum().backward()
        assert codes.grad is None


def test_straight_through_is_the_identity_for_the_gradient(pair):
    row, code = pair
    assert torch.equal(jacobian(lambda x: straight_through(x, code.unsqueeze(0)), row), torch.eye(5).double())
