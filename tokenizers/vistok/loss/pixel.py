"""Distances between pixels beyond the mean absolute and squared error; means over batch, channels and positions."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vistok.layers.wavelet import haar

# Share of the unit interval left free at each end, so that logits stay finite (section A.3 of the paper).
LOGIT_MARGIN = 0.1


class LogitLaplace(nn.Module):
    """Negative log-likelihood of images under a Laplace distribution of their logits, in nats per value.

    A. Ramesh et al.: Zero-Shot Text-to-Image Generation, https://arxiv.org/abs/2102.12092, section A.3. Images are
    squeezed from [-1, 1] into [0.1, 0.9] and have a Laplace distribution in logit space. The paper's decoder predicts
    location and scale of every value in twice the channels. Here the decoder's image is the location, so that every
    decoder fits and its images need no conversion, and one learned scale is shared by all values. Outside [-1, 1] the
    logit continues along its tangent, so that a decoder that overshoots has a gradient.

    Attributes:
        log_scale: Natural logarithm of the scale; learned.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(
        self, reconstructions: Float[Tensor, "b c *size"], images: Float[Tensor, "b c *size"]
    ) -> Float[Tensor, ""]:
        """Mean over all values of images in [-1, 1]."""
        squeezed = _squeeze(images)
        jacobian = (squeezed * (1 - squeezed)).log()
        error = (_logit(reconstructions) - _logit(images)).abs()
        return math.log(2) + self.log_scale + (jacobian + error * torch.exp(-self.log_scale)).mean()


def _squeeze(images: Tensor) -> Tensor:
    return LOGIT_MARGIN + (1 - 2 * LOGIT_MARGIN) * (images + 1) / 2


def _logit(images: Tensor) -> Tensor:
    inside = images.clamp(-1, 1)
    slope = (1 - 2 * LOGIT_MARGIN) / 2 / (LOGIT_MARGIN * (1 - LOGIT_MARGIN))
    return torch.logit(_squeeze(inside)) + slope * (images - inside)


def focal_frequency(
    reconstructions: Float[Tensor, "b c *size"], images: Float[Tensor, "b c *size"]
) -> Float[Tensor, ""]:
    """Squared error of the orthonormal 2D spectra, weighted by its own magnitude, so that hard frequencies count.

    L. Jiang et al.: Focal Frequency Loss for Image Reconstruction and Synthesis, https://arxiv.org/abs/2012.12821,
    with alpha = 1. The weights are 1 at the largest error of each channel and carry no gradient.
    """
    spectrum = torch.fft.fft2(reconstructions - images, norm="ortho")
    power = spectrum.real.square() + spectrum.imag.square()
    weights = power.detach().sqrt()
    # A channel without any error has no largest one.
    weights = weights / weights.amax((-2, -1), keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    return (weights * power).mean()


def wavelet(
    reconstructions: Float[Tensor, "b c *size"], images: Float[Tensor, "b c *size"], levels: int
) -> Float[Tensor, ""]:
    """Mean absolute error of the coefficients of an orthonormal 2D Haar transform.

    Args:
        reconstructions: Compared with `images`, frame by frame in videos.
        images: Images or videos.
        levels: How often the average is split into an average and three bands of details.

    Raises:
        ValueError: If a side is not a multiple of ``2**levels`` pixels.
    """
    error = reconstructions - images
    if any(side % 2**levels for side in error.shape[-2:]):
        raise ValueError(
            f"{levels} levels of wavelets need sides that are multiples of {2**levels} pixels, got "
            f"{tuple(error.shape[-2:])}: lower wavelet_levels"
        )
    average = error.reshape(-1, 1, *error.shape[-2:])
    total = error.new_zeros(())
    for _ in range(levels):
        # `haar` returns means, which are half the coefficients of the orthonormal transform.
        average, *details = (2 * haar(average)).chunk(4, dim=1)
        total = total + sum(band.abs().sum() for band in details)
    return (total + average.abs().sum()) / error.numel()
