import warnings

import pytest
import torch
from torch import nn

from vistok.metric import I3D, FeatureDistances
from vistok.metric.fvd import I3D_FILE
from vistok.metric.weights import WeightsNotFoundError


class SmallNetwork(nn.Module):
    """Called as the I3D of StyleGAN-V is."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(3, 6, 3)

    def forward(
        self, x: torch.Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
    ) -> torch.Tensor:
        if rescale:
            x = 2 * x / 255 - 1
        return self.conv(x).relu().mean([2, 3, 4])


@pytest.fixture
def file(tmp_path):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.script(SmallNetwork()).save(str(tmp_path / I3D_FILE))
    return tmp_path / I3D_FILE


def videos(seed, num=24):
    return torch.randint(0, 256, (num, 3, 5, 8, 8), generator=torch.Generator().manual_seed(seed)).float()


def frechet(a, b):
    """Squared Frechet distance of the Gaussians of two sets of features, in float64 from the formula."""
    a, b = a.double(), b.double()
    product = torch.cov(a.T) @ torch.cov(b.T)
    trace = torch.linalg.eigvals(product).real.clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + torch.cov(a.T).trace() + torch.cov(b.T).trace() - 2 * trace)


def test_fvd_is_the_frechet_distance_of_the_features_of_whole_videos(file):
    torch.manual_seed(0)
    reference = SmallNetwork().double()
    ours, originals = videos(0), videos(1) * 0.5
    with torch.no_grad():
        expected = frechet(*(reference(pixels.double(), rescale=True) for pixels in (ours, originals)))
    distances = FeatureDistances(I3D(file), ["fvd"])
    for first, second in zip(ours.split(7), originals.split(7), strict=True):
        distances.update(first, second)
    assert distances.compute()["fvd"] == pytest.approx(expected, rel=1e-4)


def test_fvd_of_equal_videos_is_zero(file):
    distances = FeatureDistances(I3D(file), ["fvd"])
    distances.update(videos(0), videos(0))
    assert distances.compute()["fvd"] == pytest.approx(0, abs=1e-6)


def test_order_of_the_frames_matters(file):
    distances = FeatureDistances(I3D(file), ["fvd"])
    moving = videos(0) * torch.linspace(0.1, 1, 5).view(1, 1, 5, 1, 1)
    distances.update(moving.flip(2), moving)
    assert distances.compute()["fvd"] > 1e-4


def test_file_is_found_by_its_path_or_in_the_folder_of_weights(file, monkeypatch):
    hashes = {I3D(file).protocol["sha256"], I3D(weights=file.parent).protocol["sha256"]}
    monkeypatch.setenv("VISTOK_WEIGHTS", str(file.parent))
    assert hashes == {I3D().protocol["sha256"]}


def test_missing_file_names_both_ways_to_give_it(tmp_path, monkeypatch):
    monkeypatch.delenv("VISTOK_WEIGHTS", raising=False)
    for weights in (None, tmp_path):
        with pytest.raises(WeightsNotFoundError, match=rf"VISTOK_WEIGHTS.*; or write fvd=/path/to/{I3D_FILE}"):
            I3D(weights=weights)


def test_file_of_another_kind_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / I3D_FILE)
    with pytest.raises(ValueError, match="is no TorchScript file"):
        I3D(tmp_path / I3D_FILE)


def test_network_stays_frozen(file):
    network = I3D(file).train()
    assert not network.network[0].training
    assert not any(parameter.requires_grad for parameter in network.network.parameters())
    assert not network.state_dict()
