"""Aspect-ratio buckets of tar shards."""

import io
import os
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from vistok.data import BucketShardData, ShardDataset, TarPictures, decode_image
from vistok.data.decode import BadImageError
from vistok.data.transforms import EvalTransform
from vistok.data.webdataset import BadShardError, expand_shards


def write_shard(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as shard:
        for key, files in samples.items():
            for extension, data in files.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                shard.addfile(info, io.BytesIO(data))
    return path


def png(width: int, height: int, value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three shards of six pictures each, wide, tall and square, whose class and red are their number."""
    shapes = [(40, 20), (20, 40), (30, 30)] * 6
    for shard in range(3):
        samples = {
            f"{number:02d}": {"cls": str(number).encode(), "png": png(*shapes[number], number), "txt": b"text"}
            for number in range(6 * shard, 6 * shard + 6)
        }
        write_shard(tmp_path / "train" / f"{shard}.tar", samples)
    write_shard(tmp_path / "val" / "0.tar", {"0": {"png": png(20, 30, 0)}})
    return tmp_path


def data(folder, **options) -> BucketShardData:
    given = {"buckets": [[8, 16], [16, 8], [12, 12]], "image_size": 12, "batch_size": 2, "num_workers": 0}
    return BucketShardData(str(folder / "train"), str(folder / "val"), **given | options)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_batch_has_one_size_of_the_ratio_of_its_pictures(folder, workers):
    batches = list(data(folder, num_workers=workers).train_dataloader())
    assert sorted(key for batch in batches for key in batch["keys"]) == [f"{number:02d}" for number in range(18)]
    for batch in batches:
        (size,) = {((8, 16), (16, 8), (12, 12))[number % 3] for number in batch["labels"].tolist()}
        assert batch["images"].shape == (2, 3, *size)
        assert batch["keys"] == [f"{number:02d}" for number in batch["labels"].tolist()]
        assert ((batch["images"][:, 0, 0, 0] + 1) * 127.5).round().tolist() == batch["labels"].tolist()
        assert batch["texts"] == ["text", "text"]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_resumes_with_the_next_batch_whatever_the_number_of_loading_processes(folder, workers):
    loader, resumed = data(folder).train_dataloader(), data(folder, num_workers=workers).train_dataloader()
    epochs = [list(loader) for _ in range(2)]
    assert [batch["keys"] for batch in epochs[0]] != [batch["keys"] for batch in epochs[1]]
    resumed.load_state_dict({"epoch": 1, "batch": 4})
    rest = list(resumed)
    assert [batch["keys"] for batch in rest] == [batch["keys"] for batch in epochs[1][4:]]
    assert all(torch.equal(one["images"], other["images"]) for one, other in zip(rest, epochs[1][4:], strict=True))


def test_processes_have_the_same_sizes_and_other_pictures(folder):
    parts = [list(data(folder).make_train_loader(None, rank, 2)) for rank in range(2)]
    assert len(parts[0]) == len(parts[1]) == 3
    for one, other in zip(*parts, strict=True):
        assert one["images"].shape == other["images"].shape
    assert not {key for batch in parts[0] for key in batch["keys"]} & {
        key for batch in parts[1] for key in batch["keys"]
    }


def test_evaluation_has_squares(folder):
    assert next(iter(data(folder).eval_dataloader()))["images"].shape == (1, 3, 12, 12)


def test_long_names_and_other_members_are_no_hindrance(tmp_path):
    samples = {"x" * 150: {"png": png(8, 4, 1)}, "b": {"json": b"{}"}, "c": {"txt": b"c", "png": png(4, 8, 2)}}
    pictures = TarPictures([write_shard(tmp_path / "a.tar", samples)])
    assert [pictures[index].key for index in range(len(pictures))] == ["x" * 150, "c"]
    assert pictures.shapes.tolist() == [[4, 8], [8, 4]]


def test_shape_and_failures_are_those_of_the_picture_that_is_read(tmp_path):
    files = {"png": png(8, 4, 1), "jpg": png(4, 8, 2), "cls": b"cat"}
    pictures = TarPictures([write_shard(tmp_path / "a.tar", {"a": files, "b": files | {"cls": b"1"}})])
    assert pictures.shapes.tolist() == [[8, 4], [8, 4]]
    assert decode_image(pictures[1].image).shape == (3, 8, 4)
    with pytest.raises(BadImageError, match="bad label: cls holds b'cat' instead of an integer"):
        _ = pictures[0]


@pytest.mark.parametrize("cut", [1024 * 8 + 600, 1024 * 9], ids=["in data", "between samples"])
def test_damaged_shard_gives_what_comes_before_the_damage_or_stops(folder, caplog, cut):
    path = folder / "train" / "1.tar"
    path.write_bytes(path.read_bytes()[:cut])
    source = data(folder).train_dataset.source
    found = [int(source[index].key) for index in range(len(source))]
    assert found in ([*range(8), *range(12, 18)], [*range(9), *range(12, 18)])
    assert "bad shard" in caplog.text
    with pytest.raises(BadShardError, match=r"1\.tar"):
        data(folder, on_bad_shard="stop").train_dataloader()


def test_shard_that_vanishes_is_reported_and_replaced(folder):
    loader = data(folder).train_dataloader()
    (folder / "train" / "2.tar").unlink()
    batches = list(loader)
    assert {len(batch["keys"]) for batch in batches} == {2}
    assert {bad.kind for batch in batches for bad in batch["bad"]} == {"bad shard"}
    assert max(label for batch in batches for label in batch["labels"].tolist()) == 11


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shuffle_buffer": 10}, r"data\.shuffle_buffer has no effect on buckets"),
        ({"samples_per_epoch": 10}, r"data\.samples_per_epoch has no effect on buckets"),
        ({"crop_scale": [0.5, 1.0]}, r"data\.crop_scale=\[0\.5, 1\.0\] has no effect on buckets"),
        ({"on_bad_shard": "halt"}, "on_bad_shard must be skip or stop, got 'halt'"),
    ],
)
def test_setting_without_effect_is_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        data(folder, **options)


def test_shards_elsewhere_and_compressed_ones_are_refused(folder):
    with pytest.raises(ValueError, match="buckets read at random places: copy the shards here"):
        BucketShardData("https://host/{0..9}.tar", str(folder / "val"))
    with tarfile.open(folder / "a.tar.gz", "w:gz"):
        pass
    with pytest.raises(ValueError, match="must be tar files without compression"):
        TarPictures([folder / "a.tar.gz"])


def test_real_shards_have_the_samples_of_a_stream():
    folder = os.environ.get("VISTOK_TEST_DATA")
    if folder is None:
        pytest.skip("VISTOK_TEST_DATA is not set to the folder of test data")
    shards = expand_shards(f"{folder}/imagenette128/val-00003.tar")
    pictures = TarPictures(shards)
    stream = next(iter(ShardDataset(shards, EvalTransform(128), 128, batch_size=750, train=False, raw=True)))
    assert [pictures[index].key for index in range(len(pictures))] == stream["keys"]
    assert [pictures[index].label for index in range(len(pictures))] == stream["labels"].tolist()
    assert torch.equal(decode_image(pictures[9].image), stream["images"][9])
    assert {tuple(shape) for shape in pictures.shapes.tolist()} == {(128, 128)}
