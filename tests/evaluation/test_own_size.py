"""Pictures that are evaluated as large as they are."""

import json

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

import vistok
from vistok.cli.hydra_app import configs_folder
from vistok.data import ImageFolderData
from vistok.evaluation import evaluate
from vistok.evaluation.run import evaluate_models
from vistok.metric.image import psnr
from vistok.training.run import train

SIZES = (40, 24), (24, 40), (176, 184)
PROTOCOL = {"dataset": "d", "split": "s", "resize": "none", "crop": "none"}


@pytest.fixture
def pictures(tmp_path):
    """Pictures of three sizes (H, W) and a border of a few pixels each, in a folder."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, (height, width) in enumerate(SIZES):
        noise = torch.randint(0, 256, (height + number, width + 3, 3), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{number}.png")
    return folder


def config(name, *overrides):
    with initialize_config_dir(str(configs_folder()), version_base="1.3"):
        return compose(name, overrides=list(overrides))


def small_tokenizer(quantizer):
    settings = config("train", "experiment=tiny", f"quantizer={quantizer}").tokenizer
    return vistok.build(OmegaConf.to_container(settings, resolve=True)).eval()


def data(pictures, **options):
    return ImageFolderData(None, val_root=str(pictures), num_workers=0, native=8, **options)


def halved(images):
    return images / 2


def test_every_picture_is_measured_at_its_own_size(pictures):
    source = data(pictures)
    images = [batch["images"] for batch in source.eval_dataloader()]
    assert [tuple(image.shape[2:]) for image in images] == list(SIZES)
    evaluation = evaluate(halved, source.eval_dataloader(), protocol=source.protocol, rfid=False, lpips=None)
    expected = [psnr(halved(image), image).item() for image in images]
    assert evaluation.per_image["psnr"] == pytest.approx(expected)
    assert evaluation.protocol["size"] == "own"
    assert evaluation.protocol["crop"] == "center, to multiples of 8 pixels"
    assert "ms_ssim" not in evaluation.metrics
    assert evaluation.missing["ms_ssim"] == "needs sides of at least 176 pixels, images have 40x24"
    assert [reference.name for reference in evaluation.references] == ["JPEG, quality 1"]


def test_a_metric_that_a_later_picture_is_too_small_for_is_left_out(pictures):
    batches = list(data(pictures).eval_dataloader())[::-1]
    evaluation = evaluate(halved, batches, protocol={**PROTOCOL, "size": "own"}, rfid=False, lpips=None)
    assert "ms_ssim" not in evaluation.metrics | evaluation.per_image
    assert evaluation.missing["ms_ssim"] == "needs sides of at least 176 pixels, images have 24x40"
    assert len(evaluation.per_image["ssim"]) == 3


@pytest.mark.parametrize("quantizer", ["fsq", "multiscale_vq"])
def test_rates_are_those_of_all_pixels(pictures, quantizer):
    tokenizer = small_tokenizer(quantizer)
    batches = [batch for batch in data(pictures).eval_dataloader() if batch["images"].shape[2] < 100]
    evaluation = evaluate(tokenizer, batches, protocol={**PROTOCOL, "size": "own"}, rfid=False, lpips=None)
    sizes = [batch["images"].shape[2:] for batch in batches]
    bits = sum(tokenizer.bits_per_pixel(size) * size.numel() for size in sizes)
    assert evaluation.metrics["bits_per_pixel"] == pytest.approx(bits / sum(size.numel() for size in sizes))
    tokens = sum(tokenizer.encode(batch["images"]).indices.numel() for batch in batches)
    assert evaluation.metrics["tokens"] == tokens
    assert not evaluation.position_entropy.numel()
    assert not evaluation.per_scale


def test_pictures_of_another_shape_are_refused_unless_the_protocol_says_so(pictures):
    batches = list(data(pictures).eval_dataloader())
    with pytest.raises(ValueError, match="all images must have one shape"):
        evaluate(halved, batches, protocol=PROTOCOL, rfid=False, lpips=None)


def test_channels_may_not_differ():
    batches = [{"images": torch.zeros(1, channels, 16, 16)} for channels in (3, 1)]
    with pytest.raises(ValueError, match="all images must have one shape"):
        evaluate(halved, batches, protocol={**PROTOCOL, "size": "own"}, rfid=False, lpips=None)


def test_a_picture_smaller_than_the_step_is_a_bad_sample(pictures):
    Image.new("RGB", (7, 30)).save(pictures / "thin.png")
    batches = list(data(pictures, max_bad_share=1.0).eval_dataloader())
    assert [len(batch["images"]) for batch in batches] == [1, 1, 1, 0]
    assert batches[-1]["bad"][0].kind == "too small"


def test_the_command_measures_and_shows_them(pictures, tmp_path):
    bundle = vistok.save(small_tokenizer("fsq"), tmp_path / "bundle")
    overrides = [f"bundle={bundle}", "data=image_folder", f"data.val_root={pictures}", "data.native=8"]
    evaluate_models(
        config("eval", *overrides, "data.num_workers=0", "rfid=false", "lpips=null"), tmp_path / "out", "command"
    )
    saved = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert saved["protocol"]["size"] == "own"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "3 images of their own size" in page
    with pytest.raises(ValueError, match=r"protocol=var resizes pictures .*data.native=8 leaves them as they are"):
        evaluate_models(config("eval", *overrides, "protocol=var"), tmp_path / "other", "command")
    fitting = config("eval", *overrides[:3], "data.native=2", "data.num_workers=0", "rfid=false", "lpips=null")
    with pytest.raises(ValueError, match=r"do not fit this tokenizer .*set data.native to a multiple of its patches"):
        evaluate_models(fitting, tmp_path / "third", "command")


def test_wide_pictures_are_reduced_so_that_three_fit_in_a_row():
    from vistok.evaluation.html import _figure

    picture = torch.zeros(3, 500, 792, dtype=torch.uint8)
    figure = _figure({"original": picture, "detail": picture[:, :50, :50]}, "caption")
    assert 'width="396" height="250" alt="original" class=reduced>' in figure
    assert 'width="250" height="250" alt="detail">' in figure


def test_training_refuses_them(pictures, tmp_path):
    overrides = ["experiment=tiny", "data=image_folder", f"data.root={pictures}", "data.native=8"]
    with pytest.raises(ValueError, match=r"data.native=8 is for vistok eval"):
        train(config("train", *overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()
