"""The collapse study: what it changes in configs, what it holds equal between runs, and that it resumes."""

import importlib
import json
import math
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path("benchmarks").resolve()


@pytest.fixture
def collapse(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("collapse")


def test_every_method_has_a_codebook_of_about_the_size_asked_for(collapse):
    for method in collapse.METHODS:
        quantizer = collapse.vistok.build(collapse.quantizer_config(method, 256, 8))
        assert abs(quantizer.codebook_size / 256 - 1) < 0.1
    for size, levels in collapse.LEVELS.items():
        assert abs(math.prod(levels) / size - 1) < 0.1


def test_configs_differ_from_the_yaml_in_the_overrides_only(collapse):
    from omegaconf import OmegaConf

    for method in collapse.METHODS:
        plain = OmegaConf.to_container(OmegaConf.load(f"configs/quantizer/{method}.yaml"), resolve=True)
        assert isinstance(plain, dict)
        changed = collapse.quantizer_config(method, 1024, 8)
        different = {key for key in changed if key not in plain or changed[key] != plain[key]}
        assert different <= set(collapse.overrides(method, 1024, 8))


def test_encoder_and_decoder_start_alike_for_every_quantizer(collapse):
    settings = collapse.Settings()
    states = []
    for method in ("vq", "simvq", "fsq"):
        tokenizer = collapse.make_tokenizer(collapse.quantizer_config(method, 256, 8), settings)
        states.append(tokenizer.encoder.state_dict())
    for state in states[1:]:
        for name, value in states[0].items():
            assert torch.equal(value, state[name])


def test_a_second_call_computes_nothing_again_and_a_changed_setting_does(collapse, tmp_path, monkeypatch):
    arguments = ["--methods", "fsq", "--sizes", "256", "--steps", "2", "--usage-tokens", "4096", "--threads", "1"]
    arguments += ["--output", str(tmp_path)]
    collapse.main(arguments)
    first = json.loads((tmp_path / "collapse.json").read_text())
    curve = first["fsq/256"]["curve"]
    assert [point["step"] for point in curve][-1] == 2
    assert 0 < curve[-1]["utilisation"] <= 1
    assert 1 <= curve[-1]["perplexity"] <= 240
    assert "| fsq |" in (tmp_path / "collapse.md").read_text()
    assert (tmp_path / "collapse.png").stat().st_size > 0

    trained = []
    monkeypatch.setattr(collapse, "train", lambda config, size, settings: trained.append(settings) or first["fsq/256"])
    collapse.main(arguments)
    assert not trained
    collapse.main([*arguments, "--steps", "3"])
    assert [settings.steps for settings in trained] == [3]


def test_a_change_reaches_the_config_and_nothing_else_does(collapse):
    plain = collapse.quantizer_config("fvq", 1024, 8)
    assert collapse.quantizer_config("fvq", 1024, 8, ["init=normal", "bridge_patch=2"]) == {
        **plain,
        "init": "normal",
        "bridge_patch": 2,
    }


@pytest.mark.parametrize("arguments", [["--change", "init=normal"], ["--steps", "2"], ["--batch-size", "2"]])
def test_other_settings_than_the_study_s_do_not_enter_its_results(collapse, capsys, arguments):
    with pytest.raises(SystemExit):
        collapse.main(arguments)
    assert "--output" in capsys.readouterr().err
