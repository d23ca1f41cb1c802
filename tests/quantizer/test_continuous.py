"""Continuous baselines: the identity and the diagonal Gaussian."""

import math

import jaxtyping
import pytest
import torch
from torch.distributions import Normal, kl_divergence

import vistok
from vistok.quantizer import KL, Identity

GRIDS = [(7,), (4, 5), (2, 3, 4)]
BASELINES = [Identity, KL]


@pytest.mark.parametrize("cls", BASELINES)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("training", [True, False])
def test_every_position_has_codes_and_no_integers(cls, grid, training):
    quantizer = cls(6).train(training)
    quantized = quantizer(torch.randn(3, 6, *grid))
    assert quantized.codes.shape == (3, 6, *grid)
    assert quantized.indices.shape == (3, *grid, 0) == (3, *quantizer.indices_shape(grid))
    assert quantized.indices.dtype == torch.int64
    assert quantized.losses.keys() == quantizer.loss_weights.keys()


@pytest.mark.parametrize("cls", BASELINES)
def test_there_is_no_codebook_and_no_limit_of_bits(cls):
    quantizer = cls(6)
    assert quantizer.codebook_sizes == ()
    assert quantizer.codebook_size == 0
    assert quantizer.num_codebooks == 0
    assert quantizer.codebook is None
    assert quantizer.bits == math.inf == quantizer.total_bits((4, 4))


@pytest.mark.parametrize("cls", BASELINES)
def test_integers_are_an_error(cls):
    quantizer = cls(6)
    message = f"{cls.__name__} is continuous, it has no indices: use its codes"
    with pytest.raises(ValueError, match=message):
        quantizer.indices_to_codes(quantizer(torch.randn(1, 6, 4)).indices)
    with pytest.raises(ValueError, match=message):
        quantizer.indices_to_codes(torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=message):
        quantizer.codes_to_indices(torch.randn(1, 6, 4))


@pytest.mark.parametrize("cls", BASELINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_of_evaluation_are_the_features(cls, dtype):
    features = torch.randn(2, 6, 3, 3, dtype=dtype)
    codes = cls(6).eval()(features).codes
    assert codes.dtype == dtype
    assert torch.equal(codes, features)


def test_the_identity_passes_the_gradient_on():
    features = torch.randn(2, 6, 3, requires_grad=True)
    weights = torch.randn(2, 6, 3)
    (Identity(6).train()(features).codes * weights).sum().backward()
    assert torch.equal(features.grad, weights)


def posterior(quantizer, features):
    """The Gaussian of each position, in float64."""
    linear = quantizer.log_variance
    log_variance = torch.einsum("oc,bc...->bo...", linear.weight.double(), features.double())
    log_variance = log_variance + linear.bias.double().view(-1, *[1] * (features.ndim - 2))
    return Normal(features.double(), (log_variance.clamp(-30, 20) / 2).exp())


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("training", [True, False])
def test_the_loss_is_the_sum_over_channels_and_positions_and_the_mean_over_samples(grid, training):
    quantizer = KL(6).train(training)
    features = torch.randn(3, 6, *grid) * 2
    divergence = kl_divergence(posterior(quantizer, features), Normal(0.0, 1.0))
    expected = divergence.flatten(1).sum(1).mean()
    loss = quantizer(features).losses["kl"]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected.float())


def test_training_codes_are_samples_of_the_posterior():
    quantizer = KL(4).train()
    features = torch.randn(1, 4, 1).expand(1, 4, 50_000)
    gaussian = posterior(quantizer, features[..., :1])
    scores = (quantizer(features).codes - gaussian.mean) / gaussian.stddev
    torch.testing.assert_close(scores.mean(-1), torch.zeros(1, 4, dtype=torch.float64), rtol=0, atol=0.02)
    torch.testing.assert_close(scores.std(-1), torch.ones(1, 4, dtype=torch.float64), rtol=0, atol=0.02)
    # Channels are drawn independently.
    correlation = torch.corrcoef(scores[0]) - torch.eye(4)
    assert correlation.abs().max() < 0.02


def test_the_global_generator_draws_the_noise():
    quantizer = KL(4).train()
    features = torch.randn(2, 4, 5)
    torch.manual_seed(3)
    first = quantizer(features).codes
    second = quantizer(features).codes
    torch.manual_seed(3)
    assert torch.equal(quantizer(features).codes, first)
    assert not torch.equal(first, second)


def test_the_gradient_reaches_mean_and_log_variance_by_reparametrisation():
    quantizer = KL(3, kl_weight=0.0).train()
    features = torch.randn(2, 3, 4, requires_grad=True)
    codes = quantizer(features).codes
    noise = ((codes - features) / posterior(quantizer, features).stddev).detach()
    codes.sum().backward()
    scale = posterior(quantizer, features).stddev.detach() * noise / 2
    # d code / d log variance = sigma noise / 2, and the features enter through the mean and the log-variance.
    torch.testing.assert_close(quantizer.log_variance.bias.grad.double(), scale.sum((0, 2)))
    through = torch.einsum("oc,bo...->bc...", quantizer.log_variance.weight.detach().double(), scale)
    torch.testing.assert_close(features.grad.double(), 1 + through, rtol=1e-4, atol=1e-5)


def test_extreme_log_variances_are_clamped():
    quantizer = KL(2).train()
    torch.nn.init.zeros_(quantizer.log_variance.weight)
    features = torch.randn(2, 2, 4)
    for bias, clamped in ((-1e4, -30.0), (1e4, 20.0)):
        torch.nn.init.constant_(quantizer.log_variance.bias, bias)
        quantized = quantizer(features)
        expected = (features.double().square() + math.exp(clamped) - 1 - clamped).flatten(1).sum(1).mean() / 2
        torch.testing.assert_close(quantized.losses["kl"], expected.float())
        assert quantized.codes.isfinite().all()


def test_a_loss_of_weight_zero_is_left_out():
    quantizer = KL(4, kl_weight=0.0)
    assert quantizer.loss_weights == {} == quantizer(torch.randn(1, 4, 3)).losses


def test_autocast_changes_neither_codes_nor_loss():
    quantizer = KL(4).eval()
    features = torch.randn(2, 4, 8)
    outside = quantizer(features)
    with torch.autocast("cpu", torch.bfloat16):
        inside = quantizer(features)
    assert inside.codes.dtype == torch.float32
    assert torch.equal(inside.codes, outside.codes)
    assert torch.equal(inside.losses["kl"], outside.losses["kl"])


def test_freezing_stops_the_log_variance():
    quantizer = KL(4)
    quantizer.freeze()
    assert not any(parameter.requires_grad for parameter in quantizer.parameters())


@pytest.mark.parametrize("cls", BASELINES)
@pytest.mark.parametrize("training", [True, False])
def test_it_compiles_into_one_graph(cls, training, monkeypatch):
    # The shape checks of the test run cannot be traced.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    torch.compiler.reset()
    quantizer = cls(4).train(training)
    features = torch.randn(2, 4, 3, 3)
    quantized = torch.compile(quantizer, fullgraph=True, backend="aot_eager")(features)
    assert quantized.indices.shape == (2, 3, 3, 0)
    for name, loss in quantizer(features).losses.items():
        torch.testing.assert_close(quantized.losses[name], loss)


@pytest.mark.parametrize("cls", BASELINES)
def test_features_that_do_not_fit_are_an_error(cls):
    with pytest.raises(ValueError, match=r"takes features \(b, 4, \*grid\), got \(1, 5, 3\)"):
        cls(4)(torch.randn(1, 5, 3))
    with pytest.raises(ValueError, match="no class-specific codebooks"):
        cls(4)(torch.randn(1, 4, 3), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="hold 12 values that are NaN or infinite"):
        cls(4).eval()(torch.full((1, 4, 3), torch.nan))


@pytest.mark.parametrize("cls", BASELINES)
def test_impossible_arguments_are_an_error(cls):
    with pytest.raises(ValueError, match="dim must be an integer of at least 1, got 0"):
        cls(0)
    with pytest.raises(ValueError, match="kl_weight must not be negative, got -1"):
        KL(4, kl_weight=-1)


@pytest.mark.parametrize("cls", BASELINES)
def test_they_build_from_their_config(cls):
    rebuilt = vistok.build(vistok.config.config_of(cls(5)))
    assert type(rebuilt) is cls
    assert rebuilt.dim == 5
