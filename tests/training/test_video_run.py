"""Training on videos from config to bundle."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import vistok
from vistok.training.run import train


@pytest.fixture
def root(tmp_path):
    generator = np.random.default_rng(0)
    for name in ("a", "b", "c", "d", "e"):
        folder = tmp_path / "videos" / name
        folder.mkdir(parents=True)
        colour = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        for number in range(9):
            picture = Image.fromarray(np.roll(colour, number, 1)).resize((20, 16), Image.Resampling.NEAREST)
            picture.save(folder / f"{number:03d}.png")
    return tmp_path / "videos"


@pytest.fixture
def video_run(compose_run, root):
    """``video_run(name, *overrides) -> (config, folder)`` of a run on videos that takes seconds."""
    small = [
        f"{part}.{setting}"
        for part in ("encoder", "decoder")
        for setting in ("base_channels=8", "channel_multipliers=[1,1]", "num_blocks=1", "attention=none")
    ]
    overrides = [
        *("data=video", f"data.root={root}", "encoder=causal3d", "decoder=causal3d", "quantizer.levels=[5,5]"),
        *("data.image_size=16", "data.frames=5", "data.batch_size=2", "data.num_workers=0", "data.val_share=0.3"),
        *("trainer.max_steps=4", "trainer.val_check_interval=2", "trainer.accelerator=cpu", "scheduler.warmup_steps=1"),
        *("callbacks.progress=null", "logger=csv", "final.lpips=null", "final.usage_tokens_per_code=1"),
    ]
    return lambda name, *more: compose_run(name, [*overrides, *small, *more])


def test_run_on_videos_writes_a_bundle_for_videos(video_run):
    metrics = train(*(arguments := video_run("run")))
    folder = arguments[1]
    assert metrics["psnr"] > 0
    assert "fvd" in json.loads((folder / "metrics.json").read_text())["missing"]
    tokenizer = vistok.load(folder / "bundle")
    assert tokenizer.default_size == (5, 16, 16)
    assert tokenizer.preprocessing["clip"] == {"rate": None, "stride": 1}
    videos = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    indices = tokenizer.encode(videos).indices
    assert indices.shape == (1, 2, 2, 2)
    assert tokenizer.decode_indices(tokenizer.unflatten(tokenizer.flatten(indices))).shape == videos.shape


def test_pictures_show_the_frames_of_a_video_side_by_side(video_run):
    config, folder = video_run("run", "callbacks.pictures.num_images=2")
    train(config, folder)
    with Image.open(folder / "reconstructions" / "step_000004.png") as picture:
        assert picture.width == 5 * 130 - 2


def test_resumed_run_on_videos_ends_with_the_same_weights(video_run):
    steady = ("scheduler=constant", "data.clips=4")
    whole, folder = video_run("whole", *steady)
    train(whole, folder)
    half, before = video_run("half", *steady, "trainer.max_steps=2")
    train(half, before)
    resumed, other = video_run("resumed", *steady, f"ckpt={before / 'checkpoints' / 'last.ckpt'}")
    train(resumed, other)
    ours, theirs = (load_file(path / "bundle" / "model.safetensors") for path in (folder, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_discriminator_of_videos_trains(video_run):
    metrics = train(
        *video_run(
            "run",
            "discriminator=patchgan_3d",
            *(f"discriminator.{name}" for name in ("base_channels=4", "num_layers=1", "num_time_layers=1")),
        )
    )
    assert metrics["train_steps"] == 4


def test_frames_that_do_not_fit_the_encoder_are_refused_before_training(video_run):
    with pytest.raises(ValueError, match="6"):
        train(*video_run("run", "data.frames=6"))
