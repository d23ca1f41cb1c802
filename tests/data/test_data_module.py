"""The data modules and their configs."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from hydra.utils import instantiate
from lightning import Trainer
from omegaconf import OmegaConf
from PIL import Image

from vistok.data import ImageFolderData, PhotosData, WebDatasetData

CONFIGS = Path(__file__).parents[2] / "configs" / "data"
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes of ten pictures each."""
    for name in ("cat", "dog"):
        (tmp_path / "root" / name).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (12, 10), (number, 0, 0)).save(tmp_path / "root" / name / f"{number}.png")
    return tmp_path / "root"


@pytest.fixture
def shards(tmp_path) -> dict[str, str]:
    """Patterns of two training shards and one of validation, ten pictures each."""
    for number in range(3):
        with wds.TarWriter(str(tmp_path / f"part-{number}.tar")) as writer:
            for n in range(10 * number, 10 * number + 10):
                file = io.BytesIO()
                Image.new("RGB", (12, 10), (n, 0, 0)).save(file, "PNG")
                writer.write({"__key__": f"{n}", "png": file.getvalue(), "cls": b"1"})
    return {"shards": f"{tmp_path}/part-{{0..1}}.tar", "val_shards": f"{tmp_path}/part-2.tar"}


@pytest.fixture(params=["photos", "image_folder", "webdataset"])
def config(request, folder, shards) -> dict:
    """Each yaml, made small."""
    given = {"photos": {"samples_per_epoch": 40}, "image_folder": {"root": str(folder)}, "webdataset": shards}[
        request.param
    ]
    config = OmegaConf.load(CONFIGS / f"{request.param}.yaml")
    small = {"image_size": 8, "eval_size": 9, "batch_size": 4, "eval_batch_size": 4, "num_workers": 0}
    return OmegaConf.merge(config, small, given)


def trainer(rank: int, world_size: int, distributed_sampler: bool = False) -> Trainer:
    """A Trainer that believes to be one of several processes."""
    one_of_many = type("OneOfMany", (Trainer,), {"global_rank": rank, "world_size": world_size})
    return one_of_many(accelerator="cpu", logger=False, use_distributed_sampler=distributed_sampler)


def test_every_config_gives_batches_of_the_contract(config):
    data = instantiate(config)
    for loader, size in ((data.train_dataloader(), 8), (data.eval_dataloader(), 9)):
        batch = next(iter(loader))
        assert batch["images"].shape == (len(batch["keys"]), 3, size, size)
        assert batch["images"].is_contiguous()
        assert -1 <= batch["images"].min() < batch["images"].max() <= 1
        assert len(batch["keys"]) in ({4} if size == 8 else {1, 2, 3, 4})
        assert batch["bad"] == []
        if not isinstance(data, PhotosData):
            assert (len(batch["labels"]), batch["labels"].dtype) == (len(batch["keys"]), torch.int64)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_numbers_of_channels_reach_the_batch(config, channels):
    data = instantiate(config, channels=channels)
    assert next(iter(data.train_dataloader()))["images"].shape == (4, channels, 8, 8)
    assert next(iter(data.eval_dataloader()))["images"].shape[1:] == (channels, 9, 9)


def test_evaluation_has_every_picture_of_the_protocol_once(config):
    data = instantiate(config)
    keys = [key for batch in data.eval_dataloader() for key in batch["keys"]]
    assert len(keys) == len(set(keys)) == data.protocol["num_images"]
    assert set(data.protocol) == {"dataset", "split", "num_images", "resize", "crop", "size"}
    assert data.protocol["size"] == [9, 9]


def test_training_sees_no_evaluation_picture(config):
    data = instantiate(config)
    trained = {key.split("#")[0] for batch in data.train_dataloader() for key in batch["keys"]}
    assert not trained & {key.split("@")[0] for batch in data.eval_dataloader() for key in batch["keys"]}


def test_loaders_do_not_touch_the_global_generators(config):
    data = instantiate(config)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    for loader in (data.train_dataloader(), data.eval_dataloader()):
        next(iter(loader))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


def test_each_pass_without_a_trainer_is_the_next_epoch(config):
    loader, again = (instantiate(config, flip=False).train_dataloader() for _ in range(2))
    epochs = [[batch["keys"] for batch in loader] for _ in range(2)]
    assert epochs[0] != epochs[1]
    again.load_state_dict({"epoch": 1, "batch": 2})
    assert [batch["keys"] for batch in again] == epochs[1][2:]


def test_workers_do_not_change_the_pictures(folder):
    batches = [
        list(ImageFolderData(str(folder), image_size=8, batch_size=4, num_workers=workers).train_dataloader())
        for workers in (0, 2)
    ]
    for one, other in zip(*batches, strict=True):
        assert one["keys"] == other["keys"]
        assert torch.equal(one["images"], other["images"])


def test_a_trainer_gets_bytes_and_makes_the_same_images_of_them(config):
    given, alone = instantiate(config), instantiate(config)
    given.trainer = trainer(0, 1)
    for split in ("train", "eval"):
        batch, expected = (next(iter(getattr(data, f"{split}_dataloader")())) for data in (given, alone))
        assert batch["images"].dtype == torch.uint8
        assert torch.equal(given.on_after_batch_transfer(batch, 0)["images"], expected["images"])


def test_ranks_have_disjoint_parts(config):
    parts = {"train": [], "eval": []}
    for rank in range(2):
        data = instantiate(config)
        data.trainer = trainer(rank, 2)
        for split, loader in (("train", data.train_dataloader()), ("eval", data.eval_dataloader())):
            parts[split].append([key.split("#")[-1] for batch in loader for key in batch["keys"]])
    for one, other in parts.values():
        assert one
        assert not set(one) & set(other)
    assert len(parts["train"][0]) == len(parts["train"][1])


def test_second_division_by_lightning_is_refused(config):
    data = instantiate(config)
    data.trainer = trainer(0, 2, distributed_sampler=True)
    with pytest.raises(ValueError, match=r"set trainer\.use_distributed_sampler=false"):
        data.train_dataloader()


def test_preprocessing_is_plain_and_complete():
    assert PhotosData(image_size=64, resize_filter="lanczos", channels=1).preprocessing == {
        "size": [64, 64],
        "channels": 1,
        "resize": {"filter": "lanczos", "mode": "short_side"},
        "crop": "center",
        "range": [-1, 1],
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, r"data\.image_size must be an integer of at least 1, got 0"),
        ({"eval_size": -8}, r"data\.eval_size"),
        ({"batch_size": 0}, r"data\.batch_size"),
        ({"num_workers": -1}, r"data\.num_workers"),
        ({"channels": 2}, r"data\.channels must be 3 .* got 2"),
        ({"resize_filter": "nearest"}, "bicubic, bilinear, lanczos, box, opencv_bilinear; got 'nearest'"),
        ({"samples_per_epoch": 0}, r"data\.samples_per_epoch"),
    ],
)
def test_impossible_setting_is_named_as_it_is_typed(options, message):
    with pytest.raises(ValueError, match=message):
        PhotosData(**options)


def test_fewer_pictures_than_a_batch_are_refused_with_advice(folder):
    with pytest.raises(ValueError, match=r"set data\.batch_size to at most"):
        ImageFolderData(str(folder), batch_size=64, num_workers=0).train_dataloader()


def test_validation_folder_below_the_root_is_left_out_of_training(folder):
    data = ImageFolderData(str(folder), val_root=str(folder / "dog"), image_size=8, num_workers=0, batch_size=5)
    trained = {key for batch in data.train_dataloader() for key in batch["keys"]}
    assert trained == {f"cat/{number}.png" for number in range(10)}
    assert data.protocol["num_images"] == 10


def test_same_folder_for_training_and_validation_is_refused(folder):
    with pytest.raises(ValueError, match="validation would measure training pictures"):
        ImageFolderData(str(folder), val_root=str(folder / "cat" / ".."))


def test_validation_pictures_are_refused_in_training(folder):
    with pytest.raises(ValueError, match=r"data\.val_root=.* holds all of data\.root=.*dog: validation would measure"):
        ImageFolderData(str(folder / "dog"), val_root=str(folder))
    (folder / "list.txt").write_text("cat/1.png\ndog/2.png\n")
    data = ImageFolderData(str(folder), str(folder / "list.txt"), str(folder / "dog"))
    with pytest.raises(ValueError, match=r"list\.txt names 1 pictures below data\.val_root=.*, such as dog/2\.png"):
        data.train_dataloader()


def test_shared_shards_for_training_and_validation_are_refused(shards):
    with pytest.raises(ValueError, match="share 2 files"):
        WebDatasetData(shards["shards"], shards["shards"])
    folder = Path(shards["shards"]).parent
    with pytest.raises(ValueError, match="share 2 files"):
        WebDatasetData(shards["shards"], str(folder / ".." / folder.name / Path(shards["shards"]).name))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_pictures_reach_the_main_process(folder, workers):
    for name in ("cat/3.png", "dog/7.png"):
        (folder / name).write_bytes(b"")
    data = ImageFolderData(str(folder), val_share=0.5, image_size=8, batch_size=2, num_workers=workers)
    batches = [*data.train_dataloader(), *data.eval_dataloader()]
    assert {(bad.key, bad.kind) for batch in batches for bad in batch["bad"]} >= {("cat/3.png", "empty")}
    assert not {"cat/3.png", "dog/7.png"} & {key for batch in batches for key in batch["keys"]}


def test_evaluation_batch_without_a_readable_picture_is_empty(folder):
    val = folder.parent / "val"
    val.mkdir()
    for name in ("1.png", "2.png", "3.png"):
        (val / name).write_bytes(b"")
    Image.new("RGB", (8, 8)).save(val / "4.png")
    data = ImageFolderData(str(folder), val_root=str(val), image_size=8, batch_size=2, num_workers=0)
    first, second = data.eval_dataloader()
    assert (first["images"].shape, first["keys"], len(first["bad"])) == ((0, 3, 8, 8), [], 2)
    assert (second["images"].shape, second["keys"], len(second["bad"])) == ((1, 3, 8, 8), ["4.png"], 1)
