"""What holds for every quantizer, over all configs and all ranks of grids."""

import copy
import math
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import vistok
from vistok.config import config_of

CONFIGS = sorted(Path("configs/quantizer").glob("*.yaml"))
GRIDS = {"sequence": (7,), "image": (4, 5), "video": (2, 3, 4)}
SMALL = {"codebook_size": 32, "levels": [5, 4, 3], "bits": 8}
CONTINUOUS = {"kl", "identity"}
# Several codebooks or scales; the tests of the composites look at what their codes become.
COMPOSITE = {"rvq", "rfsq", "rlfq", "grouped_vq", "gsq", "factorized_vq", "multiscale_vq", "multiscale_bsq"}
# In training their codes carry noise that evaluation and the indices do not have.
NOISY = {"kl", "fsq_dithered"}


def make(path, **overrides):
    config = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    config.update({key: value for key, value in SMALL.items() if config.get(key) is not None})
    config.update(overrides)
    return vistok.build(config)


def features_for(quantizer, grid, batch=3, dtype=torch.float32):
    return torch.randn(batch, quantizer.dim, *grid, dtype=dtype)


def random_indices(quantizer, grid, batch=3):
    shape = (batch, *quantizer.indices_shape(grid))
    return (torch.rand(shape, dtype=torch.float64) * sizes_of(quantizer)).long()


def sizes_of(quantizer):
    """Codebook sizes, shaped so that they compare with indices."""
    sizes = torch.tensor(quantizer.codebook_sizes)
    return sizes if len(sizes) > 1 else sizes[0]


def assert_inside(quantizer, indices):
    assert indices.dtype == torch.int64
    assert (indices >= 0).all()
    assert (indices < sizes_of(quantizer)).all()


def trained(path):
    """A quantizer after one training step, so that codebooks that start from data have started."""
    quantizer = make(path)
    quantizer.train()(features_for(quantizer, (6, 6)))
    quantizer.update()
    return quantizer


def named(paths):
    return {"params": paths, "ids": [path.stem for path in paths]}


@pytest.fixture(**named(CONFIGS))
def any_quantizer(request):
    return trained(request.param)


@pytest.fixture(**named([path for path in CONFIGS if path.stem not in CONTINUOUS]))
def quantizer(request):
    return trained(request.param)


@pytest.fixture(**named([path for path in CONFIGS if path.stem not in CONTINUOUS | COMPOSITE]))
def tabled(request):
    return trained(request.param)


@pytest.fixture(**named([path for path in CONFIGS if path.stem in CONTINUOUS]))
def continuous(request):
    return trained(request.param)


@pytest.fixture(**named([path for path in CONFIGS if path.stem not in CONTINUOUS | NOISY]))
def noiseless(request):
    return trained(request.param)


@pytest.fixture(params=GRIDS.values(), ids=GRIDS.keys())
def grid(request):
    return request.param


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same_state(module, before):
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("training", [True, False])
def test_codes_keep_the_input_shape_and_indices_its_grid(any_quantizer, grid, training):
    quantized = any_quantizer.train(training)(features_for(any_quantizer, grid))
    assert quantized.codes.shape == (3, any_quantizer.dim, *grid)
    assert quantized.indices.shape == (3, *any_quantizer.indices_shape(grid))


def test_indices_are_int64_inside_the_codebook(quantizer, grid):
    assert_inside(quantizer, quantizer.eval()(features_for(quantizer, grid)).indices)


def test_codes_of_evaluation_are_exactly_the_codes_of_their_indices(quantizer, grid):
    quantized = quantizer.eval()(features_for(quantizer, grid))
    assert torch.equal(quantizer.indices_to_codes(quantized.indices, grid), quantized.codes)


def test_codes_of_training_have_the_value_of_the_codes_of_their_indices(noiseless, grid):
    quantized = noiseless.train()(features_for(noiseless, grid))
    torch.testing.assert_close(noiseless.indices_to_codes(quantized.indices, grid), quantized.codes)


def test_every_index_survives_a_round_trip_through_its_code(tabled):
    table = tabled.codebook
    indices = torch.arange(tabled.codebook_size).unsqueeze(0)
    codes = tabled.indices_to_codes(indices)
    assert torch.equal(table, codes[0].T)
    recovered = tabled.codes_to_indices(codes)
    assert torch.equal(tabled.indices_to_codes(recovered), codes)
    assert torch.equal(recovered, indices) or len(table.unique(dim=0)) < len(table)


def test_codes_of_random_indices_are_finite(quantizer, grid):
    codes = quantizer.indices_to_codes(random_indices(quantizer, grid), grid)
    assert codes.shape == (3, quantizer.dim, *grid)
    assert torch.isfinite(codes).all()


def test_bits_are_the_logarithm_of_the_number_of_codes(quantizer):
    assert 2**quantizer.bits == pytest.approx(math.prod(quantizer.codebook_sizes))
    assert quantizer.total_bits((4, 5)) == pytest.approx(
        quantizer.bits * math.prod(quantizer.indices_shape((4, 5))) / quantizer.num_codebooks
    )


def test_continuous_codes_have_no_integers(continuous, grid):
    quantized = continuous.eval()(features_for(continuous, grid))
    assert continuous.codebook_sizes == ()
    assert continuous.bits == math.inf
    assert quantized.indices.numel() == 0
    assert quantized.indices.dtype == torch.int64
    for call in (continuous.indices_to_codes, continuous.codes_to_indices):
        with pytest.raises(ValueError, match="is continuous"):
            call(quantized.indices if call == continuous.indices_to_codes else quantized.codes)


def test_losses_have_the_same_keys_in_training_and_evaluation(any_quantizer, grid):
    features = features_for(any_quantizer, grid)
    for training in (True, False):
        losses = any_quantizer.train(training)(features).losses
        assert losses.keys() == any_quantizer.loss_weights.keys()
        assert all(loss.shape == () and torch.isfinite(loss) for loss in losses.values())


def test_a_position_is_quantized_the_same_alone_and_in_a_batch(quantizer, grid):
    features = features_for(quantizer, grid, batch=40)
    together = quantizer.eval()(features).indices
    alone = torch.cat([quantizer(features[i : i + 1]).indices for i in range(len(features))])
    assert torch.equal(together, alone)


def test_evaluation_changes_no_state(any_quantizer, grid):
    before = state(any_quantizer)
    any_quantizer.eval()(features_for(any_quantizer, grid))
    any_quantizer.update()
    assert_same_state(any_quantizer, before)


def test_a_training_forward_changes_no_state_before_update(any_quantizer, grid):
    before = state(any_quantizer)
    any_quantizer.train()(features_for(any_quantizer, grid))
    assert_same_state(any_quantizer, before)


def test_a_discarded_step_changes_no_state(any_quantizer, grid):
    before = state(any_quantizer)
    any_quantizer.train()(features_for(any_quantizer, grid))
    any_quantizer.discard()
    any_quantizer.update()
    assert_same_state(any_quantizer, before)


def test_state_survives_saving_and_loading(quantizer, grid):
    features = features_for(quantizer, grid)
    other = copy.deepcopy(quantizer)
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other.eval()(features).indices, quantizer.eval()(features).indices)


def test_the_gradient_reaches_the_features(any_quantizer, grid):
    features = features_for(any_quantizer, grid).requires_grad_()
    codes = any_quantizer.train()(features).codes
    (codes * torch.randn_like(codes)).sum().backward()
    assert torch.isfinite(features.grad).all()
    assert features.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_come_back_in_the_dtype_of_the_features(any_quantizer, grid, dtype):
    assert any_quantizer.eval()(features_for(any_quantizer, grid, dtype=dtype)).codes.dtype == dtype


def test_autocast_does_not_change_the_indices(quantizer, grid):
    features = features_for(quantizer, grid, batch=64)
    outside = quantizer.eval()(features).indices
    with torch.autocast("cpu", torch.bfloat16):
        inside = quantizer(features)
        inverted = quantizer.codes_to_indices(features)
    assert torch.equal(inside.indices, outside)
    assert torch.equal(inverted, quantizer.codes_to_indices(features))
    assert inside.codes.dtype == torch.float32


@pytest.mark.parametrize("value", [0.0, 1e30, -1e30])
@pytest.mark.parametrize("training", [True, False])
def test_huge_zero_and_repeated_features_stay_inside_the_codebook(quantizer, grid, value, training):
    features = torch.full((2, quantizer.dim, *grid), value)
    quantized = quantizer.train(training)(features)
    assert_inside(quantizer, quantized.indices)
    assert torch.isfinite(quantizer.indices_to_codes(quantized.indices, grid)).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_an_error_in_evaluation(any_quantizer, grid, value):
    features = features_for(any_quantizer, grid)
    features.view(-1)[5] = value
    with pytest.raises(ValueError, match=r"features .* hold 1 values that are NaN or infinite"):
        any_quantizer.eval()(features)


def test_features_that_are_not_finite_never_reach_the_codebook(quantizer, grid):
    features = features_for(quantizer, grid)
    features.view(-1)[5] = torch.nan
    quantized = quantizer.train()(features)
    quantizer.update()
    assert_inside(quantizer, quantized.indices)
    assert all(torch.isfinite(value).all() for value in quantizer.state_dict().values())


def test_a_wrong_channel_count_is_named_in_the_error(any_quantizer, grid):
    with pytest.raises(
        ValueError, match=rf"takes features \(b, {any_quantizer.dim}, \*grid\), got \(3, {any_quantizer.dim + 1},"
    ):
        any_quantizer(torch.randn(3, any_quantizer.dim + 1, *grid))


@pytest.mark.parametrize("index", [-1, "size"])
def test_an_index_outside_the_codebook_is_an_error(quantizer, grid, index):
    indices = random_indices(quantizer, grid)
    indices.view(-1)[0] = quantizer.codebook_sizes[0] if index == "size" else index
    with pytest.raises(ValueError, match=rf"indices 0 to {quantizer.codebook_sizes[0] - 1}"):
        quantizer.indices_to_codes(indices, grid)


def test_labels_are_refused_where_there_are_no_class_specific_codebooks(any_quantizer, grid):
    labels = torch.zeros(3, dtype=torch.int64)
    if any_quantizer.accepts_labels:
        assert_inside(any_quantizer, any_quantizer(features_for(any_quantizer, grid), labels).indices)
        return
    with pytest.raises(ValueError, match="no class-specific codebooks"):
        any_quantizer(features_for(any_quantizer, grid), labels)


def test_a_frozen_quantizer_learns_nothing(any_quantizer, grid):
    any_quantizer.train().freeze()
    before = state(any_quantizer)
    features = features_for(any_quantizer, grid).requires_grad_()
    any_quantizer(features).codes.sum().backward()
    any_quantizer.update()
    tables = {name: value for name, value in before.items() if not name.endswith("updates")}
    for name, value in tables.items():
        assert torch.equal(any_quantizer.state_dict()[name], value), name
    assert all(parameter.grad is None for parameter in any_quantizer.parameters())


def test_a_quantizer_is_rebuilt_from_its_config(any_quantizer, grid):
    other = vistok.build(config_of(any_quantizer))
    other.load_state_dict(any_quantizer.state_dict())
    features = features_for(any_quantizer, grid)
    assert torch.equal(other.eval()(features).codes, any_quantizer.eval()(features).codes)


def test_a_recomputation_in_the_backward_pass_collects_nothing_twice(quantizer, grid):
    from torch.utils.checkpoint import checkpoint

    features = features_for(quantizer, grid, batch=8).requires_grad_()
    twin = copy.deepcopy(quantizer)
    # The square needs the codes in its backward pass; straight-through codes alone would not be computed again.
    checkpoint(lambda x: quantizer(x).codes.square(), features, use_reentrant=False).sum().backward()
    quantizer.update()
    twin(features)
    twin.update()
    for name, tensor in quantizer.state_dict().items():
        torch.testing.assert_close(tensor, twin.state_dict()[name])


def test_autocast_changes_neither_codes_nor_losses_nor_gradients_of_training(any_quantizer, grid):
    features = features_for(any_quantizer, grid, batch=8).requires_grad_()
    weights = torch.randn_like(features)
    results = []
    for enabled in (True, False):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            quantized = any_quantizer.train()(features)
        total = (quantized.codes * weights).sum() + sum(quantized.losses.values())
        results.append((quantized.codes, quantized.losses, torch.autograd.grad(total, features)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
