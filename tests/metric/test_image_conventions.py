"""What papers do otherwise, against the program they did it with."""

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from vistok.metric import l2, psnr, ssim
from vistok.metric.image import from_pixels, to_pixels, to_uint8


def pair(size=(40, 56)):
    originals = torch.nn.functional.interpolate(torch.rand(3, 3, 6, 6), size, mode="bicubic").clamp(0, 1) * 2 - 1
    return originals + 0.3 * torch.randn_like(originals), originals


def unit(images):
    return [np.asarray(image.movedim(0, -1)) / 255 for image in to_uint8(images)]


@pytest.mark.parametrize("data_range", [1.0, 2.0])
def test_the_uniform_window_is_the_default_of_scikit_image(data_range):
    ours, originals = pair()
    expected = [
        structural_similarity(a, b, data_range=data_range, channel_axis=-1)
        for a, b in zip(unit(ours), unit(originals), strict=True)
    ]
    values = ssim(ours, originals, window="uniform_valid", data_range=data_range)
    assert values.tolist() == pytest.approx(expected, abs=2e-5)


def test_the_valid_gaussian_window_leaves_the_border_out():
    ours, originals = pair()
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "full": True}
    expected = [
        structural_similarity(a, b, data_range=1.0, channel_axis=-1, **options)[1][5:-5, 5:-5].mean()
        for a, b in zip(unit(ours), unit(originals), strict=True)
    ]
    assert ssim(ours, originals, window="gaussian_valid").tolist() == pytest.approx(expected, abs=2e-5)


def test_twice_the_data_range_raises_ssim():
    ours, originals = pair()
    assert (ssim(ours, originals, data_range=2.0) > ssim(ours, originals)).all()


def test_truncation_is_a_cast_to_8_bits():
    images = pair()[0].clamp(-1, 1)
    assert torch.equal(to_pixels(images, "truncate"), (images * 127.5 + 127.5).to(torch.uint8).float())


def test_without_rounding_pixels_are_images_again():
    images = pair()[0].clamp(-1, 1)
    assert torch.allclose(from_pixels(to_pixels(images, "none")), images, atol=1e-6)


def test_psnr_without_rounding_is_that_of_floats():
    ours, originals = pair()
    originals = from_pixels(to_pixels(originals))
    error = (ours.clamp(-1, 1) - originals).div(2).double().square().mean((1, 2, 3))
    assert psnr(ours, originals, rounding="none").tolist() == pytest.approx((-10 * error.log10()).tolist(), rel=1e-6)


def test_psnr_follows_from_l2():
    ours, originals = pair()
    assert psnr(ours, originals).tolist() == pytest.approx((-10 * l2(ours, originals).log10()).tolist())


@pytest.mark.parametrize(("options", "message"), [({"rounding": "up"}, "nearest, trunc"), ({"window": "box"}, "gauss")])
def test_an_unknown_convention_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ssim(*pair(), **options)


def test_a_window_needs_pixels_inside_the_border():
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(*pair((10, 40)), window="gaussian_valid")
