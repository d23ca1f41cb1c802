import io
import re
import tarfile
import zipfile
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from small_videos import numbers, write_frames, write_video

from vistok.data import (
    BadSample,
    Clip,
    EvalTransform,
    TrainTransform,
    VideoDataset,
    VideoFolder,
    VideoFolderData,
    VideoShardData,
    decode_image,
)
from vistok.data import video as video_module
from vistok.data.decode import BadImageError
from vistok.data.video import find_videos

av = pytest.importorskip("av")


def read(source, position=0.5, **clip):
    return numbers(map(decode_image, Clip(**clip).read(source, position)))


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm", ".avi"])
@pytest.mark.parametrize(("position", "first"), [(0.0, 0), (0.5, 16), (1.0, 31)])
def test_clip_has_the_frames_from_its_position_on(tmp_path, suffix, position, first):
    path = write_video(tmp_path / f"a{suffix}")
    assert read(path, position, frames=9) in ([*range(first, first + 9)], [*range(first - 1, first + 8)])
    assert read(path.read_bytes(), position, frames=9) == read(path, position, frames=9)


def test_clip_as_long_as_its_video_has_every_frame(tmp_path):
    for suffix in (".mp4", ".webm", ".avi", ".mkv"):
        assert read(write_video(tmp_path / f"a{suffix}", 11), frames=11) == [*range(11)]


def test_animated_picture_is_a_video(tmp_path):
    frames = [decode_image(frame) for frame in Clip(5).read(write_video(tmp_path / "a.gif", 5), 0.5)]
    assert len(frames) == 5
    values = [float(frame.float().mean()) for frame in frames]
    assert values == sorted(values)


def test_stride_takes_every_nth_frame(tmp_path):
    assert read(write_video(tmp_path / "a.mp4"), 0.0, frames=5, stride=4) == [0, 4, 8, 12, 16]


def test_rate_takes_the_frames_nearest_in_time(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    assert read(path, 0.0, frames=4, rate=5) == [0, 5, 10, 15]
    assert read(path, 0.0, frames=4, rate=25) == [0, 1, 2, 3]


def test_rate_above_that_of_the_video_repeats_frames(tmp_path):
    assert read(write_video(tmp_path / "a.mp4"), 0.0, frames=6, rate=50) in ([0, 1, 1, 2, 2, 3], [0, 0, 1, 1, 2, 2])


def test_only_the_frames_from_the_key_frame_on_are_decoded(tmp_path, monkeypatch):
    decoded = []
    original = video_module._decoded
    monkeypatch.setattr(video_module, "_decoded", lambda *args: (decoded.append(1) or item for item in original(*args)))
    assert len(read(write_video(tmp_path / "a.mp4"), 1.0, frames=2)) == 2
    assert len(decoded) <= 14


def test_sound_that_lasts_longer_is_no_part_of_the_video(tmp_path):
    path = write_video(tmp_path / "a.webm", 20, sound=True)
    with av.open(str(path)) as file:
        assert file.duration > 3_500_000
    assert read(path, 1.0, frames=3) == [17, 18, 19]


def test_duration_is_found_where_no_header_has_it(tmp_path, monkeypatch):
    monkeypatch.setattr("vistok.data.video.DURATION", re.compile("never"))
    path = write_video(tmp_path / "a.webm", 20, sound=True)
    assert read(path, 1.0, frames=3) == [17, 18, 19]


@pytest.mark.parametrize(("turn", "shape"), [(0, (3, 32, 48)), (90, (3, 48, 32))])
def test_video_that_is_stored_lying_stands_upright(tmp_path, turn, shape):
    path = write_video(tmp_path / "a.mp4", 3)
    if turn:
        data = bytearray(path.read_bytes())
        matrix = data.index(b"tkhd") + 4 + 40  # version and times, then the matrix of nine fixed-point numbers
        for place, value in enumerate((0, 1, 0, -1, 0, 0)):
            data[matrix + 4 * place : matrix + 4 * place + 4] = (value << 16).to_bytes(4, "big", signed=True)
        path.write_bytes(data)
    frames = [decode_image(frame) for frame in Clip(3).read(path, 0.5)]
    assert [tuple(frame.shape) for frame in frames] == [shape] * 3


def test_folder_of_pictures_is_ordered_by_number(tmp_path):
    folder = write_frames(tmp_path / "walk")  # frame_8, frame_9, frame_10 ...
    assert read(folder, 0.0, frames=4) == [0, 1, 2, 3]
    assert read(folder, 1.0, frames=3, stride=2) == [5, 7, 9]


def test_pictures_of_several_names_are_no_video(tmp_path):
    write_frames(tmp_path / "walk", name="left_{}.png")
    write_frames(tmp_path / "walk", name="right_{}.png")
    with pytest.raises(BadImageError, match=r"several names \(left_\*, right_\*\)"):
        read(tmp_path / "walk", frames=3)


def zip_of(files, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return file.getvalue()


def test_hidden_files_of_an_archive_are_no_pictures(tmp_path):
    frames = {path.name: path.read_bytes() for path in write_frames(tmp_path / "walk", 3).iterdir()}
    hidden = {f"__MACOSX/._{name}": b"" for name in frames}
    assert read(zip_of(frames | hidden), frames=3) == [0, 1, 2]


def test_archive_that_grows_when_it_is_read_is_refused(monkeypatch):
    monkeypatch.setattr(video_module, "MAX_PICTURE_BYTES", 999)
    data = zip_of({"1.png": bytes(1000)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(BadImageError, match=r"too large: 1\.png has 1000 bytes"):
        read(data, frames=1)


def test_damaged_archive_is_a_bad_sample():
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        data = bytearray(zip_of({"1.png": np.random.default_rng(0).bytes(1000)}, compression))
        data[60:400] = bytes(340)
        assert kind_of(bytes(data), frames=1) == "unreadable"


def test_rate_of_pictures_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"no rate: set data.rate=null and data.stride"):
        read(write_frames(tmp_path / "walk"), frames=3, rate=8)


@pytest.mark.parametrize("settings", [{"frames": 0}, {"stride": 0}, {"rate": 0}, {"rate": 8, "stride": 2}])
def test_impossible_clip_is_refused(settings):
    with pytest.raises(ValueError, match=r"must be at least 1|has no effect"):
        Clip(**settings)


def kind_of(source, **clip):
    with pytest.raises(BadImageError) as caught:
        read(source, 0.5, **clip)
    return caught.value.kind


def test_what_is_no_video_says_so(tmp_path):
    (tmp_path / "text.mp4").write_text("hello " * 1000)
    (tmp_path / "empty.mp4").touch()
    play_list = f"#EXTM3U\n#EXTINF:5,\n{write_video(tmp_path / 'a.mp4')}\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.mp4").write_text(play_list)
    assert kind_of(tmp_path / "text.mp4") == "not a video"
    assert kind_of(tmp_path / "empty.mp4") == "empty"
    assert kind_of(tmp_path / "list.mp4") == "not a video"
    assert kind_of(tmp_path / "absent.mp4") == "unreadable"
    assert kind_of(b"") == "empty"


def test_short_video_says_how_long_it_is(tmp_path):
    with pytest.raises(BadImageError, match="too short: 8 frames, a clip takes 17"):
        read(write_video(tmp_path / "a.mp4", 8), frames=17)
    with pytest.raises(BadImageError, match="too short: 3 frames, a clip takes 5"):
        read(write_frames(tmp_path / "walk", 3), frames=3, stride=2)


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".avi", ".mkv"])
def test_cut_off_video_is_a_bad_sample(tmp_path, suffix):
    options = {"movflags": "faststart"} if suffix == ".mp4" else {}
    path = write_video(tmp_path / f"a{suffix}", **options)
    data = path.read_bytes()
    assert kind_of(data[: len(data) * 6 // 10], frames=39) in ("truncated", "not a video", "too short", "unreadable")


def outcome(source):
    """How many frames a clip of 9 has, or why it has none."""
    try:
        return len(list(Clip(9).read(source, 0.5)))
    except BadImageError as error:
        return error.kind


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".avi", ".mkv", ".gif"])
def test_damaged_video_gives_its_frames_or_is_a_bad_sample(tmp_path, suffix):
    data = bytearray(write_video(tmp_path / f"a{suffix}").read_bytes())
    generator = np.random.default_rng(0)
    for _ in range(20):
        broken = bytearray(data)
        for place in generator.integers(0, len(data), 30):
            broken[place] = generator.integers(0, 256)
        assert outcome(bytes(broken)) in (9, "not a video", "truncated", "too short", "too large", "unreadable")


def test_missing_library_is_named_with_what_installs_it(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4")

    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("vistok.data.video.import_module", absent)
    with pytest.raises(ImportError, match=r"pip install av"):
        read(path)


def test_videos_are_files_and_folders_of_numbered_pictures(tmp_path):
    for name in ("a.mp4", "deep/er/b.WEBM", "deep/c.gif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a1.jpg").touch()  # thumbnails beside a video are none
    (tmp_path / "a2.jpg").touch()
    write_frames(tmp_path / "walk")
    write_frames(tmp_path / "single", 1)
    assert find_videos(tmp_path) == ["a.mp4", "deep/c.gif", "deep/er/b.WEBM", "walk"]
    assert find_videos(tmp_path, exclude=tmp_path / "deep") == ["a.mp4", "walk"]


def test_folder_without_videos_says_what_it_holds(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"no videos .* looked for \.mp4 .* saw 1 other files \(1 \.txt\)"):
        find_videos(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"does not exist: data\.root and data\.val_root are folders of videos"):
        find_videos(tmp_path / "absent")
    write_frames(tmp_path, 3)
    with pytest.raises(FileNotFoundError, match=r"saw 4 other files \(3 \.png, 1 \.txt\)"):
        find_videos(tmp_path)
    for picture in tmp_path.glob("*.png"):
        picture.unlink()
    (tmp_path / "notes.txt").rename(tmp_path / "a.tar")
    with pytest.raises(FileNotFoundError, match=r"holds shards: write data=video_shards data.shards="):
        find_videos(tmp_path)


def folder_of(root, clips=1):
    return VideoFolder(root, find_videos(root), clips=clips)


def test_all_frames_of_a_clip_are_cropped_and_mirrored_alike(tmp_path):
    folder = tmp_path / "walk"
    folder.mkdir()
    picture = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    for number in range(6):
        Image.fromarray(picture).save(folder / f"{number}.png")
    dataset = VideoDataset(folder_of(tmp_path), TrainTransform(8, crop_scale=(0.2, 0.9)), clip=Clip(5))
    first, second = dataset[0, 0]["image"], dataset[1, 0]["image"]
    assert first.shape == (3, 5, 8, 8)
    assert torch.equal(first, first[:, :1].expand_as(first))
    assert not torch.equal(first, second)


def test_training_clips_begin_anywhere_and_depend_on_the_epoch_alone(tmp_path):
    write_frames(tmp_path / "walk", 30)
    dataset = VideoDataset(folder_of(tmp_path), TrainTransform(8), clip=Clip(2), seed=1)
    starts = [numbers(dataset[epoch, 0]["image"].movedim(1, 0))[0] for epoch in range(30)]
    assert len(set(starts)) > 10
    assert min(starts) < 5
    assert max(starts) > 23
    assert starts == [numbers(dataset[epoch, 0]["image"].movedim(1, 0))[0] for epoch in range(30)]


def test_evaluation_clips_are_spread_evenly(tmp_path):
    write_frames(tmp_path / "walk", 34)
    make = partial(VideoDataset, transform=EvalTransform(8), train=False, clip=Clip(2))
    starts = [
        [numbers(dataset[0, index]["image"].movedim(1, 0))[0] for index in range(clips)]
        for clips, dataset in ((clips, make(folder_of(tmp_path, clips))) for clips in (1, 4))
    ]
    assert starts == [[16], [4, 12, 20, 28]]
    assert make(folder_of(tmp_path, 4))[0, 3]["key"] == "walk#3"


def test_unreadable_videos_are_replaced_in_training_and_reported_in_evaluation(tmp_path):
    write_frames(tmp_path / "b", 8)
    (tmp_path / "a.mp4").write_bytes(b"no video at all")
    train = VideoDataset(VideoFolder(tmp_path, ["a.mp4", "b"]), TrainTransform(8), clip=Clip(3))
    sample = train[0, 0]
    assert sample["key"] == "b"
    assert [(bad.key, bad.kind) for bad in sample["bad"]] == [("a.mp4", "not a video")]
    held_out = VideoDataset(VideoFolder(tmp_path, ["a.mp4", "b"]), EvalTransform(8), train=False, clip=Clip(3))
    assert isinstance(held_out[0, 0], BadSample)


def test_frames_that_differ_in_size_are_a_bad_sample(tmp_path):
    write_frames(tmp_path / "walk", 4)
    Image.new("RGB", (50, 50)).save(tmp_path / "walk" / "frame_9.png")
    write_frames(tmp_path / "run", 4)
    dataset = VideoDataset(folder_of(tmp_path), EvalTransform(8), train=False, clip=Clip(4))
    assert dataset[0, 1] == BadSample("walk", "unreadable", "its frames differ in size")


@pytest.fixture
def root(tmp_path):
    for group in ("cats", "dogs"):
        write_video(tmp_path / "videos" / group / "a.mp4", 12)
        for name in ("b", "c", "d"):
            write_frames(tmp_path / "videos" / group / name, 12)
    return tmp_path / "videos"


SMALL = {"frames": 5, "image_size": 8, "batch_size": 2, "num_workers": 0}


def test_batches_have_clips_in_model_range_with_labels(root):
    data = VideoFolderData(root=str(root), val_share=0.2, clips=2, **SMALL)
    batch = next(iter(data.train_dataloader()))
    assert batch["images"].shape == (2, 3, 5, 8, 8)
    assert batch["images"].dtype == torch.float32
    assert -1 <= float(batch["images"].min()) < float(batch["images"].max()) <= 1
    assert batch["labels"].shape == (2,)
    assert len(data.train_dataset) == 2 * (8 - len(data.eval_dataset))


def test_batches_of_loading_processes_are_those_of_the_main_process(root):
    batches = [
        list(VideoFolderData(root=str(root), **SMALL | {"num_workers": workers}).train_dataloader())
        for workers in (0, 2)
    ]
    for ours, theirs in zip(*batches, strict=True):
        assert ours["keys"] == theirs["keys"]
        assert torch.equal(ours["images"], theirs["images"])


def test_resumed_epoch_goes_on_with_the_same_clips(root):
    data = VideoFolderData(root=str(root), clips=2, **SMALL)
    whole = list(data.train_dataloader())
    resumed = data.train_dataloader()
    resumed.load_state_dict(data.train_dataloader().state_dict() | {"batch": 2})
    rest = list(resumed)
    assert [batch["keys"] for batch in rest] == [batch["keys"] for batch in whole[2:]]
    assert all(torch.equal(a["images"], b["images"]) for a, b in zip(rest, whole[2:], strict=True))


def test_size_is_that_of_clips(root):
    data = VideoFolderData(root=str(root), eval_size=16, eval_clips=2, stride=2, **SMALL)
    assert data.preprocessing["size"] == [5, 8, 8]
    assert data.preprocessing["clip"] == {"rate": None, "stride": 2}
    assert data.protocol["size"] == [5, 16, 16]
    assert data.protocol["clip"] == "5 frames, one of 2; 2 of each video, evenly spread"


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_are_those_asked_for(root, channels):
    data = VideoFolderData(val_root=str(root), channels=channels, **SMALL)
    assert next(iter(data.eval_dataloader()))["images"].shape == (2, channels, 5, 8, 8)


def test_root_that_is_not_set_is_named():
    with pytest.raises(ValueError, match=r"set it to a folder of videos, data\.root="):
        VideoFolderData()


def write_shards(folder, names, num_videos=4, suffix=".mp4"):
    folder.mkdir()
    video = write_video(folder.parent / f"source{suffix}", 14).read_bytes()
    for shard in names:
        with tarfile.open(folder / shard, "w") as archive:
            for number in range(num_videos):
                damaged = number == 1 and shard == names[0]
                for extension, content in ((suffix, video[:50] if damaged else video), (".cls", str(number).encode())):
                    member = tarfile.TarInfo(f"{shard[:-4]}_{number}{extension}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return folder


@pytest.fixture
def shards(tmp_path):
    train = write_shards(tmp_path / "train", ["a.tar", "b.tar"])
    return {"shards": str(train), "val_shards": str(write_shards(tmp_path / "val", ["c.tar"], suffix=".webm"))}


def test_shards_give_clips_and_report_what_cannot_be_read(shards):
    data = VideoShardData(**shards, **SMALL)
    train = list(data.train_dataloader())
    assert [batch["images"].shape for batch in train] == [(2, 3, 5, 8, 8)] * 4
    assert {bad.kind for batch in train for bad in batch["bad"]} == {"not a video"}
    held_out = list(data.eval_dataloader())
    assert sum(len(batch["images"]) for batch in held_out) == 3
    assert [bad.key for batch in held_out for bad in batch["bad"]] == ["c_1"]
    assert data.protocol["num_images"] == 4
    assert data.protocol["clip"].endswith("the middle of each video")


def test_shards_resume_inside_an_epoch(shards):
    data = VideoShardData(**shards, **SMALL)
    whole = list(data.train_dataloader())
    resumed = data.train_dataloader()
    resumed.load_state_dict(data.train_dataloader().state_dict() | {"batch": 1})
    rest = list(resumed)
    assert len(rest) == len(whole) - 1
    assert all(torch.equal(a["images"], b["images"]) for a, b in zip(rest, whole[1:], strict=True))


def test_reduced_decoding_of_video_files_is_refused(shards):
    with pytest.raises(ValueError, match=r"data\.reduced_decode=true has no effect on shards of videos"):
        VideoShardData(**shards, reduced_decode=True, **SMALL)


def test_folders_of_pictures_need_no_pyav(tmp_path, monkeypatch):
    monkeypatch.setattr(video_module, "import_module", lambda name: pytest.fail(f"imported {name}"))
    assert read(write_frames(tmp_path / "walk", 3), frames=3) == [0, 1, 2]
