"""Settings that the composition accepts and no program can use: each is named, with what to write instead."""

import sys

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from vistok.cli.hydra_app import check_settings, configs_folder, explain
from vistok.cli.train import check_optimizer, refuse_existing_folder


def check(*overrides, name="train"):
    with initialize_config_dir(str(configs_folder()), version_base="1.3"):
        config = compose(name, overrides=list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    OmegaConf.set_struct(config, False)
    del config["hydra"]
    before = OmegaConf.to_container(config)
    check_settings(config, name)
    return before, OmegaConf.to_container(config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=abc", "optimizer.lr must be a number, such as 0.001; got 'abc'"),
        ("optimizer.betas=0.9", r"optimizer.betas must be a list of numbers, such as \[0.9,0.99\]; got 0.9"),
        ("optimizer.betas=[a,b]", r"optimizer.betas must be a list of numbers, .* got \['a', 'b'\]"),
        ("quantizer.levels=8", r"quantizer.levels must be a list of numbers, such as \[8,5,5,5\]; got 8"),
        ("quantizer.levels=abc", r"quantizer.levels must be a list of numbers, such as \[8,5,5,5\]; got 'abc'"),
        ("seed=now", "seed must be a number, such as 0; got 'now'"),
        ("callbacks.ema.decay=slow", "callbacks.ema.decay must be a number"),
    ],
)
def test_a_value_of_another_kind_than_its_default_is_named(override, message):
    with pytest.raises(ValueError, match=message):
        check(override)


def test_a_group_inside_a_group_is_checked_too():
    with pytest.raises(ValueError, match=r"discriminator\.adversarial\.lr must be a number"):
        check("discriminator=patchgan", "discriminator.adversarial.lr=fast")


def test_settings_of_an_experiment_for_another_choice_are_named_with_how_to_leave_them_out():
    message = (
        "decoder=vit has no num_blocks; encoder=vit has no base_channels, num_blocks: experiment=tiny sets them for "
        "another choice. Leave them out by ~decoder.num_blocks ~encoder.base_channels ~encoder.num_blocks"
    )
    overrides = ["experiment=tiny", "encoder=vit", "decoder=vit"]
    with pytest.raises(ValueError, match=message):
        check(*overrides)
    check(*overrides, *message.split(" by ")[1].split())


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.image_size=[32,48]", "trainer.devices=2", "trainer.compile=inductor", "optimizer.lr=null"],
        ["module.freeze=[encoder]", "encoder.attention=[8]", "+optimizer.eps=1e-9"],
        ["scheduler.warmup_steps=${trainer.max_steps}"],
        ["experiment=tiny", "encoder._target_=mine.Encoder"],
        *([f"experiment={path.stem}"] for path in sorted((configs_folder() / "experiment").glob("*.yaml"))),
    ],
    ids=str,
)
def test_what_is_possible_passes_as_it_is(overrides):
    before, after = check(*overrides)
    assert before == after
    for override in overrides:
        key, value = override.lstrip("+").split("=", 1)
        if key == "experiment":
            assert HydraConfig.get().runtime.choices.experiment == value
        else:
            assert OmegaConf.select(OmegaConf.create(after), key) == OmegaConf.select(
                OmegaConf.merge(before, OmegaConf.from_dotlist([override.lstrip("+")])), key
            )


@pytest.mark.parametrize("name", ["eval", "export_tokens", "probe", "sample"])
def test_the_defaults_of_every_program_pass_as_they_are(name):
    before, after = check(name=name)
    assert before == after
    assert after["plugins"] == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["quantizer=fsq", "quantizer.codebook_size=512"], ". FSQ's size is the product of quantizer.levels"),
        (["quantizer=lfq", "quantizer.codebook_size=512"], ". LFQ's size is 2**bits: set quantizer.bits"),
        (["quantizer=bsq", "quantizer.codebook_size=512"], ". BSQ's size is 2**bits: set quantizer.bits"),
        (["data.root=/nope"], ". data=photos has no root: add data=image_folder or data="),
        (["data.shards=/nope"], ". data=photos has no shards: add data=webdataset or data="),
    ],
)
def test_a_setting_of_another_member_is_answered_with_what_to_write(monkeypatch, overrides, message):
    monkeypatch.setattr(sys, "argv", ["train.py", *overrides])
    with (
        initialize_config_dir(str(configs_folder()), version_base="1.3"),
        pytest.raises(ConfigCompositionException) as refusal,
    ):
        compose("train", overrides=overrides)
    assert message in explain(refusal.value, "train")


def test_an_unknown_optimiser_is_named_with_the_closest_one():
    with pytest.raises(ValueError, match=r"timm has no optimizer.opt=adamx: .*\. Did you mean adam.*\?"):
        check_optimizer("adamx")
    for name in ("adamw", "lookahead_AdamW", None):
        check_optimizer(name)


def test_a_folder_of_an_earlier_run_is_refused_in_the_words_of_training(monkeypatch, tmp_path, capsys):
    from vistok.training.run import refuse_existing_run

    (tmp_path / "run.json").touch()
    monkeypatch.setattr(sys, "argv", ["train.py", f"hydra.run.dir={tmp_path}"])
    with pytest.raises(SystemExit):
        refuse_existing_folder()
    with pytest.raises(FileExistsError) as refusal:
        refuse_existing_run(tmp_path)
    assert capsys.readouterr().err == f"error: {refusal.value}\n"
