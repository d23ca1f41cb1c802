"""rFID: the Frechet arithmetic on a small network; the real network where its weights are."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn

from vistok.metric import RFID, WeightsNotFoundError
from vistok.metric.image import to_uint8
from vistok.metric.rfid import INCEPTION_FILE

needs_weights = pytest.mark.skipif("VISTOK_WEIGHTS" not in os.environ, reason="VISTOK_WEIGHTS")


class Network(nn.Module):
    num_features = 6

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, self.num_features, 5, stride=3)
        self.seen = []

    def forward(self, images):
        self.seen.append(images.dtype)
        return self.layer(images.float() / 255).relu().mean((2, 3))


def pair(count=40, channels=3, size=16):
    originals = torch.rand(count, channels, size, size) * 2 - 1
    return originals * 0.7 + 0.1 * torch.randn_like(originals), originals


@torch.no_grad()
def expected(network, ours, originals):
    a, b = (network(to_uint8(images)).double().numpy() for images in (ours, originals))
    root = sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)


def test_the_value_equals_a_computation_in_float64():
    network = Network()
    ours, originals = pair()
    rfid = RFID(network=network)
    rfid.update(ours, originals)
    assert rfid.compute() == pytest.approx(expected(network, ours, originals), rel=1e-4)


def test_the_value_does_not_depend_on_the_batches():
    network = Network()
    ours, originals = pair()
    whole, parts = RFID(network=network), RFID(network=network)
    whole.update(ours, originals)
    for part in range(0, 40, 7):
        parts.update(ours[part : part + 7], originals[part : part + 7])
    assert parts.compute() == pytest.approx(whole.compute(), rel=1e-4)


def test_perfect_reconstructions_have_no_distance():
    rfid = RFID(network=Network())
    _, originals = pair()
    rfid.update(originals, originals)
    assert rfid.compute() == pytest.approx(0, abs=1e-6)


def test_autocast_changes_nothing():
    network = Network()
    images = pair()
    outside, inside = RFID(network=network), RFID(network=network)
    outside.update(*images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside.update(*images)
    assert inside.compute() == outside.compute()


def test_the_network_gets_8_bit_images():
    network = Network()
    RFID(network=network).update(*pair())
    assert network.seen == [torch.uint8, torch.uint8]


def test_one_channel_is_repeated():
    network = Network()
    ours, originals = pair(channels=1)
    grey, colour = RFID(network=network), RFID(network=network)
    grey.update(ours, originals)
    colour.update(ours.repeat(1, 3, 1, 1), originals.repeat(1, 3, 1, 1))
    assert grey.compute() == colour.compute()


def test_four_channels_are_refused():
    with pytest.raises(ValueError, match="1 or 3 channels, got 4"):
        RFID(network=Network()).update(*pair(channels=4))


def test_few_images_carry_a_note():
    rfid = RFID(network=Network())
    rfid.update(*pair(count=5))
    assert rfid.note == "n = 5, biased: fewer images than feature dimensions (6)"
    rfid.update(*pair(count=1))
    assert rfid.note is None


def test_reset_forgets_the_images():
    network = Network()
    images = pair()
    rfid, fresh = RFID(network=network), RFID(network=network)
    rfid.update(*pair())
    rfid.reset()
    rfid.update(*images)
    fresh.update(*images)
    assert rfid.compute() == fresh.compute()


def test_one_image_is_too_few():
    rfid = RFID(network=Network())
    rfid.update(*pair(count=1))
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        rfid.compute()


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(WeightsNotFoundError, match=INCEPTION_FILE):
        RFID(weights=tmp_path)


@needs_weights
def test_inception_resizes_as_tensorflow_did_and_states_its_hash():
    rfid = RFID()
    ours, originals = pair(count=3, size=64)
    rfid.update(ours, originals)
    assert rfid._fid.inception.use_antialias is False
    assert rfid.count == 3
    assert len(rfid.protocol["sha256"]) == 64


@needs_weights
def test_inception_features_equal_those_of_torch_fidelity():
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = str(Path(os.environ["VISTOK_WEIGHTS"]) / INCEPTION_FILE)
    network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=path).eval()
    rfid = RFID()
    _, originals = pair(count=2, size=64)
    rfid.update(originals, originals)
    features = network(to_uint8(originals))[0].double()
    assert torch.allclose(rfid._fid.real_features_sum, features.sum(0), rtol=1e-4, atol=1e-4)
