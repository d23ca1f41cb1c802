"""Lookup-free quantization against a dense reference and vector_quantize_pytorch."""

import math
import warnings

import pytest
import torch

from vistok.quantizer import LFQ


def dense_losses(features, temperature):
    """The three losses of the paper in float64, from the softmax over all codes; features ``(n bits)``."""
    bits = features.shape[-1]
    codes = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * bits)
    log_p = (2 * features @ codes.T / temperature).log_softmax(-1)
    mean = log_p.exp().mean(0)
    return {
        "sample_entropy": -(log_p.exp() * log_p).sum(-1).mean(),
        "batch_entropy": -(mean * mean.log()).sum(),
        "commitment": (features - torch.where(features > 0, 1.0, -1.0)).square().mean(),
    }


@pytest.fixture
def lucidrains():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import vector_quantize_pytorch

        yield lambda bits: vector_quantize_pytorch.LFQ(dim=bits, codebook_size=2**bits, entropy_loss_weight=0.1)


def test_losses_equal_the_dense_reference():
    features = torch.randn(2, 6, 5, 4) * 0.3
    quantizer = LFQ(6, temperature=0.5)
    expected = dense_losses(features.double().movedim(1, -1).reshape(-1, 6), 0.5)
    for name, loss in quantizer(features).losses.items():
        torch.testing.assert_close(loss.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_the_weighted_sum_is_the_loss_of_the_paper():
    quantizer = LFQ(6, entropy_weight=0.3, gamma=2.0, commitment_weight=0.5)
    assert quantizer.loss_weights == {"sample_entropy": 0.3, "batch_entropy": -0.6, "commitment": 0.5}


def test_open_magvit2_order_is_the_default():
    # Channel 0 is the least significant bit, as in the tables of Open-MAGVIT2 and MaskBit.
    assert LFQ(3).codebook.tolist()[:5] == [[-1, -1, -1], [1, -1, -1], [-1, 1, -1], [1, 1, -1], [-1, -1, 1]]


def test_indices_and_codes_agree_with_lucidrains(lucidrains):
    features = torch.randn(2, 10, 30)
    reference = lucidrains(10).eval()
    codes, indices, _ = reference(features.movedim(1, -1))
    quantized = LFQ(10, bit_order="msb_first").eval()(features)
    assert torch.equal(quantized.indices, indices.long())
    assert torch.equal(quantized.codes, codes.movedim(-1, 1))


def test_entropies_agree_with_lucidrains_where_its_clamp_does_not_bite(lucidrains):
    # Few codes and soft distributions: no probability is near its 1e-5.
    features = torch.randn(2, 4, 50) * 0.001
    _, breakdown = lucidrains(4).train()(features.movedim(1, -1), return_loss_breakdown=True)
    losses = LFQ(4).train()(features).losses
    torch.testing.assert_close(losses["sample_entropy"], breakdown.per_sample_entropy, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses["batch_entropy"], breakdown.batch_entropy, rtol=1e-5, atol=1e-6)


def test_eighteen_bits_of_uniform_usage_have_their_true_entropy():
    # 12.4766 nats; a clamp at 1e-5 says 11.5129.
    assert LFQ(18)(torch.zeros(1, 18, 2)).losses["batch_entropy"].item() == pytest.approx(18 * math.log(2), abs=1e-4)


def test_the_gradient_of_the_codes_passes_straight_through():
    features = torch.randn(2, 5, 7).requires_grad_()
    upstream = torch.randn(2, 5, 7)
    (LFQ(5).train()(features).codes * upstream).sum().backward()
    assert torch.equal(features.grad, upstream)


def test_descending_the_entropy_loss_makes_codes_certain_and_all_of_them_used():
    features = (torch.randn(1, 4, 256) * 0.02 + 0.05).requires_grad_()
    quantizer = LFQ(4, commitment_weight=0.0, temperature=0.1)
    before = quantizer(features)
    optimizer = torch.optim.Adam([features], lr=0.01)
    for _ in range(100):
        losses = quantizer(features).losses
        optimizer.zero_grad()
        torch.stack([losses[name] * weight for name, weight in quantizer.loss_weights.items()]).sum().backward()
        optimizer.step()
    after = quantizer(features)
    assert len(before.indices.unique()) < 16 == len(after.indices.unique())
    assert after.losses["sample_entropy"] < 0.1 * before.losses["sample_entropy"]


def test_a_residual_stack_of_stages_halves_the_error_each_time():
    quantizer = LFQ(3).eval()
    rest = torch.rand(1, 3, 1000) * 4 - 2
    scale = 1.0
    for stage in range(6):
        assert rest.abs().max() <= quantizer.stage_limits[0] * 0.5**stage
        rest = rest - quantizer(rest / scale).codes * scale
        scale *= quantizer.stage_factors[0]


def test_a_temperature_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="temperature must be a positive number, got 0"):
        LFQ(4, temperature=0)
