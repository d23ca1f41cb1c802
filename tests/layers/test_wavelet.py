"""Patches by Haar wavelets or space to depth: what they are, and that they can be undone."""

import pytest
import torch

from vistok.layers.wavelet import check_patching, from_patches, haar, halvings, to_patches


@pytest.mark.parametrize("patching", ["haar", "fold"])
@pytest.mark.parametrize("patch_size", [2, 4])
@pytest.mark.parametrize("size", [(8, 12), (4, 8, 12)])
def test_patches_can_be_undone(size, patch_size, patching):
    images = torch.randn(2, 3, *size)
    patches = to_patches(images, patch_size, patching)
    grid = tuple(side // patch_size for side in size)
    assert patches.shape == (2, 3 * patch_size ** len(size), *grid)
    torch.testing.assert_close(from_patches(patches, patch_size, patching), images)


def test_no_patching_is_the_identity():
    images = torch.randn(2, 3, 4, 4)
    assert torch.equal(to_patches(images, 1, "none"), images)
    assert torch.equal(from_patches(images, 1, "none"), images)


@pytest.mark.parametrize("size", [(8, 8), (8, 8, 8)])
def test_a_constant_keeps_its_value_in_the_first_band_and_has_no_others(size):
    patches = to_patches(torch.full((1, 1, *size), 0.7), 4, "haar")
    assert torch.allclose(patches[:, 0], torch.tensor(0.7))
    assert torch.allclose(patches[:, 1:], torch.tensor(0.0))


def test_bands_of_images_are_mean_then_height_then_width_then_both():
    # The signs of the four pixels of a patch, rows first; each pattern is one band alone.
    patterns = {0: [[1, 1], [1, 1]], 1: [[1, 1], [-1, -1]], 2: [[1, -1], [1, -1]], 3: [[1, -1], [-1, 1]]}
    for band, pattern in patterns.items():
        images = torch.tensor(pattern).float().view(1, 1, 2, 2)
        assert haar(images).flatten().tolist() == [float(other == band) for other in range(4)]


def test_bands_of_videos_count_width_then_height_then_time():
    for axis, band in ((4, 1), (3, 2), (2, 4)):
        signs = torch.ones(1, 1, 2, 2, 2)
        signs.select(axis, 1).neg_()
        assert haar(signs).flatten().tolist() == [float(other == band) for other in range(8)]


def test_every_step_transforms_all_bands_and_keeps_channels_together():
    images = torch.randn(1, 3, 8, 8)
    twice = to_patches(images, 4, "haar")
    assert torch.equal(twice, haar(haar(images)))
    alone = to_patches(images[:, 1:2], 4, "haar")
    torch.testing.assert_close(twice[:, 1::3], alone)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: check_patching(4, "dct"), "patching must be one of none, fold, haar; got 'dct'"),
        (lambda: check_patching(1, "haar"), "patching=haar and patch_size=1 do not fit"),
        (lambda: check_patching(4, "none"), "patching=none and patch_size=4 do not fit"),
        (lambda: check_patching(6, "haar"), "patch_size must be a power of 2, got 6"),
        (lambda: halvings("factor", 12, 4, 3), "factor must be patch_size times a power of 2, got factor=12"),
        (lambda: halvings("factor", 2, 4, 3), "factor must be patch_size times a power of 2, got factor=2"),
        (lambda: halvings("factor", 32, 4, 3), "which needs 4 or more levels, got 3"),
    ],
)
def test_impossible_settings_are_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
