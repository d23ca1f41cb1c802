"""Pixel losses against brute-force formulas in float64."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Laplace

from vistok.loss import LogitLaplace, focal_frequency, wavelet

SHAPES = [(2, 3, 8, 16), (2, 1, 3, 8, 8)]


def pair(*shape):
    return torch.rand(*shape) * 2 - 1, torch.rand(*shape) * 2 - 1


def spectrum(image):
    """The 2D Fourier transform by its definition, divided by the root of the number of pixels."""
    height, width = image.shape
    rows = np.exp(-2j * np.pi * np.outer(np.arange(height), np.arange(height)) / height)
    columns = np.exp(-2j * np.pi * np.outer(np.arange(width), np.arange(width)) / width)
    return rows @ image @ columns / math.sqrt(height * width)


@pytest.mark.parametrize("shape", SHAPES)
def test_focal_frequency_is_the_formula_of_the_paper(shape):
    ours, images = pair(*shape)
    terms = []
    for a, b in zip(
        ours.double().numpy().reshape(-1, *shape[-2:]), images.double().numpy().reshape(-1, *shape[-2:]), strict=True
    ):
        magnitude = np.abs(spectrum(a) - spectrum(b))
        terms.append(magnitude / magnitude.max() * magnitude**2)
    assert focal_frequency(ours, images).item() == pytest.approx(np.mean(terms), rel=1e-5)


def test_focal_frequency_of_equal_images_is_zero_with_a_gradient_of_zero():
    ours, _ = pair(2, 3, 8, 8)
    images = ours.clone()
    value = focal_frequency(ours.requires_grad_(), images)
    value.backward()
    assert value == 0
    assert ours.grad.abs().max() == 0


def test_the_weights_of_focal_frequency_carry_no_gradient():
    ours, images = pair(1, 1, 4, 4)
    ours = ours.double().requires_grad_()
    focal_frequency(ours, images.double()).backward()
    magnitude = torch.fft.fft2(ours.detach() - images, norm="ortho").abs()
    weights = magnitude / magnitude.max()
    expected = torch.fft.ifft2(weights * torch.fft.fft2(ours.detach() - images.double(), norm="ortho"), norm="ortho")
    torch.testing.assert_close(ours.grad, 2 * expected.real / 16)


def haar_matrix(size):
    """Orthonormal Haar transform of one level: averages, then differences."""
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for i in range(size // 2):
        matrix[i, 2 * i] = matrix[i, 2 * i + 1] = 0.5**0.5
        matrix[size // 2 + i, 2 * i], matrix[size // 2 + i, 2 * i + 1] = 0.5**0.5, -(0.5**0.5)
    return matrix


@pytest.mark.parametrize("shape", SHAPES)
def test_wavelet_is_the_mean_of_the_absolute_coefficients(shape):
    ours, images = pair(*shape)
    coefficients = (ours - images).double()
    for level in range(2):
        height, width = (side >> level for side in shape[-2:])
        part = coefficients[..., :height, :width]
        coefficients[..., :height, :width] = haar_matrix(height) @ part @ haar_matrix(width).T
    assert wavelet(ours, images, levels=2).item() == pytest.approx(coefficients.abs().mean().item(), rel=1e-5)


def test_wavelets_of_odd_sides_are_refused():
    with pytest.raises(ValueError, match=r"3 levels .* multiples of 8 pixels, got \(8, 12\): lower wavelet_levels"):
        wavelet(torch.zeros(1, 3, 8, 12), torch.zeros(1, 3, 8, 12), levels=3)


@pytest.mark.parametrize("log_scale", [0.0, -1.5])
def test_logit_laplace_is_minus_the_log_density_of_the_image(log_scale):
    """The density by the change of variables: that of the logit times its derivative."""
    ours, images = (images.double() for images in pair(2, 3, 4, 4))
    loss = LogitLaplace()
    loss.log_scale.data.fill_(log_scale)
    location, x = (torch.logit(0.1 + 0.4 * (values + 1)) for values in (ours, images))
    unit = 0.1 + 0.4 * (images + 1)
    density = Laplace(location, math.exp(log_scale)).log_prob(x) - torch.log(unit * (1 - unit))
    assert loss(ours, images).item() == pytest.approx(-density.mean().item(), rel=1e-6)


def test_the_best_scale_of_logit_laplace_is_the_mean_absolute_error_of_the_logits():
    ours, images = pair(2, 3, 8, 8)
    loss = LogitLaplace()
    error = (torch.logit(0.1 + 0.4 * (ours + 1)) - torch.logit(0.1 + 0.4 * (images + 1))).abs().mean()
    loss.log_scale.data.copy_(error.log())
    loss(ours, images).backward()
    assert loss.log_scale.grad.abs() < 1e-5


def test_values_outside_the_range_are_pulled_back_by_logit_laplace():
    ours = torch.tensor([-3.0, 3.0]).view(1, 1, 1, 2).requires_grad_()
    LogitLaplace()(ours, torch.zeros(1, 1, 1, 2)).backward()
    assert ours.grad.flatten().tolist() == pytest.approx([-40 / 18, 40 / 18])


@pytest.mark.parametrize("loss", [focal_frequency, lambda a, b: wavelet(a, b, levels=2), LogitLaplace()])
def test_each_image_counts_the_same(loss):
    ours, images = pair(3, 3, 8, 8)
    alone = [loss(ours[i : i + 1], images[i : i + 1]).item() for i in range(3)]
    assert loss(ours, images).item() == pytest.approx(sum(alone) / 3, rel=1e-5)
