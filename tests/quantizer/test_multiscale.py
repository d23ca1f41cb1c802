"""Multi-scale quantization against VAR's algorithm in plain loops."""

import copy
import itertools
import math

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import vistok
from vistok.config import config_of
from vistok.quantizer import MultiScaleQuantizer
from vistok.quantizer.multiscale import average, enlarge, spread

LEARNED = {"_target_": "vistok.quantizer.VectorQuantizer", "table": "learned", "init": "normal"}
EMA = {"_target_": "vistok.quantizer.VectorQuantizer", "table": "ema", "init": "normal", "decay": 0.8}
SPHERE = {"_target_": "vistok.quantizer.BSQ", "entropy_weight": 0.1, "commitment_weight": 0.25}
SCALES = [1, 2, 3, 5]
GRIDS = {"sequence": (7,), "image": (4, 5), "video": (3, 4, 5)}


def pyramid(template=LEARNED, scales=SCALES, codebook_size=32, dim=4, phi=2, **arguments):
    return MultiScaleQuantizer(template, scales, phi, codebook_size=codebook_size, dim=dim, **arguments)


def area_means(image, size):
    """Mean of the cells of an image ``(d, h, w)``, one by one."""
    d, h, w = image.shape
    means = image.new_zeros(d, *size)
    for i, j in itertools.product(range(size[0]), range(size[1])):
        rows = slice(i * h // size[0], -(-(i + 1) * h // size[0]))
        columns = slice(j * w // size[1], -(-(j + 1) * w // size[1]))
        means[:, i, j] = image[:, rows, columns].mean((1, 2))
    return means


def interpolated(values, size, kernel, reach):
    """Interpolate along the last axis; samples beyond the border repeat the outermost."""
    length = values.shape[-1]
    out = []
    for position in range(size):
        at = (position + 0.5) * length / size - 0.5
        near = range(math.floor(at) - reach + 1, math.floor(at) + reach + 1)
        out.append(sum(kernel(abs(at - k)) * values[..., min(max(k, 0), length - 1)] for k in near))
    return torch.stack(out, -1)


def cubic(x, a=-0.75):
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def bicubic(image, size):
    vertical = interpolated(image.mT, size[0], cubic, 2).mT
    return interpolated(vertical, size[1], cubic, 2)


def by_loops(quantizer, image):
    """Indices of each scale and the partial sums of the codes of one image ``(d, h, w)`` in float64."""
    table = quantizer.part(0).table.detach().double()
    rest, total, indices, sums = image.double(), torch.zeros_like(image).double(), [], []
    size = image.shape[1:]
    for number, scale in enumerate(quantizer.scales):
        cells = tuple(max(1, math.floor(length * scale / quantizer.scales[-1] + 0.5)) for length in size)
        rows = area_means(rest, cells).flatten(1).T
        indices.append((rows.unsqueeze(1) - table).square().sum(-1).argmin(-1))
        h = bicubic(table[indices[-1]].T.unflatten(1, cells), size)
        phi = quantizer.phi[spread(len(quantizer.phi), len(quantizer.scales))[number]]
        padded = F.pad(h, (1, 1, 1, 1))
        convolved = phi.bias.double().view(-1, 1, 1) + sum(
            torch.einsum("oi,ihw->ohw", phi.weight[:, :, i, j].double(), padded[:, i : i + size[0], j : j + size[1]])
            for i, j in itertools.product(range(3), range(3))
        )
        h = 0.5 * h + 0.5 * convolved
        total, rest = total + h, rest - h
        sums.append(total)
    return torch.cat(indices), sums


@pytest.mark.parametrize("grid", [(5, 5), (4, 7)])
@torch.no_grad()
def test_indices_codes_and_losses_are_those_of_the_algorithm_in_loops(grid):
    quantizer = pyramid().eval()
    features = torch.randn(2, 4, *grid)
    quantized = quantizer(features)
    indices, sums = zip(*(by_loops(quantizer, image) for image in features), strict=True)
    assert torch.equal(quantized.indices, torch.stack(indices))
    sums = torch.stack([torch.stack(each) for each in sums], 1)
    torch.testing.assert_close(quantized.codes.double(), sums[-1], atol=1e-5, rtol=0)
    error = torch.stack([(each - features).square().mean() for each in sums]).mean().item()
    assert quantized.losses["commitment"].item() == pytest.approx(error, rel=1e-5)
    assert quantized.losses["codebook"].item() == pytest.approx(error, rel=1e-5)
    assert quantizer.loss_weights == {"commitment": 0.25, "codebook": 1.0}


@pytest.mark.parametrize(
    ("count", "scales", "table"),
    [
        (4, 10, (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)),
        (10, 10, tuple(range(10))),
        (13, 13, tuple(range(13))),
        # Scales in the middle of two ticks are where float64 puts them.
        (2, 3, (0, 0, 1)),
        (3, 7, (0, 0, 0, 1, 1, 2, 2)),
        (1, 4, (0, 0, 0, 0)),
        (1, 1, (0,)),
    ],
)
def test_the_convolutions_are_spread_over_the_scales_as_in_var(count, scales, table):
    assert spread(count, scales) == table


@torch.no_grad()
def test_grids_of_a_schedule_have_its_scales_and_others_those_of_their_proportions():
    schedules = [[[1, 1], [2, 3], [4, 6], [8, 12]], [[1, 1], [4, 6], [4, 6]]]
    quantizer = MultiScaleQuantizer(LEARNED, scales=(1, 2), codebook_size=8, dim=2, phi=2, schedules=schedules).eval()
    assert quantizer.scale_sizes((8, 12)) == [(1, 1), (2, 3), (4, 6), (8, 12)]
    assert quantizer.scale_sizes((4, 6)) == [(1, 1), (2, 3), (4, 6)]
    assert quantizer.scale_sizes((6, 4)) == [(3, 2), (6, 4)]
    features = torch.randn(2, 2, 8, 12)
    codes, indices, _ = quantizer(features)
    assert indices.shape == (2, 1 + 6 + 24 + 96)
    assert torch.equal(quantizer.indices_to_codes(indices, (8, 12)), codes)
    # As many convolutions for four scales as for two: 0, 0, 1, 1.
    cells = quantizer.part(0).indices_to_codes(indices[:, 1:7]).unflatten(2, (2, 3))
    enlarged = F.interpolate(cells, (8, 12), mode="bicubic")
    first = 0.5 * enlarged + 0.5 * quantizer.phi[0](enlarged)
    torch.testing.assert_close(quantizer.enlarge(cells, 1, (8, 12)), first)
    rebuilt = vistok.build(config_of(quantizer))
    assert rebuilt.scale_sizes((8, 12)) == quantizer.scale_sizes((8, 12))


@pytest.mark.parametrize("schedules", [[[[2, 2], [1, 3]]], [[[1, 1], [0, 2]]], [[[1], [2]]]])
def test_schedules_that_are_no_pyramids_are_refused(schedules):
    with pytest.raises(ValueError, match="schedules must be lists of cells"):
        MultiScaleQuantizer(LEARNED, codebook_size=8, dim=2, schedules=schedules)


def test_a_square_grid_has_the_lengths_of_var():
    quantizer = MultiScaleQuantizer(LEARNED, codebook_size=8, dim=2)
    assert quantizer.scale_lengths((16, 16)) == (1, 4, 9, 16, 25, 36, 64, 100, 169, 256)
    assert quantizer.indices_shape((16, 16)) == (680,)
    assert quantizer.total_bits((16, 16)) == 3 * 680
    large = MultiScaleQuantizer(LEARNED, [1, 2, 3, 4, 6, 9, 13, 18, 24, 32], codebook_size=8, dim=2)
    assert large.indices_shape((32, 32)) == (2240,)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_every_grid_ends_with_a_scale_of_its_own_size(grid):
    quantizer = pyramid().eval()
    lengths = quantizer.scale_lengths(grid)
    assert lengths[0] == 1
    assert lengths[-1] == math.prod(grid)
    quantized = quantizer(torch.randn(2, 4, *grid))
    assert quantized.indices.shape == (2, sum(lengths)) == (2, *quantizer.indices_shape(grid))
    assert torch.equal(quantized.codes, quantizer.indices_to_codes(quantized.indices, grid))
    again = quantizer.codes_to_indices(quantized.codes)
    assert again.shape == quantized.indices.shape


def test_a_sequence_is_an_image_of_one_row_and_an_image_is_a_video_of_one_frame():
    quantizer = pyramid().eval()
    features = torch.randn(2, 4, 7)
    assert torch.equal(quantizer(features).indices, quantizer(features.unsqueeze(2)).indices)
    features = torch.randn(2, 4, 5, 6)
    image, video = quantizer(features), quantizer(features.unsqueeze(2))
    assert torch.equal(image.indices, video.indices)
    assert torch.equal(image.codes, video.codes[:, :, 0])


def test_videos_are_averaged_over_areas_and_interpolated_trilinearly():
    features = torch.randn(2, 4, 6, 5, 7)
    torch.testing.assert_close(average(features, (4, 2, 3)), F.interpolate(features, (4, 2, 3), mode="area"))
    cells = torch.randn(2, 4, 2, 3, 2)
    torch.testing.assert_close(
        enlarge(cells, (6, 5, 7), "linear"), F.interpolate(cells, (6, 5, 7), mode="trilinear"), atol=1e-6, rtol=1e-5
    )


def test_without_convolutions_the_codes_and_the_rest_make_up_the_features():
    quantizer = pyramid(phi=0).eval()
    features = torch.randn(2, 4, 5, 5)
    indices = quantizer(features).indices
    before = features - quantizer.indices_to_codes(quantizer.shorten(indices, 3))
    last = quantizer.part(0).indices_to_codes(indices[:, -25:]).unflatten(-1, (5, 5))
    rest = before - last
    torch.testing.assert_close(quantizer.indices_to_codes(indices) + rest, features)


def test_the_first_scale_alone_decodes_to_one_code_everywhere():
    quantizer = pyramid(phi=0).eval()
    indices = quantizer(torch.randn(2, 4, 5, 5)).indices
    first = quantizer.part(0).indices_to_codes(indices[:, :1])
    torch.testing.assert_close(
        quantizer.indices_to_codes(indices[:, :1]), first.unsqueeze(-1).expand(2, 4, 5, 5), atol=1e-6, rtol=1e-6
    )


def test_any_number_of_whole_scales_decodes_and_nothing_between():
    quantizer = pyramid().eval()
    indices = quantizer(torch.randn(2, 4, 5, 5)).indices
    for length, tokens in enumerate(itertools.accumulate([1, 4, 9, 25]), start=1):
        assert torch.equal(quantizer.shorten(indices, length), indices[:, :tokens])
        assert quantizer.indices_to_codes(indices[:, :tokens], (5, 5)).shape == (2, 4, 5, 5)
    with pytest.raises(ValueError, match=r"1, 5, 14, 39 tokens on the grid \(5, 5\); got \(2, 6\)"):
        quantizer.indices_to_codes(indices[:, :6])
    with pytest.raises(ValueError, match="length must lie between 1 and 4, got 5"):
        quantizer.shorten(indices, 5)
    other = quantizer(torch.randn(2, 4, 4, 7)).indices
    assert quantizer.shorten(other, 2, (4, 7)).shape == (2, 1 + 2 * 3)


def test_the_gradient_of_the_codes_is_the_identity_and_leaves_everything_else_alone():
    quantizer = pyramid().train()
    features, upstream = torch.randn(2, 4, 5, 5, requires_grad=True), torch.randn(2, 4, 5, 5)
    quantized = quantizer(features)
    codes = quantizer.indices_to_codes(quantized.indices)
    torch.testing.assert_close(quantized.codes, codes, atol=1e-5, rtol=1e-5)
    quantized.codes.mul(upstream).sum().backward()
    torch.testing.assert_close(features.grad, upstream)
    assert all(parameter.grad is None for parameter in quantizer.parameters())


def test_each_loss_reaches_one_side():
    quantizer = pyramid().train()
    features = torch.randn(2, 4, 5, 5, requires_grad=True)
    losses = quantizer(features).losses
    losses["commitment"].backward(retain_graph=True)
    sums = [
        quantizer.indices_to_codes(quantizer.shorten(quantizer(features).indices, length)).detach()
        for length in (1, 2, 3, 4)
    ]
    expected = 2 * sum(features.detach() - each for each in sums) / 4 / features.numel()
    torch.testing.assert_close(features.grad, expected, atol=1e-7, rtol=1e-4)
    assert all(parameter.grad is None for parameter in quantizer.parameters())
    features.grad = None
    losses["codebook"].backward()
    assert features.grad is None
    assert all(parameter.grad.abs().sum() > 0 for parameter in quantizer.parameters())


def test_early_codes_learn_from_all_later_partial_sums():
    quantizer = pyramid(phi=0, scales=[1, 2]).train()
    features = torch.randn(1, 4, 2, 2)
    quantized = quantizer(features)
    quantized.losses["codebook"].backward()
    table = quantizer.part(0).table.detach().clone().requires_grad_()
    first = table[quantized.indices[0, 0]].view(1, 4, 1, 1).expand(1, 4, 2, 2)
    second = first + table[quantized.indices[0, 1:]].T.view(1, 4, 2, 2)
    (F.mse_loss(first, features) / 2 + F.mse_loss(second, features) / 2).backward()
    torch.testing.assert_close(quantizer.part(0).table.grad, table.grad)


def test_the_losses_of_the_part_are_averaged_over_the_scales():
    quantizer = MultiScaleQuantizer(SPHERE, [1, 2, 4], phi=0, up="linear", loss="stage", bits=6).train()
    features = torch.randn(2, 6, 4, 4)
    losses = quantizer(features).losses
    rest, each = features, []
    for size in (1, 2, 4):
        quantized = quantizer.part(0)(F.interpolate(rest, (size, size), mode="area"))
        each.append(quantized.losses)
        rest = rest - F.interpolate(quantized.codes, (4, 4), mode="bilinear")
    assert losses.keys() == quantizer.loss_weights.keys() == {"sample_entropy", "batch_entropy", "commitment"}
    for key, loss in losses.items():
        torch.testing.assert_close(loss, torch.stack([one[key] for one in each]).mean())


def test_bits_of_infinity_are_the_labels_of_each_token():
    quantizer = MultiScaleQuantizer(
        {**SPHERE, "index_bits": 1}, [1, 2, 4], phi=0, up="linear", loss="stage", bits=6
    ).eval()
    features = torch.randn(2, 6, 4, 4)
    quantized = quantizer(features)
    assert quantized.indices.shape == (2, 21, 6) == (2, *quantizer.indices_shape((4, 4)))
    assert quantizer.total_bits((4, 4)) == 21 * 6
    rest, labels = features, []
    for size in (1, 2, 4):
        bits = F.interpolate(rest, (size, size), mode="area") > 0
        labels.append(bits.flatten(2).mT.long())
        rest = rest - F.interpolate((2.0 * bits - 1) / 6**0.5, (4, 4), mode="bilinear")
    assert torch.equal(quantized.indices, torch.cat(labels, 1))


def test_the_codebook_moves_once_by_the_cells_of_all_scales():
    quantizer = pyramid(EMA, phi=0, scales=[1, 2, 4]).train()
    single = copy.deepcopy(quantizer.part(0))
    rest = features = torch.randn(2, 4, 4, 4)
    for size in (1, 2, 4):
        codes = single(F.interpolate(rest, (size, size), mode="area")).codes
        rest = rest - F.interpolate(codes.detach(), (4, 4), mode="bicubic")
    single.update()
    quantizer(features)
    quantizer.update()
    torch.testing.assert_close(quantizer.part(0).table, single.table)
    assert quantizer.part(0).updates == 1


def test_dropout_keeps_a_prefix_of_the_scales_and_gives_every_parameter_a_gradient():
    quantizer = pyramid(dropout=1.0, min_scales=2).train()
    lengths = set()
    for _ in range(12):
        features = torch.randn(2, 4, 5, 5, requires_grad=True)
        quantized = quantizer(features)
        lengths.add(quantized.indices.shape[1])
        codes = quantizer.indices_to_codes(quantized.indices)
        torch.testing.assert_close(quantized.codes, codes, atol=1e-5, rtol=1e-5)
        quantizer.zero_grad()
        (quantized.codes.sum() + sum(quantized.losses.values())).backward()
        assert all(parameter.grad is not None for parameter in quantizer.parameters())
        quantizer.update()
    assert lengths == {5, 14, 39}
    assert quantizer.eval()(features).indices.shape[1] == 39


def test_a_recomputation_keeps_as_many_scales_and_collects_nothing_twice():
    quantizer = pyramid(EMA, phi=0, dropout=1.0).train()
    twin = copy.deepcopy(quantizer)
    for _ in range(3):
        features = torch.randn(2, 4, 5, 5, requires_grad=True)
        checkpoint(lambda x: quantizer(x).codes, features, use_reentrant=False).sum().backward()
        twin(features)
        quantizer.update()
        twin.update()
    for name, tensor in quantizer.state_dict().items():
        torch.testing.assert_close(tensor, twin.state_dict()[name])


def test_an_image_is_quantized_the_same_alone_and_in_a_batch():
    quantizer = pyramid(dim=8).eval()
    features = torch.randn(20, 8, 5, 5).contiguous(memory_format=torch.channels_last)
    together = quantizer(features)
    alone = [quantizer(features[i : i + 1].contiguous()) for i in range(20)]
    assert torch.equal(together.indices, torch.cat([each.indices for each in alone]))
    assert torch.equal(together.codes, torch.cat([each.codes for each in alone]))


def test_the_seed_alone_decides_the_start():
    torch.manual_seed(1)
    state = pyramid().state_dict()
    before = torch.random.get_rng_state()
    other = pyramid().state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(tensor, other[name]) for name, tensor in state.items())
    assert not torch.equal(state["phi.0.weight"], pyramid(seed=1).state_dict()["phi.0.weight"])


def test_a_stack_may_be_the_part_and_it_is_built_again_from_its_config():
    stack = {"_target_": "vistok.quantizer.ResidualQuantizer", "depth": 2, "quantizer": LEARNED}
    quantizer = pyramid(stack)
    again = vistok.build(config_of(quantizer)).eval()
    assert config_of(again) == config_of(quantizer)
    quantized = again(torch.randn(2, 4, 5, 5))
    assert quantized.indices.shape == (2, 39, 2)
    assert torch.equal(quantized.codes, again.indices_to_codes(quantized.indices))


@pytest.mark.parametrize("training", [True, False])
def test_it_compiles_into_one_graph(training, monkeypatch):
    # The shape checks of the test run cannot be traced.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    torch.compiler.reset()
    sphere = {"_target_": "vistok.quantizer.BSQ", "entropy_weight": 0.0, "commitment_weight": 0.25}
    quantizer = MultiScaleQuantizer(sphere, [1, 2], phi=0, loss="stage", bits=4).train(training)
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    features = torch.randn(2, 4, 2, 2)
    expected, got = quantizer(features), compiled(features)
    assert torch.equal(got.indices, expected.indices)
    torch.testing.assert_close(got.codes, expected.codes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scales": []}, "scales must be positive integers"),
        ({"scales": [1, 3, 2]}, "scales must be positive integers that do not decrease"),
        ({"phi": 5}, "5 convolutions are too many for 4 scales"),
        ({"phi": 2, "template": EMA}, "the phi convolutions learn by the cumulative codebook loss"),
        ({"phi": 2, "loss": "stage"}, "the phi convolutions learn by the cumulative codebook loss"),
        ({"phi": 0, "phi_ratio": 0.5}, "phi_ratio=0.5 has no effect"),
        ({"phi_ratio": 1.5}, r"phi_ratio must lie in \(0, 1\]"),
        ({"up": "nearest"}, "up must be one of bicubic, linear"),
        ({"loss": "sum"}, "loss must be one of cumulative, stage"),
        ({"min_scales": 2}, "min_scales=2 has no effect without dropout"),
        ({"template": {"_target_": "vistok.quantizer.KL"}, "codebook_size": None}, "KL is continuous"),
    ],
)
def test_what_cannot_work_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        pyramid(**arguments)


def test_a_part_without_distances_has_no_cumulative_loss():
    with pytest.raises(ValueError, match="BSQ has neither commitment nor codebook loss: write loss=stage"):
        MultiScaleQuantizer({**SPHERE, "commitment_weight": 0.0}, [1, 2], phi=0, bits=4)
    with pytest.raises(ValueError, match=r"needs a grid \(n,\), \(h, w\) or \(t, h, w\)"):
        pyramid()(torch.randn(1, 4, 2, 2, 2, 2))


@torch.no_grad()
def test_the_ratio_is_the_share_of_the_convolution():
    quantizer = pyramid(scales=[3], phi=1, phi_ratio=0.2).eval()
    quantized = quantizer(torch.randn(2, 4, 3, 3))
    cells = quantizer.part(0).indices_to_codes(quantized.indices).unflatten(2, (3, 3))
    torch.testing.assert_close(quantized.codes, 0.8 * cells + 0.2 * quantizer.phi[0](cells), atol=1e-6, rtol=1e-5)


def test_losses_of_the_part_do_not_move_the_scales_before():
    quantizer = pyramid({**LEARNED, "entropy_weight": 0.1}, phi=1).train()
    features = torch.randn(2, 4, 5, 5, requires_grad=True)
    quantizer(features).losses["sample_entropy"].backward()
    assert features.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in quantizer.phi.parameters())


@torch.no_grad()
def test_the_memory_layout_of_the_features_changes_no_index():
    quantizer = pyramid(SPHERE, [1, 2, 4], None, None, 0, loss="stage", bits=4).eval()
    # The averages cancel out, so that their signs show the order of the sum.
    half = torch.randn(16, 4, 8)
    features = torch.cat([half, -half], -1)[..., torch.randperm(16)].unflatten(-1, (4, 4)).contiguous()
    strided = features.contiguous(memory_format=torch.channels_last)
    assert torch.equal(quantizer(strided).indices, quantizer(features).indices)


@torch.no_grad()
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_the_codes_are_what_the_scales_add(grid):
    quantizer = pyramid().eval()
    codes, indices, _ = quantizer(torch.randn(2, 4, *grid))
    sizes = quantizer.scale_sizes(grid)
    assert tuple(math.prod(size) for size in sizes) == quantizer.scale_lengths(grid)
    maps = [quantizer.part(0).indices_to_codes(each) for each in indices.split(quantizer.scale_lengths(grid), 1)]
    added = [quantizer.enlarge(cells, number, grid) for number, cells in enumerate(maps)]
    assert torch.allclose(sum(added), codes, atol=1e-6)
    assert torch.equal(quantizer.enlarge(maps[1].unflatten(2, sizes[1]), 1, grid), added[1])
    assert [quantizer.reduce(codes, number).shape[2:] for number in range(len(sizes))] == sizes
