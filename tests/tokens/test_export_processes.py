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


def run(bundle, out, **environment):
    os.environ.update(environment)
    # As in the loading processes of PyTorch: threads do not survive a fork.
    torch.set_num_threads(1)
    config = OmegaConf.load("configs/export_tokens.yaml")
    config.data = OmegaConf.load("configs/data/photos.yaml")
    settings = {"bundle": str(bundle), "out": str(out), "shard_size": 2, "batch_size": 2, "device": "cpu"}
    config.merge_with(settings)
    export_from_config(config)


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
