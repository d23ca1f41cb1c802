"""A folder of pictures."""

import os

import pytest
import torch
from PIL import Image

from vistok.data.bad_samples import BadSample
from vistok.data.image_folder import (
    ImageFolder,
    find_classes,
    find_images,
    read_file_list,
    split_by_hash,
)
from vistok.data.pictures import PictureDataset
from vistok.data.transforms import EvalTransform, TrainTransform


def write(path, color=(10, 20, 30), size=(12, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def test_pictures_are_found_at_any_depth_in_sorted_order_without_hidden_ones(tmp_path):
    for name in ("b.PNG", "a/z.jpg", "a/b/c/d.webp", ".hidden/x.png", "._b.png", "a/.y.png"):
        write(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    assert find_images(tmp_path) == ["a/b/c/d.webp", "a/z.jpg", "b.PNG"]


def test_linked_folder_is_followed_once(tmp_path):
    write(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "root").mkdir()
    write(tmp_path / "root" / "b.png")
    (tmp_path / "root" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "loop").symlink_to(tmp_path / "root")
    assert find_images(tmp_path / "root") == ["b.png", "link/a.png"]


def test_missing_folder_is_named_by_its_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/photos does not exist: data\.root and"):
        find_images(type(tmp_path)("photos"))


def test_folder_without_pictures_says_what_it_holds_instead(tmp_path):
    for name in ("a.heic", "b.heic", "c.txt"):
        (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError, match=r"looked for \.jpg .*saw 3 other files \(2 \.heic, 1 \.txt\)"):
        find_images(tmp_path)


def test_file_list_gives_its_own_order_and_names_what_is_missing(tmp_path):
    write(tmp_path / "a.png"), write(tmp_path / "b.png")
    (tmp_path / "list.txt").write_text("b.png\na.png\n\n")
    assert read_file_list(tmp_path, tmp_path / "list.txt") == ["b.png", "a.png"]
    (tmp_path / "list.txt").write_text("b.png\nc.png\n")
    with pytest.raises(FileNotFoundError, match=r"1 of 2 paths in .* such as c\.png"):
        read_file_list(tmp_path, tmp_path / "list.txt")


@pytest.mark.parametrize(
    ("paths", "classes"),
    [
        (["dog/1.png", "cat/x/2.png"], ["cat", "dog"]),
        (["dog/1.png", "dog/2.png"], []),
        (["dog/1.png", "cat/2.png", "3.png"], []),
    ],
)
def test_first_level_folders_are_classes_if_there_are_two(paths, classes):
    assert find_classes(paths) == classes


def test_validation_share_is_met_and_does_not_move_when_files_are_added():
    paths = [f"{number}.png" for number in range(2000)]
    train, val = split_by_hash(paths, 0.1)
    assert sorted(train + val) == sorted(paths)
    assert 160 < len(val) < 240
    more_train, more_val = split_by_hash([*paths, *(f"new{number}.png" for number in range(500))], 0.1)
    assert set(val) <= set(more_val)
    assert set(train) <= set(more_train)


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_both_sides_of_a_small_split_have_a_picture(share):
    train, val = split_by_hash(["a", "b", "c"], share)
    assert min(len(train), len(val)) == 1


def test_single_picture_and_impossible_share_are_refused_with_advice():
    with pytest.raises(ValueError, match=r"set data\.val_root"):
        split_by_hash(["a.png"], 0.05)
    with pytest.raises(ValueError, match="got 5"):
        split_by_hash(["a", "b"], 5.0)


def test_sample_has_key_and_label(tmp_path):
    write(tmp_path / "cat/a.png"), write(tmp_path / "dog/b.png", (9, 8, 7))
    folder = PictureDataset(ImageFolder(tmp_path, find_images(tmp_path), ["cat", "dog"]), EvalTransform(8), train=False)
    sample = folder[0, 1]
    assert (sample["key"], sample["label"]) == ("dog/b.png", 1)
    assert sample["image"][:, 0, 0].tolist() == [9, 8, 7]


def test_picture_smaller_than_the_crop_is_enlarged(tmp_path):
    write(tmp_path / "a.png", size=(3, 5))
    assert PictureDataset(ImageFolder(tmp_path, ["a.png"]), TrainTransform(8))[0, 0]["image"].shape == (3, 8, 8)


def test_unreadable_picture_is_replaced_in_training_and_reported_in_evaluation(tmp_path):
    for name in ("a.png", "c.png"):
        write(tmp_path / name)
    (tmp_path / "b.png").write_bytes(b"no picture")
    bad = BadSample("b.png", "not an image", "10 bytes of no picture format that PIL knows")
    train = PictureDataset(ImageFolder(tmp_path, find_images(tmp_path)), TrainTransform(8))
    assert (train[0, 1]["key"], train[0, 1]["bad"]) == ("c.png", [bad])
    assert torch.equal(train[0, 1]["image"], train[0, 2]["image"])
    assert PictureDataset(ImageFolder(tmp_path, find_images(tmp_path)), EvalTransform(8), train=False)[0, 1] == bad


def test_unreadable_folder_is_refused_at_once_with_examples(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    with pytest.raises(
        ValueError, match=r"2 pictures in a row .* unreadable, such as a\.png: empty \(0 bytes\); b\.png"
    ):
        PictureDataset(ImageFolder(tmp_path, find_images(tmp_path)), EvalTransform(8), train=False)


def test_too_many_unreadable_pictures_in_a_row_stop_training(tmp_path):
    write(tmp_path / "a.png")
    for number in range(5):
        (tmp_path / f"b{number}.png").touch()
    folder = PictureDataset(ImageFolder(tmp_path, find_images(tmp_path)), TrainTransform(8), max_bad=3)
    assert folder[0, 5]["key"] == "a.png"
    with pytest.raises(ValueError, match="3 pictures in a row"):
        folder[0, 1]


def test_file_names_outside_utf8_are_read(tmp_path):
    name = os.fsdecode(b"\xff.png")
    try:
        write(tmp_path / name)
    except OSError:
        pytest.skip("this file system stores UTF-8 names only")
    assert PictureDataset(ImageFolder(tmp_path, find_images(tmp_path)), EvalTransform(8))[0, 0]["key"] == name


def test_a_validation_share_of_unreadable_pictures_gets_a_readable_one():
    paths = [f"{i}.jpg" for i in range(20)]
    train, val = split_by_hash(paths, 0.05)
    unreadable = set(val)
    train, more = split_by_hash(paths, 0.05, lambda path: path not in unreadable)
    assert set(more) > unreadable
    assert len(more) == len(val) + 1
    assert sorted(train + more) == sorted(paths)
