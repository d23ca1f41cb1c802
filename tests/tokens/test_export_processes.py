"""Exports in real processes: one that is killed, and several at once."""

import multiprocessing
import os
import signal
import time

import pytest
import torch
from omegaconf import OmegaConf

import vistok
from vistok.decoder import CNNDecoder
from vistok.encoder import CNNEncoder
from vistok.quantizer import FSQ
from vistok.tokens.export import export_from_config

CNN = {"base_channels": 32, "patch_size": 8, "num_blocks": 1}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    torch.manual_seed(0)
    parts = CNNEncoder(**CNN), FSQ(levels=[8, 5, 5, 5]), CNNDecoder(**CNN)
    tokenizer = vistok.Tokenizer(*parts, preprocessing={"size": [128, 128]})
    return vistok.save(tokenizer, tmp_path_factory.mktemp("tokenizer") / "bundle")


def config_of(bundle, out):
    config = OmegaConf.load("configs/export_tokens.yaml")
    config.data = OmegaConf.load("configs/data/photos.yaml")
    settings = {"bundle": str(bundle), "out": str(out), "shard_size": 2, "batch_size": 2, "device": "cpu"}
    config.merge_with(settings)
    return config


def run(bundle, out, **environment):
    os.environ.update(environment)
    # As in the loading processes of PyTorch: threads do not survive a fork.
    torch.set_num_threads(1)
    export_from_config(config_of(bundle, out))


def start(bundle, out, **environment):
    # Forked: a fresh interpreter takes seconds to import everything.
    process = multiprocessing.get_context("fork").Process(target=run, args=(bundle, out), kwargs=environment)
    process.start()
    return process


def finish(process):
    process.join()
    assert process.exitcode == 0


def content(folder):
    return {path.name: path.read_bytes() for path in [*folder.glob("tokens-*"), folder / "manifest.json"]}


@pytest.fixture(scope="module")
def whole(bundle, tmp_path_factory):
    """What one process writes that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    finish(start(bundle, folder))
    return content(folder)


def test_an_export_that_is_killed_and_run_again_has_the_same_bytes(bundle, whole, tmp_path):
    process = start(bundle, tmp_path)
    while not (tmp_path / "tokens-00001.safetensors").exists():
        assert process.is_alive()
        time.sleep(0.0001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "manifest.json").exists()
    finish(start(bundle, tmp_path))
    assert content(tmp_path) == whole


def test_two_processes_at_once_write_the_bytes_of_one(bundle, whole, tmp_path):
    processes = [start(bundle, tmp_path, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    for process in processes:
        finish(process)
    assert content(tmp_path) == whole


def test_a_rank_that_is_killed_is_made_up_for_by_the_next_run(bundle, whole, tmp_path):
    ranks = [start(bundle, tmp_path, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    while not (tmp_path / "tokens-00003.safetensors").exists():
        assert ranks[1].is_alive()
        time.sleep(0.0001)
    ranks[1].kill()
    ranks[1].join()
    finish(ranks[0])
    assert not (tmp_path / "manifest.json").exists()
    for process in [start(bundle, tmp_path, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]:
        finish(process)
    assert content(tmp_path) == whole


def test_an_export_goes_on_with_other_settings_of_loading(bundle, whole, tmp_path):
    for name, data in whole.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "manifest.json").unlink()
    config = config_of(bundle, tmp_path)
    config.data.merge_with({"num_workers": 0, "worker_timeout": 1, "worker_restarts": 0})
    assert export_from_config(config).num_pictures > 0
    assert content(tmp_path) == whole


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"layouts": "csv"}, "got 'csv'"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"shard_size": "many"}, "shard_size must be an integer of at least 1, got 'many'"),
        ({"size": 0.5}, "size must be an integer"),
        ({"ten_crop_scale": 0.9}, "ten_crop_scale must be a number of at least 1, got 0.9"),
    ],
)
def test_impossible_exports_are_refused_before_anything_is_loaded(tmp_path, setting, message):
    config = config_of(tmp_path / "nothing", tmp_path)
    config.merge_with(setting)
    with pytest.raises(ValueError, match=message):
        export_from_config(config)


def test_ten_crops_are_cut_from_a_picture_as_large_as_llamagens(bundle, tmp_path):
    config = config_of(bundle, tmp_path)
    config.merge_with({"views": "ten_crop", "data": {"num_workers": 0}, "batch_size": 40})
    assert export_from_config(config).data["eval_size"] == 140  # int(1.1 * 128)
