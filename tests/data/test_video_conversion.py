"""From videos to shards."""

import os
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_videos import STEP, numbers, write_frames, write_video

from vistok.data import Clip, VideoShardData, decode_image
from vistok.data.convert import Recipe, ShardWriter, convert
from vistok.data.decode import BadImageError
from vistok.data.manifest import read_manifest
from vistok.data.sources import open_source
from vistok.data.video import rates_of
from vistok.data.video_recipe import VideoRecipe
from vistok.data.webdataset import expand_shards


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two video files and a folder of pictures, of two classes."""
    write_video(tmp_path / "videos" / "cat" / "a.mp4", 12)
    write_video(tmp_path / "videos" / "dog" / "deep" / "b.webm", 12)
    write_frames(tmp_path / "videos" / "dog" / "walk", 12)
    return tmp_path / "videos"


def write(folder: Path, dest: Path, recipe: VideoRecipe | None = None, **options):
    options = {"shard_samples": 2, "num_workers": 0} | options
    return convert(open_source(str(folder), videos=True), dest, recipe or VideoRecipe(), **options)


def all_members(dest: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(dest.glob("*.tar")):
        with tarfile.open(path) as shard:
            found |= {member.name: shard.extractfile(member).read() for member in shard}
    return found


def test_video_files_are_copied_byte_by_byte(folder, tmp_path):
    manifest = write(folder, tmp_path / "out")
    found = all_members(tmp_path / "out")
    assert found["cat/00000000_a.mp4"] == (folder / "cat/a.mp4").read_bytes()
    assert found["dog/deep/00000001_b.webm"] == (folder / "dog/deep/b.webm").read_bytes()
    assert (found["cat/00000000_a.cls"], found["dog/00000002_walk.cls"]) == (b"0", b"1")
    assert (manifest.content, manifest.num_samples, manifest.classes) == ("videos", 3, ["cat", "dog"])


def test_folder_of_pictures_is_kept_as_it_is(folder, tmp_path):
    write(folder, tmp_path / "out")
    data = all_members(tmp_path / "out")["dog/00000002_walk.zip"]
    assert (folder / "dog/walk/frame_9.png").read_bytes() in data
    for position in (0.0, 0.4, 1.0):
        frames = [
            [decode_image(frame) for frame in Clip(3, stride=2).read(source, position)]
            for source in (data, folder / "dog/walk")
        ]
        assert torch.equal(*map(torch.stack, frames))


@pytest.mark.parametrize("size", [None, 16])
def test_shards_train_and_evaluate_with_the_counts_of_the_manifest(folder, tmp_path, monkeypatch, size):
    for split in ("train", "val"):
        write(folder, tmp_path / split, VideoRecipe(size))
    monkeypatch.setattr("vistok.data.webdataset.count_samples", lambda *_: pytest.fail("counted in the headers"))
    options = {"frames": 5, "image_size": 8, "batch_size": 3, "num_workers": 0}
    data = VideoShardData(shards=str(tmp_path / "train"), val_shards=str(tmp_path / "val"), **options)
    train, held_out = list(data.train_dataloader()), list(data.eval_dataloader())
    assert [batch["images"].shape for batch in train + held_out] == [(3, 3, 5, 8, 8)] * 2
    assert sorted(train[0]["labels"].tolist()) == [0, 1, 1]
    assert not any(batch["bad"] for batch in train + held_out)
    assert data.protocol["num_images"] == 3
    # The clip in the middle, whichever way the video is stored.
    for clip in held_out[0]["images"]:
        gray = ((clip.movedim(1, 0) + 1) * 127.5).mean((1, 2, 3))
        assert torch.allclose(gray, torch.tensor([20 + STEP * (n + 3.5) for n in range(5)]), atol=STEP)


@pytest.mark.parametrize(("options", "size"), [({}, (24, 16)), ({"crop": True}, (16, 16))])
def test_encoded_video_has_the_size_and_the_frames_at_their_times(tmp_path, options, size):
    path = write_video(tmp_path / "a.mkv", 30, rate=30)
    extension, data = VideoRecipe(16, **options).apply(path)
    frames = list(Clip(30).read(data, 0.5))
    assert (extension, {frame.size for frame in frames}) == ("mp4", {size})
    assert numbers(map(decode_image, frames)) == list(range(30))
    assert float(rates_of(data)[0]) == pytest.approx(30, rel=0.01)  # Matroska counts milliseconds
    assert VideoRecipe(16, **options).apply(path)[1] == data


def test_video_that_has_the_size_already_is_copied(tmp_path):
    path = write_video(tmp_path / "a.mp4", 5, width=48, height=32)
    assert VideoRecipe(32).apply(path) == ("mp4", path.read_bytes())
    assert VideoRecipe(32, crop=True).apply(path)[1] != path.read_bytes()


def test_factor_decides_the_size_of_the_file():
    folder = os.environ.get("VISTOK_TEST_DATA")
    if folder is None:
        pytest.skip("VISTOK_TEST_DATA is not set to the folder of test data")
    path = Path(folder) / "video" / "04_coffee.mp4"
    fine, coarse = (VideoRecipe(32, "box", crf=crf).apply(path)[1] for crf in (18, 40))
    assert len(coarse) < len(fine) < path.stat().st_size / 10


def test_bad_videos_are_left_out_and_listed(folder, tmp_path):
    (folder / "cat" / "empty.mp4").touch()
    (folder / "cat" / "text.mp4").write_text("no video")
    cut = write_video(folder / "cat" / "cut.mkv", 40)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 6 // 10])
    write_frames(folder / "dog" / "run", 4)
    Image.new("RGB", (50, 50)).save(folder / "dog" / "run" / "frame_9.png")
    write_frames(folder / "dog" / "sit", 4)
    (folder / "dog" / "sit" / "frame_9.png").write_bytes(b"")
    manifest = write(folder, tmp_path / "out", max_bad_share=1)
    assert [(bad.key, bad.kind) for bad in manifest.bad] == [
        ("cat/cut.mkv", "truncated"),
        ("cat/empty.mp4", "empty"),
        ("cat/text.mp4", "not a video"),
        ("dog/run", "unreadable"),
        ("dog/sit", "empty"),
    ]
    assert manifest.num_samples == 3
    assert read_manifest(tmp_path / "out") == manifest


@pytest.mark.parametrize("size", [None, 16])
def test_interrupted_conversion_goes_on_to_the_same_shards_whatever_the_workers(folder, tmp_path, monkeypatch, size):
    whole = write(folder, tmp_path / "whole", VideoRecipe(size), num_workers=2)
    finish = ShardWriter._finish
    count = []

    def killed(self, next_index):
        count.append(None)
        if len(count) == 2:
            raise InterruptedError
        finish(self, next_index)

    with monkeypatch.context() as patch:
        patch.setattr("vistok.data.convert.ShardWriter._finish", killed)
        with pytest.raises(InterruptedError):
            write(folder, tmp_path / "out", VideoRecipe(size))
    assert write(folder, tmp_path / "out", VideoRecipe(size)) == whole
    assert all_members(tmp_path / "out") == all_members(tmp_path / "whole")
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_list_names_files_and_folders_of_pictures(folder, tmp_path):
    (tmp_path / "list.txt").write_text("dog/walk\ncat/a.mp4\n")
    source = open_source(str(folder), tmp_path / "list.txt", videos=True)
    assert [source[index].key for index in range(len(source))] == ["dog/walk", "cat/a.mp4"]
    (tmp_path / "list.txt").write_text("dog/walk\ndog\n")
    with pytest.raises(FileNotFoundError, match=r"1 of 2 paths .* are no files and folders of numbered .* such as dog"):
        open_source(str(folder), tmp_path / "list.txt", videos=True)


def test_shards_of_pictures_and_of_videos_are_told_apart(folder, tmp_path):
    write(folder, tmp_path / "videos_out")
    with pytest.raises(ValueError, match="holds shards of videos: read them by data=video_shards"):
        expand_shards(str(tmp_path / "videos_out"))
    convert(open_source(str(folder / "dog" / "walk")), tmp_path / "pictures_out", Recipe(), num_workers=0)
    with pytest.raises(ValueError, match="holds shards of pictures: read them by data=webdataset"):
        VideoShardData(shards=None, val_shards=str(tmp_path / "pictures_out"))
    with pytest.raises(ValueError, match="holds shards of pictures: choose another folder for videos"):
        write(folder, tmp_path / "pictures_out")


def test_damaged_archive_of_pictures_is_a_bad_sample(folder, tmp_path):
    _, data = VideoRecipe().apply(folder / "dog/walk")
    for damaged in (data[:200], data[:100] + b"x" + data[101:]):
        with pytest.raises(BadImageError, match="unreadable: zip file of pictures"):
            list(Clip(12).read(damaged, 0.0))
    with pytest.raises(ValueError, match=r"data\.rate=8 is of video files.* set data\.rate=null and data\.stride"):
        list(Clip(3, rate=8).read(data, 0.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 15}, "must be an even number of pixels, as H.264 needs it; got 15"),
        ({"crf": 20}, "crf has no effect on copied files"),
        ({"size": 16, "crf": 99}, "crf must lie between 0"),
        ({"crop": True}, "need a size"),
    ],
)
def test_impossible_recipe_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VideoRecipe(**options)
