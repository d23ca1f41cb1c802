"""Tools on trained codebooks: what clusters must be, whatever k-means finds."""

import itertools

import pytest
import torch

import vistok
from vistok.decoder import CNNDecoder
from vistok.encoder import CNNEncoder
from vistok.quantizer import FSQ, Identity, VectorQuantizer
from vistok.quantizer.clustering import (
    coarse_to_fine,
    fit_codebook,
    recluster,
    reduce_codebook,
    with_quantizer,
)


def distortion(codebook, weights, centres, labels):
    return (weights.double() * (codebook.double() - centres.double()[labels]).square().sum(-1)).sum().item()


def best_partition(codebook, weights, size):
    """The least distortion of all partitions, tried one by one."""
    best = float("inf")
    for labels in itertools.product(range(size), repeat=len(codebook)):
        labels = torch.tensor(labels)
        if len(labels.unique()) == size:
            one_hot = torch.eye(size, dtype=torch.float64)[labels] * weights.double().unsqueeze(-1)
            centres = one_hot.T @ codebook.double() / one_hot.sum(0).unsqueeze(-1)
            best = min(best, distortion(codebook, weights, centres, labels))
    return best


def blobs(count=5, each=40, dim=3):
    centres = torch.randn(count, dim) * 10
    return (centres.unsqueeze(1) + 0.1 * torch.randn(count, each, dim)).flatten(0, 1), centres


def make_tokenizer(quantizer, projection="linear", dim=32):
    parts = CNNEncoder(base_channels=dim, num_blocks=1), quantizer, CNNDecoder(base_channels=dim, num_blocks=1)
    return vistok.Tokenizer(*parts, projection=projection, preprocessing={"size": [16, 16]}).eval()


def images(count=4):
    return torch.rand(count, 3, 16, 16) * 2 - 1


def test_well_separated_clusters_are_found():
    codebook, _ = blobs()
    clusters = recluster(codebook, 5)
    assert [len(part.unique()) for part in clusters.labels.split(40)] == [1] * 5
    assert clusters.labels.unique().tolist() == list(range(5))


def test_every_centre_is_the_weighted_mean_of_its_codes_and_every_code_is_with_its_nearest_centre():
    codebook, weights = torch.randn(200, 4), torch.rand(200)
    centres, labels = recluster(codebook, 12, weights)
    for cluster in range(12):
        share = weights[labels == cluster].double()
        mean = (share.unsqueeze(-1) * codebook[labels == cluster].double()).sum(0) / share.sum()
        torch.testing.assert_close(centres[cluster].double(), mean, rtol=1e-5, atol=1e-6)
    assert torch.equal(labels, torch.cdist(codebook.double(), centres.double()).argmin(-1))


def test_the_best_of_several_seeds_is_the_best_of_all_partitions():
    codebook, weights = torch.randn(7, 2), torch.rand(7) + 0.1
    found = min(distortion(codebook, weights, *recluster(codebook, 3, weights, seed=seed)) for seed in range(40))
    assert found == pytest.approx(best_partition(codebook, weights, 3), rel=1e-5)


def test_integer_weights_equal_repeated_codes():
    codebook, counts = torch.randn(30, 3), torch.randint(1, 5, (30,))
    weighted = [distortion(codebook, counts, *recluster(codebook, 4, counts, seed=seed)) for seed in range(10)]
    repeated = codebook.repeat_interleave(counts, 0)
    ones = torch.ones(len(repeated))
    again = [distortion(repeated, ones, *recluster(repeated, 4, seed=seed)) for seed in range(10)]
    assert min(weighted) == pytest.approx(min(again), rel=1e-5)


def test_codes_of_weight_zero_have_a_label_but_move_nothing():
    codebook, _ = blobs(3, 20)
    weights = torch.ones(80)
    weights[60:] = 0
    far = torch.cat([codebook, torch.full((20, 3), 1e3)])
    clusters = recluster(far, 3, weights)
    torch.testing.assert_close(clusters.codebook, recluster(codebook, 3).codebook)
    assert len(clusters.labels) == 80


def test_as_many_clusters_as_codes_are_the_codes():
    codebook = torch.randn(17, 3)
    clusters = recluster(codebook, 17)
    torch.testing.assert_close(clusters.codebook[clusters.labels], codebook)


def test_equal_codes_share_a_cluster_and_leave_none_empty():
    codebook = torch.randn(6, 3).repeat(4, 1)
    clusters = recluster(codebook, 6)
    assert sorted(clusters.labels.unique().tolist()) == list(range(6))
    torch.testing.assert_close(clusters.codebook[clusters.labels], codebook)
    with pytest.raises(ValueError, match="7 clusters need at least as many distinct codes that are used, got 6"):
        recluster(codebook, 7)


def test_a_cluster_that_loses_all_its_codes_starts_again_at_the_worst_fit():
    from vistok.quantizer.clustering import _means

    rows = torch.tensor([[0.0], [1.0], [9.0]])
    means = _means(rows, torch.ones(3, dtype=torch.float64), torch.tensor([0, 0, 0]), torch.zeros(2, 1))
    assert means.flatten().tolist() == pytest.approx([10 / 3, 9.0])


def test_the_seed_decides_and_the_global_random_state_is_left_alone():
    codebook = torch.randn(100, 4)
    state = torch.get_rng_state()
    first, again, other = (recluster(codebook, 10, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.codebook, again.codebook)
    assert not torch.equal(first.codebook, other.codebook)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("codebook", "arguments", "message"),
    [
        (torch.zeros(3), {"size": 2}, r"finite float table \(K, d\), got torch.float32 \(3,\)"),
        (torch.full((4, 2), torch.nan), {"size": 2}, "finite float table"),
        (torch.arange(8.0).view(4, 2), {"size": 5}, "5 clusters need .* got 4"),
        (torch.arange(8.0).view(4, 2), {"size": 0}, "size must be at least 1, got 0"),
        (torch.arange(8.0).view(4, 2), {"size": 2, "iterations": 0}, "iterations must be at least 1, got 0"),
        (torch.arange(8.0).view(4, 2), {"size": 2, "weights": [1, 1]}, r"weights must be 4 .* got \(2,\)"),
        (torch.arange(8.0).view(4, 2), {"size": 2, "weights": [1, 1, 1, -1]}, "not negative"),
        (torch.arange(8.0).view(4, 2), {"size": 2, "weights": [0, 0, 0, 1]}, "2 clusters need .* used, got 1"),
    ],
)
def test_wrong_arguments_of_a_reclustering_are_named(codebook, arguments, message):
    with pytest.raises(ValueError, match=message):
        recluster(codebook, **arguments)


def test_coarser_clusters_are_unions_of_finer_ones():
    codebook, weights = torch.randn(150, 4), torch.rand(150)
    sizes = [8, 64, 3]
    nested = dict(zip(sizes, coarse_to_fine(codebook, sizes, weights), strict=True))
    for size, (centres, labels) in nested.items():
        assert labels.unique().tolist() == list(range(size))
        for cluster in range(size):
            inside = labels == cluster
            mean = (weights[inside, None] * codebook[inside]).sum(0) / weights[inside].sum()
            torch.testing.assert_close(centres[cluster], mean, rtol=1e-4, atol=1e-5)
    for coarse, fine in ((3, 8), (8, 64)):
        pairs = torch.stack([nested[fine].labels, nested[coarse].labels], -1).unique(dim=0)
        assert len(pairs) == fine


def test_sizes_of_nested_clusters_differ():
    with pytest.raises(ValueError, match=r"all be different, got \[4, 4\]"):
        coarse_to_fine(torch.randn(9, 2), [4, 4])


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_a_reduced_codebook_is_that_of_the_clusters_and_never_changes(distance):
    quantizer = VectorQuantizer(64, 4, distance=distance)
    reduced = reduce_codebook(quantizer, 8)
    expected = recluster(quantizer.codebook.detach(), 8).codebook
    if distance == "cosine":
        expected = torch.nn.functional.normalize(expected, dim=-1)
    torch.testing.assert_close(reduced.codebook, expected)
    assert reduced.bits == 3
    assert reduced.training
    reduced(torch.randn(2, 4, 5))
    reduced.update()
    torch.testing.assert_close(reduced.codebook, expected)
    assert not list(reduced.parameters())


def test_codes_that_are_not_compared_with_features_cannot_be_reduced():
    with pytest.raises(ValueError, match=r"only the codebook of a VectorQuantizer .* got FSQ"):
        reduce_codebook(FSQ((5, 5)), 4)


def test_a_reduced_tokenizer_is_saved_and_loaded_and_leaves_the_original_as_it_was(tmp_path):
    tokenizer = make_tokenizer(VectorQuantizer(64, 4))
    before = {name: tensor.clone() for name, tensor in tokenizer.state_dict().items()}
    reduced = reduce_codebook(tokenizer, 8, weights=torch.rand(64))
    batch = images()
    assert reduced.vocab_size == 8
    assert torch.equal(reduced(batch).features, tokenizer(batch).features)
    loaded = vistok.load(vistok.save(reduced, tmp_path / "bundle"))
    assert torch.equal(loaded.encode(batch).indices, reduced.encode(batch).indices)
    for tensor in reduced.state_dict().values():
        tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tokenizer.state_dict().items())


def test_fewer_codes_cost_quality_and_rate_step_by_step():
    features = torch.randn(4, 4, 16, 16)
    quantizer = fit_codebook(features, 256)
    errors, bits = [], []
    for size in (128, 32, 8, 2):
        reduced = reduce_codebook(quantizer, size).eval()
        errors.append((reduced(features).codes - features).square().mean().item())
        bits.append(reduced.total_bits((16, 16)))
    assert errors == sorted(errors)
    assert bits == [7 * 256, 5 * 256, 3 * 256, 256]


def test_a_fitted_codebook_is_near_every_latent():
    rows, _ = blobs(6, 50, dim=4)
    features = rows.T.reshape(1, 4, 15, 20)
    quantizer = fit_codebook(features, 6).eval()
    assert (quantizer(features).codes - features).abs().max() < 1
    assert not list(quantizer.parameters())


def test_batches_of_latents_give_the_codebook_of_all_at_once():
    features = torch.randn(6, 3, 4, 5)
    whole = fit_codebook(features, 7)
    streamed = fit_codebook((batch for batch in features.split(2)), 7)
    assert torch.equal(whole.codebook, streamed.codebook)


def test_of_many_latents_a_uniform_draw_is_clustered():
    # As many codes as kept features: the codebook is the draw itself.
    features = torch.arange(200.0).view(4, 1, 50)
    draws = torch.stack(
        [fit_codebook(features.split(1), 20, max_features=20, seed=seed).codebook for seed in range(60)]
    )
    assert all(len(draw.unique()) == 20 for draw in draws)
    counts = torch.bincount(draws.flatten().long(), minlength=200)
    assert counts.sum() == 1200
    # 60 draws of a tenth: 6 +- 2.3 each.
    assert 0 < counts.float().var() < 2 * 60 * 0.1 * 0.9
    assert counts.max() <= 18


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.randn(3, 4), r"features must be \(b, d, \*grid\) with one d, got \(3, 4\)"),
        ([torch.randn(1, 4, 8), torch.randn(1, 3, 8)], r"with one d, got \(1, 3, 8\)"),
        ([], "there are no features"),
        (torch.randn(1, 4, 3), "5 clusters need .* got 3"),
    ],
)
def test_wrong_latents_are_named(features, message):
    with pytest.raises(ValueError, match=message):
        fit_codebook(features, 5)


def test_a_continuous_tokenizer_becomes_a_discrete_one(tmp_path):
    autoencoder = make_tokenizer(Identity(4))
    batch = images(8)
    tokenizer = with_quantizer(autoencoder, fit_codebook(autoencoder.encode(batch).codes.detach(), 16))
    loaded = vistok.load(vistok.save(tokenizer, tmp_path / "bundle"))
    assert loaded.vocab_size == 16
    quantized = loaded.encode(batch)
    assert torch.equal(loaded.decode_indices(quantized.indices), loaded.decode(quantized.codes))
    assert not tokenizer.training


def test_a_quantizer_of_another_dim_does_not_fit():
    with pytest.raises(ValueError, match="codes of dim 4, the quantizer of 2"):
        with_quantizer(make_tokenizer(Identity(4)), FSQ((5, 5)))
