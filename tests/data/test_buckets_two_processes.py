"""Aspect-ratio buckets with two processes that talk to each other."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from PIL import Image
from two_processes import run_on_two_processes

from vistok.data import BucketFolderData, BucketShardData
from vistok.data.convert import Recipe, convert
from vistok.data.sources import open_source

BUCKETS = [[8, 16], [16, 8], [12, 12]]


class Watch(LightningModule):
    """Notes the pictures and the size of every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[list[str], list[int]]] = []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def training_step(self, batch, batch_idx):
        images = batch["images"]
        self.seen.append((batch["keys"], list(images.shape[2:])))
        total = images.detach().clone()
        dist.all_reduce(total)  # fails or hangs where the processes differ in size or number of batches
        return self.weight * total.mean()


def _train(rank: int, folder: Path, data) -> None:
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=folder,
    )
    module = Watch()
    trainer.fit(module, datamodule=data)
    torch.save(module.seen, folder / f"{rank}.pt")


def of_folder(rank: int, folder: Path) -> None:
    options = {"buckets": BUCKETS, "image_size": 12, "batch_size": 2, "num_workers": 1, "val_share": 0.01}
    _train(rank, folder, BucketFolderData(root=str(folder.parent / "pictures"), **options))


def of_shards(rank: int, folder: Path) -> None:
    shards = str(folder.parent / "shards")
    options = {"buckets": BUCKETS, "image_size": 12, "batch_size": 2, "num_workers": 1}
    _train(rank, folder, BucketShardData(f"{shards}/0000{{0..1}}.tar", f"{shards}/00002.tar", **options))


@pytest.mark.parametrize("worker", [of_folder, of_shards])
def test_processes_have_the_same_sizes_and_other_pictures_at_every_step(tmp_path, worker):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "run").mkdir()
    for number in range(45):
        Image.new("RGB", ((40, 20), (20, 40), (30, 30))[number % 3]).save(tmp_path / "pictures" / f"{number:02d}.png")
    convert(open_source(str(tmp_path / "pictures")), tmp_path / "shards", Recipe(), shard_samples=20, num_workers=0)
    one, other = run_on_two_processes(worker, tmp_path / "run").values()
    assert len(one) == len(other) > 10
    for (keys, size), (other_keys, other_size) in zip(one, other, strict=True):
        assert size == other_size
        assert len({*keys, *other_keys}) == 4
    half = len(one) // 2
    for epoch in (slice(half), slice(half, None)):
        seen = [key for keys, _ in one[epoch] + other[epoch] for key in keys]
        assert len(seen) == len(set(seen))
    assert len({tuple(size) for _, size in one}) == 3
    assert one[:half] != one[half:]
