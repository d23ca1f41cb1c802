"""Product quantization against its formulas and the peer's."""

import copy
import math

import jaxtyping
import pytest
import torch
import vector_quantize_pytorch as peer

import vistok
from vistok.config import config_of
from vistok.quantizer import GroupedQuantizer, ResidualQuantizer

LEARNED = {"_target_": "vistok.quantizer.VectorQuantizer", "table": "learned", "init": "normal"}
EMA = {"_target_": "vistok.quantizer.VectorQuantizer", "table": "ema", "init": "normal", "decay": 0.8}
SYMMETRIC = {"_target_": "vistok.quantizer.FSQ", "form": "symmetric", "bound": "clamp"}
MASKING = [0.0, 0.2, 0.3, 0.7]


def grouped(groups=4, codebook_size=16, dim=8, template=LEARNED, **arguments):
    return GroupedQuantizer(template, groups, codebook_size=codebook_size, dim=dim, **arguments)


def chunks(quantizer, features):
    return [(quantizer.part(number), chunk) for number, chunk in enumerate(features.chunk(quantizer.count, 1))]


def test_each_group_of_channels_has_its_own_nearest_code():
    quantizer = grouped().eval()
    features = torch.randn(2, 8, 3, 5)
    quantized = quantizer(features)
    assert quantized.indices.shape == (2, 3, 5, 4) == (2, *quantizer.indices_shape((3, 5)))
    for group in range(4):
        table = quantizer.part(group).codebook.double()
        rows = features[:, 2 * group : 2 * group + 2].movedim(1, -1).double()
        nearest = (rows.unsqueeze(-2) - table).square().sum(-1).argmin(-1)
        assert torch.equal(quantized.indices[..., group], nearest)
        torch.testing.assert_close(
            quantized.codes[:, 2 * group : 2 * group + 2].movedim(1, -1).double(), table[nearest]
        )
    assert torch.equal(quantized.codes, quantizer.indices_to_codes(quantized.indices))
    assert torch.equal(quantizer.codes_to_indices(quantized.codes), quantized.indices)
    assert quantizer.codebook_sizes == (16,) * 4
    assert quantizer.bits == 16


def test_groups_may_differ():
    templates = [{**LEARNED, "codebook_size": 8, "dim": 3}, {**SYMMETRIC, "levels": [5, 4]}]
    quantizer = GroupedQuantizer(templates, 2).eval()
    features = torch.randn(2, 5, 9)
    quantized = quantizer(features)
    assert quantizer.codebook_sizes == (8, 20)
    for group, channels in enumerate((slice(0, 3), slice(3, 5))):
        alone = quantizer.part(group)(features[:, channels])
        assert torch.equal(quantized.codes[:, channels], alone.codes)
        assert torch.equal(quantized.indices[..., group], alone.indices)
    assert not quantizer.indices_to_codes(quantized.indices[..., :1])[:, 3:].any()
    assert quantizer.stage_factors[:3] == (1, 1, 1)
    with pytest.raises(ValueError, match=r"codes of equal dim, got groups of \[3, 2\]"):
        GroupedQuantizer(templates, 2, disentanglement_weight=0.1)


def test_groups_of_stacks_are_the_peers():
    stack = {"_target_": "vistok.quantizer.ResidualQuantizer", "depth": 3, "quantizer": LEARNED}
    quantizer = grouped(groups=2, template=stack).eval()
    other = peer.GroupedResidualVQ(dim=8, groups=2, codebook_size=16, num_quantizers=3, rotation_trick=False)
    for group, rvq in enumerate(other.rvqs):
        for stage, layer in enumerate(rvq.layers):
            layer._codebook.embed.data.copy_(quantizer.part(group).part(stage).table.detach().unsqueeze(0))
            layer._codebook.initted.fill_(True)
    features = torch.randn(2, 8, 30)
    codes, indices, _ = other.eval()(features.movedim(1, -1))
    quantized = quantizer(features)
    # The peer stacks the groups first: (g b n depth).
    assert torch.equal(quantized.indices.unflatten(-1, (2, 3)), indices.permute(1, 2, 0, 3))
    torch.testing.assert_close(quantized.codes, codes.movedim(-1, 1))


def test_groups_of_stacks_and_a_stack_of_groups_are_the_same_codes():
    inside = {"_target_": "vistok.quantizer.GroupedQuantizer", "groups": 2, "quantizer": SYMMETRIC}
    stack = ResidualQuantizer(inside, 3, levels=[5, 4, 3]).eval()
    outside = {"_target_": "vistok.quantizer.ResidualQuantizer", "depth": 3, "quantizer": SYMMETRIC}
    groups = GroupedQuantizer(outside, 2, levels=[5, 4, 3]).eval()
    features = torch.randn(2, 6, 50)
    assert torch.equal(stack(features).codes, groups(features).codes)


@pytest.mark.parametrize("weights", [{"distance": "cosine"}, {"distance": "cosine", "unit_norm": "features"}])
def test_a_loss_is_the_mean_over_the_groups_and_moves_all_tables(weights):
    quantizer = grouped(template={**LEARNED, **weights}).train()
    features = torch.randn(2, 8, 9)
    losses = quantizer(features).losses
    each = [part(chunk).losses for part, chunk in chunks(quantizer, features)]
    assert losses.keys() == quantizer.loss_weights.keys() == {"commitment", "codebook"}
    for key, loss in losses.items():
        torch.testing.assert_close(loss, torch.stack([one[key] for one in each]).mean())
    losses["codebook"].backward()
    assert all(part.table.grad.abs().sum() > 0 for part, _ in chunks(quantizer, features))


def test_the_gradient_of_the_codes_is_the_identity():
    features, upstream = torch.randn(2, 8, 9, requires_grad=True), torch.randn(2, 8, 9)
    grouped().train()(features).codes.mul(upstream).sum().backward()
    torch.testing.assert_close(features.grad, upstream)


def test_a_shared_codebook_moves_once_by_the_features_of_all_groups():
    shared = grouped(template=EMA, shared=True).train()
    single = copy.deepcopy(shared.part(0))
    features = torch.randn(4, 8, 20)
    single(torch.cat(features.chunk(4, dim=1)))
    single.update()
    shared(features)
    shared.update()
    assert len(list(shared.parts())) == 1
    torch.testing.assert_close(shared.part(0).table, single.table)


def test_spherical_groups_search_by_direction_and_return_the_rows_themselves():
    quantizer = grouped(template={**LEARNED, "distance": "cosine", "unit_norm": "features"}, shared=True).eval()
    table = quantizer.part(0).table.detach().double()
    features = torch.randn(1, 8, 40)
    directions = features[0].T.double().unflatten(-1, (4, 2))
    cosines = torch.nn.functional.cosine_similarity(directions.unsqueeze(-2), table, dim=-1)
    quantized = quantizer(features)
    assert torch.equal(quantized.indices[0], cosines.argmax(-1))
    torch.testing.assert_close(quantized.codes[0].T.double(), table[cosines.argmax(-1)].flatten(1))


def test_nested_masking_keeps_each_group_as_often_as_its_threshold_says():
    quantizer = grouped(masking=MASKING).train()
    kept = []
    for step in range(3000):
        quantizer.updates.fill_(step)
        quantizer.draw()
        kept.append(quantizer.begin())
    kept = torch.tensor(kept)
    shares = [(kept > group).double().mean().item() for group in range(4)]
    assert shares == pytest.approx([1 - threshold for threshold in MASKING], abs=0.04)


def masked_to(kept, **arguments):
    quantizer = grouped(masking=MASKING, **arguments).train()
    while quantizer.kept != kept:
        quantizer.begin()
        quantizer.update()
    return quantizer


def test_a_masked_group_has_no_indices_and_codes_of_zero():
    quantizer = masked_to(2)
    features = torch.randn(2, 8, 9, requires_grad=True)
    quantized = quantizer(features)
    assert quantized.indices.shape == (2, 9, 2)
    assert not quantized.codes[:, 4:].any()
    torch.testing.assert_close(quantized.codes, quantizer.indices_to_codes(quantized.indices))
    (quantized.codes.sum() + sum(quantized.losses.values())).backward()
    assert not features.grad[:, 4:].any()
    gradients = [part.table.grad for part, _ in chunks(quantizer, features)]
    assert [bool(gradient.any()) for gradient in gradients] == [True, True, False, False]


def test_evaluation_masks_no_group_and_a_prefix_of_groups_decodes_with_zeros():
    quantizer = masked_to(1).eval()
    quantized = quantizer(torch.randn(2, 8, 9))
    assert quantized.indices.shape == (2, 9, 4)
    shorter = quantizer.shorten(quantized.indices, 3)
    codes = quantizer.indices_to_codes(shorter)
    assert torch.equal(codes[:, :6], quantized.codes[:, :6])
    assert not codes[:, 6:].any()


def test_disentanglement_is_the_mean_squared_cosine_of_pairs_of_groups():
    quantizer = grouped(groups=3, dim=9, disentanglement_weight=0.1).train()
    features = torch.randn(2, 9, 5, requires_grad=True)
    quantized = quantizer(features)
    codes = quantizer.indices_to_codes(quantized.indices).detach().double().unflatten(1, (3, 3)).permute(0, 3, 1, 2)
    squares = []
    for position in codes.reshape(-1, 3, 3).tolist():
        for a, b in ((0, 1), (0, 2), (1, 2)):
            dot = sum(x * y for x, y in zip(position[a], position[b], strict=True))
            squares.append((dot / math.hypot(*position[a]) / math.hypot(*position[b])) ** 2)
    loss = quantized.losses["disentanglement"]
    assert loss.item() == pytest.approx(sum(squares) / len(squares), rel=1e-5)
    assert quantizer.loss_weights["disentanglement"] == 0.1
    loss.backward()
    assert features.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in quantizer.parameters())


def test_disentanglement_of_a_single_group_is_zero():
    losses = masked_to(1, disentanglement_weight=0.1)(torch.randn(2, 8, 9)).losses
    assert losses["disentanglement"] == 0


def test_a_position_is_quantized_the_same_alone_and_in_a_batch():
    quantizer = grouped().eval()
    features = torch.randn(30, 8, 3)
    alone = torch.cat([quantizer(features[i : i + 1]).indices for i in range(30)])
    assert torch.equal(quantizer(features).indices, alone)


def test_it_is_built_again_from_its_config():
    quantizer = grouped(masking=MASKING, shared=True)
    again = vistok.build(config_of(quantizer))
    assert config_of(again) == config_of(quantizer)
    assert torch.equal(again.part(0).table, quantizer.part(0).table)


@pytest.mark.parametrize("training", [True, False])
def test_it_compiles_into_one_graph(training, monkeypatch):
    # The shape checks of the test run cannot be traced.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    torch.compiler.reset()
    masking = [0.0, 0.9] if training else None
    quantizer = GroupedQuantizer(SYMMETRIC, 2, levels=[5, 4], masking=masking, disentanglement_weight=0.1)
    compiled = torch.compile(quantizer.train(training), fullgraph=True, backend="aot_eager")
    features = torch.randn(2, 4, 4, 5)
    for _ in range(3):
        expected, got = quantizer(features), compiled(features)
        assert torch.equal(got.indices, expected.indices)
        torch.testing.assert_close(got.codes, expected.codes)
        quantizer.update()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": 1}, "groups must be an integer of at least 2"),
        ({"dim": 10}, "dim must be a multiple of groups = 4, got 10"),
        ({"masking": [0.0, 0.2]}, "masking has one threshold for each of the 4 groups"),
        ({"masking": [0.1, 0.2, 0.3, 0.4]}, "from 0 and not decreasing"),
        ({"masking": [0.0, 0.4, 0.3, 0.5]}, "from 0 and not decreasing"),
        ({"masking": [0.0] * 4}, "masking has one threshold"),
        ({"disentanglement_weight": -1.0}, "disentanglement_weight must be a number of at least 0"),
        ({"template": {**LEARNED, "dim": 3}}, "its composite says dim=2"),
    ],
)
def test_what_cannot_work_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        grouped(**arguments)
