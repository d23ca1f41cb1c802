"""Vector quantization against its formulas, choice by choice."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from safetensors.torch import save_file

from vistok.quantizer import DualVectorQuantizer, VectorQuantizer


def ema(codebook_size, dim, **arguments):
    return VectorQuantizer(codebook_size, dim, table="ema", **arguments)


def rows_to_features(rows):
    return rows.T.unsqueeze(0)


def test_indices_equal_a_brute_force_search_in_double_precision():
    quantizer = ema(50, 4).eval()
    rows = torch.randn(300, 4)
    distances = (rows.double()[:, None] - quantizer.codebook.double()[None]).square().sum(-1)
    assert torch.equal(quantizer(rows_to_features(rows)).indices[0], distances.argmin(-1))


def test_an_update_is_that_of_appendix_a1():
    quantizer = ema(5, 3, decay=0.9, eps=1e-5).train()
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
    one, two = (ema(8, 3).train() for _ in range(2))
    one(rows_to_features(rows))
    two(rows_to_features(rows[:25]))
    two(rows_to_features(rows[25:]))
    one.update()
    two.update()
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], tensor)


def test_unused_codes_never_explode():
    quantizer = ema(64, 2).train()
    for _ in range(50):
        quantizer(rows_to_features(torch.randn(4, 2) * 0.1 + 5))
        quantizer.update()
    assert quantizer.codebook.abs().max() < 10


def test_dead_codes_are_revived_at_features_of_the_batch_and_stay():
    quantizer = ema(16, 2, decay=0.5, revival="random", revive_below=0.2).train()
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
    quantizer = ema(8, 3).train()
    features = torch.randn(1, 3, 10, requires_grad=True)
    quantized = quantizer(features)
    loss = quantized.losses["commitment"]
    codes = quantizer.indices_to_codes(quantized.indices)
    assert loss.item() == pytest.approx((features - codes).square().mean().item())
    loss.backward()
    torch.testing.assert_close(features.grad, 2 * (features.detach() - codes) / features.numel())
    assert not list(quantizer.parameters())


def test_the_gradient_goes_straight_through():
    quantizer = ema(8, 3).train()
    features = torch.randn(1, 3, 10, requires_grad=True)
    weights = torch.randn(1, 3, 10)
    (quantizer(features).codes * weights).sum().backward()
    assert torch.equal(features.grad, weights)


def test_batch_initialisation_copies_features_of_the_first_batch():
    quantizer = ema(8, 3, init="batch").train()
    rows = torch.randn(30, 3)
    quantizer(rows_to_features(rows))
    assert all((rows == code).all(-1).any() for code in quantizer.codebook)
    assert len(quantizer.codebook.unique(dim=0)) == 8


def test_batch_initialisation_works_with_fewer_features_than_codes():
    quantizer = ema(64, 3, init="batch").train()
    quantizer(torch.randn(1, 3, 10))
    assert torch.isfinite(quantizer.codebook).all()
    assert bool(quantizer.initialised)


def test_kmeans_initialisation_finds_separate_clusters():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    rows = (centres[torch.arange(400) % 4] + 0.1 * torch.randn(400, 2))[torch.randperm(400)]
    quantizer = ema(16, 2, init="kmeans").train()
    quantizer(rows_to_features(rows))
    nearest = torch.cdist(centres, quantizer.codebook).amin(-1)
    assert nearest.max() < 0.2


def test_kmeans_with_too_few_features_says_what_to_change():
    quantizer = ema(64, 3, init="kmeans").train()
    with pytest.raises(
        ValueError, match=r"at least codebook_size = 64 .* got 10: raise data.batch_size, or set quantizer.init=batch"
    ):
        quantizer(torch.randn(1, 3, 10))


def test_an_initialised_codebook_is_not_initialised_again_after_loading():
    quantizer = ema(8, 3, init="batch").train()
    quantizer(torch.randn(1, 3, 30))
    other = ema(8, 3, init="batch").train()
    other.load_state_dict(quantizer.state_dict())
    other(torch.randn(1, 3, 30))
    assert torch.equal(other.codebook, quantizer.codebook)


def test_random_choices_leave_the_global_random_state_alone():
    quantizer = ema(64, 3, init="batch", revival="random", revive_below=0.5).train()
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
        ({"table": "ema", "decay": 1.0}, r"decay must lie in \[0, 1\), got 1.0"),
        ({"revival": "random", "revive_below": 2}, "revive_below is a share of uniform usage"),
        (
            {"init": "zeros"},
            "init must be one of normal, scaled_normal, sphere, uniform, batch, kmeans, file; got 'zeros'",
        ),
        ({"distance": "manhattan"}, "distance must be one of euclidean, cosine, dot, linear; got 'manhattan'"),
        ({"decay": 0.9}, "decay=0.9 has no effect without table=ema or a revival: choose that, or write decay=null"),
        ({"decay": 0}, "decay=0 has no effect without table=ema or a revival"),
        ({"projection_bias": False}, "projection_bias=False has no effect without projection=linear"),
        ({"table": "ema", "codebook_weight": 1.0}, "codebook_weight=1.0 has no effect without table=learned or a"),
        ({"temperature": 0.5}, "temperature=0.5 has no effect without gradient=soft"),
        ({"gradient": "soft", "temperature": -1}, "temperature must be positive, got -1"),
        ({"table_dim": 4}, "table_dim=4 has no effect without projection=linear"),
        ({"init": "file"}, "init=file needs codebook_file=PATH"),
        ({"gradient": "soft", "assignment": "sinkhorn"}, "gradient=soft needs the scores of every code"),
        ({"gradient": "soft", "table": "ema"}, "use table=learned"),
        ({"distance": "linear"}, "gradient=soft only"),
        ({"projection": "linear", "table": "ema"}, "cannot be written into a table behind a projection"),
        ({"projection": "linear", "revival": "random"}, "cannot be written into a table behind a projection"),
        ({"projection": "linear", "table_dim": 3, "init": "kmeans"}, "fills the table with features"),
        ({"projection": "bridge"}, "codebook_size 8 is no multiple of bridge_patch"),
        ({"projection": "bridge", "bridge_patch": 1, "bridge_width": 6}, "bridge_width 6 must be a multiple"),
    ],
)
def test_impossible_arguments_are_errors_that_say_what_is_allowed(arguments, message):
    from vistok import build

    config = {"_target_": "vistok.quantizer.VectorQuantizer", "codebook_size": 8, "dim": 2, **arguments}
    with pytest.raises(ValueError, match=message):
        build(config)


def brute_force_distances(rows, codebook):
    return (rows.double()[:, None] - codebook.double()[None]).square().sum(-1)


def run(quantizer, rows):
    """Codes and indices as rows, and the losses."""
    quantized = quantizer(rows_to_features(rows))
    return quantized.codes[0].T, quantized.indices[0], quantized.losses


def test_the_learned_losses_are_equation_3_and_move_what_it_says():
    quantizer = VectorQuantizer(8, 3).train()
    rows = torch.randn(20, 3, requires_grad=True)
    _, indices, losses = run(quantizer, rows)
    codes = quantizer.table[indices]
    assert losses.keys() == {"commitment", "codebook"}
    for loss in losses.values():
        torch.testing.assert_close(loss, (rows - codes).square().mean())
    losses["commitment"].backward(retain_graph=True)
    assert quantizer.table.grad is None
    torch.testing.assert_close(rows.grad, 2 * (rows - codes).detach() / rows.numel())
    rows.grad = None
    losses["codebook"].backward()
    assert rows.grad is None
    expected = torch.zeros(8, 3).index_add(0, indices, (2 * (codes - rows) / rows.numel()).detach())
    torch.testing.assert_close(quantizer.table.grad, expected)


def test_the_decoder_does_not_move_the_codebook_with_straight_through():
    quantizer = VectorQuantizer(8, 3).train()
    rows = torch.randn(20, 3, requires_grad=True)
    run(quantizer, rows)[0].square().sum().backward()
    assert quantizer.table.grad is None


def test_cosine_quantization_lives_on_the_unit_sphere():
    quantizer = VectorQuantizer(16, 4, distance="cosine", init="uniform").eval()
    rows = 3 * torch.randn(50, 4)
    codes, indices, losses = run(quantizer, rows)
    similarity = F.normalize(rows.double(), dim=-1) @ F.normalize(quantizer.table.double(), dim=-1).T
    assert torch.equal(indices, similarity.argmax(-1))
    torch.testing.assert_close(codes.norm(dim=-1), torch.ones(50))
    expected = (F.normalize(rows, dim=-1) - codes).square().mean()
    torch.testing.assert_close(losses["commitment"], expected)


def test_cosine_assignment_can_keep_the_lengths_of_the_codes():
    quantizer = VectorQuantizer(16, 4, distance="cosine", unit_norm="none").eval()
    rows = torch.randn(50, 4)
    codes, indices, _ = run(quantizer, rows)
    similarity = F.normalize(rows.double(), dim=-1) @ F.normalize(quantizer.table.double(), dim=-1).T
    assert torch.equal(indices, similarity.argmax(-1))
    assert torch.equal(codes, quantizer.table[indices])


def test_dot_product_takes_the_largest_product():
    quantizer = VectorQuantizer(16, 4, distance="dot").eval()
    rows = torch.randn(50, 4)
    assert torch.equal(run(quantizer, rows)[1], (rows.double() @ quantizer.table.double().T).argmax(-1))


def test_a_projected_codebook_is_what_indices_decode_to():
    # The first SimVQ release looked up the table without its projection.
    quantizer = VectorQuantizer(16, 4, table="frozen", projection="linear", table_dim=6, init="scaled_normal").eval()
    indices = torch.arange(16).unsqueeze(0)
    expected = quantizer.table @ quantizer.projection.weight.T + quantizer.projection.bias
    torch.testing.assert_close(quantizer.indices_to_codes(indices)[0].T, expected)
    torch.testing.assert_close(quantizer.codebook, expected)


def test_only_the_projection_of_a_frozen_table_learns():
    quantizer = VectorQuantizer(16, 4, table="frozen", projection="linear").train()
    _, _, losses = run(quantizer, torch.randn(30, 4))
    losses["codebook"].backward()
    assert [name for name, _ in quantizer.named_parameters()] == ["projection.weight", "projection.bias"]
    assert all(parameter.grad.abs().sum() > 0 for parameter in quantizer.parameters())


def test_the_codebook_follows_a_change_of_its_projection():
    quantizer = VectorQuantizer(16, 4, table="frozen", projection="linear").eval()
    before = quantizer.codebook.clone()
    with torch.no_grad():
        quantizer.projection.weight.mul_(2)
    assert not torch.equal(quantizer.codebook, before)
    state = {name: torch.zeros_like(value) for name, value in quantizer.state_dict().items()}
    quantizer.load_state_dict(state)
    assert not quantizer.codebook.any()


def test_the_codebook_can_be_used_in_training_after_it_was_made_in_inference_mode():
    quantizer = VectorQuantizer(16, 4, distance="cosine").eval()
    with torch.inference_mode():
        codebook = quantizer.codebook
    weight = torch.ones(4, requires_grad=True)
    (quantizer.codebook * weight).sum().backward()
    assert torch.equal(codebook, quantizer.codebook)


def test_the_bridge_moves_every_code_and_starts_at_zero():
    quantizer = VectorQuantizer(64, 4, projection="bridge", bridge_patch=2, bridge_width=16).train()
    assert not quantizer.codebook.any()
    optimizer = torch.optim.Adam(quantizer.parameters(), 1e-2)
    for step in range(3):
        optimizer.zero_grad()
        run(quantizer, torch.randn(30, 4))[2]["codebook"].backward()
        assert bool(quantizer.table.grad.any()) == (step > 0)
        optimizer.step()
    assert (quantizer.table.grad.abs().sum(-1) > 0).all()


def test_the_bridge_of_the_paper_has_its_number_of_parameters():
    quantizer = VectorQuantizer(16384, 256, projection="bridge", bridge_patch=4, bridge_width=256)
    assert sum(parameter.numel() for parameter in quantizer.projection.parameters()) == 3_153_664


def test_the_bridge_lays_the_table_out_as_an_image():
    from vistok.quantizer.bridge import VQBridge

    bridge = VQBridge(24, 2, patch=2, width=8, depth=1, heads=2)
    bridge.norm, bridge.blocks = torch.nn.Identity(), torch.nn.Identity()
    bridge.embed, bridge.head = torch.nn.Identity(), torch.nn.Identity()
    table = torch.randn(24, 2)
    assert torch.equal(bridge(table), table)
    assert bridge.rows == 2


def dense_soft_one_hot(rows, codebook, logits):
    soft = logits.softmax(-1)
    hard = F.one_hot(logits.argmax(-1), logits.shape[-1]).to(soft)
    return (hard - soft.detach() + soft) @ codebook


def test_index_backpropagation_has_the_gradients_of_the_dense_formula():
    arguments = {"distance": "dot", "gradient": "soft", "soft_weight": 1.0, "commitment_weight": 1.0}
    quantizer = VectorQuantizer(24, 4, codebook_weight=0.25, **arguments).train()
    rows = torch.randn(30, 4, requires_grad=True)
    target = torch.randn(30, 4)
    codes, indices, losses = run(quantizer, rows)
    total = (codes * target).sum() + sum(quantizer.loss_weights[name] * loss for name, loss in losses.items())
    total.backward()

    z = rows.detach().double().requires_grad_()
    table = quantizer.table.detach().double().requires_grad_()
    logits = z @ table.T
    soft_codes = dense_soft_one_hot(z, table, logits)
    hard = table[logits.argmax(-1)]
    mse = F.mse_loss
    expected = (soft_codes * target).sum() + mse(soft_codes, z) + mse(hard.detach(), z) + 0.25 * mse(hard, z.detach())
    expected.backward()
    assert torch.equal(indices, logits.argmax(-1))
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows.grad.double(), z.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quantizer.table.grad.double(), table.grad, rtol=1e-4, atol=1e-5)
    assert (quantizer.table.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("distance", ["euclidean", "cosine", "dot"])
def test_the_entropies_are_those_of_the_dense_softmax(distance):
    quantizer = VectorQuantizer(24, 4, distance=distance, entropy_weight=0.1, entropy_temperature=0.5).train()
    rows = torch.randn(30, 4, requires_grad=True)
    losses = run(quantizer, rows)[2]
    weights = quantizer.loss_weights
    assert (weights["sample_entropy"], weights["batch_entropy"]) == (0.1, -0.1)
    (0.1 * losses["sample_entropy"] - 0.1 * losses["batch_entropy"]).backward()

    z = rows.detach().double().requires_grad_()
    table = quantizer.table.detach().double().requires_grad_()
    x, e = (F.normalize(z, dim=-1), F.normalize(table, dim=-1)) if distance == "cosine" else (z, table)
    logits = x @ e.T if distance == "dot" else -(x[:, None] - e[None]).square().sum(-1)
    p = (logits / 0.5).softmax(-1)
    sample = -(p * p.log()).sum(-1).mean()
    mean = p.mean(0)
    batch = -(mean * mean.log()).sum()
    (0.1 * sample - 0.1 * batch).backward()
    torch.testing.assert_close(losses["sample_entropy"].double(), sample, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses["batch_entropy"].double(), batch, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows.grad.double(), z.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(quantizer.table.grad.double(), table.grad, rtol=1e-4, atol=1e-6)


def gumbel_quantizer(**arguments):
    return VectorQuantizer(
        16,
        4,
        distance="linear",
        assignment="gumbel",
        gradient="soft",
        commitment_weight=0,
        codebook_weight=0,
        prior_weight=5e-4,
        **arguments,
    )


def test_gumbel_sampling_draws_codes_with_the_probabilities_of_the_scores():
    quantizer = gumbel_quantizer().train()
    row = torch.randn(1, 4)
    indices = torch.cat([run(quantizer, row.expand(2000, 4))[1] for _ in range(5)])
    frequencies = torch.bincount(indices, minlength=16) / len(indices)
    torch.testing.assert_close(frequencies, quantizer.scores(row)[0].softmax(-1), atol=0.03, rtol=0)


def test_gumbel_evaluation_is_without_noise_and_by_the_scores():
    quantizer = gumbel_quantizer().eval()
    rows = torch.randn(40, 4)
    assert torch.equal(run(quantizer, rows)[1], quantizer.scores(rows).argmax(-1))


def test_the_gumbel_prior_is_the_divergence_from_uniform():
    quantizer = gumbel_quantizer().train()
    rows = torch.randn(40, 4)
    p = quantizer.scores(rows).double().softmax(-1)
    expected = (p * (p * 16).log()).sum(-1).mean()
    torch.testing.assert_close(run(quantizer, rows)[2]["prior"].double(), expected, rtol=1e-5, atol=1e-6)


def test_gumbel_gradients_reach_the_scores_the_codes_and_the_features():
    quantizer = gumbel_quantizer(temperature=0.7).train()
    rows = torch.randn(40, 4, requires_grad=True)
    (run(quantizer, rows)[0] * torch.randn(40, 4)).sum().backward()
    for tensor in (rows, quantizer.table, quantizer.scores.weight, quantizer.scores.bias):
        assert tensor.grad.abs().sum() > 0


def test_gumbel_noise_follows_the_global_random_state():
    quantizer = gumbel_quantizer().train()
    rows = torch.randn(40, 4)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(run(quantizer, rows)[1])
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_optimal_transport_spreads_features_that_share_a_nearest_code():
    quantizer = VectorQuantizer(16, 4, assignment="sinkhorn", init="normal").train()
    rows = 0.1 * torch.randn(160, 4) + quantizer.table[0].detach()
    spread = run(quantizer, rows)[1].unique()
    assert len(run(quantizer.eval(), rows)[1].unique()) < 4
    assert len(spread) >= 15


def test_anchors_are_the_closest_features_and_move_codes_by_equation_5():
    quantizer = VectorQuantizer(6, 3, distance="cosine", unit_norm="none", revival="anchor", decay=0.9).train()
    table = quantizer.table.detach().double().clone()
    usage = torch.zeros(6, dtype=torch.float64)
    for _ in range(3):
        rows = torch.randn(40, 3)
        similarity = F.normalize(rows.double(), dim=-1) @ F.normalize(table, dim=-1).T
        usage = 0.9 * usage + 0.1 * torch.bincount(similarity.argmax(-1), minlength=6) / 40
        share = torch.exp(-usage * 6 * 10 / 0.1 - 1e-3)[:, None]
        table = (1 - share) * table + share * rows.double()[similarity.argmax(0)]
        run(quantizer, rows)
        quantizer.update()
    torch.testing.assert_close(quantizer.table.double(), table, rtol=1e-5, atol=1e-5)


def test_revived_rows_of_a_learned_table_are_reported():
    quantizer = VectorQuantizer(16, 2, revival="random", decay=0.5, revive_below=0.2).train()
    with torch.no_grad():
        quantizer.table[8:] += 100
    before = quantizer.table.detach().clone()
    for _ in range(4):
        run(quantizer, torch.randn(200, 2))
        quantizer.update()
        ((parameter, rows),) = quantizer.touched_codes or [(quantizer.table, torch.empty(0, dtype=torch.int64))]
        if len(rows):
            break
    assert parameter is quantizer.table
    changed = (quantizer.table != before).any(-1).nonzero().squeeze(-1)
    assert torch.equal(rows, changed)
    assert set(range(8, 16)) <= set(rows.tolist())


def test_a_code_that_is_used_is_not_touched():
    quantizer = VectorQuantizer(4, 2, revival="random").train()
    run(quantizer, quantizer.table.detach().repeat(10, 1))
    quantizer.update()
    assert not quantizer.touched_codes


def test_vq_kd_averages_the_centroids_of_batches_on_the_sphere():
    quantizer = ema(6, 3, distance="cosine", average="centroids", decay=0.9).train()
    table = quantizer.table.double().clone()
    for _ in range(3):
        rows = torch.randn(20, 3)
        unit = F.normalize(rows.double(), dim=-1)
        indices = (unit @ table.T).argmax(-1)
        for code in range(6):
            chosen = unit[indices == code]
            centroid = F.normalize(chosen.mean(0), dim=0) if len(chosen) else table[code]
            table[code] = 0.9 * table[code] + 0.1 * centroid
        table = F.normalize(table, dim=-1)
        run(quantizer, rows)
        quantizer.update()
    torch.testing.assert_close(quantizer.codebook.double(), table, rtol=1e-5, atol=1e-5)


def test_orthogonality_is_the_mean_squared_cosine_of_pairs():
    quantizer = VectorQuantizer(6, 3, orthogonality_weight=1.0).train()
    unit = F.normalize(quantizer.table.detach().double(), dim=-1)
    expected = (unit @ unit.T).square().sum() / 36 - 1 / 6
    torch.testing.assert_close(run(quantizer, torch.randn(9, 3))[2]["orthogonality"].double(), expected)


def test_a_frozen_quantizer_changes_nothing():
    for quantizer in (ema(8, 3), VectorQuantizer(8, 3, projection="linear", assignment="sinkhorn")):
        quantizer.train().freeze()
        rows = torch.randn(30, 3, requires_grad=True)
        before = {name: value.clone() for name, value in quantizer.state_dict().items()}
        codes, _, losses = run(quantizer, rows)
        (codes.sum() + losses["commitment"]).backward()
        quantizer.update()
        assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())
        assert all(parameter.grad is None for parameter in quantizer.parameters())
        quantizer.freeze(False)
        assert all(parameter.requires_grad for parameter in quantizer.parameters())


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_a_codebook_file_becomes_the_table(tmp_path, suffix):
    rows = torch.randn(8, 5)
    path = tmp_path / f"clusters{suffix}"
    np.save(path, rows.numpy()) if suffix == ".npy" else save_file({"codebook": rows}, path)
    arguments = {"table": "frozen", "projection": "linear", "table_dim": 5, "init": "file", "codebook_file": str(path)}
    quantizer = VectorQuantizer(8, 3, **arguments).train()
    run(quantizer, torch.randn(4, 3))
    assert torch.equal(quantizer.table, rows)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.npy", "missing.npy does not exist"),
        ("table.pt", "must end in .safetensors or .npy, got table.pt"),
        ("table.npy", r"has shape \(7, 3\), but codebook_size and table_dim ask for \(8, 3\)"),
    ],
)
def test_a_codebook_file_that_does_not_fit_is_named(tmp_path, name, message):
    (tmp_path / "table.pt").touch()
    np.save(tmp_path / "table.npy", np.zeros((7, 3), np.float32))
    quantizer = VectorQuantizer(8, 3, table="frozen", init="file", codebook_file=str(tmp_path / name)).train()
    with pytest.raises(ValueError, match=message):
        run(quantizer, torch.randn(4, 3))


def test_the_codebook_of_a_projection_from_features_starts_as_features():
    quantizer = VectorQuantizer(8, 3, table="frozen", projection="linear", init="batch").train()
    rows = torch.randn(30, 3)
    run(quantizer, rows)
    assert torch.equal(quantizer.codebook, quantizer.table)
    assert all((rows == code).all(-1).any() for code in quantizer.codebook)


def test_a_dual_codebook_chooses_by_both_parts_and_returns_both():
    quantizer = DualVectorQuantizer(16, 5, semantic_dim=3, pixel_weight=2.0).eval()
    rows = torch.randn(40, 5)
    codes, indices, _ = run(quantizer, rows)
    parts = [(F.normalize(x.double()[:, a], dim=-1)) for x in (rows, quantizer.table) for a in (slice(3), slice(3, 5))]
    semantic, pixel, semantic_codes, pixel_codes = parts
    distances = (semantic[:, None] - semantic_codes[None]).square().sum(-1)
    distances += 2.0 * (pixel[:, None] - pixel_codes[None]).square().sum(-1)
    assert torch.equal(indices, distances.argmin(-1))
    expected = torch.cat([semantic_codes, pixel_codes], -1)[indices]
    torch.testing.assert_close(codes.double(), expected, rtol=1e-5, atol=1e-6)


def test_published_initial_tables_have_their_scale():
    assert VectorQuantizer(1000, 16, init="normal").table.detach().std() == pytest.approx(1, rel=0.02)
    assert VectorQuantizer(1000, 16, init="scaled_normal").table.detach().std() == pytest.approx(
        1 / math.sqrt(16), rel=0.02
    )
    assert VectorQuantizer(1000, 16, init="uniform").table.detach().abs().max() == pytest.approx(1 / 1000, rel=0.01)


def test_the_default_table_is_that_of_the_yaml():
    config = OmegaConf.load("configs/quantizer/vq.yaml")
    assert torch.equal(VectorQuantizer(16, 4).table, VectorQuantizer(16, 4, init=config.init).table)


def test_rare_codes_are_averages_with_smoothed_sizes():
    quantizer = ema(4, 2, decay=0.5, eps=0.3).train()
    table = quantizer.codebook.clone().double()
    run(quantizer, quantizer.codebook[:1].repeat(20, 1))
    quantizer.update()
    sizes = torch.tensor([10.5, 0.5, 0.5, 0.5], dtype=torch.float64)
    sums = 0.5 * table
    sums[0] += 0.5 * 20 * table[0]
    smoothed = (sizes + 0.3) / (12 + 4 * 0.3) * 12
    torch.testing.assert_close(quantizer.codebook.double(), sums / smoothed[:, None], rtol=1e-5, atol=1e-6)


def test_averages_continue_from_a_table_that_started_from_the_batch():
    quantizer = ema(4, 2, init="batch", decay=0.9).train()
    rows = torch.randn(30, 2)
    _, indices, _ = run(quantizer, rows)
    table = quantizer.codebook.clone()
    quantizer.update()
    chosen = F.one_hot(indices, 4).float()
    expected = (0.9 * table + 0.1 * chosen.T @ rows) / (0.9 + 0.1 * chosen.sum(0))[:, None]
    torch.testing.assert_close(quantizer.codebook, expected, rtol=1e-3, atol=1e-3)


def test_a_revived_code_stays_at_its_feature_while_it_waits_for_others():
    quantizer = ema(4, 2, decay=0.5, revival="random", revive_below=0.2).train()
    with torch.no_grad():
        for tensor in (quantizer.table, quantizer.table_sum):
            tensor.copy_(torch.tensor([[0.0, 0.0], [90.0, 0.0], [0.0, 90.0], [90.0, 90.0]]))
    rows = torch.randn(40, 2)
    run(quantizer, rows)
    quantizer.update()
    revived = quantizer.codebook[1:].clone()
    assert all((rows == code).all(-1).any() for code in revived)
    run(quantizer, quantizer.codebook[:1].repeat(40, 1))
    quantizer.update()
    torch.testing.assert_close(quantizer.codebook[1:], revived, rtol=1e-4, atol=1e-4)


def test_every_revival_draws_other_features():
    quantizer = VectorQuantizer(4, 2, revival="random", decay=0.0, revive_below=0.9).train()
    start, rows = torch.tensor([[0.0, 0.0], [90.0, 0.0], [0.0, 90.0], [90.0, 90.0]]), torch.randn(200, 2)
    revived = []
    for _ in range(2):
        with torch.no_grad():
            quantizer.table.copy_(start)
        run(quantizer, rows)
        quantizer.update()
        revived.append(quantizer.table[1:].detach().clone())
    assert not torch.equal(*revived)


def test_no_feature_revives_two_codes():
    quantizer = VectorQuantizer(16, 2, revival="random", decay=0.0, revive_below=0.9).train()
    run(quantizer, torch.randn(3, 2))
    quantizer.update()
    ((_, revived),) = quantizer.touched_codes
    assert len(revived) == len(quantizer.table[revived].unique(dim=0)) == 3


def test_an_update_without_features_reports_no_revived_rows():
    quantizer = VectorQuantizer(16, 2, revival="random", decay=0.0, revive_below=0.9).train()
    run(quantizer, torch.randn(30, 2))
    quantizer.update()
    assert quantizer.touched_codes
    quantizer.update()
    assert not quantizer.touched_codes


def test_averages_continue_from_codes_that_moved_to_anchors():
    quantizer = ema(6, 3, revival="anchor", decay=0.9, eps=1e-5).train()
    table = quantizer.codebook.double().clone()
    usage, sizes, sums = torch.zeros(6).double(), torch.ones(6).double(), table.clone()
    for _ in range(3):
        rows = torch.randn(40, 3)
        chosen = F.one_hot(brute_force_distances(rows, table).argmin(-1), 6).double()
        sizes, sums = 0.9 * sizes + 0.1 * chosen.sum(0), 0.9 * sums + 0.1 * chosen.T @ rows.double()
        table = sums / ((sizes + 1e-5) / (sizes.sum() + 6e-5) * sizes.sum())[:, None]
        usage = 0.9 * usage + 0.1 * chosen.sum(0) / 40
        share = torch.exp(-usage * 6 * 10 / 0.1 - 1e-3)[:, None]
        table = (1 - share) * table + share * rows.double()[brute_force_distances(rows, table).argmin(0)]
        sums = table * sizes[:, None]
        run(quantizer, rows)
        quantizer.update()
    torch.testing.assert_close(quantizer.codebook.double(), table, rtol=1e-5, atol=1e-5)


def test_a_state_that_was_never_initialised_starts_from_the_next_batch():
    quantizer = ema(8, 3, init="batch").train()
    for _ in range(2):
        run(quantizer, torch.randn(30, 3))
    quantizer.load_state_dict(ema(8, 3, init="batch").state_dict())
    rows = torch.randn(30, 3)
    run(quantizer, rows)
    assert all((rows == code).all(-1).any() for code in quantizer.codebook)


def test_the_weight_of_the_batch_entropy_is_negative_and_scaled_by_the_diversity():
    weights = VectorQuantizer(8, 3, entropy_weight=0.2, diversity=3.0).loss_weights
    assert weights == pytest.approx({"commitment": 0.25, "codebook": 1, "sample_entropy": 0.2, "batch_entropy": -0.6})


def test_the_prior_moves_the_codes_it_compares_with():
    quantizer = VectorQuantizer(8, 3, commitment_weight=0, codebook_weight=0, prior_weight=1.0).train()
    rows = torch.randn(20, 3, requires_grad=True)
    run(quantizer, rows)[2]["prior"].backward()
    z, table = rows.detach().double().requires_grad_(), quantizer.table.detach().double().requires_grad_()
    p = (-(z[:, None] - table[None]).square().sum(-1)).softmax(-1)
    (p * (p * 8).log()).sum(-1).mean().backward()
    torch.testing.assert_close(rows.grad.double(), z.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(quantizer.table.grad.double(), table.grad, rtol=1e-4, atol=1e-6)


def test_ranks_that_were_seeded_alike_draw_different_gumbel_noise(monkeypatch):
    quantizer = gumbel_quantizer().train()
    rows = torch.randn(40, 4)
    draws = []
    for rank in (0, 1):
        monkeypatch.setattr("vistok.distributed.rank", lambda rank=rank: rank)
        torch.manual_seed(0)
        draws.append(run(quantizer, rows)[1])
    assert not torch.equal(*draws)


def test_without_an_estimator_the_codes_have_no_gradient():
    quantizer = VectorQuantizer(8, 3, gradient="none").train()
    codes, indices, losses = run(quantizer, torch.randn(20, 3, requires_grad=True))
    assert not codes.requires_grad
    assert torch.equal(codes, quantizer.table[indices])
    assert losses["commitment"].requires_grad


def test_rows_that_moved_to_their_anchors_are_reported():
    quantizer = VectorQuantizer(4, 2, revival="anchor", decay=0.9).train()
    run(quantizer, quantizer.table[:1].detach().repeat(20, 1))
    quantizer.update()
    ((parameter, rows),) = quantizer.touched_codes
    assert parameter is quantizer.table
    assert rows.tolist() == [1, 2, 3]


@pytest.mark.parametrize("projection", ["linear", "bridge"])
def test_a_projected_codebook_is_the_same_under_autocast(projection):
    def make():
        patch = 2 if projection == "bridge" else None
        quantizer = VectorQuantizer(16, 4, projection=projection, bridge_patch=patch).eval()
        for parameter in quantizer.parameters():
            parameter.data.normal_(generator=torch.Generator().manual_seed(1))
        return quantizer

    indices = torch.arange(16).unsqueeze(0)
    expected = make().indices_to_codes(indices)
    # The first use computes what later ones find in the cache, so each starts anew.
    decoding, encoding = make(), make()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(decoding.indices_to_codes(indices), expected)
        assert torch.equal(encoding.codes_to_indices(expected), indices)


@pytest.mark.parametrize("init", ["batch", "kmeans"])
def test_the_table_that_the_first_rank_starts_from_holds(init, monkeypatch):
    first = torch.randn(8, 3)
    monkeypatch.setattr("vistok.distributed.broadcast", lambda tensor: tensor.copy_(first))
    quantizer = ema(8, 3, init=init).train()
    run(quantizer, torch.randn(30, 3))
    assert torch.equal(quantizer.table, first)
    assert torch.equal(quantizer.table_sum, first)


@pytest.mark.parametrize(
    "choices",
    [
        {"distance": "cosine"},
        {"table": "frozen", "projection": "linear"},
        {"projection": "bridge", "bridge_patch": 2, "bridge_width": 16},
    ],
)
def test_reading_the_codebook_under_autocast_keeps_it_in_full_precision(choices):
    quantizer = VectorQuantizer(16, 4, **choices).eval()
    with torch.autocast("cpu", torch.bfloat16):
        inside = quantizer.codebook
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, quantizer._project(quantizer.table).detach())


def test_the_tangential_rotation_alone_has_no_gradient_along_the_features():
    along = {}
    for gradient in ("rotation", "rotation_tangential"):
        rows = torch.randn(20, 3, requires_grad=True)
        (run(VectorQuantizer(8, 3, gradient=gradient).train(), rows)[0] * torch.randn(20, 3)).sum().backward()
        along[gradient] = F.cosine_similarity(rows, rows.grad).abs().max().item()
    assert along["rotation_tangential"] < 1e-4 < 0.1 < along["rotation"]
