"""Binary spherical quantization against a dense reference."""

import math

import pytest
import torch

from vistok.quantizer import BSQ


def unit(features):
    return features / features.square().sum(1, keepdim=True).sqrt()


def test_codes_are_the_nearest_corners_in_the_unit_sphere():
    features = torch.randn(2, 6, 40)
    quantizer = BSQ(6).eval()
    quantized = quantizer(features)
    torch.testing.assert_close(quantized.codes.square().sum(1), torch.ones(2, 40))
    nearest = (unit(features).movedim(1, -1) @ quantizer.codebook.T).argmax(-1)
    assert torch.equal(quantized.indices, nearest)


def test_channel_0_is_the_most_significant_bit():
    quantizer = BSQ(4)
    assert torch.equal(quantizer.codebook[0b1000], torch.tensor([0.5, -0.5, -0.5, -0.5]))


def test_indices_do_not_depend_on_the_length_of_the_features():
    features = torch.randn(2, 9, 40)
    quantizer = BSQ(9).eval()
    assert torch.equal(quantizer(features).indices, quantizer(unit(features) * 1e-3).indices)


def test_losses_equal_the_dense_reference():
    features = torch.randn(2, 6, 30, dtype=torch.float64)
    points = unit(features).movedim(1, -1).reshape(-1, 6)
    quantizer = BSQ(6, inv_temperature=7.0, batch_entropy="group", entropy_group=3, commitment_weight=0.5)
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 3) / math.sqrt(6)
    sample, batch = 0.0, 0.0
    for group in points.split(3, dim=-1):
        log_p = (2 * 7 * group @ corners.T).log_softmax(-1)
        mean = log_p.exp().mean(0)
        sample = sample - (log_p.exp() * log_p).sum(-1).mean()
        batch = batch - (mean * mean.log()).sum()
    commitment = (points - points.sign() / math.sqrt(6)).square().sum(-1).mean()
    losses = quantizer(features.float()).losses
    total = torch.stack([losses[name] * weight for name, weight in quantizer.loss_weights.items()]).sum()
    torch.testing.assert_close(losses["sample_entropy"].double(), sample, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses["batch_entropy"].double(), batch, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total.double(), 0.1 * (sample - batch) / 7 + 0.5 * commitment, rtol=1e-5, atol=1e-6)


def test_the_authors_defaults_have_no_commitment_and_an_almost_flat_softmax():
    quantizer = BSQ(18)
    assert quantizer.loss_weights == {"sample_entropy": 0.1, "batch_entropy": -0.1}
    sample = quantizer(torch.randn(1, 18, 2000)).losses["sample_entropy"].item()
    assert sample / (18 * math.log(2)) == pytest.approx(0.991, abs=1e-3)


@pytest.mark.parametrize(("gradient_scale", "factor"), [("paper", 1 / 3), ("identity", 1.0)])
def test_the_gradient_is_that_of_the_normalised_features_times_the_scale(gradient_scale, factor):
    features = torch.randn(2, 9, 7, dtype=torch.float64).requires_grad_()
    upstream = torch.randn(2, 9, 7)
    codes = BSQ(9, gradient_scale=gradient_scale).train()(features).codes
    (codes * upstream).sum().backward()
    twin = features.detach().clone().requires_grad_()
    (unit(twin) * upstream).sum().mul(factor).backward()
    torch.testing.assert_close(features.grad, twin.grad, rtol=1e-5, atol=1e-6)
    # The length of the features receives none.
    torch.testing.assert_close(
        (features.grad * features).sum(1), torch.zeros(2, 7, dtype=torch.float64), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("bits", [2, 9, 36])
def test_the_stage_factor_is_the_length_of_what_a_stage_leaves_of_a_unit_vector(bits):
    quantizer = BSQ(bits, batch_entropy="bit").eval()
    points = unit(torch.randn(1, bits, 20000))
    rest = (points - quantizer(points).codes).square().sum(1).mean().sqrt().item()
    assert quantizer.stage_factors == (pytest.approx(rest, rel=0.01),) * bits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 1}, "bits must be an integer of at least 2, got 1"),
        ({"bits": 8, "gradient_scale": "none"}, "gradient_scale must be one of paper, identity; got 'none'"),
        ({"bits": 8, "inv_temperature": 0.0}, "inv_temperature must be a positive number, got 0.0"),
    ],
)
def test_wrong_arguments_are_named_with_what_to_write(arguments, message):
    with pytest.raises(ValueError, match=message):
        BSQ(**arguments)
