"""Encoders, quantizers and decoders of users, which vistok does not know."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vistok
from vistok.config import Configurable, build, config_of
from vistok.quantizer import FSQ

# The documentation's own example.
PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")


def block(start):
    """Text of the code block that begins with this line, which is a comment with its file name."""
    return re.search(rf"```\w+\n({re.escape(start)}\n.*?)```", PAGE, re.DOTALL)[1]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "my_configs" / "quantizer").mkdir(parents=True)
    for file in ("my_quantizer.py", "my_configs/quantizer/noisy_fsq.yaml"):
        (tmp_path / file).write_text(block(f"# {file}"))
    return tmp_path


def command(folder, name, *arguments):
    return subprocess.run(
        [sys.executable, "-m", f"vistok.cli.{name}", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=250,
    )


def test_a_quantizer_of_a_user_is_trained_saved_measured_and_loaded(folder):
    documented = shlex.split(re.search(r"\nvistok train (.*)\n", PAGE)[1])
    tiny = [*documented, "experiment=tiny", "trainer.max_steps=2", "scheduler.warmup_steps=0"]
    refused = command(folder, "train", *tiny, "plugins=[]", "hydra.run.dir=refused")
    assert refused.returncode == 2
    assert "decorated by vistok.register" in refused.stderr
    assert "plugins=[module]" in refused.stderr
    trained = command(folder, "train", *tiny, "quantizer.levels=[5,3]", "hydra.run.dir=run")
    assert trained.returncode == 0, trained.stderr
    config = json.loads((folder / "run" / "bundle" / "config.json").read_text())
    assert config["quantizer"] == {
        "_target_": "my_quantizer.NoisyFSQ", "levels": [5, 3], "noise": 0.05, "bound": "tanh"
    }  # fmt: skip
    measured = command(
        folder, "eval", "bundle=run", "plugins=[my_quantizer]", "rfid=false", "lpips=null", "hydra.run.dir=out"
    )
    assert measured.returncode == 0, measured.stderr
    assert (folder / "out" / "report.html").is_file()


def test_a_bundle_imports_nothing_by_itself(folder, monkeypatch):
    config = {"_target_": "my_quantizer.NoisyFSQ", "levels": [5, 3]}
    monkeypatch.syspath_prepend(str(folder))
    with pytest.raises(ValueError, match=r"only classes of vistok .* decorated by vistok.register"):
        build(config)
    assert "my_quantizer" not in sys.modules
    __import__("my_quantizer")
    try:
        assert config_of(build(config)) == config | {"noise": 0.1, "bound": "tanh"}
    finally:
        del sys.modules["my_quantizer"]


class Unregistered(FSQ):
    """Nobody else can know it."""


def test_what_no_bundle_could_name_is_not_saved(tmp_path):
    from vistok.decoder import CNNDecoder
    from vistok.encoder import CNNEncoder

    sizes = {"patch_size": 4, "base_channels": 32, "channel_multipliers": [1], "num_blocks": 1}
    tokenizer = vistok.Tokenizer(CNNEncoder(**sizes), Unregistered([5, 5]), CNNDecoder(**sizes))
    with pytest.raises(ValueError, match=r"tokenizer.quantizer._target_ is .*Unregistered.*vistok.register"):
        vistok.save(tokenizer, tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def test_only_importable_module_classes_are_registered():
    class Local(FSQ):
        pass

    with pytest.raises(ValueError, match="define it at the top of a file"):
        vistok.register(Local)
    for other in (torch.nn.Linear, Configurable):
        with pytest.raises(TypeError, match="derived from vistok's Encoder, Quantizer or Decoder"):
            vistok.register(other)


@pytest.mark.parametrize(
    ("plugins", "message"),
    [("[no_such_module]", "plugins: no_such_module cannot be imported"), ("my_quantizer", "plugins must be a list")],
)
def test_plugins_that_cannot_be_imported_are_named(folder, plugins, message):
    result = command(folder, "train", "experiment=tiny", f"plugins={plugins}")
    assert result.returncode == 2
    assert message in result.stderr
    assert not Path(folder, "runs").exists() or not list(Path(folder, "runs").rglob("run.json"))
