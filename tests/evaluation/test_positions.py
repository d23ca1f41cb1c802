"""Entropy of positions and the plane of a codebook, by hand."""

import pytest
import torch

from vistok.evaluation import positions
from vistok.evaluation.positions import PositionEntropy, principal_plane


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
