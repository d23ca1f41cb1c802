"""The commands as a user types them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
TINY = [
    "encoder.base_channels=32",
    "encoder.num_blocks=1",
    "decoder.num_blocks=1",
    "data.image_size=16",
    "data.batch_size=4",
    "scheduler.warmup_steps=1",
    "logger=csv",
    "final.lpips=null",
    "final.usage_tokens_per_code=1",
]


def environment():
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT / "tokenizers"),
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "offline",
        "COLUMNS": "120",
    }


def run(*command, cwd=None, timeout=240):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd or ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["quantizer=fsqq"], "quantizer has no member 'fsqq'; choose quantizer=bsq|"),
        (["quantiser=fsq"], "no setting 'quantiser': the top level has callbacks, ckpt, data"),
        (
            ["quantizer.level=[8,5]"],
            "no setting 'quantizer.level': quantizer has bound, eps, form, levels, noise_dropout. Did you mean levels?",
        ),
        (
            ["quantizer=vq_ema", "quantizer.size=3"],
            "no setting 'quantizer.size': quantizer has assignment, average, ",
        ),
        (["quantizer.levels=[8,5"], "cannot read the override 'quantizer.levels=[8,5'"),
        (["+colour=3"], "no setting 'colour': the top level has"),
    ],
)
def test_a_mistyped_override_lists_what_is_allowed(tmp_path, overrides, message):
    result = run("train.py", f"hydra.run.dir={tmp_path}", *overrides)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["quantizer.levels=[1,5]"], "levels must be a list of integers of at least 3, such as [8,5,5,5]; got [1, 5]"),
        (["data=image_folder"], "data.root is not set: set it to a folder of pictures"),
        (["data=webdataset"], "data.val_shards has no default"),
        (["data=image_folder", "data.root=/nowhere/photos"], "/nowhere/photos"),
        (["data.image_size=65"], "image size must be a multiple of 8 pixels, got 65x65"),
        (["encoder.attention=everywhere"], "attention must be none, middle, last or a list of resolutions"),
    ],
)
def test_an_impossible_value_is_answered_without_a_traceback(tmp_path, overrides, message):
    result = run("train.py", f"hydra.run.dir={tmp_path}", *overrides)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_help_shows_examples_and_groups():
    result = run("train.py", "--help")
    assert result.returncode == 0
    for text in (
        "python train.py quantizer=vq_ema",
        "ckpt=",
        "quantizer: bsq, class_specific_vq, cvq, ",
        "logger: csv, none",
    ):
        assert text in result.stdout


def test_vistok_names_its_subcommands():
    result = run("-m", "vistok.cli", "--help")
    assert result.returncode == 0
    assert "train" in result.stdout
    assert "eval" in result.stdout
    result = run("-m", "vistok.cli", "tarin")
    assert result.returncode == 2
    assert "no subcommand 'tarin'" in result.stderr


def test_ctrl_c_saves_and_says_how_to_resume_and_resuming_finishes(tmp_path):
    overrides = [*TINY, "trainer.max_steps=100000", "trainer.val_check_interval=100000"]
    process = subprocess.Popen(
        [sys.executable, "train.py", f"hydra.run.dir={tmp_path / 'run'}", *overrides],
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    deadline = time.monotonic() + 200
    while not (tmp_path / "run" / "metrics.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=100)
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert process.returncode == 130
    assert f"resume with: python train.py {' '.join(overrides)} ckpt={checkpoint}" in stderr
    assert checkpoint.exists()


def test_train_evaluate_and_load_from_another_folder(tmp_path):
    trained = run(
        "train.py",
        f"hydra.run.dir={tmp_path / 'run'}",
        *TINY,
        "trainer.max_steps=3",
        "trainer.val_check_interval=3",
    )
    assert trained.returncode == 0, trained.stderr
    assert str(tmp_path / "run" / "bundle") in trained.stdout
    evaluated = run(
        "eval.py",
        f"bundle={tmp_path / 'run' / 'bundle'}",
        f"hydra.run.dir={tmp_path / 'eval'}",
        "data.eval_size=256",
        "rfid=false",
    )
    assert evaluated.returncode == 0, evaluated.stderr
    assert {path.name for path in (tmp_path / "eval").iterdir()} >= {"metrics.json", "report.md", "report.html"}
    code = "import sys, vistok, torch; print(vistok.load(sys.argv[1]).encode(torch.zeros(1, 3, 8, 16)).indices.shape)"
    loaded = run("-c", code, tmp_path / "run", cwd=tmp_path)
    assert "torch.Size([1, 1, 2])" in loaded.stdout, loaded.stderr


def test_the_console_script_trains_one_tokenizer_on_two_processes(tmp_path):
    result = run(
        "-m",
        "vistok.cli",
        "train",
        "experiment=tiny",
        "quantizer=vq_ema",
        "quantizer.codebook_size=32",
        "trainer.accelerator=cpu",
        "trainer.devices=2",
        "trainer.strategy=ddp",
        "trainer.max_steps=4",
        "trainer.val_check_interval=4",
        "logger=csv",
        "final.lpips=null",
        f"hydra.run.dir={tmp_path / 'run'}",
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "bundle" / "model.safetensors").exists()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["command"].startswith("vistok train experiment=tiny quantizer=vq_ema")


def test_a_bundle_that_does_not_exist_is_named(tmp_path):
    result = run("eval.py", "bundle=runs/nothing", f"hydra.run.dir={tmp_path}")
    assert result.returncode == 2
    assert "runs/nothing" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_sweep_prints_its_runs_side_by_side(tmp_path):
    result = run(
        "train.py",
        "-m",
        "quantizer=fsq,vq_ema",
        f"hydra.sweep.dir={tmp_path}",
        *TINY,
        "trainer.max_steps=2",
        "trainer.val_check_interval=2",
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "comparison.json").exists()
    table = result.stdout[result.stdout.rindex("PSNR") :]
    assert "0_fsq" in table
    assert "1_vq_ema" in table
