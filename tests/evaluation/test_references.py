"""The trivial codecs: their rate is what they claim, and the same-rate one spends no more than the tokenizer."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from vistok.evaluation.references import JPEG, Bicubic, PatchColour, References, colour_levels
from vistok.metric import psnr, ssim
from vistok.metric.image import to_uint8


def images(channels=3, size=(32, 48), count=3):
    small = torch.rand(count, channels, 5, 5)
    return torch.nn.functional.interpolate(small, size, mode="bicubic").clamp(0, 1) * 2 - 1


@pytest.mark.parametrize("codes", [1, 2, 7, 8, 10, 100, 512, 1000, 1024])
def test_levels_are_the_best_triple_of_at_most_that_many_codes(codes):
    def error(levels):
        return sum(n**-2 for n in levels)

    everything = [
        (a, b, codes // (a * b))
        for a in range(1, codes + 1)
        for b in range(a, codes // a + 1)
        if codes // (a * b) <= 256
    ]
    levels = colour_levels(math.log2(codes), 3)
    assert math.prod(levels) <= codes
    assert error(levels) == pytest.approx(min(map(error, everything)))


@pytest.mark.parametrize(("bits", "channels"), [(36.0, 3), (5000.0, 3), (24.0, 3), (9.0, 1), (62.0, 4)])
def test_huge_codebooks_give_8_bit_colours(bits, channels):
    assert colour_levels(bits, channels) == (256,) * channels


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_levels_exist_for_every_number_of_channels(channels):
    levels = colour_levels(7.0, channels)
    assert len(levels) == channels
    assert 64 < math.prod(levels) <= 128


def test_patch_colour_spends_no_more_than_the_tokenizer():
    _, rates = PatchColour(math.log2(1000), (4, 6), 3)(images())
    assert rates.tolist() == pytest.approx([math.log2(1000) * 24 / (32 * 48)] * 3)


def test_patch_colour_of_a_flat_image_is_within_half_a_level():
    flat = torch.tensor([0.3, -0.7, 0.9]).view(1, 3, 1, 1).expand(1, 3, 32, 48)
    codec = PatchColour(9.0, (4, 6), 3)
    error = (codec(flat)[0] - flat).abs().amax((0, 2, 3))
    assert (error <= 1 / torch.tensor(codec.levels) + 1e-6).all()


def test_patch_colour_that_saves_bits_says_so():
    assert "24.0 of 40.0 bits" in PatchColour(40.0, (4, 6), 3).note


def test_bicubic_costs_8_bits_per_small_pixel_and_channel():
    _, rates = Bicubic((4, 6))(images(channels=4))
    assert rates.tolist() == pytest.approx([8 * 4 / 64] * 3)


def test_bicubic_keeps_a_flat_image():
    flat = torch.full((1, 3, 32, 48), 0.2)
    assert torch.equal(to_uint8(Bicubic((4, 6))(flat)[0]), to_uint8(flat))


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_pillows_with_the_bits_of_its_file(channels):
    batch = images(channels)
    ours, rates = JPEG()(batch)
    pixels = to_uint8(batch)[1].movedim(0, -1).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels if channels == 3 else pixels[..., 0]).save(file, "JPEG", quality=1, optimize=True)
    expected = np.asarray(Image.open(file)).reshape(32, 48, channels)
    assert np.array_equal(to_uint8(ours)[1].movedim(0, -1).numpy(), expected)
    assert rates[1].item() == pytest.approx(8 * len(file.getvalue()) / (32 * 48))


def test_values_are_means_over_images_of_all_batches():
    batch = images(count=5)
    references = References((32, 48), (4, 6), 3, 9 / 64)
    references.update(batch[:3])
    references.update(batch[3:])
    ours, _ = Bicubic((4, 6))(batch)
    result = next(entry for entry in references.compute() if entry.name.startswith("bicubic"))
    assert result.psnr == pytest.approx(psnr(ours, batch).mean().item())
    assert result.ssim == pytest.approx(ssim(ours, batch).mean().item(), rel=1e-5)


def test_the_rate_of_a_multi_scale_tokenizer_counts_all_its_tokens():
    references = References((32, 48), (4, 6), 3, bits_per_pixel=2 * 9 / 64)
    assert references.codecs[0].levels == colour_levels(18.0, 3)


@pytest.mark.parametrize(
    ("grid", "channels", "rate", "missing"),
    [
        ((24,), 3, 0.1, {"same-rate patch colour", "bicubic"}),
        ((4, 6), 4, 0.1, {"JPEG"}),
        ((4, 6), 3, math.inf, {"same-rate patch colour"}),
    ],
)
def test_what_does_not_apply_is_missing_with_a_reason(grid, channels, rate, missing):
    references = References((32, 48), grid, channels, rate)
    references.update(images(channels))
    assert set(references.missing) == missing
    assert len(references.compute()) == 3 - len(missing)


def test_too_small_images_have_no_ssim():
    references = References((4, 4), (1, 1), 3, 0.5)
    references.update(images(size=(4, 4)))
    assert {entry.ssim for entry in references.compute()} == {None}
