"""Protocols as files: every one builds, differs from the others, says so, and changes what it should."""

import dataclasses
import logging
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from patch_tokenizer import PROTOCOL, make_batches, make_tokenizer

from vistok.evaluation import Protocol, evaluate
from vistok.evaluation.run import data_settings
from vistok.loss.lpips import LPIPS
from vistok.metric import Features, ssim
from vistok.metric.image import to_pixels

FILES = sorted(Path("configs/protocol").glob("*.yaml"))


def read(path):
    return instantiate(OmegaConf.load(path), _convert_="all")


def run(**options):
    return evaluate(make_tokenizer(), make_batches(4), protocol=PROTOCOL, rfid=False, **options)


def test_the_published_protocols_are_there():
    names = {path.stem for path in FILES}
    assert names >= {"taming", "llamagen", "seed_voken", "titok", "rqvae", "var", "bsq", "clean_fid", "vistok"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_lists_every_argument_and_carries_its_name(path):
    config = OmegaConf.load(path)
    assert {str(key) for key in config} - {"_target_"} == {field.name for field in dataclasses.fields(Protocol)}
    assert config.name == path.stem
    assert path.read_text().startswith("# ")


def test_the_recommended_file_is_the_default_of_the_class():
    assert read(Path("configs/protocol/vistok.yaml")) == Protocol()


def test_no_two_files_are_alike():
    protocols = [dataclasses.replace(read(path), name="") for path in FILES]
    assert all(protocols.count(protocol) == 1 for protocol in protocols)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_was_followed_is_saved_beside_the_numbers(path):
    saved = run(rules=read(path), lpips=None).protocol
    assert saved["protocol"] == path.stem
    assert {"rounding", "ssim", "published_on"} <= set(saved)


def test_ssim_follows_the_protocol():
    rules = Protocol(ssim_window="uniform_valid", ssim_data_range=2.0)
    tokenizer, batches = make_tokenizer(), make_batches(4)
    images = batches[0]["images"]
    expected = ssim(tokenizer(images).images, images, window="uniform_valid", data_range=2.0).mean().item()
    metrics = evaluate(tokenizer, batches, protocol=PROTOCOL, rules=rules, rfid=False, lpips=None).metrics
    assert metrics["ssim"] == pytest.approx(expected, rel=1e-5)


def test_psnr_follows_the_rounding():
    tokenizer, batches = make_tokenizer(), make_batches(4)
    values = [
        evaluate(tokenizer, batches, protocol=PROTOCOL, rules=Protocol(rounding=rounding), rfid=False, lpips=None)
        for rounding in ("nearest", "truncate", "none")
    ]
    assert len({value.metrics["psnr"] for value in values}) == 3


def test_the_networks_see_what_the_protocol_rounds(monkeypatch):
    seen = []

    class Recorder:
        def __init__(self, *_):
            self.protocol = {}

        def __call__(self, pixels):
            seen.append(pixels)
            return Features(pixels.mean((2, 3)))

        def to(self, device):
            return self

    monkeypatch.setattr("vistok.evaluation.measures.Inception", Recorder)
    tokenizer, batches = make_tokenizer(), make_batches(2)
    evaluate(tokenizer, batches, protocol=PROTOCOL, rules=Protocol(feature_rounding="none"), lpips=None)
    images = batches[0]["images"]
    assert torch.equal(seen[0], to_pixels(tokenizer(images).images, "none"))
    assert torch.equal(seen[1], to_pixels(images))


def test_lpips_sees_what_the_networks_see_and_not_what_psnr_sees(monkeypatch):
    seen = []

    class Recorder(LPIPS):
        min_side, protocol = 1, {}

        def __init__(self):
            torch.nn.Module.__init__(self)

        def to(self, device):
            return self

        def forward(self, reconstructions, originals):
            seen.append(reconstructions)
            return reconstructions.new_zeros(len(reconstructions))

    monkeypatch.setattr("vistok.evaluation.measures.LPIPS", lambda net, weights: Recorder())
    rules = read(Path("configs/protocol/seed_voken.yaml"))
    tokenizer, batches = make_tokenizer(), make_batches(2)
    evaluate(tokenizer, batches, protocol=PROTOCOL, rules=rules, rfid=False)
    whole = [to_pixels(images, "none") for images in seen]
    assert whole[0] == pytest.approx(to_pixels(tokenizer(batches[0]["images"]).images, "none"), abs=1e-3)
    assert (whole[0] - whole[0].round()).abs().max() > 0.1


def test_vqgan_is_scored_on_pictures_cut_off_to_8_bits():
    taming = read(Path("configs/protocol/taming.yaml"))
    assert (taming.rounding, taming.feature_rounding) == ("truncate", "truncate")


def test_several_networks_of_lpips_have_a_name_each(tmp_path):
    missing = run(rules=Protocol(lpips=["alex", "vgg"]), weights=tmp_path).missing
    assert {"lpips_alex", "lpips_vgg"} <= set(missing)


def test_lpips_of_the_call_goes_before_that_of_the_protocol(tmp_path):
    assert run(rules=Protocol(lpips="alex"), lpips=None, weights=tmp_path).missing["lpips"] == "switched off"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounding": "floor"}, "rounding must be one of nearest, truncate, none; got 'floor'"),
        ({"feature_rounding": "floor"}, "feature_rounding must be"),
        ({"extractor_resize": "pil"}, "extractor_resize must be one of tf1, torch, clean"),
        ({"ssim_window": "box"}, "ssim_window must be"),
        ({"ssim_data_range": 0.0}, "ssim_data_range must be positive"),
        ({"lpips": "dino"}, r"lpips must be of vgg, alex, squeeze, or null; got \['dino'\]"),
    ],
)
def test_an_impossible_protocol_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Protocol(**options)


def test_equal_scoring_is_told_from_equal_preparation():
    var, titok = (read(Path(f"configs/protocol/{name}.yaml")) for name in ("var", "titok"))
    assert var != titok
    assert var.features() == titok.features()
    assert Protocol().features() != Protocol(extractor_resize="torch").features()


def test_a_protocol_sets_the_data_where_it_can_and_warns_where_not(caplog):
    rules = Protocol(name="x", data={"resize_filter": "lanczos", "resize_mode": "adm"})
    with caplog.at_level(logging.WARNING):
        assert data_settings(rules, {"resize_filter": "bicubic"}) == {"resize_filter": "lanczos"}
    assert "protocol x wants resize_mode=adm" in caplog.text


def test_a_protocol_that_replaces_a_setting_of_the_data_says_so(caplog):
    rules = Protocol(name="x", data={"resize_filter": "lanczos"})
    with caplog.at_level(logging.INFO):
        data_settings(rules, {"resize_filter": "bicubic"})
    assert "protocol x sets data.resize_filter=lanczos, in place of bicubic" in caplog.text


def test_an_unknown_distance_is_refused():
    with pytest.raises(ValueError, match=r"got \['fid'\]"):
        run(distances=["fid"], lpips=None)
