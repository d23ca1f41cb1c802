"""Class-specific codebooks: which codes a label allows, and what happens without one."""

import math

import pytest
import torch

from vistok.quantizer import ClassSpecificQuantizer, VectorQuantizer

CLASSES, SIZE, DIM = 3, 16, 4


def make(**arguments):
    return ClassSpecificQuantizer(SIZE, DIM, CLASSES, **arguments)


def features(batch=6, grid=(5, 3)):
    return torch.randn(batch, DIM, *grid)


def labels_for(batch=6):
    return torch.arange(batch) % CLASSES


def nearest_of_class(rows, table, label):
    """Brute force in float64 over the codes of one class."""
    distances = torch.cdist(rows.double(), table[label * SIZE : (label + 1) * SIZE].double())
    return distances.argmin(-1) + label * SIZE


@pytest.mark.parametrize("training", [True, False])
def test_an_image_takes_the_nearest_codes_of_its_class(training):
    quantizer, batch, labels = make().train(training), features(), labels_for()
    indices = quantizer(batch, labels).indices
    for image, label, got in zip(batch, labels.tolist(), indices, strict=True):
        expected = nearest_of_class(image.flatten(1).T, quantizer.codebook.detach(), label)
        assert torch.equal(got.flatten(), expected)


def test_cosine_distance_compares_directions_within_the_class():
    quantizer, batch, labels = make(distance="cosine").eval(), features(), labels_for()
    indices = quantizer(batch, labels).indices
    for image, label, got in zip(batch, labels.tolist(), indices, strict=True):
        rows = torch.nn.functional.normalize(image.flatten(1).T, dim=-1)
        assert torch.equal(got.flatten(), nearest_of_class(rows, quantizer.codebook.detach(), label))


def test_without_labels_each_position_takes_the_nearest_code_of_all_classes():
    quantizer = make().eval()
    plain = VectorQuantizer(CLASSES * SIZE, DIM).eval()
    plain.load_state_dict(quantizer.state_dict())
    batch = features()
    assert torch.equal(quantizer(batch).indices, plain(batch).indices)


def test_codes_of_labelled_images_are_exactly_those_of_their_indices():
    quantizer = make().eval()
    quantized = quantizer(features(), labels_for())
    assert torch.equal(quantizer.indices_to_codes(quantized.indices), quantized.codes)


def test_a_labelled_image_is_quantized_the_same_alone_and_in_a_batch():
    quantizer, batch, labels = make().eval(), features(20), labels_for(20)
    together = quantizer(batch, labels).indices
    alone = [quantizer(batch[i : i + 1], labels[i : i + 1]).indices for i in range(20)]
    assert torch.equal(together, torch.cat(alone))


def test_labels_of_one_batch_do_not_reach_the_next():
    quantizer, batch = make().eval(), features()
    before = quantizer(batch).indices
    quantizer(batch, labels_for())
    with pytest.raises(ValueError, match="NaN"):
        quantizer(batch * torch.nan, labels_for())
    assert torch.equal(quantizer(batch).indices, before)


def test_sizes_count_the_codes_of_all_classes():
    quantizer = make()
    assert quantizer.codebook_sizes == (CLASSES * SIZE,)
    assert quantizer.bits == pytest.approx(math.log2(CLASSES * SIZE))
    assert quantizer.codebook.shape == (CLASSES * SIZE, DIM)


def test_only_codes_of_the_classes_of_the_batch_learn():
    quantizer = make().train()
    losses = quantizer(features(), torch.full((6,), 1)).losses
    losses["codebook"].backward()
    moved = quantizer.table.grad.abs().sum(-1).nonzero().flatten()
    assert len(moved)
    assert moved.min() >= SIZE
    assert moved.max() < 2 * SIZE


def test_averages_move_the_codes_of_a_class_to_its_features():
    quantizer = make(table="ema", decay=0.5).train()
    centres = torch.tensor([-8.0, 0.0, 8.0])
    for _ in range(12):
        labels = labels_for()
        quantizer(features() * 0.1 + centres[labels].view(-1, 1, 1, 1), labels)
        quantizer.update()
    used = quantizer.cluster_size.view(CLASSES, SIZE) > 0.5
    for label, centre in enumerate(centres.tolist()):
        codes = quantizer.codebook.view(CLASSES, SIZE, DIM)[label][used[label]]
        assert len(codes)
        assert (codes - centre).abs().max() < 0.5


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 3]), r"labels must be 0 to 2, got 0 to 3: set quantizer.num_classes"),
        (torch.tensor([-1, 1, 2]), "labels must be 0 to 2, got -1 to 2"),
        (torch.tensor([0, 1]), r"labels must be 3 integers, one per image, got torch.int64 \(2,\)"),
    ],
)
def test_labels_that_do_not_fit_are_named(labels, message):
    with pytest.raises(ValueError, match=message):
        make()(features(3), labels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes must be an integer of at least 1, got 0"),
        ({"codebook_size": 1}, "codebook_size must be an integer of at least 2, got 1"),
        ({"distance": "linear"}, "distance must be one of euclidean, cosine, dot; got 'linear'"),
        ({"gradient": "soft"}, "gradient must be one of .*; got 'soft'"),
        ({"init": "kmeans"}, "init must be one of .*; got 'kmeans'"),
        ({"decay": 0.9}, "decay"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ClassSpecificQuantizer(**({"codebook_size": SIZE, "dim": DIM, "num_classes": CLASSES} | arguments))
