"""What holds for every quantizer, over all configs and all ranks of grids."""

import copy
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import vistok

CONFIGS = sorted(Path("configs/quantizer").glob("*.yaml"))
GRIDS = {"sequence": (7,), "image": (4, 5), "video": (2, 3, 4)}
SMALL = {"codebook_size": 32, "levels": [5, 4, 3]}


def make(path, **overrides):
    config = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    config.update({key: value for key, value in SMALL.items() if key in config})
    config.update(overrides)
    return vistok.build(config)


def features_for(quantizer, grid, batch=3, dtype=torch.float32):
    return torch.randn(batch, quantizer.dim, *grid, dtype=dtype)


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def quantizer(request):
    quantizer = make(request.param)
    # One training step, so that codebooks that start from data have started.
    quantizer.train()(features_for(quantizer, (6, 6)))
    quantizer.update()
    return quantizer


@pytest.fixture(params=GRIDS.values(), ids=GRIDS.keys())
def grid(request):
    return request.param


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same_state(module, before):
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("training", [True, False])
def test_codes_keep_the_input_shape_and_indices_its_grid(quantizer, grid, training):
    quantized = quantizer.train(training)(features_for(quantizer, grid))
    assert quantized.codes.shape == (3, quantizer.dim, *grid)
    assert quantized.indices.shape == (3, *quantizer.indices_shape(grid))


def test_indices_are_int64_inside_the_codebook(quantizer, grid):
    indices = quantizer.eval()(features_for(quantizer, grid)).indices
    assert indices.dtype == torch.int64
    assert indices.min() >= 0
    assert indices.max() < quantizer.codebook_size


def test_codes_of_evaluation_are_exactly_the_codes_of_their_indices(quantizer, grid):
    quantized = quantizer.eval()(features_for(quantizer, grid))
    assert torch.equal(quantizer.indices_to_codes(quantized.indices), quantized.codes)


def test_codes_of_training_have_the_value_of_the_codes_of_their_indices(quantizer, grid):
    quantized = quantizer.train()(features_for(quantizer, grid))
    torch.testing.assert_close(quantizer.indices_to_codes(quantized.indices), quantized.codes)


def test_every_index_survives_a_round_trip_through_its_code(quantizer):
    indices = torch.arange(quantizer.codebook_size).unsqueeze(0)
    codes = quantizer.indices_to_codes(indices)
    table = quantizer.codebook
    distinct = len(table.unique(dim=0)) == len(table)
    recovered = quantizer.codes_to_indices(codes)
    assert torch.equal(quantizer.indices_to_codes(recovered), codes)
    assert torch.equal(recovered, indices) or not distinct


def test_the_codebook_has_one_row_per_index(quantizer):
    indices = torch.arange(quantizer.codebook_size).unsqueeze(0)
    assert torch.equal(quantizer.codebook, quantizer.indices_to_codes(indices)[0].T)


def test_bits_are_the_logarithm_of_the_number_of_codes(quantizer):
    assert 2**quantizer.bits == pytest.approx(quantizer.codebook_size)


def test_losses_have_the_same_keys_in_training_and_evaluation(quantizer, grid):
    features = features_for(quantizer, grid)
    for training in (True, False):
        losses = quantizer.train(training)(features).losses
        assert losses.keys() == quantizer.loss_weights.keys()
        assert all(loss.shape == () and torch.isfinite(loss) for loss in losses.values())


def test_a_position_is_quantized_the_same_alone_and_in_a_batch(quantizer, grid):
    features = features_for(quantizer, grid, batch=40)
    together = quantizer.eval()(features).indices
    alone = torch.cat([quantizer(features[i : i + 1]).indices for i in range(len(features))])
    assert torch.equal(together, alone)


def test_evaluation_changes_no_state(quantizer, grid):
    before = state(quantizer)
    quantizer.eval()(features_for(quantizer, grid))
    quantizer.update()
    assert_same_state(quantizer, before)


def test_a_training_forward_changes_no_state_before_update(quantizer, grid):
    before = state(quantizer)
    quantizer.train()(features_for(quantizer, grid))
    assert_same_state(quantizer, before)


def test_a_discarded_step_changes_no_state(quantizer, grid):
    before = state(quantizer)
    quantizer.train()(features_for(quantizer, grid))
    quantizer.discard()
    quantizer.update()
    assert_same_state(quantizer, before)


def test_state_survives_saving_and_loading(quantizer, grid):
    features = features_for(quantizer, grid)
    other = copy.deepcopy(quantizer)
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other.eval()(features).indices, quantizer.eval()(features).indices)


def test_the_gradient_reaches_the_features(quantizer, grid):
    features = features_for(quantizer, grid).requires_grad_()
    quantizer.train()(features).codes.square().sum().backward()
    assert torch.isfinite(features.grad).all()
    assert features.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_come_back_in_the_dtype_of_the_features(quantizer, grid, dtype):
    assert quantizer.eval()(features_for(quantizer, grid, dtype=dtype)).codes.dtype == dtype


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
    assert quantized.indices.min() >= 0
    assert quantized.indices.max() < quantizer.codebook_size
    assert torch.isfinite(quantizer.indices_to_codes(quantized.indices)).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_an_error_in_evaluation(quantizer, grid, value):
    features = features_for(quantizer, grid)
    features.view(-1)[5] = value
    with pytest.raises(ValueError, match=r"features .* hold 1 values that are NaN or infinite"):
        quantizer.eval()(features)


def test_features_that_are_not_finite_never_reach_the_codebook(quantizer, grid):
    features = features_for(quantizer, grid)
    features.view(-1)[5] = torch.nan
    quantized = quantizer.train()(features)
    quantizer.update()
    assert 0 <= quantized.indices.min() <= quantized.indices.max() < quantizer.codebook_size
    assert torch.isfinite(quantizer.codebook).all()


def test_a_wrong_channel_count_is_named_in_the_error(quantizer, grid):
    with pytest.raises(
        ValueError, match=rf"takes features \(b, {quantizer.dim}, \*grid\), got \(3, {quantizer.dim + 1},"
    ):
        quantizer(torch.randn(3, quantizer.dim + 1, *grid))


@pytest.mark.parametrize("index", [-1, "size"])
def test_an_index_outside_the_codebook_is_an_error(quantizer, index):
    index = quantizer.codebook_size if index == "size" else index
    with pytest.raises(ValueError, match=rf"indices 0 to {quantizer.codebook_size - 1}"):
        quantizer.indices_to_codes(torch.tensor([[0, index]]))


def test_labels_are_refused_where_there_are_no_class_specific_codebooks(quantizer, grid):
    with pytest.raises(ValueError, match="no class-specific codebooks"):
        quantizer(features_for(quantizer, grid), torch.zeros(3, dtype=torch.int64))


def test_a_recomputation_in_the_backward_pass_collects_nothing_twice(quantizer, grid):
    from torch.utils.checkpoint import checkpoint

    features = features_for(quantizer, grid, batch=8).requires_grad_()
    twin = copy.deepcopy(quantizer)
    checkpoint(lambda x: quantizer(x).codes, features, use_reentrant=False).sum().backward()
    quantizer.update()
    twin(features)
    twin.update()
    for name, tensor in quantizer.state_dict().items():
        torch.testing.assert_close(tensor, twin.state_dict()[name])
