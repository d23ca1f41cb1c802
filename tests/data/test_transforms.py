"""Transforms: geometry, value range and where randomness comes from."""

import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image

from vistok.data.decode import BadImageError
from vistok.data.transforms import (
    PIL_FILTERS,
    EvalTransform,
    TrainTransform,
    center_crop,
    random_crop,
    random_flip,
    random_resized_crop,
    resize,
    resize_short_side,
    sample_generator,
    to_model_range,
    to_uint8,
)


def picture(height: int, width: int, channels: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (channels, height, width), generator=torch.Generator().manual_seed(0)).byte()


def coordinates(height: int, width: int) -> torch.Tensor:
    """A picture whose channels are the row and the column of each pixel."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns, torch.zeros_like(rows)]).byte()


@pytest.mark.parametrize("name", PIL_FILTERS)
def test_resize_equals_pillow(name):
    image = picture(40, 30)
    expected = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((13, 17), getattr(Image.Resampling, name.upper()))
    assert np.array_equal(resize(image, 17, 13, name).permute(1, 2, 0).numpy(), np.asarray(expected))


def test_opencv_bilinear_equals_opencv():
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(7), indexing="ij")
    image = ((37 * rows**2 + 91 * columns + 13 * rows * columns) % 256).byte()[None]
    # cv2.resize(image, (4, 4)) and cv2.resize(image, (3, 8)) of OpenCV 5.0.
    smaller = [[45, 178, 118, 99], [91, 162, 137, 128], [128, 105, 114, 131], [123, 182, 58, 109]]
    taller = [[61, 17, 144], [89, 64, 104], [87, 149, 115], [69, 239, 174]]
    taller += [[150, 215, 173], [171, 237, 111], [143, 200, 97], [90, 113, 135]]
    for expected in (smaller, taller):
        result = resize(image, len(expected), len(expected[0]), "opencv_bilinear")
        assert (result.dtype, result[0].tolist()) == (torch.uint8, expected)


def test_opencv_bilinear_leaves_pixels_out_where_it_reduces():
    stripes = torch.zeros(3, 64, 64, dtype=torch.uint8)
    stripes[:, :, 1::8] = 255
    assert resize(stripes, 8, 8, "opencv_bilinear").max() == 0


def test_evaluation_can_resize_to_more_than_it_cuts():
    image = picture(80, 60)
    expected = center_crop(resize_short_side(image, 36, "lanczos"), 32)
    assert torch.equal(EvalTransform(32, "lanczos", scale=1.125)(image), expected)
    with pytest.raises(ValueError, match=r"eval_scale must be at least 1, got 0\.875"):
        EvalTransform(32, scale=0.875)


def test_resize_is_antialiased():
    stripes = torch.zeros(1, 64, 64, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    assert (resize(stripes, 8, 8, "bilinear").float() - 127.5).abs().max() < 16


def test_unknown_filter_lists_the_allowed_ones():
    with pytest.raises(ValueError, match="bicubic, bilinear, lanczos, box, opencv_bilinear; got 'BICUBIC'"):
        EvalTransform(8, "BICUBIC")


@pytest.mark.parametrize(("size", "expected"), [((40, 60), (20, 30)), ((60, 40), (30, 20)), ((10, 25), (20, 50))])
def test_short_side_is_met_and_aspect_kept(size, expected):
    assert resize_short_side(picture(*size), 20).shape[1:] == expected


def test_colour_of_invisible_pixels_does_not_bleed():
    image = torch.zeros(4, 8, 8, dtype=torch.uint8)
    image[0, :, :4] = image[3, :, :4] = 255  # left: red; right: invisible black
    small = resize(image, 4, 4)
    assert small[0][small[3] > 0].min() == 255


def test_sliver_that_would_fill_the_memory_is_refused():
    with pytest.raises(BadImageError, match="too large"):
        resize_short_side(torch.zeros(1, 1, 10_000, dtype=torch.uint8), 256)


def test_center_crop_cuts_both_sides_alike():
    crop = center_crop(coordinates(10, 20), 4)
    assert crop[0, :, 0].tolist() == [3, 4, 5, 6]
    assert crop[1, 0].tolist() == [8, 9, 10, 11]


def test_random_crop_reaches_every_place_and_is_not_resampled():
    generator = torch.Generator().manual_seed(0)
    crops = [random_crop(coordinates(6, 5), 4, generator) for _ in range(200)]
    assert {tuple(crop[:2, 0, 0].tolist()) for crop in crops} == set(itertools.product(range(3), range(2)))
    assert all((crop[0, :, 0] - crop[0, 0, 0]).tolist() == [0, 1, 2, 3] for crop in crops)


def test_random_resized_crop_covers_the_asked_share_of_the_area():
    generator = torch.Generator().manual_seed(0)
    spans = []
    for _ in range(200):
        crop = random_resized_crop(coordinates(200, 250), 20, (0.25, 1.0), generator, "bilinear").float()
        spans.append(((crop[0, -1, 0] - crop[0, 0, 0]) * 20 / 19 / 200).item() ** 2)
        assert math.isclose(crop[0, -1, 0] - crop[0, 0, 0], crop[1, 0, -1] - crop[1, 0, 0], abs_tol=2)
    assert 0.23 < min(spans) < 0.3
    assert 0.95 < max(spans) < 1.03


def test_flip_mirrors_half_of_the_pictures():
    generator = torch.Generator().manual_seed(0)
    image = coordinates(2, 3)
    flipped = [not torch.equal(random_flip(image, generator), image) for _ in range(400)]
    assert 150 < sum(flipped) < 250


@pytest.mark.parametrize("crop_scale", [None, (0.5, 1.0)])
def test_train_transform_depends_on_seed_epoch_and_sample_only(crop_scale):
    transform, image = TrainTransform(8, crop_scale=crop_scale), picture(30, 40)
    views = [transform(image, sample_generator(*key)) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]
    torch.manual_seed(123)
    assert torch.equal(views[0], transform(image, sample_generator(0, 0, 0)))
    assert all(not torch.equal(views[0], view) for view in views[1:])


def test_transforms_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    TrainTransform(8, crop_scale=(0.5, 1.0))(picture(30, 40), sample_generator(0, 0, 0))
    assert torch.equal(torch.get_rng_state(), state)


def test_neighbouring_samples_are_independent():
    draws = torch.stack([torch.rand(4, generator=sample_generator(0, 0, index)) for index in range(1000)])
    assert (draws.mean(0) - 0.5).abs().max() < 0.04
    assert torch.corrcoef(torch.cat([draws[:-1].T, draws[1:].T])).fill_diagonal_(0).abs().max() < 0.15


@pytest.mark.parametrize("crop_scale", [(0.0, 1.0), (0.9, 0.5), (0.5, 1.5), (0.5,)])
def test_impossible_crop_scale_is_named(crop_scale):
    with pytest.raises(ValueError, match="crop_scale must be"):
        TrainTransform(8, crop_scale=crop_scale)


def test_every_byte_survives_the_model_range():
    images = torch.arange(256, dtype=torch.uint8)
    values = to_model_range(images)
    assert (values[0], values[-1], values.dtype) == (-1, 1, torch.float32)
    assert torch.equal(to_uint8(values), images)


def test_images_are_contiguous_and_correctly_rounded_in_the_model_range():
    images = picture(4, 5)[None].contiguous(memory_format=torch.channels_last)
    values = to_model_range(images)
    assert values.is_contiguous()
    assert np.array_equal(values.numpy(), images.numpy().astype(np.float32) / np.float32(127.5) - np.float32(1))


def test_values_outside_the_model_range_are_clamped_and_others_rounded():
    values = torch.tensor([-7.0, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1, 0.0, 7.0])
    assert to_uint8(values).tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize("size", [(40, 61), (83, 70), (16, 16), (33, 97)])
def test_adm_crop_equals_its_steps_in_pillow(size):
    image = picture(*size)
    pil = Image.fromarray(image.permute(1, 2, 0).numpy())
    while min(pil.size) >= 2 * 16:
        pil = pil.resize((pil.width // 2, pil.height // 2), Image.Resampling.BOX)
    scale = 16 / min(pil.size)
    pil = pil.resize((round(pil.width * scale), round(pil.height * scale)), Image.Resampling.BICUBIC)
    left, top = (pil.width - 16) // 2, (pil.height - 16) // 2
    expected = np.asarray(pil.crop((left, top, left + 16, top + 16)))
    assert np.array_equal(EvalTransform(16, resize_mode="adm")(image).permute(1, 2, 0).numpy(), expected)


def test_multi_scale_crops_come_from_every_short_side():
    transform, image = TrainTransform(8, short_sides=(8, 16), flip=False), coordinates(64, 64)
    spans = set()
    for index in range(200):
        crop = transform(image, sample_generator(0, 0, index)).float()
        spans.add(round((crop[0, 6, 0] - crop[0, 1, 0]).item() / 5))
    assert spans == set(range(4, 9))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"short_sides": (4, 16)}, r"two lengths of at least 8 pixels such as \[8,12\], got \[4, 16\]"),
        ({"short_sides": (8, 16), "crop_scale": (0.5, 1.0)}, "leave out short_sides"),
        ({"resize_mode": "adm", "crop_scale": (0.5, 1.0)}, "leave out short_sides and resize_mode"),
        ({"resize_mode": "ADM"}, "one of short_side, adm; got 'ADM'"),
        ({"resize_mode": "adm", "resize_filter": "box"}, "leave out resize_filter=box"),
    ],
)
def test_settings_without_effect_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainTransform(8, **options)


@pytest.mark.parametrize(
    ("options", "needed"), [({}, 8), ({"short_sides": (8, 12)}, 12), ({"crop_scale": (0.25, 1.0)}, 16)]
)
def test_needed_size_is_what_no_crop_enlarges(options, needed):
    assert TrainTransform(8, **options).needed_size == needed
