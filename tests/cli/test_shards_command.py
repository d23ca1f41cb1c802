"""``vistok shards`` as a user types it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from vistok.cli import shards
from vistok.data.manifest import read_manifest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def folder(tmp_path) -> Path:
    """200 pictures."""
    (tmp_path / "in").mkdir()
    for number in range(200):
        Image.linear_gradient("L").resize((40, 30)).rotate(number).save(tmp_path / "in" / f"{number}.png")
    return tmp_path / "in"


def give(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["vistok shards", *map(str, arguments)])
    shards.main()


def test_command_says_what_it_wrote_and_how_to_train_on_it(folder, tmp_path, monkeypatch, capsys):
    (folder / "0.png").write_bytes(b"")
    give(monkeypatch, folder, tmp_path / "out", "--size", 16, "--crop", "--workers", 0, "--max-bad-share", 0.1)
    out = capsys.readouterr().out
    assert "199 pictures in 1 shards" in out
    assert "1 bad pictures left out, listed in manifest.json" in out
    assert f"vistok train data=webdataset data.shards={tmp_path / 'out'}" in out
    assert read_manifest(tmp_path / "out").settings["size"] == 16


def test_videos_are_converted_and_the_command_says_how_to_train_on_them(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "videos" / "bad").mkdir(parents=True)
    folder.rename(tmp_path / "videos" / "walk")  # 200 numbered pictures
    for name in ("1.png", "2.png"):
        (tmp_path / "videos" / "bad" / name).write_bytes(b"")
    give(monkeypatch, tmp_path / "videos", tmp_path / "out", "--videos", "--workers", 1, "--max-bad-share", 0.5)
    out = capsys.readouterr().out
    assert "1 videos in 1 shards" in out
    assert "1 bad videos left out, listed in manifest.json" in out
    assert f"vistok train data=video_shards data.shards={tmp_path / 'out'}" in out


def test_folder_of_videos_asks_for_the_option(tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").touch()
    with pytest.raises(SystemExit):
        give(monkeypatch, tmp_path / "in", tmp_path / "out")
    assert "vistok shards --videos" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere"], "/nowhere does not exist: give a folder, torchvision:NAME or hf:NAME"),
        (["torchvision:cifar"], "no torchvision set 'cifar'; there are"),
        (["/nowhere", "--size", "0"], "size must be at least 1 pixel, got 0"),
        (["/nowhere", "--quality", "50"], "quality has no effect"),
        (["/nowhere", "--crf", "20"], "--crf 20 has no effect on pictures: leave it out or add --videos"),
        (["/nowhere", "--videos", "--format", "png"], "--format png has no effect on videos: leave it out"),
        (["hf:owner/name", "--videos"], "videos are read from a folder, not from hf:owner/name"),
    ],
)
def test_impossible_command_is_answered_without_a_traceback(arguments, message, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit:
        give(monkeypatch, arguments[0], tmp_path / "out", *arguments[1:])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_killed_command_goes_on_when_it_is_given_again(folder, tmp_path, monkeypatch):
    options = ["--shard-samples", 5, "--workers", 1]
    command = [sys.executable, "-m", "vistok.cli", "shards", folder, tmp_path / "out", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tokenizers"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(list(map(str, command)), env=environment)
    deadline = time.monotonic() + 200
    while not (tmp_path / "out" / "manifest.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    give(monkeypatch, folder, tmp_path / "out", *options)
    give(monkeypatch, folder, tmp_path / "whole", *options)
    manifest, whole = read_manifest(tmp_path / "out"), read_manifest(tmp_path / "whole")
    assert manifest == whole
    assert manifest.num_samples == 200
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "manifest.json",
        *(shard.name for shard in whole.shards),
    }
