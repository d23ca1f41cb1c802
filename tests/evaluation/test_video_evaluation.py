"""Videos: their frames are measured as images, FVD sees them whole."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from patch_tokenizer import PROTOCOL

import vistok
from vistok.data import VideoFolderData
from vistok.evaluation import evaluate, write_report
from vistok.evaluation.pictures import reconstruction_grid, video_grid
from vistok.metric import FeatureDistances, Inception, psnr, ssim
from vistok.metric.image import to_frames, to_pixels
from vistok.quantizer import FSQ

FRAMES, SIZE = 9, (9, 16, 16)


def make_video_tokenizer():
    torch.manual_seed(0)
    trunk = {"base_channels": 8, "channel_multipliers": [1, 1], "num_blocks": 1, "attention": "none", "z_channels": 4}
    return vistok.Tokenizer(
        vistok.encoder.Causal3DEncoder(**trunk), FSQ([5, 5]), vistok.decoder.Causal3DDecoder(**trunk)
    ).eval()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    videos = torch.randint(0, 256, (3, 3, *SIZE), generator=generator).float() / 127.5 - 1
    return [{"images": videos[:2], "keys": ["a.mp4", "b.mp4"]}, {"images": videos[2:], "keys": ["c.mp4"]}]


def run(model, batches, **options):
    return evaluate(model, batches, **({"protocol": PROTOCOL, "lpips": None, "rfid": False, "fvd": None} | options))


def test_image_metrics_are_means_over_all_frames(batches):
    tokenizer = make_video_tokenizer()
    videos = torch.cat([batch["images"] for batch in batches])
    with torch.no_grad():
        ours, originals = to_frames(tokenizer(videos).images), to_frames(videos)
    evaluation = run(tokenizer, batches)
    for name, measure in (("psnr", psnr), ("ssim", ssim)):
        assert evaluation.metrics[name] == pytest.approx(measure(ours, originals).mean().item(), rel=1e-4)
        assert len(evaluation.per_image[name]) == 3 * FRAMES
    assert evaluation.per_image["key"][:2] == ["a.mp4 frame 0", "a.mp4 frame 1"]
    assert evaluation.per_image["key"][-1] == "c.mp4 frame 8"


def test_frames_of_a_video_stay_together_and_in_order():
    videos = torch.arange(2 * 4.0).view(2, 1, 4, 1, 1)
    assert to_frames(videos).flatten().tolist() == [*range(8)]


def test_protocol_says_that_numbers_are_per_frame(batches):
    protocol = run(make_video_tokenizer(), batches).protocol
    assert protocol["videos"].startswith("3 of 9 frames; images are their frames in every metric but FVD")
    assert protocol["size"] == [9, 16, 16]
    assert protocol["images"] == 3 * FRAMES


def test_rates_are_per_pixel_of_all_frames(batches):
    tokenizer = make_video_tokenizer()
    metrics = run(tokenizer, batches).metrics
    assert metrics["tokens"] == 3 * tokenizer.sequence_length(SIZE)
    assert metrics["bits_per_pixel"] == pytest.approx(tokenizer.bits_per_pixel(SIZE))
    assert 0 < metrics["coded_bits_per_pixel"] < 2 * metrics["bits_per_pixel"]


def test_fvd_that_is_not_measured_says_why(batches, monkeypatch):
    monkeypatch.delenv("VISTOK_WEIGHTS", raising=False)

    def copy(images):
        return images

    assert "write fvd=/path/to/i3d_torchscript.pt" in run(copy, batches, fvd="i3d_torchscript.pt").missing["fvd"]
    assert run(copy, batches).missing["fvd"] == "switched off"
    short = [{"images": batch["images"][:, :, :5]} for batch in batches]
    assert run(copy, short, fvd="any.pt").missing["fvd"] == "needs at least 9 frames, videos have 5"
    pictures = [{"images": batch["images"][:, :, 0]} for batch in batches]
    assert "fvd" not in run(copy, pictures, fvd="any.pt").missing


def test_fvd_sees_whole_videos(batches, monkeypatch):
    shapes = []

    class Network:
        def __init__(self, file, weights):
            self.protocol = {"extractor": "mean over pixels"}
            assert (file, weights) == ("mine.pt", "folder")

        def __call__(self, pixels):
            shapes.append(tuple(pixels.shape))
            return vistok.metric.Features(pixels.mean((3, 4)).flatten(1))

        def to(self, device):
            return self

    monkeypatch.setattr("vistok.evaluation.measures.I3D", Network)
    evaluation = run(lambda images: images * 0.5, batches, fvd="mine.pt", weights="folder")
    assert evaluation.metrics["fvd"] > 0
    assert set(shapes) == {(2, 3, *SIZE), (1, 3, *SIZE)}
    assert evaluation.protocol["fvd"]["extractor"] == "mean over pixels"


@pytest.mark.skipif(
    not {"VISTOK_TEST_DATA", "VISTOK_WEIGHTS"} <= set(os.environ), reason="VISTOK_TEST_DATA, VISTOK_WEIGHTS"
)
def test_rfid_of_real_videos_is_between_the_sets_of_their_frames():
    folder = Path(os.environ["VISTOK_TEST_DATA"]) / "video"
    settings = {"frames": 4, "stride": 30, "image_size": 64, "batch_size": 1, "num_workers": 0}
    data = VideoFolderData(root=None, val_root=str(folder), **settings)

    def blur(videos):
        return torch.nn.functional.avg_pool3d(videos, (1, 5, 5), 1, (0, 2, 2), count_include_pad=False)

    evaluation = evaluate(
        blur, data.eval_dataloader(), protocol=data.protocol, lpips=None, distances=["kid"], references=False
    )
    distances, frames = FeatureDistances(Inception(), ["rfid", "kid"]), 0
    for batch in data.eval_dataloader():
        for time in range(4):
            originals = batch["images"][:, :, time]
            ours = torch.nn.functional.avg_pool2d(originals, 5, 1, 2, count_include_pad=False)
            distances.update(to_pixels(ours), to_pixels(originals))
            frames += len(originals)
    assert frames == evaluation.protocol["images"] == 8
    expected = distances.compute()
    assert {name: evaluation.metrics[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    assert evaluation.metrics["rfid"] > 1


def test_messages_name_videos(batches):
    wrong = [batches[0], {"images": batches[1]["images"][..., :-1], "keys": ["c.mp4"]}]
    with pytest.raises(ValueError, match="all videos must have one shape"):
        run(lambda videos: videos, wrong)
    with pytest.raises(ValueError, match=r"videos must be in \[-1, 1\]"):
        run(lambda videos: videos, [{"images": 2 * batches[0]["images"]}])
    with pytest.raises(ValueError, match=r"gave .* for videos"):
        run(lambda videos: videos[:, :, 1:], batches)
    with pytest.raises(ValueError, match="a float tensor of videos"):
        run(lambda videos: [videos], batches)


def test_report_of_videos_is_written(batches, tmp_path):
    write_report(run(make_video_tokenizer(), batches), tmp_path, title="video", command="none")
    page = (tmp_path / "report.html").read_text()
    assert "3 videos of 9 frames of 16x16 pixels" in page
    assert "encode, frames/s" in page
    worst = json.loads((tmp_path / "metrics.json").read_text())["worst"][0]["key"]
    assert worst.split(" frame ")[0] in ("a.mp4", "b.mp4", "c.mp4")
    assert worst in (tmp_path / "report.html").read_text()


def test_grid_of_videos_shows_frames_from_first_to_last_side_by_side(batches):
    videos = batches[0]["images"]
    picture = video_grid(videos, videos, min_side=16)
    one = reconstruction_grid(videos[0, :, [0, 1, 2, 3, 5, 6, 7, 8]].movedim(1, 0), videos[0, :, :8].movedim(1, 0), 16)
    assert picture.width == one.width == 8 * 18 - 2
    assert picture.height == 2 * one.height + 8
    assert np.array_equal(np.asarray(picture)[:16], np.asarray(one)[:16])
