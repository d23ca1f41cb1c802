"""The data sets of torchvision, from files in its layout."""

import struct
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torchvision
from PIL import Image

from vistok.data import TorchvisionData
from vistok.data.convert import Recipe, convert
from vistok.data.sources import open_source
from vistok.data.torchvision_set import SETS, TorchvisionSet


@pytest.fixture
def root(tmp_path) -> Path:
    """FashionMNIST of twelve training and five test pictures, 28x28; picture n is n gray, of class n % 10."""
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for split, count in (("train", 12), ("t10k", 5)):
        numbers = np.arange(count, dtype=np.uint8)
        pictures = np.broadcast_to(numbers[:, None, None], (count, 28, 28))
        for name, values in (("images-idx3", pictures), ("labels-idx1", numbers % 10)):
            header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
            (folder / f"{split}-{name}-ubyte").write_bytes(header + values.tobytes())
    return tmp_path


@pytest.fixture
def offline(monkeypatch) -> None:
    """No set can be downloaded."""

    def fail(*args, **kwargs):
        raise URLError("no network")

    for module in (torchvision.datasets.mnist, torchvision.datasets.cifar):
        monkeypatch.setattr(module, "download_and_extract_archive", fail)


def test_every_set_exists_in_torchvision():
    assert all(hasattr(torchvision.datasets, class_name) for class_name, _ in SETS.values())


def test_set_trains_and_evaluates_on_its_own_splits(root):
    data = TorchvisionData("fashion_mnist", str(root), image_size=16, batch_size=6, num_workers=0, channels=1)
    data.prepare_data()
    batches = list(data.train_dataloader())
    assert sorted(int(key) for batch in batches for key in batch["keys"]) == list(range(12))
    assert batches[0]["images"].shape == (6, 1, 16, 16)
    for batch in batches:
        assert batch["labels"].tolist() == [int(key) % 10 for key in batch["keys"]]
    assert data.protocol["dataset"] == "torchvision fashion_mnist"
    assert (data.protocol["split"], data.protocol["num_images"]) == ("test", 5)


def test_picture_of_no_class_has_no_label(root):
    source = TorchvisionSet("fashion_mnist", root, "train")
    source._set.targets[3] = -1  # as in stl10
    assert [source[index].label for index in (2, 3, 4)] == [2, None, 4]


def test_set_of_files_is_read_from_the_files(tmp_path):
    for name in ("Forest", "River"):
        path = tmp_path / "eurosat" / "2750" / name / f"{name}_1.jpg"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(path)
    source = TorchvisionSet("eurosat", tmp_path, "all", download=False)
    assert list(source.classes) == ["Forest", "River"]
    picture = source[1]
    assert (picture.key, picture.label) == ("eurosat/2750/River/River_1.jpg", 1)
    assert picture.image == tmp_path / "eurosat/2750/River/River_1.jpg"


def test_set_is_converted_to_shards_without_loss(root, tmp_path):
    source = open_source("torchvision:fashion_mnist", root=root)
    manifest = convert(source, tmp_path / "out", Recipe(), shard_samples=5, num_workers=0)
    assert ([shard.num_samples for shard in manifest.shards], len(manifest.classes)) == ([5, 5, 2], 10)
    assert manifest.source == "torchvision fashion_mnist, train"


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_missing_set_without_a_network_names_the_folder(tmp_path, name):
    with pytest.raises(
        FileNotFoundError, match=rf"{name} is not below {tmp_path} and cannot be downloaded .*no network"
    ):
        TorchvisionSet(name, tmp_path, "train")


def test_missing_imagenet_says_that_it_is_not_downloaded(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=rf"imagenet is not below {tmp_path}, and its archives must be put there"
    ):
        TorchvisionSet("imagenet", tmp_path, "val")


def test_unknown_names_list_what_there_is(tmp_path):
    with pytest.raises(ValueError, match="no torchvision set 'cifar'; there are caltech101, celeba, cifar10"):
        TorchvisionData("cifar", str(tmp_path))
    with pytest.raises(ValueError, match="mnist has no split 'val'; there are train, test"):
        TorchvisionSet("mnist", tmp_path, "val")
    with pytest.raises(ValueError, match="both see the split 'all' of eurosat"):
        TorchvisionData("eurosat", str(tmp_path))
