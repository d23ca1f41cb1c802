"""From pictures to shards."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from vistok.data import WebDatasetData
from vistok.data.bad_samples import TooManyBadSamplesError
from vistok.data.convert import Recipe, ShardWriter, convert
from vistok.data.image_folder import ImageFolder, find_classes, find_images
from vistok.data.manifest import read_manifest
from vistok.data.pictures import Picture, PictureStream
from vistok.data.transforms import center_crop, resize_adm, resize_short_side
from vistok.data.webdataset import count_all, expand_shards
from vistok.hub.files import sha256


@pytest.fixture
def folder(tmp_path) -> Path:
    """Ten pictures of two classes, 24x20 pixels, JPEG and PNG."""
    for number in range(10):
        path = tmp_path / "pictures" / ("cat" if number < 5 else "dog") / f"{number}.{'jpg' if number % 2 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").resize((24, 20)).rotate(10 * number).convert("RGB").save(path)
    return tmp_path / "pictures"


def open_folder(folder: Path) -> ImageFolder:
    paths = find_images(folder)
    return ImageFolder(folder, paths, find_classes(paths))


def write(folder: Path, dest: Path, recipe: Recipe | None = None, **options):
    options = {"shard_samples": 4, "num_workers": 0} | options
    return convert(open_folder(folder), dest, recipe or Recipe(), **options)


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as shard:
        return {member.name: shard.extractfile(member).read() for member in shard}


def all_members(dest: Path) -> dict[str, bytes]:
    return {name: data for path in sorted(dest.glob("*.tar")) for name, data in members(path).items()}


def size_of(data: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(data)) as image:
        return image.size


def test_files_are_copied_byte_by_byte_with_class_and_readable_keys(folder, tmp_path):
    write(folder, tmp_path / "out")
    found = all_members(tmp_path / "out")
    assert found["cat/00000001_1.jpg"] == (folder / "cat/1.jpg").read_bytes()
    assert found["dog/00000006_6.png"] == (folder / "dog/6.png").read_bytes()
    assert (found["cat/00000001_1.cls"], found["dog/00000006_6.cls"]) == (b"0", b"1")
    assert len(found) == 20


def test_manifest_counts_what_the_shards_hold(folder, tmp_path):
    manifest = write(folder, tmp_path / "out")
    assert manifest == read_manifest(tmp_path / "out")
    assert [shard.num_samples for shard in manifest.shards] == [4, 4, 2]
    assert (manifest.complete, manifest.num_samples, manifest.classes) == (True, 10, ["cat", "dog"])
    for shard in manifest.shards:
        path = tmp_path / "out" / shard.name
        assert (shard.num_bytes, shard.sha256) == (path.stat().st_size, sha256(path))
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["num_samples"] == 10


def test_shards_train_with_the_epoch_length_of_the_manifest(folder, tmp_path, monkeypatch):
    for split in ("train", "val"):
        write(folder, tmp_path / split)
    monkeypatch.setattr("vistok.data.webdataset.count_samples", lambda shard: pytest.fail("counted in the headers"))
    data = WebDatasetData(str(tmp_path / "train"), str(tmp_path / "val"), image_size=8, batch_size=5, num_workers=0)
    batches = list(data.train_dataloader())
    assert (len(batches), data.protocol["num_images"]) == (2, 10)
    assert sorted(label for batch in batches for label in batch["labels"].tolist()) == [0] * 5 + [1] * 5


def test_shard_that_was_changed_after_the_conversion_is_counted_again(folder, tmp_path):
    write(folder, tmp_path / "out")
    shards = expand_shards(str(tmp_path / "out"))
    assert count_all(shards) == 10
    shards[0].write_bytes(shards[0].read_bytes()[:1600])
    assert count_all(shards) < 10


@pytest.mark.parametrize(("options", "size"), [({}, (14, 12)), ({"crop": True}, (12, 12))])
def test_resized_pictures_have_the_size_asked_for(folder, tmp_path, options, size):
    write(folder, tmp_path / "out", Recipe(12, **options))
    pictures = {name: data for name, data in all_members(tmp_path / "out").items() if not name.endswith("cls")}
    assert {size_of(data) for data in pictures.values()} == {size}
    assert all(name.endswith(".jpg") for name in pictures)


@pytest.mark.parametrize("mode", ["short_side", "adm"])
def test_lossless_conversion_has_the_pixels_of_the_named_resize(folder, tmp_path, mode):
    from vistok.data.decode import decode_image

    write(folder, tmp_path / "out", Recipe(8, resize_mode=mode, crop=True, format="png"))
    image = decode_image(folder / "cat/0.png")
    expected = center_crop(resize_adm(image, 8) if mode == "adm" else resize_short_side(image, 8), 8, mode)
    assert decode_image(all_members(tmp_path / "out")["cat/00000000_0.png"]).equal(expected)


def test_picture_that_has_size_and_format_already_is_copied(folder, tmp_path):
    write(folder, tmp_path / "out", Recipe(20, format="jpg"))
    assert all_members(tmp_path / "out")["cat/00000001_1.jpg"] == (folder / "cat/1.jpg").read_bytes()


def test_quality_decides_the_size_of_the_files(folder, tmp_path):
    for quality in (10, 95):
        write(folder, tmp_path / f"{quality}", Recipe(16, quality=quality, format="webp"))
    small, large = (sum(map(len, all_members(tmp_path / name).values())) for name in ("10", "95"))
    assert small < large


def test_transparency_is_kept_in_four_channels(tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGBA", (8, 8), (10, 20, 30, 40)).save(tmp_path / "in" / "a.png")
    write(tmp_path / "in", tmp_path / "out", Recipe(4, channels=4))
    with Image.open(io.BytesIO(all_members(tmp_path / "out")["00000000_a.png"])) as image:
        assert image.mode == "RGBA"
        assert image.getpixel((0, 0)) == pytest.approx((10, 20, 30, 40), abs=3)  # resized with premultiplied alpha


def test_shards_are_limited_by_bytes_too(folder, tmp_path):
    manifest = write(folder, tmp_path / "out", shard_bytes=1500, shard_samples=1000)
    assert len(manifest.shards) > 2
    assert manifest.num_samples == 10
    for shard in manifest.shards:
        held = members(tmp_path / "out" / shard.name)
        assert shard.num_samples == 1 or sum(map(len, held.values())) <= 1500


def test_bad_pictures_are_left_out_and_listed(folder, tmp_path):
    (folder / "cat" / "2.png").write_bytes(b"")
    (folder / "dog" / "9.jpg").write_bytes((folder / "dog" / "9.jpg").read_bytes()[:200])
    manifest = write(folder, tmp_path / "out", max_bad_share=0.5)
    assert [(bad.key, bad.kind) for bad in manifest.bad] == [("cat/2.png", "empty"), ("dog/9.jpg", "truncated")]
    assert read_manifest(tmp_path / "out").bad == manifest.bad
    assert manifest.num_samples == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_samples": 0}, "room for a sample, got shard_samples=0"),
        ({"shard_bytes": -5}, "shard_bytes=-5"),
        ({"num_workers": -1}, "workers must be at least 0"),
        ({"max_bad_share": 2}, "must lie between 0 and 1"),
    ],
)
def test_impossible_number_is_refused_before_anything_is_written(folder, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        write(folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_destination_that_is_a_file_is_named(folder):
    with pytest.raises(ValueError, match=r"1\.jpg is a file: choose a folder"):
        write(folder, folder / "cat" / "1.jpg")


def test_too_many_bad_pictures_stop_with_the_list(folder, tmp_path):
    (folder / "cat" / "2.png").write_bytes(b"")
    with pytest.raises(
        TooManyBadSamplesError, match=r"1 of 10 samples cannot be read \(1 empty\)[^$]*cat/2\.png: empty"
    ):
        write(folder, tmp_path / "out", max_bad_share=0.05)


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_interrupted_conversion_goes_on_to_the_same_shards(folder, tmp_path, monkeypatch, calls):
    (folder / "cat" / "2.png").write_bytes(b"")
    (folder / "dog" / "7.jpg").write_bytes(b"")
    options = {"max_bad_share": 1, "shard_samples": 3}
    whole = write(folder, tmp_path / "whole", **options)
    finish = ShardWriter._finish
    count = []

    def killed(self, next_index):
        count.append(None)
        if len(count) == calls:
            raise InterruptedError
        finish(self, next_index)

    with monkeypatch.context() as patch:
        patch.setattr("vistok.data.convert.ShardWriter._finish", killed)
        with pytest.raises(InterruptedError):
            write(folder, tmp_path / "out", **options)
    if calls > 1:
        with pytest.raises(ValueError, match="is not finished: give its vistok shards command again"):
            expand_shards(str(tmp_path / "out"))
    assert write(folder, tmp_path / "out", **options) == whole
    assert all_members(tmp_path / "out") == all_members(tmp_path / "whole")
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_number_of_workers_does_not_change_the_shards(folder, tmp_path):
    assert write(folder, tmp_path / "0") == write(folder, tmp_path / "2", num_workers=2)


def test_complete_conversion_is_verified_when_given_again(folder, tmp_path):
    manifest = write(folder, tmp_path / "out")
    assert write(folder, tmp_path / "out") == manifest
    path = tmp_path / "out" / "00001.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"00001\.tar is not what was written"):
        write(folder, tmp_path / "out")


def test_shards_of_another_conversion_are_not_mixed_in(folder, tmp_path):
    write(folder, tmp_path / "out")
    with pytest.raises(ValueError, match=r"shards of another conversion \(size None instead of 8\)"):
        write(folder, tmp_path / "out", Recipe(8))
    Image.new("RGB", (8, 8)).save(folder / "cat" / "new.png")
    with pytest.raises(ValueError, match=r"another conversion \(fingerprint"):
        write(folder, tmp_path / "out")


def test_stream_is_converted_in_its_order(tmp_path):
    class Stream(PictureStream):
        name = fingerprint = "stream"

        def __iter__(self):
            for number in range(5):
                yield Picture(str(number), Image.new("L", (4, 4), number), number, f"caption {number}")

    convert(Stream(), tmp_path, Recipe(), shard_samples=2, num_workers=2)
    found = all_members(tmp_path)
    assert list(found)[:3] == ["00000000.png", "00000000.cls", "00000000.txt"]
    assert found["00000004.txt"] == b"caption 4"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": True}, "need a size"),
        ({"size": 8, "channels": 4, "format": "jpg"}, "jpg has no transparency"),
        ({"quality": 50}, "quality has no effect"),
        ({"channels": 1}, "channels has no effect"),
        ({"size": 0}, "at least 1 pixel"),
        ({"size": 8, "format": "gif"}, "must be one of jpg, png, webp"),
        ({"size": 8, "resize_mode": "adm", "resize_filter": "lanczos"}, "leave out resize_filter=lanczos"),
    ],
)
def test_impossible_recipe_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**options)
