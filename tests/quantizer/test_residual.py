"""Residual stacks against their formulas and the peer's."""

import copy
import itertools

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
import vector_quantize_pytorch as peer
from torch.utils.checkpoint import checkpoint

import vistok
from vistok.config import config_of
from vistok.quantizer import FSQ, LFQ, GroupedQuantizer, MultiScaleQuantizer, ResidualQuantizer, VectorQuantizer

LEARNED = {"_target_": "vistok.quantizer.VectorQuantizer", "table": "learned", "init": "normal"}
EMA = {"_target_": "vistok.quantizer.VectorQuantizer", "table": "ema", "init": "normal", "decay": 0.8}
SYMMETRIC = {"_target_": "vistok.quantizer.FSQ", "form": "symmetric", "bound": "clamp"}
BINARY = {"_target_": "vistok.quantizer.LFQ", "entropy_weight": 0.0}


def learned(depth=3, codebook_size=16, dim=4, template=LEARNED, **arguments):
    return ResidualQuantizer(template, depth, codebook_size=codebook_size, dim=dim, **arguments)


def rows_of(features):
    return features.movedim(1, -1).flatten(0, -2)


def tables(quantizer):
    return [quantizer.part(number).codebook.detach() for number in range(quantizer.count)]


def test_indices_and_codes_are_those_of_a_loop_over_the_stages():
    quantizer = learned().eval()
    features = torch.randn(2, 4, 3, 5)
    rest = rows_of(features).double()
    expected = []
    for table in tables(quantizer):
        nearest = [min(range(16), key=lambda k: (row - table[k]).square().sum()) for row in rest]
        expected.append(torch.tensor(nearest))
        rest = rest - table[expected[-1]].double()
    quantized = quantizer(features)
    assert quantized.indices.shape == (2, 3, 5, 3) == (2, *quantizer.indices_shape((3, 5)))
    assert torch.equal(quantized.indices.flatten(0, -2), torch.stack(expected, -1))
    torch.testing.assert_close(rows_of(quantized.codes).double(), rows_of(features) - rest, atol=1e-6, rtol=0)
    assert quantizer.codebook_sizes == (16, 16, 16)
    assert quantizer.bits == 12


def test_fsq_stages_are_those_of_a_loop_with_scales_that_shrink_by_the_levels():
    levels = torch.tensor([5.0, 4.0, 2.0], dtype=torch.float64)
    quantizer = ResidualQuantizer(SYMMETRIC, 3, levels=[5, 4, 2]).eval()
    features = 2 * torch.randn(300, 3, 1)
    limit = 1 + 1 / (levels - 1)
    rest = limit * torch.tanh(features[..., 0].double() / limit)
    expected = torch.zeros_like(rest)
    for stage in range(3):
        scale = levels**-stage
        digits = torch.floor((levels - 1) * ((rest / scale).clamp(-1, 1) + 1) / 2 + 0.5)
        code = (2 * digits / (levels - 1) - 1) * scale
        expected, rest = expected + code, rest - code
        # What is left spans the full range of the next stage, and never more.
        assert (rest.abs() <= limit * scale / levels + 1e-9).all()
    torch.testing.assert_close(quantizer(features).codes[..., 0].double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shared", [True, False])
def test_a_stack_of_tables_is_the_peers(shared):
    quantizer = learned(depth=4, shared=shared).eval()
    other = peer.ResidualVQ(dim=4, codebook_size=16, num_quantizers=4, shared_codebook=shared, rotation_trick=False)
    for layer, table in zip(other.layers, tables(quantizer), strict=True):
        layer._codebook.embed.data.copy_(table.unsqueeze(0))
        layer._codebook.initted.fill_(True)
    features = torch.randn(2, 4, 30)
    codes, indices, _ = other.eval()(features.movedim(1, -1))
    quantized = quantizer(features)
    assert torch.equal(quantized.indices, indices)
    torch.testing.assert_close(quantized.codes, codes.movedim(-1, 1))


def test_a_stack_of_fsq_is_the_peers():
    quantizer = ResidualQuantizer(SYMMETRIC, 4, levels=[8, 5, 5, 3]).eval()
    other = peer.ResidualFSQ(levels=[8, 5, 5, 3], num_quantizers=4, dim=4).eval()
    features = 2 * torch.randn(2, 4, 500)
    codes, indices = other(features.movedim(1, -1))
    quantized = quantizer(features)
    # A float at the edge between two levels may fall to either side.
    assert (quantized.indices == indices).float().mean() > 0.999
    torch.testing.assert_close(quantized.codes, codes.movedim(-1, 1), atol=8**-3 * 1.2, rtol=0)


def test_a_stack_of_lfq_is_the_peers():
    quantizer = ResidualQuantizer({**BINARY, "bit_order": "msb_first"}, 5, bits=4).eval()
    other = peer.ResidualLFQ(dim=4, codebook_size=16, num_quantizers=5).eval()
    features = 2 * torch.randn(2, 4, 100)
    codes, indices, _ = other((2 * torch.tanh(features / 2)).movedim(1, -1))
    quantized = quantizer(features)
    assert torch.equal(quantized.indices, indices)
    torch.testing.assert_close(quantized.codes, codes.movedim(-1, 1))


def stage_entropies(indices, codebook_size):
    """Entropy of the indices of each stage as a share of its maximum."""
    shares = [torch.bincount(stage, minlength=codebook_size) / len(stage) for stage in indices.unbind(-1)]
    return torch.stack([torch.special.entr(share).sum() / torch.tensor(codebook_size).log() for share in shares])


def test_later_stages_of_fsq_stay_in_use_where_plain_residuals_die():
    levels, features = [5, 5, 5], torch.randn(8, 3, 4000)
    scaled = ResidualQuantizer(SYMMETRIC, 4, levels=levels).eval()(features).indices.flatten(0, -2)
    stage, rest, plain = FSQ(levels).eval(), features, []
    for _ in range(4):
        quantized = stage(rest)
        rest = rest - quantized.codes
        plain.append(quantized.indices.flatten())
    assert stage_entropies(scaled, 125)[1:].min() > 0.97
    assert stage_entropies(torch.stack(plain, -1), 125)[-1] < 0.3


def test_codes_of_training_are_the_codes_of_their_indices():
    for quantizer in (learned(), ResidualQuantizer(SYMMETRIC, 3, levels=[5, 4])):
        quantized = quantizer.train()(torch.randn(2, quantizer.dim, 7))
        torch.testing.assert_close(quantized.codes, quantizer.indices_to_codes(quantized.indices))


def test_the_gradient_of_the_codes_is_the_identity_and_leaves_the_tables_alone():
    quantizer = learned().train()
    features, upstream = torch.randn(2, 4, 3, 5, requires_grad=True), torch.randn(2, 4, 3, 5)
    quantizer(features).codes.mul(upstream).sum().backward()
    torch.testing.assert_close(features.grad, upstream)
    assert all(parameter.grad is None for parameter in quantizer.parameters())


def test_the_gradient_passes_the_soft_clamp():
    quantizer = ResidualQuantizer(SYMMETRIC, 3, levels=[5, 4]).train()
    features = torch.randn(2, 2, 9, requires_grad=True)
    quantizer(features).codes.sum().backward()
    limits = torch.tensor([1 + 1 / 4, 1 + 1 / 3]).view(1, 2, 1)
    torch.testing.assert_close(features.grad, 1 - torch.tanh(features.detach() / limits) ** 2)


def test_the_estimators_of_the_stages_add_up():
    features = torch.randn(2, 4, 9, requires_grad=True)
    learned(gradient="stages").train()(features).codes.sum().backward()
    torch.testing.assert_close(features.grad, torch.full_like(features, 3.0))


def test_a_loss_is_the_mean_over_the_stages():
    quantizer = learned().train()
    features = torch.randn(2, 4, 9, requires_grad=True)
    losses = quantizer(features).losses
    rest, stage_losses = features.detach(), []
    for number in range(3):
        quantized = quantizer.part(number).eval()(rest)
        stage_losses.append(F.mse_loss(rest, quantized.codes))
        rest = rest - quantized.codes
    assert losses.keys() == quantizer.loss_weights.keys() == {"commitment", "codebook"}
    for loss in losses.values():
        torch.testing.assert_close(loss, torch.stack(stage_losses).mean())
    losses["codebook"].backward()
    assert features.grad is None
    assert all(quantizer.part(number).table.grad.abs().sum() > 0 for number in range(3))


def test_the_cumulative_commitment_pulls_the_features_to_every_partial_sum():
    quantizer = learned(commitment="cumulative").train()
    features = torch.randn(2, 4, 9, requires_grad=True)
    quantized = quantizer(features)
    partial = [quantizer.indices_to_codes(quantized.indices[..., :depth]).detach() for depth in (1, 2, 3)]
    loss = quantized.losses["commitment"]
    torch.testing.assert_close(loss, torch.stack([(features - each).square().mean() for each in partial]).mean())
    (gradient,) = torch.autograd.grad(loss, features)
    expected = 2 * sum(features - each for each in partial) / 3 / features.numel()
    torch.testing.assert_close(gradient, expected)


def test_a_shared_codebook_moves_once_by_the_features_of_all_stages():
    shared = learned(template=EMA, shared=True).train()
    single = copy.deepcopy(shared.part(0))
    features = torch.randn(4, 4, 20)
    rest = features
    for _ in range(3):
        rest = rest - single(rest).codes.detach()
    single.update()
    shared(features)
    shared.update()
    assert len(list(shared.parts())) == 1
    torch.testing.assert_close(shared.part(0).table, single.table)
    assert shared.part(0).updates == single.updates == 1


def test_stages_of_nested_stacks_start_from_different_tables():
    groups = {"_target_": "vistok.quantizer.GroupedQuantizer", "groups": 2, "quantizer": LEARNED}
    quantizer = ResidualQuantizer(groups, 2, codebook_size=8, dim=4)
    found = [module.table for module in quantizer.modules() if isinstance(module, VectorQuantizer)]
    assert len(found) == 4
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(found, 2))


def test_every_prefix_of_the_depths_decodes_to_the_sum_of_its_codes():
    quantizer = learned().eval()
    features = torch.randn(2, 4, 3, 5)
    indices = quantizer(features).indices
    total = torch.zeros_like(features)
    for depth in (1, 2, 3):
        total = total + quantizer.part(depth - 1).indices_to_codes(indices[..., depth - 1])
        prefix = quantizer.shorten(indices, depth)
        assert torch.equal(prefix, indices[..., :depth])
        assert torch.equal(quantizer.indices_to_codes(prefix), total)
    for length in (0, 4):
        with pytest.raises(ValueError, match=f"length must lie between 1 and 3, got {length}"):
            quantizer.shorten(indices, length)


def test_a_part_of_several_codebooks_is_kept_whole():
    quantizer = ResidualQuantizer({**BINARY, "index_bits": 2}, 3, bits=4).eval()
    indices = quantizer(torch.randn(2, 4, 5)).indices
    assert indices.shape == (2, 5, 6)
    assert quantizer.shorten(indices, 2).shape == (2, 5, 4)
    with pytest.raises(ValueError, match="indices of whole parts, 2, 4, 6 values"):
        quantizer.indices_to_codes(indices[..., :3])


def depths(quantizer, steps):
    """Depth of each of a number of training steps."""
    kept = []
    for _ in range(steps):
        kept.append(quantizer.begin())
        quantizer.update()
    return kept


def dropping(dropout=0.6, **arguments):
    return ResidualQuantizer(SYMMETRIC, 4, levels=[3], dropout=dropout, **arguments).train()


def test_dropout_keeps_a_uniform_number_of_stages_in_its_share_of_the_steps():
    quantizer, kept = dropping(min_depth=2), []
    for step in range(2000):
        quantizer.updates.fill_(step)
        quantizer.draw()
        kept.append(quantizer.begin())
    kept = torch.tensor(kept)
    shares = [(kept == depth).double().mean().item() for depth in range(1, 5)]
    assert shares == pytest.approx([0, 0.2, 0.2, 0.6], abs=0.04)


def test_evaluation_never_drops_a_stage():
    quantizer = dropping(1.0).eval()
    assert quantizer(torch.zeros(1, 1, 1)).indices.shape[-1] == 4


def test_the_depth_follows_from_the_seed_and_the_number_of_updates():
    expected = depths(dropping(), 30)
    assert depths(dropping(), 30) == expected
    assert depths(dropping(seed=1), 30) != expected
    resumed = dropping()
    depths(resumed, 15)
    other = dropping()
    other.load_state_dict(resumed.state_dict())
    assert depths(other, 15) == expected[15:]


def test_accumulated_batches_and_rejected_steps_draw_no_new_depth():
    quantizer = dropping()
    for _ in range(10):
        quantizer.begin()
        quantizer.discard()
        quantizer.update()
    assert quantizer.updates == 0
    assert depths(quantizer, 20) == depths(dropping(), 20)


def test_a_shortened_step_decodes_like_its_indices_and_has_all_losses():
    quantizer = learned(dropout=1.0).train()
    shapes = set()
    for _ in range(8):
        quantized = quantizer(torch.randn(2, 4, 9))
        torch.testing.assert_close(quantized.codes, quantizer.indices_to_codes(quantized.indices))
        assert quantized.indices.shape[-1] == quantizer.kept
        assert quantized.losses.keys() == quantizer.loss_weights.keys()
        shapes.add(quantized.indices.shape[-1])
        quantizer.update()
    assert shapes == {1, 2, 3}


def test_dropped_stages_take_part_in_the_backward_pass():
    quantizer = learned(dropout=1.0).train()
    while quantizer.kept > 1:
        quantizer(torch.randn(2, 4, 9))
        quantizer.update()
    quantized = quantizer(torch.randn(2, 4, 9))
    (quantized.codes.sum() + sum(quantized.losses.values())).backward()
    first, *others = [quantizer.part(number).table.grad for number in range(3)]
    assert first.abs().sum() > 0
    assert all(torch.equal(gradient, torch.zeros_like(first)) for gradient in others)


def test_a_recomputation_keeps_as_many_stages():
    quantizer = learned(template=EMA, dropout=1.0).train()
    for _ in range(6):
        features = torch.randn(2, 4, 9, requires_grad=True)
        kept = []

        def codes(x, kept=kept):
            quantized = quantizer(x)
            kept.append(quantized.indices.shape[-1])
            # Its backward pass needs the codes, which the straight-through estimator alone does not.
            return quantized.codes.square()

        checkpoint(codes, features, use_reentrant=False).sum().backward()
        assert len(kept) == 2
        assert kept[0] == kept[1]
        quantizer.update()


def beamed(beam, template=LEARNED, codebook_size=4, dim=3, depth=3, **arguments):
    return learned(depth, codebook_size, dim, template, beam=beam, **arguments).eval()


def squared_errors(quantizer, features):
    return (quantizer(features).codes - features).double().square().sum(1).flatten()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_the_beam_is_never_worse_than_greedy(shared, distance):
    template = {**LEARNED, "distance": distance, "unit_norm": "none"}
    features = torch.randn(4, 3, 100)
    greedy, beam = (squared_errors(beamed(width, template, 8, shared=shared, depth=4), features) for width in (1, 3))
    assert (beam <= greedy * (1 + 1e-6)).all()
    assert beam.mean() < 0.9 * greedy.mean()


def test_a_beam_over_all_paths_finds_the_best_codes():
    quantizer = beamed(beam=16)
    features = torch.randn(2, 3, 40)
    sums = torch.stack([sum(codes) for codes in itertools.product(*[table.double() for table in tables(quantizer)])])
    best = (rows_of(features).double().unsqueeze(1) - sums).square().sum(-1).min(1).values
    torch.testing.assert_close(squared_errors(quantizer, features), best, atol=1e-6, rtol=1e-6)


def test_the_beam_quantizes_a_position_the_same_alone_and_in_a_batch():
    quantizer = beamed(beam=3)
    features = torch.randn(40, 3, 2)
    quantized = quantizer(features)
    alone = torch.cat([quantizer(features[i : i + 1]).indices for i in range(40)])
    assert torch.equal(quantized.indices, alone)
    assert torch.equal(quantized.codes, quantizer.indices_to_codes(quantized.indices))


@pytest.mark.parametrize("template", [{**SYMMETRIC, "levels": [8, 5, 2]}, {**BINARY, "bits": 3}], ids=["fsq", "lfq"])
def test_codes_of_nested_ranges_have_exactly_one_encoding(template):
    quantizer = ResidualQuantizer(template, 3)
    indices = torch.stack([torch.randint(size, (5, 60)) for size in quantizer.codebook_sizes], -1)
    assert torch.equal(quantizer.codes_to_indices(quantizer.indices_to_codes(indices)), indices)


def test_codes_of_tables_are_encoded_again_as_well_as_the_beam_can():
    indices = torch.randint(4, (2, 60, 3))
    wide = beamed(beam=16)
    codes = wide.indices_to_codes(indices)
    torch.testing.assert_close(wide.indices_to_codes(wide.codes_to_indices(codes)), codes, atol=1e-5, rtol=0)
    assert squared_errors(beamed(beam=1), codes).mean() > 1e-3


def test_stages_may_differ():
    quantizer = ResidualQuantizer(
        [{**LEARNED, "codebook_size": 8, "dim": 3}, {**EMA, "codebook_size": 5, "dim": 3}, LFQ(3, entropy_weight=0.0)],
        3,
    )
    assert quantizer.codebook_sizes == (8, 5, 8)
    losses = quantizer(torch.randn(2, 3, 5)).losses
    assert losses.keys() == quantizer.loss_weights.keys()
    assert quantizer.loss_weights == pytest.approx(
        {
            "part0_commitment": 0.25 / 3,
            "part0_codebook": 1 / 3,
            "part1_commitment": 0.25 / 3,
            "part2_commitment": 0.25 / 3,
        }
    )


def test_one_stage_of_a_table_is_the_table():
    quantizer = learned(depth=1).eval()
    single = quantizer.part(0)
    features = torch.randn(2, 4, 3, 5)
    assert torch.equal(quantizer(features).indices, single(features).indices)
    assert torch.equal(quantizer.codebook, single.codebook)


def test_groups_of_stacks_are_built_again_from_their_config():
    stack = {"_target_": "vistok.quantizer.ResidualQuantizer", "depth": 2, "quantizer": SYMMETRIC}
    quantizer = GroupedQuantizer(stack, 2, levels=[5, 4])
    again = vistok.build(config_of(quantizer))
    assert config_of(again) == config_of(quantizer)
    assert again.codebook_sizes == (20, 20, 20, 20)
    features = torch.randn(2, 4, 3, 5)
    assert torch.equal(again.eval()(features).indices, quantizer.eval()(features).indices)


@pytest.mark.parametrize("training", [True, False])
def test_it_compiles_into_one_graph(training, monkeypatch):
    # The shape checks of the test run cannot be traced.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    torch.compiler.reset()
    quantizer = ResidualQuantizer(SYMMETRIC, 2, levels=[5, 4], dropout=1.0 if training else 0.0).train(training)
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    features = torch.randn(2, 2, 4, 5)
    for _ in range(3):
        expected, got = quantizer(features), compiled(features)
        assert torch.equal(got.indices, expected.indices)
        torch.testing.assert_close(got.codes, expected.codes)
        quantizer.update()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 0}, "depth must be an integer of at least 1"),
        ({"dropout": 1.5}, "dropout is a probability"),
        ({"min_depth": 2}, "min_depth=2 has no effect without dropout"),
        ({"min_depth": 4, "dropout": 0.5}, "min_depth must be at most 3"),
        ({"commitment": "sum"}, "commitment must be one of stage, cumulative; got 'sum'"),
        ({"gradient": "soft"}, "gradient must be one of straight_through, stages"),
        ({"beam": 0}, "beam must be an integer of at least 1"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
        ({"codebook_size": 32, "template": {**LEARNED, "codebook_size": 16}}, "its composite says codebook_size=32"),
        ({"template": [LEARNED]}, "one template for each of the 3 parts"),
        ({"template": [LEARNED] * 3, "shared": True}, "needs shared=false"),
        ({"template": {"_target_": "vistok.quantizer.Identity"}, "codebook_size": None}, "Identity is continuous"),
        (
            {"template": config_of(MultiScaleQuantizer(LEARNED, [1, 2], phi=0, codebook_size=16, dim=4))},
            "MultiScaleQuantizer has no indices of its own for each position",
        ),
        ({"template": config_of(learned(dropout=0.5))}, "let the outermost quantizer do it"),
    ],
)
def test_what_cannot_work_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        learned(**arguments)


def test_what_stages_lack_is_an_error():
    with pytest.raises(ValueError, match="commitment=cumulative replaces the commitment loss of the stages"):
        ResidualQuantizer(SYMMETRIC, 2, levels=[5, 4], commitment="cumulative")
    with pytest.raises(ValueError, match="beam=2 needs stages with one codebook"):
        ResidualQuantizer({**BINARY, "index_bits": 1}, 2, bits=4, beam=2)
    with pytest.raises(ValueError, match="dim must be equal; got \\[2, 4\\]"):
        ResidualQuantizer([{**SYMMETRIC, "levels": [5, 4]}, {**LEARNED, "codebook_size": 8, "dim": 4}], 2)


def test_a_loaded_stack_keeps_as_many_stages_as_the_saved_one_at_any_step():
    saved, loaded = dropping(1.0), dropping(1.0)
    for _ in range(20):
        loaded.load_state_dict(saved.state_dict())
        assert loaded.kept == saved.kept
        depths(saved, 1)


def test_revived_rows_of_a_shared_codebook_are_reported():
    template = {**LEARNED, "revival": "random", "decay": 0.0, "revive_below": 0.9}
    quantizer = learned(template=template, shared=True).train()
    quantizer(torch.randn(2, 4, 9))
    quantizer.update()
    ((parameter, rows),) = quantizer.touched_codes
    assert parameter is quantizer.part(0).table
    assert len(rows)


def test_unscaled_stages_see_the_rest_as_it_is():
    stage = FSQ([8, 5], form="atanh").eval()
    quantizer = ResidualQuantizer(stage, 3, scaled=False).eval()
    rest = features = 2 * torch.randn(2, 2, 3, 5)
    for number, indices in enumerate(quantizer(features).indices.unbind(-1)):
        codes = stage(rest).codes
        assert torch.equal(indices, stage(rest).indices), number
        rest = rest - codes
    assert not torch.equal(ResidualQuantizer(stage, 3).eval()(features).indices, quantizer(features).indices)


def test_codebooks_have_no_range_that_could_be_left_unscaled():
    with pytest.raises(ValueError, match="scaled=false has no effect"):
        learned(scaled=False)
