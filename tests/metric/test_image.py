"""Image metrics against scikit-image, torchmetrics and hand-made cases."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from vistok.metric import l1, ms_ssim, psnr, ssim
from vistok.metric.image import PSNR_CAP, from_uint8, to_uint8


def pair(batch=3, channels=3, size=(40, 56), noise=0.3):
    originals = torch.nn.functional.interpolate(torch.rand(batch, channels, 6, 6), size, mode="bicubic") * 2 - 1
    originals = originals.clamp(-1, 1)
    return originals + noise * torch.randn_like(originals), originals


def pixels(images):
    return [np.asarray(image.movedim(0, -1)) for image in to_uint8(images)]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_psnr_equals_scikit_image_on_8_bit_images(channels):
    ours, originals = pair(channels=channels)
    expected = [
        peak_signal_noise_ratio(b, a, data_range=255) for a, b in zip(pixels(ours), pixels(originals), strict=True)
    ]
    assert psnr(ours, originals).tolist() == pytest.approx(expected, rel=1e-9)


def test_psnr_of_one_step_in_one_value():
    originals = torch.zeros(1, 3, 8, 8)
    ours = from_uint8(to_uint8(originals))
    ours[0, 0, 0, 0] += 2 / 255
    assert psnr(ours, originals).item() == pytest.approx(20 * math.log10(255) + 10 * math.log10(3 * 64), rel=1e-9)


def test_psnr_of_identical_images_is_the_cap():
    ours, originals = pair()
    ours[0] = originals[0]
    assert psnr(ours, originals)[0].item() == PSNR_CAP
    assert psnr(ours, originals).mean().isfinite()


def test_values_outside_the_range_count_as_clamped():
    ours, originals = pair(noise=2.0)
    assert torch.equal(psnr(ours, originals), psnr(ours.clamp(-1, 1), originals))


def test_rounding_to_8_bits_happens_once():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(from_uint8(levels)), levels)


def test_ssim_equals_scikit_image_with_the_border_reflected():
    ours, originals = pair()
    expected = []
    for a, b in zip(pixels(ours), pixels(originals), strict=True):
        border = ((5, 5), (5, 5), (0, 0))
        full = structural_similarity(
            *(np.pad(image / 255, border, mode="reflect") for image in (a, b)),
            data_range=1.0,
            channel_axis=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            full=True,
        )[1]
        expected.append(full[5:-5, 5:-5].mean())
    assert ssim(ours, originals).tolist() == pytest.approx(expected, abs=1e-5)


def test_ms_ssim_equals_torchmetrics_on_8_bit_images():
    ours, originals = pair(batch=2, size=(176, 180))
    expected = multiscale_structural_similarity_index_measure(
        to_uint8(ours).float() / 255, to_uint8(originals).float() / 255, data_range=1.0, reduction="none"
    )
    assert ms_ssim(ours, originals).tolist() == pytest.approx(expected.tolist(), rel=1e-6)


def test_l1_is_the_mean_absolute_error_of_the_unit_range():
    ours, originals = pair()
    error = np.abs(np.stack(pixels(ours)).astype(float) - np.stack(pixels(originals))) / 255
    assert l1(ours, originals).tolist() == pytest.approx(error.mean((1, 2, 3)).tolist(), rel=1e-9)


@pytest.mark.parametrize("measure", [psnr, ssim, l1])
def test_each_image_is_measured_on_its_own(measure):
    ours, originals = pair()
    alone = [measure(ours[i : i + 1], originals[i : i + 1]).item() for i in range(3)]
    assert measure(ours, originals).tolist() == pytest.approx(alone, abs=1e-6)


@pytest.mark.parametrize("measure", [psnr, ssim, l1])
def test_autocast_changes_nothing(measure):
    ours, originals = pair()
    outside = measure(ours, originals)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(measure(ours, originals), outside)


@pytest.mark.parametrize(("measure", "side"), [(ssim, 5), (ms_ssim, 175)])
def test_too_small_images_are_named(measure, side):
    ours, originals = pair(batch=1, size=(side, 200))
    with pytest.raises(ValueError, match=f"at least {side + 1} pixels, got \\({side}, 200\\)"):
        measure(ours, originals)
