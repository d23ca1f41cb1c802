"""FSQ with dither: what each sample becomes in training."""

import jaxtyping
import pytest
import torch

from vistok.quantizer import FSQ, DitheredFSQ


def kinds(quantizer, features):
    """Masks of the samples that were noisy, continuous and quantized; no sample is a mixture."""
    quantized = quantizer.train()(features)
    codes = quantizer.indices_to_codes(quantized.indices)
    quantized_samples = torch.isclose(quantized.codes, codes, atol=1e-6).flatten(1).all(1)
    continuous = torch.isclose(quantized.codes, features.tanh(), atol=1e-6).flatten(1).all(1)
    noisy = ~torch.isclose(quantized.codes, features.tanh(), atol=1e-6).flatten(1).any(1) & ~quantized_samples
    return noisy, continuous, quantized_samples


@pytest.mark.parametrize("keep", [0.05, 0.5, 0.8])
def test_each_sample_is_noisy_continuous_or_quantized_with_the_documented_probability(keep):
    quantizer = DitheredFSQ((5, 8), keep)
    # Values away from codes and from multiples that noise could hit by chance.
    noisy, continuous, quantized = kinds(quantizer, torch.rand(8000, 2, 6) * 0.3 + 0.01)
    assert (noisy.long() + continuous.long() + quantized.long() == 1).double().mean() > 0.999
    for mask, probability in ((noisy, 1 - keep), (continuous, keep**2), (quantized, keep * (1 - keep))):
        assert mask.double().mean() == pytest.approx(probability, abs=0.02)


def test_noise_is_uniform_over_one_level_spacing_around_the_squashed_feature():
    quantizer = DitheredFSQ((5, 8, 2), keep=0.0).train()
    features = torch.randn(4, 3, 5000)
    noise = (quantizer(features).codes - features.tanh()) * torch.tensor([4, 7, 1]).view(1, 3, 1) / 2
    for channel in noise.unbind(1):
        assert 0.49 < channel.abs().max() <= 0.5 + 1e-5
        assert channel.mean().abs() < 0.02
        assert channel.std() == pytest.approx(12**-0.5, rel=0.03)


def test_every_sample_stays_continuous_if_everything_is_kept():
    features = torch.randn(4, 2, 3, 3)
    torch.testing.assert_close(DitheredFSQ((5, 8), keep=1.0).train()(features).codes, features.tanh())


def test_indices_are_those_of_the_quantized_value_and_never_outside():
    dithered, plain = DitheredFSQ((5, 8)), FSQ((5, 8), form="symmetric")
    features = torch.randn(64, 2, 4, 4) * 5
    indices = dithered.train()(features).indices
    assert torch.equal(indices, plain(features).indices)
    assert 0 <= indices.min() <= indices.max() < 40


def test_evaluation_is_symmetric_fsq():
    dithered, plain = DitheredFSQ((5, 8)).eval(), FSQ((5, 8), form="symmetric").eval()
    features = torch.randn(8, 2, 4, 4)
    assert torch.equal(dithered(features).codes, plain(features).codes)
    assert torch.equal(dithered(features).codes, dithered.indices_to_codes(dithered(features).indices))


def test_the_gradient_is_that_of_tanh_for_every_kind_of_sample():
    features = torch.randn(64, 2, 10, requires_grad=True)
    DitheredFSQ((5, 8)).train()(features).codes.sum().backward()
    torch.testing.assert_close(features.grad, 1 - features.detach().tanh() ** 2)


def test_training_codes_come_back_in_the_dtype_of_the_features():
    assert DitheredFSQ((5, 8)).train()(torch.randn(4, 2, 3, dtype=torch.bfloat16)).codes.dtype == torch.bfloat16


@pytest.mark.parametrize("training", [True, False])
def test_it_compiles_into_one_graph(training, monkeypatch):
    # The shape checks of the test run cannot be traced.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    torch.compiler.reset()
    quantizer = DitheredFSQ((5, 8)).train(training)
    features = torch.randn(4, 2, 3, 3)
    quantized = torch.compile(quantizer, fullgraph=True, backend="aot_eager")(features)
    assert torch.equal(quantized.indices, quantizer(features).indices)


@pytest.mark.parametrize("keep", [-0.1, 1.1])
def test_an_impossible_probability_is_an_error(keep):
    with pytest.raises(ValueError, match="keep is a probability, got"):
        DitheredFSQ((5, 8), keep)
