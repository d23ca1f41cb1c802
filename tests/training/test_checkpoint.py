"""Checkpoints are whole or absent."""

import errno

import lightning
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from vistok.training.callbacks import LastCheckpoint, WeightEMA
from vistok.training.checkpoint import AtomicCheckpointIO


def test_a_checkpoint_survives_a_round_trip(tmp_path):
    AtomicCheckpointIO().save_checkpoint({"step": 3, "w": torch.ones(2)}, tmp_path / "a" / "last.ckpt")
    loaded = torch.load(tmp_path / "a" / "last.ckpt", weights_only=True)
    assert loaded["step"] == 3


def test_a_full_disk_leaves_the_previous_checkpoint_and_no_scrap(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)

    def full(checkpoint, file):
        file.write_bytes(b"half a checkpoint")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        OSError, match=r"could not write .*last.ckpt: the disk is full; the previous checkpoint .* intact"
    ):
        AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    monkeypatch.undo()
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_the_weight_average_warms_up_and_follows_its_formula():
    averaged, current = [torch.zeros(1)], [torch.ones(1)]
    average = WeightEMA(decay=0.5)._kwargs["multi_avg_fn"]
    average(averaged, current, torch.tensor(1))
    assert averaged[0].item() == pytest.approx(1 - 2 / 11)
    average(averaged, current, torch.tensor(1000))
    assert averaged[0].item() == pytest.approx(1 - 0.5 * 2 / 11)


def test_a_validation_outside_of_training_leaves_the_last_checkpoint_alone(tmp_path):
    trainer = lightning.Trainer(
        callbacks=[LastCheckpoint(tmp_path)],
        accelerator="cpu",
        limit_val_batches=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.validate(BoringModel(), verbose=False)
    assert not (tmp_path / "last.ckpt").exists()
