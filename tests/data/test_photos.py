"""The photographs inside installed packages."""

from importlib.machinery import ModuleSpec

import pytest
import torch

from vistok.data import photos as module
from vistok.data.photos import GRAY, HELD_OUT, TRAIN, Photos


@pytest.fixture(scope="module")
def train() -> Photos:
    return Photos("train", 32, samples_per_epoch=300)


def test_training_and_held_out_pictures_are_disjoint():
    assert not (TRAIN | GRAY).keys() & HELD_OUT.keys()
    assert len(TRAIN | GRAY) == 15


def test_crop_depends_on_seed_epoch_and_index_only(train):
    again = Photos("train", 32, samples_per_epoch=300)
    assert torch.equal(train[3, 7]["image"], again[3, 7]["image"])
    assert not torch.equal(train[3, 7]["image"], train[4, 7]["image"])
    assert not torch.equal(train[3, 7]["image"], Photos("train", 32, seed=1)[3, 7]["image"])


def test_photographs_are_chosen_by_area(train):
    chosen = [train[0, index]["key"].split("#")[0] for index in range(300)]
    share = train.photos[train.names.index("retina.jpg")][0].numel() / sum(photo[0].numel() for photo in train.photos)
    assert set(chosen) == set(TRAIN)
    assert abs(chosen.count("retina.jpg") / 300 - share) < 0.1


def is_piece_of(photo: torch.Tensor, crop: torch.Tensor) -> bool:
    size = crop.shape[-1]
    corners = (photo[:, : 1 - size, : 1 - size] == crop[:, :1, :1]).all(0).nonzero().tolist()
    return any(torch.equal(photo[:, top : top + size, left : left + size], crop) for top, left in corners)


@pytest.mark.parametrize(("min_scale", "verbatim"), [(1.0, True), (0.25, False)])
def test_crop_is_a_verbatim_piece_of_its_photograph_unless_it_is_reduced(min_scale, verbatim):
    photos = Photos("train", 16, min_scale=min_scale, flip=False)
    for index in range(5):
        sample = photos[0, index]
        photo = photos.photos[photos.names.index(sample["key"].split("#")[0])]
        assert is_piece_of(photo, sample["image"]) == verbatim


def test_crop_larger_than_a_photograph_is_enlarged():
    large = Photos("train", 600)
    assert all(large[0, index]["image"].shape == (3, 600, 600) for index in range(8))


def test_tiles_do_not_overlap_and_leave_equal_margins():
    tiles = Photos("held-out", 128)
    assert len(tiles) == 4 * 4 + 3 * 2 + 4 * 3
    assert [tiles[0, index]["key"] for index in (16, 17, 19, 22)] == [
        "chelsea.png@33,22", "chelsea.png@161,22", "chelsea.png@33,150", "coffee.png@44,8",
    ]  # fmt: skip
    assert torch.equal(tiles[0, 19]["image"], tiles.photos[1][:, 150:278, 33:161])


def test_gray_photographs_are_optional_and_become_colour():
    gray = Photos("train", 32, include_gray=True)
    brick = gray.photos[gray.names.index("brick.png")]
    assert len(gray.photos) == 15
    assert torch.equal(brick[0], brick[2])


def test_tile_larger_than_every_photograph_is_refused():
    with pytest.raises(ValueError, match="at most 512"):
        Photos("held-out", 513)


def test_missing_package_and_missing_file_are_named(monkeypatch, tmp_path):
    spec = ModuleSpec("skimage", None, is_package=True)
    spec.submodule_search_locations.append(str(tmp_path))
    monkeypatch.setattr(module.importlib.util, "find_spec", {"skimage": spec}.get)
    with pytest.raises(FileNotFoundError, match=r"scikit-image is installed without coffee\.png"):
        module.photo_path("coffee.png")
    with pytest.raises(FileNotFoundError, match="pip install scikit-learn"):
        module.photo_path("flower.jpg")
