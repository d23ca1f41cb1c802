"""A generator from tokens to a bundle and to images."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

import vistok
from vistok.decoder import CNNDecoder
from vistok.encoder import CNNEncoder
from vistok.hub.files import sha256
from vistok.prior import GPT, generate, load_prior, save_prior
from vistok.prior.data import TokenData
from vistok.prior.sample import choose_labels, load_tokenizer, sample_from_config
from vistok.quantizer import FSQ
from vistok.tokens import Layout
from vistok.tokens.dataset import encode_keys
from vistok.tokens.manifest import Manifest

ROOT = Path(__file__).parent.parent.parent
CNN = {"base_channels": 32, "patch_size": 4, "num_blocks": 1}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    torch.manual_seed(0)
    parts = CNNEncoder(**CNN), FSQ(levels=[3, 3]), CNNDecoder(**CNN)
    tokenizer = vistok.Tokenizer(*parts, preprocessing={"size": [8, 8]})
    return vistok.save(tokenizer, tmp_path_factory.mktemp("tokenizer") / "bundle")


def write_tokens(folder, bundle, count=40, labels=True):
    """Pictures whose tokens are all equal to their class."""
    classes = torch.arange(count) % 4
    tokens = classes[:, None, None].expand(count, 2, 4).contiguous().to(torch.uint8)
    tensors = {"tokens": tokens, "keys": encode_keys([str(number) for number in range(count)])}
    save_file(tensors | ({"labels": classes} if labels else {}), folder / "tokens-00000.safetensors")
    shards = [{"file": "tokens-00000.safetensors", "num_pictures": count, "sha256": ""}]
    tokenizer = {"bundle": str(bundle), "sha256": sha256(bundle / "model.safetensors"), "config": {}}
    layout = Layout([8, 8], [2, 2], [9])
    numbers = count, 0, labels, 4 if labels else 0
    Manifest(layout, "uint8", ["center", "center_flipped"], *numbers, shards, tokenizer, {}, {}).write(folder)
    return folder


@pytest.fixture
def tokens(tmp_path, bundle):
    return write_tokens(tmp_path, bundle)


def test_validation_pictures_are_not_trained_on(tokens):
    data = TokenData(str(tokens), val_share=0.25, views="all", batch_size=4)
    train = {number // 2 for number in data.train_dataset.numbers}
    val = {number // 2 for number in data.val_dataset.numbers}
    assert not train & val
    assert len(train) == 30
    assert len(val) == 10


def test_an_epoch_of_random_views_has_every_training_picture_once(tokens):
    data = TokenData(str(tokens), val_share=0.25, batch_size=10)
    batches = list(data.train_dataloader())
    assert [len(batch["tokens"]) for batch in batches] == [10, 10, 10]
    assert sorted(data.train_dataset.numbers) == data.train_dataset.numbers
    assert len(set(data.train_dataset.numbers)) == 30


def test_validation_has_every_view_once(tokens):
    data = TokenData(str(tokens), val_share=0.25, batch_size=8)
    assert sum(len(batch["labels"]) for batch in data.val_dataloader()) == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 100}, "set data.batch_size to at most"),
        ({"val_share": 0}, "val_share in"),
    ],
)
def test_impossible_data_is_refused(tokens, options, message):
    with pytest.raises(ValueError, match=message):
        TokenData(str(tokens), **options)


def test_tokens_are_not_for_tokenizers(tokens):
    with pytest.raises(ValueError, match="prior=gpt"):
        _ = TokenData(str(tokens), batch_size=4).preprocessing


def tiny(**options):
    return GPT([9], [2, 2], 4, width=32, depth=1, num_heads=2, **options).eval()


def test_a_saved_generator_loads_with_equal_likelihoods(tmp_path):
    prior = tiny()
    torch.nn.init.normal_(prior.head.weight)
    save_prior(prior, tmp_path / "bundle", {"size": [8, 8]})
    loaded, meaning = load_prior(tmp_path)
    tokens = torch.randint(9, (2, 4), generator=torch.Generator().manual_seed(0))
    assert torch.equal(prior(tokens), loaded(tokens))
    assert meaning == {"size": [8, 8]}
    assert not loaded.training


def test_a_generator_in_bfloat16_keeps_its_rotations_and_nearly_its_likelihoods(tmp_path):
    prior = tiny()
    torch.nn.init.normal_(prior.head.weight)
    save_prior(prior, tmp_path / "bundle", {})
    loaded, _ = load_prior(tmp_path, dtype=torch.bfloat16)
    tokens = torch.randint(9, (2, 4), generator=torch.Generator().manual_seed(0))
    assert loaded.head.weight.dtype == torch.bfloat16
    assert torch.equal(loaded._cosines, prior._cosines)
    assert torch.allclose(loaded(tokens), prior(tokens), atol=0.3)
    assert generate(loaded, torch.tensor([1])).shape == (1, 4)


@pytest.mark.parametrize("change", [{"_target_": "os.system"}, {"format": 7}, {"colour": "red"}])
def test_a_foreign_generator_is_refused(tmp_path, change):
    folder = save_prior(tiny(), tmp_path / "bundle", {})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=r"config\.json describes|does not describe"):
        load_prior(folder)


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_damaged_file_of_weights_is_refused(tmp_path, damage):
    folder = save_prior(tiny(), tmp_path / "bundle", {})
    path = folder / "model.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    else:
        save_file({"head.weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"model\.safetensors (is not a readable|does not fit)"):
        load_prior(folder)


def test_a_generator_refuses_the_tokenizer_of_another(bundle):
    with pytest.raises(ValueError, match="not the tokenizer of this generator"):
        load_tokenizer(str(bundle), {"sha256": "0" * 64}, torch.device("cpu"))


def test_classes_are_taken_in_turn():
    assert choose_labels(None, 6, tiny()).tolist() == [0, 1, 2, 3, 0, 1]
    assert choose_labels([2, 0], 3, tiny()).tolist() == [2, 0, 2]


@pytest.mark.parametrize("classes", [3, [], [5], ["dog"]])
def test_classes_that_the_generator_has_not_are_refused(classes):
    with pytest.raises(ValueError, match="classes must be a list of numbers from 0 to 3"):
        choose_labels(classes, 2, tiny())


def test_a_tokenizer_that_nobody_wrote_down_is_asked_for():
    with pytest.raises(ValueError, match="set bundle="):
        load_tokenizer(None, {"bundle": None, "sha256": ""}, torch.device("cpu"))


def test_samples_are_written_as_tokens_images_and_a_picture(tmp_path, bundle):
    meaning = {"bundle": str(bundle), "sha256": sha256(bundle / "model.safetensors")}
    prior = save_prior(tiny(), tmp_path / "prior", {"size": [8, 8], "tokenizer": meaning})
    config = OmegaConf.load("configs/sample.yaml")
    config.merge_with({"generator": str(prior), "out": str(tmp_path / "out"), "num_images": 5, "batch_size": 2})
    config.device = "cpu"
    samples = sample_from_config(config)
    stored = load_file(tmp_path / "out" / "samples.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in samples.items())
    assert stored["images"].shape == (5, 3, 8, 8)
    assert stored["images"].dtype == torch.uint8
    assert stored["tokens"].shape == (5, 4)
    assert stored["labels"].tolist() == [0, 1, 2, 3, 0]
    assert (tmp_path / "out" / "samples.png").is_file()
    with pytest.raises(FileExistsError, match="choose another out="):
        sample_from_config(config)


@pytest.fixture
def compose(tmp_path):
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig

    def made(tokens, *overrides):
        settings = [
            "experiment=gpt_tiny",
            f"data.tokens={tokens}",
            "data.batch_size=16",
            "prior.width=32",
            "prior.depth=1",
            "prior.num_heads=2",
            "prior.dropout=0",
            "trainer.max_steps=60",
            "trainer.val_check_interval=30",
            "trainer.accelerator=cpu",
            "scheduler.warmup_steps=2",
            "optimizer.lr=1e-2",
            "callbacks.progress=null",
            "callbacks.ema.decay=0.5",
            "logger=csv",
            *overrides,
        ]
        with initialize_config_dir(str((ROOT / "configs").resolve()), version_base="1.3"):
            config = compose("train", overrides=settings, return_hydra_config=True)
        OmegaConf.set_struct(config, False)
        OmegaConf.set_readonly(config.hydra, False)
        config.hydra.runtime.output_dir = str(tmp_path / "run")
        HydraConfig.instance().set_config(config)
        del config["hydra"]
        return config

    yield made
    HydraConfig.instance().cfg = None


def test_training_learns_the_classes_and_its_bundle_draws_them(tmp_path, tokens, compose):
    from vistok.prior.run import train_prior

    metrics = train_prior(compose(tokens), tmp_path / "run", "command")
    # The classes tell all tokens; a uniform guess has log(9) = 2.2 nats.
    assert metrics["val_loss"] < 0.5
    assert metrics["train_steps"] == 60
    prior, meaning = load_prior(tmp_path / "run")
    assert meaning["size"] == [8, 8]
    drawn = generate(prior, torch.arange(4).repeat(8), generator=torch.Generator().manual_seed(0))
    assert (drawn == torch.arange(4).repeat(8)[:, None]).float().mean() > 0.7


def test_a_resumed_training_equals_one_that_was_not_stopped(tmp_path, tokens, compose):
    from vistok.prior.run import train_prior

    options = ["scheduler=constant", "trainer.val_check_interval=4", "prior.dropout=0.1", "data.batch_size=10"]
    whole = train_prior(compose(tokens, *options, "trainer.max_steps=8"), tmp_path / "whole")
    train_prior(compose(tokens, *options, "trainer.max_steps=4"), tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    resumed = train_prior(compose(tokens, *options, "trainer.max_steps=8", f"ckpt={checkpoint}"), tmp_path / "resumed")
    assert resumed["train_steps"] == 8
    assert resumed["val_loss"] == whole["val_loss"]
    other = [*options, "trainer.max_steps=8", f"ckpt={checkpoint}", "optimizer.lr=0.5"]
    with pytest.raises(ValueError, match=r"these would have no effect: .*optimizer\.lr=\S+ / 0.5"):
        train_prior(compose(tokens, *other), tmp_path / "other")
    assert not (tmp_path / "other" / "run.json").exists()  # what was refused does not hold the folder


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["quantizer=vq_ema"], "quantizer has no effect"),
        (["trainer.compile=true"], "trainer.compile"),
        (["data=photos"], "set data=tokens"),
    ],
)
def test_settings_without_effect_are_refused(tmp_path, tokens, compose, overrides, message):
    from vistok.prior.run import train_prior

    if "data=photos" in overrides:
        config = compose(tokens)
        config.data = OmegaConf.load(ROOT / "configs" / "data" / "photos.yaml")
    else:
        config = compose(tokens, *overrides)
    with pytest.raises(ValueError, match=message):
        train_prior(config, tmp_path / "run")
