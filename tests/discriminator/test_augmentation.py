"""Differentiable augmentation: the same for both players, exact, and differentiable twice."""

import pytest
import torch

from vistok.discriminator import AUGMENTATIONS, draw_augmentation
from vistok.discriminator.augmentation import change_color, shift


@pytest.mark.parametrize("shape", [(4, 3, 16, 24), (4, 3, 2, 16, 24)])
def test_images_and_reconstructions_are_treated_alike(shape):
    images = torch.rand(shape)
    augment = draw_augmentation(AUGMENTATIONS, images)
    assert torch.equal(augment(images.clone()), augment(images))
    assert not torch.equal(draw_augmentation(AUGMENTATIONS, images)(images), augment(images))


def test_no_augmentation_is_the_identity():
    images = torch.rand(2, 3, 8, 8)
    assert draw_augmentation((), images)(images) is images


def test_all_frames_of_a_video_are_treated_alike():
    frame = torch.rand(3, 3, 1, 16, 16)
    videos = draw_augmentation(("translation", "cutout"), frame)(frame.expand(-1, -1, 4, -1, -1))
    assert torch.equal(videos, videos[:, :, :1].expand_as(videos))


def test_a_shift_moves_each_image_by_its_own_number_of_pixels():
    images = torch.arange(1.0, 9.0).view(2, 1, 1, 4)
    moved = shift(images, torch.tensor([1, -2]), -1)
    assert moved.flatten(1).tolist() == [[0, 1, 2, 3], [7, 8, 0, 0]]


def test_translations_stay_within_an_eighth_of_the_side():
    images = torch.ones(256, 1, 32, 16)
    moved = draw_augmentation(("translation",), images)(images)
    empty_rows = (moved.sum((1, 3)) == 0).sum(1)
    empty_columns = (moved.sum((1, 2)) == 0).sum(1)
    assert empty_rows.max() == 4
    assert empty_columns.max() == 2


def test_a_cutout_blanks_at_most_a_square_of_half_the_side():
    images = torch.ones(512, 1, 16, 16)
    blank = (draw_augmentation(("cutout",), images)(images) == 0).sum((1, 2, 3))
    assert blank.max() == 64
    assert blank.min() < 64


def test_colour_changes_follow_their_formulas():
    images = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    brightness, saturation, contrast = torch.rand(3, 2, dtype=torch.float64)
    changed = change_color(images, brightness, saturation, contrast)
    for row in range(2):
        expected = images[row].numpy() + brightness[row].item()
        grey = expected.mean(0, keepdims=True)
        expected = grey + (expected - grey) * saturation[row].item()
        expected = expected.mean() + (expected - expected.mean()) * contrast[row].item()
        torch.testing.assert_close(changed[row], torch.from_numpy(expected))


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_each_augmentation_is_differentiable_twice(kind):
    images = torch.rand(2, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    augment = draw_augmentation((kind,), images)
    assert torch.autograd.gradgradcheck(lambda images: augment(images.double() ** 2), images)
