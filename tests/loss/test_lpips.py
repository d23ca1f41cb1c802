"""LPIPS against the authors' package with the same random weights; the real weights where they are."""

import os
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import models

from vistok.loss.lpips import _NETWORKS, LPIPS, WeightsNotFoundError

NETS = ("vgg", "alex", "squeeze")
CHANNELS = {
    "vgg": (64, 128, 256, 512, 512),
    "alex": (64, 192, 384, 256, 256),
    "squeeze": (64, 128, 256, 384, 384, 512, 512),
}
FILES = {
    "vgg": "vgg16_features.safetensors",
    "alex": "alexnet_features.safetensors",
    "squeeze": "squeezenet1_1_features.safetensors",
}
MODELS = {"vgg": models.vgg16, "alex": models.alexnet, "squeeze": models.squeezenet1_1}
# Where the layers of torchvision's `features` are cut by the authors' package.
SLICES = {
    "vgg": (0, 4, 9, 16, 23, 30),
    "alex": (0, 2, 5, 8, 10, 12),
    "squeeze": (0, 2, 5, 8, 10, 11, 12, 13),
}


def layers_of(net):
    with torch.device("meta"):
        return MODELS[net]().features


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights of all networks, random but of sensible size."""
    path = tmp_path_factory.mktemp("weights")
    torch.manual_seed(1)
    for net, file in FILES.items():
        tensors = {}
        for name, tensor in layers_of(net).state_dict().items():
            scale = (2 / tensor[0].numel()) ** 0.5 if tensor.ndim == 4 else 0.1
            tensors[f"features.{name}"] = torch.randn(tensor.shape) * scale
        save_file(tensors, path / file)
        linear = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) / c for i, c in enumerate(CHANNELS[net])}
        save_file(linear, path / f"lpips_{net}_lin.safetensors")
    return path


def pair(channels=3, size=64):
    return torch.rand(2, channels, size, size) * 2 - 1, torch.rand(2, channels, size, size) * 2 - 1


def authors(net, folder):
    """The authors' package with the weights of a folder, without building torchvision's whole networks."""
    lpips = pytest.importorskip("lpips")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = lpips.LPIPS(net="alex", pnet_rand=True, pretrained=False, verbose=False)
    # Their constructors build the classifier too, which for VGG takes seconds, so the layers are put in by hand.
    kind = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet"}[net]
    slices = getattr(lpips.pretrained_networks, kind).__new__(getattr(lpips.pretrained_networks, kind))
    nn.Module.__init__(slices)
    layers = layers_of(net)
    for number, (first, last) in enumerate(pairwise(SLICES[net]), start=1):
        part = nn.Sequential()
        for layer in range(first, last):
            part.add_module(str(layer), layers[layer])
        setattr(slices, f"slice{number}", part)
    slices.N_slices = len(SLICES[net]) - 1
    features = load_file(folder / FILES[net])
    slices.load_state_dict(
        {name: features["features." + name.split(".", 1)[1]] for name in slices.state_dict()}, assign=True
    )
    network.net, network.chns, network.L = slices, CHANNELS[net], len(CHANNELS[net])
    linear = load_file(folder / f"lpips_{net}_lin.safetensors")
    network.lins = nn.ModuleList(lpips.NetLinLayer(channels, use_dropout=True) for channels in CHANNELS[net])
    for i, layer in enumerate(network.lins):
        layer.load_state_dict({"model.1.weight": linear[f"lin{i}.model.1.weight"]})
    return network.eval()


@pytest.mark.parametrize("net", NETS)
@torch.no_grad()
def test_values_equal_those_of_the_authors(net, folder):
    ours, targets = pair()
    expected = authors(net, folder)(ours, targets).flatten()
    assert LPIPS(net, folder)(ours, targets).tolist() == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-6)


def test_identical_images_have_no_distance(folder):
    images, _ = pair()
    assert LPIPS("alex", folder)(images, images).tolist() == [0, 0]


def test_gradient_reaches_the_first_images_only(folder):
    ours, targets = (images.requires_grad_() for images in pair())
    LPIPS("alex", folder)(ours, targets).sum().backward()
    assert ours.grad.abs().sum() > 0
    assert targets.grad is None


def test_gradient_is_finite_where_all_features_are_zero(folder, tmp_path):
    for name in (FILES["alex"], "lpips_alex_lin.safetensors"):
        tensors = load_file(folder / name)
        save_file({key: value - 9.0 * key.endswith("bias") for key, value in tensors.items()}, tmp_path / name)
    ours, targets = pair()
    ours.requires_grad_()
    LPIPS("alex", tmp_path)(ours, targets).sum().backward()
    assert ours.grad.isfinite().all()


def test_it_stays_in_evaluation_mode(folder):
    parent = nn.Sequential(LPIPS("alex", folder)).train()
    assert parent.training
    assert not parent[0].training


def test_it_is_in_no_state_dict_and_has_no_parameters(folder):
    parent = nn.ModuleDict({"lpips": LPIPS("alex", folder), "layer": nn.Linear(1, 1)})
    assert set(parent.state_dict()) == {"layer.weight", "layer.bias"}
    assert len(list(parent.parameters())) == 2
    assert not list(parent.buffers())


def test_a_parent_loads_its_state_dict_strictly(folder):
    parent = nn.ModuleDict({"lpips": LPIPS("alex", folder), "layer": nn.Linear(1, 1)})
    assert parent.load_state_dict({"layer.weight": torch.ones(1, 1), "layer.bias": torch.ones(1)}).missing_keys == []


@pytest.mark.parametrize("precision", ["autocast", "parent", "input"])
@torch.no_grad()
def test_it_computes_in_float32_whatever_surrounds_it(folder, precision):
    lpips = LPIPS("alex", folder)
    ours, targets = (images.bfloat16().float() for images in pair())
    expected = lpips(ours, targets)
    if precision == "parent":
        nn.Sequential(lpips).bfloat16()
    if precision == "input":
        ours, targets = ours.bfloat16(), targets.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
        values = lpips(ours, targets)
    assert values.dtype == torch.float32
    assert torch.equal(values, expected)


def test_weights_follow_the_module_to_its_device(folder):
    lpips = nn.Sequential(LPIPS("alex", folder)).to("meta")[0]
    networks = (lpips.network, lpips.trunk.network)
    assert {weight.device.type for network in networks for weight in network.parameters()} == {"meta"}


def test_one_channel_is_repeated(folder):
    ours, targets = pair(channels=1)
    lpips = LPIPS("alex", folder)
    expected = lpips(ours.repeat(1, 3, 1, 1), targets.repeat(1, 3, 1, 1))
    assert torch.allclose(lpips(ours, targets), expected, atol=1e-6)


@pytest.mark.parametrize(("net", "smallest"), [("vgg", 16), ("alex", 31), ("squeeze", 17)])
def test_the_smallest_side_is_enough_and_one_less_is_refused(net, smallest, folder):
    lpips = LPIPS(net, folder)
    assert lpips(*pair(size=smallest)).isfinite().all()
    with pytest.raises(ValueError, match=f"at least {smallest} pixels"):
        lpips(*pair(size=smallest - 1))


def test_four_channels_are_refused(folder):
    with pytest.raises(ValueError, match=r"1 or 3.*got \(2, 4, 64, 64\)"):
        LPIPS("alex", folder)(*pair(channels=4))


def test_an_unknown_network_is_refused(folder):
    with pytest.raises(ValueError, match="vgg, alex or squeeze, got 'resnet'"):
        LPIPS("resnet", folder)


def test_a_missing_file_names_file_argument_and_variable(tmp_path):
    with pytest.raises(
        WeightsNotFoundError, match=r"vgg16_features\.safetensors.*weights=.*VISTOK_WEIGHTS.*torchvision"
    ):
        LPIPS("vgg", tmp_path)


def test_no_folder_names_argument_and_variable(monkeypatch):
    monkeypatch.delenv("VISTOK_WEIGHTS", raising=False)
    with pytest.raises(FileNotFoundError, match=r"no folder was given.*weights=.*VISTOK_WEIGHTS"):
        LPIPS("vgg")


def test_the_environment_variable_gives_the_folder(folder, monkeypatch):
    monkeypatch.setenv("VISTOK_WEIGHTS", str(folder))
    assert set(LPIPS("alex").protocol["weights"]) == {FILES["alex"], "lpips_alex_lin.safetensors"}


def test_a_file_that_lacks_a_tensor_is_named(folder, tmp_path):
    save_file({"features.0.weight": torch.zeros(1)}, tmp_path / FILES["alex"])
    save_file(load_file(folder / "lpips_alex_lin.safetensors"), tmp_path / "lpips_alex_lin.safetensors")
    with pytest.raises(ValueError, match=r"lacks 9 tensors, the first is features\.0\.bias"):
        LPIPS("alex", tmp_path)


@pytest.mark.parametrize("net", NETS)
@torch.no_grad()
def test_weights_of_torchvision_lie_under_the_layers_of_torchmetrics(net, folder, tmp_path, monkeypatch):
    """The download is played by a file in torch's cache; the 1x1 layers are those of the authors."""
    published = models.get_weight(_NETWORKS[net].published)
    (tmp_path / "checkpoints").mkdir()
    torch.save(load_file(folder / FILES[net]), tmp_path / "checkpoints" / published.url.rsplit("/", 1)[-1])
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    lpips = LPIPS(net, "torchvision")
    theirs = pytest.importorskip("lpips")
    linear = torch.load(Path(theirs.__file__).parent / f"weights/v0.1/{net}.pth", map_location="cpu", weights_only=True)
    network = authors(net, folder)
    for i, layer in enumerate(network.lins):
        layer.load_state_dict({"model.1.weight": linear[f"lin{i}.model.1.weight"]})
    ours, targets = pair()
    expected = network(ours, targets).flatten()
    assert lpips(ours, targets).tolist() == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-6)


@pytest.mark.skipif("VISTOK_WEIGHTS" not in os.environ, reason="VISTOK_WEIGHTS")
@pytest.mark.parametrize("net", ["vgg", "alex"])
@torch.no_grad()
def test_real_weights_give_the_values_of_the_authors(net):
    ours, targets = pair()
    expected = authors(net, Path(os.environ["VISTOK_WEIGHTS"]))(ours, targets).flatten()
    assert LPIPS(net)(ours, targets).tolist() == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-6)


@pytest.mark.skipif("VISTOK_WEIGHTS" not in os.environ, reason="VISTOK_WEIGHTS")
@pytest.mark.parametrize("net", ["vgg", "alex"])
@torch.no_grad()
def test_real_weights_judge_blur_worse_than_brightness_of_the_same_error(net):
    """What the metric is for (section 1 of the paper): blur is a large perceptual change at a small pixel error."""
    from skimage.data import astronaut

    original = torch.from_numpy(astronaut()[:256, 64:320].copy()).permute(2, 0, 1)[None] / 127.5 - 1
    blurred = nn.functional.avg_pool2d(nn.functional.pad(original, (5, 5, 5, 5), mode="reflect"), 11, stride=1)
    brighter = original + (blurred - original).square().mean().sqrt()
    lpips = LPIPS(net)
    assert lpips(blurred, original).item() > 2 * lpips(brighter, original).item() > 0
