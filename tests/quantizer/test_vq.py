"""Vector quantization by moving averages against its formulas."""

import pytest
import torch

from vistok.quantizer import VectorQuantizer


def rows_to_features(rows):
    return rows.T.unsqueeze(0)


def test_indices_equal_a_brute_force_search_in_double_precision():
    quantizer = VectorQuantizer(50, 4, init="normal").eval()
    rows = torch.randn(300, 4)
    distances = (rows.double()[:, None] - quantizer.codebook.double()[None]).square().sum(-1)
    assert torch.equal(quantizer(rows_to_features(rows)).indices[0], distances.argmin(-1))


def test_an_update_is_that_of_appendix_a1():
    quantizer = VectorQuantizer(5, 3, decay=0.9, eps=1e-5, init="normal", revive_below=0).train()
    table = quantizer.codebook.clone().double()
    sizes, sums = torch.ones(5).double(), table.clone()
    for _ in range(3):
        rows = torch.randn(20, 3)
        for_each_row = (rows.double()[:, None] - table[None]).square().sum(-1).argmin(-1)
        counts = torch.zeros(5).double()
        totals = torch.zeros(5, 3).double()
        for row, index in zip(rows.double(), for_each_row.tolist(), strict=True):
            counts[index] += 1
            totals[index] += row
        sizes = 0.9 * sizes + 0.1 * counts
        sums = 0.9 * sums + 0.1 * totals
        smoothed = (sizes + 1e-5) / (sizes.sum() + 5e-5) * sizes.sum()
        table = sums / smoothed[:, None]
        quantizer(rows_to_features(rows))
        quantizer.update()
    torch.testing.assert_close(quantizer.codebook.double(), table, rtol=1e-5, atol=1e-5)


def test_the_batches_of_an_accumulated_step_count_as_one_batch():
    rows = torch.randn(40, 3)
    one, two = (VectorQuantizer(8, 3, init="normal").train() for _ in range(2))
    one(rows_to_features(rows))
    two(rows_to_features(rows[:25]))
    two(rows_to_features(rows[25:]))
    one.update()
    two.update()
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], tensor)


def test_unused_codes_never_explode():
    quantizer = VectorQuantizer(64, 2, init="normal", revive_below=0).train()
    for _ in range(50):
        quantizer(rows_to_features(torch.randn(4, 2) * 0.1 + 5))
        quantizer.update()
    assert quantizer.codebook.abs().max() < 10


def test_dead_codes_are_revived_at_features_of_the_batch_and_stay():
    quantizer = VectorQuantizer(16, 2, decay=0.5, init="normal", revive_below=0.2).train()
    with torch.no_grad():
        quantizer.table[8:] += 100
        quantizer.table_sum[8:] += 100
    rows = torch.randn(200, 2)
    for _ in range(12):
        quantizer(rows_to_features(rows))
        quantizer.update()
    assert quantizer.codebook.abs().max() < 5
    assert len(quantizer.eval()(rows_to_features(rows)).indices.unique()) >= 14


def test_the_commitment_loss_moves_the_features_only():
    quantizer = VectorQuantizer(8, 3, init="normal").train()
    features = torch.randn(1, 3, 10, requires_grad=True)
    quantized = quantizer(features)
    loss = quantized.losses["commitment"]
    codes = quantizer.indices_to_codes(quantized.indices)
    assert loss.item() == pytest.approx((features - codes).square().mean().item())
    loss.backward()
    torch.testing.assert_close(features.grad, 2 * (features.detach() - codes) / features.numel())
    assert not list(quantizer.parameters())


def test_the_gradient_goes_straight_through():
    quantizer = VectorQuantizer(8, 3, init="normal").train()
    features = torch.randn(1, 3, 10, requires_grad=True)
    weights = torch.randn(1, 3, 10)
    (quantizer(features).codes * weights).sum().backward()
    assert torch.equal(features.grad, weights)


def test_batch_initialisation_copies_features_of_the_first_batch():
    quantizer = VectorQuantizer(8, 3, init="batch").train()
    rows = torch.randn(30, 3)
    quantizer(rows_to_features(rows))
    assert all((rows == code).all(-1).any() for code in quantizer.codebook)
    assert len(quantizer.codebook.unique(dim=0)) == 8


def test_batch_initialisation_works_with_fewer_features_than_codes():
    quantizer = VectorQuantizer(64, 3, init="batch").train()
    quantizer(torch.randn(1, 3, 10))
    assert torch.isfinite(quantizer.codebook).all()
    assert bool(quantizer.initialised)


def test_kmeans_initialisation_finds_separate_clusters():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    rows = (centres[torch.arange(400) % 4] + 0.1 * torch.randn(400, 2))[torch.randperm(400)]
    quantizer = VectorQuantizer(16, 2, init="kmeans").train()
    quantizer(rows_to_features(rows))
    nearest = torch.cdist(centres, quantizer.codebook).amin(-1)
    assert nearest.max() < 0.2


def test_kmeans_with_too_few_features_says_what_to_change():
    quantizer = VectorQuantizer(64, 3, init="kmeans").train()
    with pytest.raises(
        ValueError, match=r"at least codebook_size = 64 .* got 10: raise data.batch_size, or set quantizer.init=batch"
    ):
        quantizer(torch.randn(1, 3, 10))


def test_an_initialised_codebook_is_not_initialised_again_after_loading():
    quantizer = VectorQuantizer(8, 3, init="batch").train()
    quantizer(torch.randn(1, 3, 30))
    other = VectorQuantizer(8, 3, init="batch").train()
    other.load_state_dict(quantizer.state_dict())
    other(torch.randn(1, 3, 30))
    assert torch.equal(other.codebook, quantizer.codebook)


def test_random_choices_leave_the_global_random_state_alone():
    quantizer = VectorQuantizer(64, 3, init="batch", revive_below=0.5).train()
    features = torch.randn(1, 3, 100)
    before = torch.get_rng_state()
    for _ in range(3):
        quantizer(features)
        quantizer.update()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"codebook_size": 1}, "codebook_size must be an integer of at least 2, got 1"),
        ({"dim": 0}, "dim must be an integer of at least 1, got 0"),
        ({"decay": 1.0}, r"decay must lie in \[0, 1\), got 1.0"),
        ({"revive_below": 2}, "revive_below is a share of uniform usage"),
        ({"init": "zeros"}, "init must be one of normal, batch, kmeans; got 'zeros'"),
    ],
)
def test_impossible_arguments_are_errors_that_say_what_is_allowed(arguments, message):
    from vistok import build

    config = {"_target_": "vistok.quantizer.VectorQuantizer", "codebook_size": 8, "dim": 2, **arguments}
    with pytest.raises(ValueError, match=message):
        build(config)
