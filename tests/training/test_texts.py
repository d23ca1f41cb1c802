"""Decoders that are given a text of each image (TA-TiTok): training, evaluation, and what stands in the way."""

import io
import tarfile

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image
from tiny_runs import TINY
from torch import nn

import vistok
from vistok.cli.hydra_app import configs_folder
from vistok.decoder import TiTokDecoder
from vistok.evaluation.run import evaluate_models
from vistok.loss import TextFeatures, text_features
from vistok.training.module import TokenizerModule
from vistok.training.run import build_tokenizer, train

LENGTH, DIM = 5, 6
TITOK = ["patch_size=8", "image_size=16", "num_tokens=4", "width=16", "depth=1", "num_heads=2"]


class Letters(nn.Module):
    """Features of the first letters of a text."""

    dim = DIM

    def __init__(self, pooled=False):
        super().__init__()
        self.pooled = pooled
        self.letters = nn.Embedding(128, DIM)

    def forward(self, texts):
        ids = torch.tensor([[ord(letter) for letter in text.ljust(LENGTH)[:LENGTH]] for text in texts])
        return self.letters(ids).mean(1) if self.pooled else self.letters(ids)


def decoder(**options):
    sizes = {"patch_size": 8, "image_size": 16, "num_tokens": 4, "width": 16, "depth": 1, "num_heads": 2}
    return TiTokDecoder(**sizes | {"text_dim": DIM, "text_length": LENGTH} | options)


def write_shard(path):
    with tarfile.open(path, "w") as tar:
        for number, text in enumerate(["red", "green", "blue", "grey"] * 3):
            buffer = io.BytesIO()
            pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(buffer, "PNG")
            for ending, data in (("png", buffer.getvalue()), ("txt", text.encode())):
                entry = tarfile.TarInfo(f"{number:03}.{ending}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return path


@pytest.fixture
def overrides(tmp_path):
    train, held_out = (write_shard(tmp_path / f"{name}.tar") for name in ("train", "val"))
    return [
        "data=webdataset", f"data.shards={train}", f"data.val_shards={held_out}", "data.shuffle_buffer=4",
        "data.eval_size=16", "data.num_workers=0", "encoder=titok", "decoder=titok",
        *(f"{half}.{setting}" for half in ("encoder", "decoder") for setting in TITOK),
        f"decoder.text_dim={DIM}", f"decoder.text_length={LENGTH}",
    ]  # fmt: skip


def without_data(settings):
    return [
        each for each in settings if not each.startswith(("encoder.", "decoder.", "data.samples", "data.eval_size"))
    ]


def test_a_decoder_of_texts_trains_and_is_evaluated_with_those_of_its_data(compose_run, overrides, tmp_path):
    words = "text_encoder={_target_: test_texts.Letters}"
    config, folder = compose_run("run", [*without_data(TINY), *overrides, words, "trainer.max_steps=4"])
    assert train(config, folder)["psnr"] > 0
    assert not any("letters" in name for name in vistok.load(folder / "bundle").state_dict())
    data = ["data=webdataset", overrides[2], "data.image_size=16", "rfid=false", "lpips=null", "references=false"]
    with initialize_config_dir(str(configs_folder()), version_base="1.3"):
        plain = compose("eval", overrides=[f"bundle={folder / 'bundle'}", *data])
        told = compose("eval", overrides=[f"bundle={folder / 'bundle'}", *data, words])
    assert evaluate_models(told, tmp_path / "eval", "")["psnr"] > 0
    with pytest.raises(ValueError, match="TiTokDecoder decodes with the help of texts: give it their encoder"):
        evaluate_models(plain, tmp_path / "without", "")


def test_every_image_is_decoded_with_its_own_text(compose_run, overrides):
    config, _ = compose_run("run", [*without_data(TINY), *overrides])
    tokenizer = build_tokenizer(config, instantiate(config.data, _convert_="all"))
    letters = Letters()
    module = TokenizerModule(tokenizer, instantiate(config.loss), torch.optim.AdamW, print, text_encoder=letters).eval()
    images = torch.rand(1, 3, 16, 16).expand(3, -1, -1, -1)
    with torch.no_grad():
        decoded = module({"images": images, "texts": ["red", "green", "red"]}).images
        features = letters(["green"])
        expected = tokenizer.decode(tokenizer.encode(images[:1]).codes, (16, 16), features)
    torch.testing.assert_close(decoded[1:2], expected)
    torch.testing.assert_close(decoded[2], decoded[0])
    assert not torch.allclose(decoded[1], decoded[0])


def test_a_text_encoder_without_a_decoder_of_texts_is_an_error():
    with pytest.raises(ValueError, match=r"takes no texts: use text_encoder=null, or set decoder.text_dim"):
        text_features(Letters(), decoder(text_dim=None, text_length=None))
    assert text_features(None, decoder(text_dim=None, text_length=None)) is None


def test_features_of_another_width_are_an_error():
    with pytest.raises(
        ValueError, match=r"7 channels, Letters gives 6: choose another text_encoder, or decoder.text_dim=6"
    ):
        TextFeatures(Letters(), decoder(text_dim=7))


@pytest.mark.parametrize(("texts", "got"), [(None, "none"), (["red"], "1")])
def test_images_without_a_text_each_are_an_error(texts, got):
    with pytest.raises(ValueError, match=f"one text for each of the 2 images of a batch, got {got}"):
        TextFeatures(Letters(), decoder())({"images": torch.zeros(2, 3, 16, 16), "texts": texts})


def test_pooled_features_are_an_error():
    with pytest.raises(ValueError, match=r"one embedding for each text, .* set text_encoder.pooled=false"):
        TextFeatures(Letters(pooled=True), decoder())({"images": torch.zeros(1, 3, 16, 16), "texts": ["red"]})
