"""Data sets to tokens and back: everything once, in whatever number of processes and after whatever interruption."""

import io
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from token_folder import write_tokens
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as F

import vistok
from vistok.data import ImageFolderData, PhotosData, WebDatasetData
from vistok.data.bad_samples import BadSample
from vistok.data.pictures import PictureDataset
from vistok.decoder import CNNDecoder
from vistok.encoder import CNNEncoder
from vistok.quantizer import FSQ
from vistok.tokens import TokenDataset, TokenStream, read_manifest
from vistok.tokens.dataset import encode_keys, keys_of
from vistok.tokens.export import Export, export
from vistok.tokens.manifest import smallest_dtype

CNN = {"base_channels": 32, "patch_size": 4, "num_blocks": 1}


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    parts = CNNEncoder(**CNN), FSQ(levels=[8, 5, 5, 5]), CNNDecoder(**CNN)
    return vistok.Tokenizer(*parts, preprocessing={"size": [16, 16]}).eval()


def work_of(tokenizer, views="center", num_views=1, eval_size=150, **options):
    data = PhotosData(image_size=128, eval_size=eval_size, num_workers=0, samples_per_epoch=5, **options)
    return Export(tokenizer, data, views, num_views, shard_size=4, identity={"weights": "0" * 64})


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    work = work_of(tokenizer, "flip", eval_size=128)
    return work, export(work, folder, batch_size=8), folder


def test_tokens_of_the_files_are_those_of_the_pictures(exported, tokenizer):
    work, manifest, folder = exported
    dataset = TokenDataset(folder)
    assert manifest.num_pictures == len(work.data.eval_dataset)
    assert len(dataset) == 2 * manifest.num_pictures
    for number in (0, 5, manifest.num_pictures - 1):
        image = work.data.eval_dataset[0, number]["image"] / 127.5 - 1
        with torch.inference_mode():
            views = tokenizer.flatten(tokenizer.encode(torch.stack([image, image.flip(-1)])).indices)
        stored = torch.stack([dataset[2 * number + view]["tokens"] for view in (0, 1)])
        # Batches of another size may round a token to another code.
        assert (stored == views).float().mean() > 0.99


def test_every_picture_is_there_once_and_by_name(exported):
    work, manifest, folder = exported
    dataset = TokenDataset(folder)
    keys = [key for number in range(len(manifest.shards)) for key in dataset.keys(number)]
    assert keys == [work.data.eval_dataset[0, number]["key"] for number in range(manifest.num_pictures)]
    assert len(set(keys)) == len(keys)


def test_the_manifest_says_what_the_tokens_are(exported):
    _, manifest, folder = exported
    content = json.loads((folder / "manifest.json").read_text())
    assert content["dtype"] == "uint16"
    assert content["layout"]["indices_shape"] == [32, 32]
    assert content["views"] == ["center", "center_flipped"]
    assert content["check"]["equal_tokens"] > 0.99
    assert read_manifest(folder) == manifest
    assert (folder / "sample.png").is_file()


def test_a_killed_export_goes_on_with_the_files_that_are_missing(exported, tmp_path, tokenizer, monkeypatch):
    work, manifest, folder = exported
    for shard in manifest.shards[:2]:
        (tmp_path / shard["file"]).write_bytes((folder / shard["file"]).read_bytes())
    (tmp_path / f".{manifest.shards[2]['file']}.99.tmp").write_bytes(b"half a file")
    written = []
    write = Export.write
    monkeypatch.setattr(
        Export, "write", lambda self, number, *rest: written.append(number) or write(self, number, *rest)
    )
    assert export(work, tmp_path, batch_size=8) == manifest
    assert written == list(range(2, len(manifest.shards)))


def test_processes_share_the_files_and_the_last_one_writes_the_manifest(exported, tmp_path):
    work, manifest, _ = exported
    assert export(work, tmp_path, batch_size=8, rank=1, world_size=2) is None
    assert not (tmp_path / "manifest.json").exists()
    with pytest.raises(FileNotFoundError, match="let it finish"):
        TokenDataset(tmp_path)
    assert export(work, tmp_path, batch_size=8, rank=0, world_size=2) == manifest


def test_tokens_of_another_export_are_not_continued(exported, tokenizer):
    _, _, folder = exported
    with pytest.raises(ValueError, match="choose another out="):
        export(work_of(tokenizer, "center", eval_size=128), folder, batch_size=8)


def test_ten_crops_are_those_of_torchvision(tokenizer):
    work = work_of(tokenizer, "ten_crop")
    images = torch.rand(2, 3, 150, 150, generator=torch.Generator().manual_seed(0))
    views = work.cut(images).unflatten(0, (2, 10))
    assert len(work.view_names) == 10
    for picture, crops in zip(images, views, strict=True):
        for crop, expected in zip(crops, F.ten_crop(picture, [128, 128]), strict=True):
            assert torch.equal(crop, expected)


def test_random_crops_are_those_of_the_epochs_of_training(tokenizer, tmp_path):
    work = work_of(tokenizer, "train", num_views=3)
    manifest = export(work, tmp_path, batch_size=6)
    assert manifest.num_pictures == 5
    assert manifest.views == ["train0", "train1", "train2"]
    image = work.data.train_dataset[2, 4]["image"] / 127.5 - 1
    with torch.inference_mode():
        tokens = tokenizer.flatten(tokenizer.encode(image[None]).indices)[0]
    assert (TokenDataset(tmp_path)[4 * 3 + 2]["tokens"] == tokens).float().mean() > 0.99


def write_pictures(folder, names):
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    for name in names:
        Image.fromarray(generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / name)


def export_folder(tokenizer, root, out, views="train", num_views=2):
    roots = {"val_root": str(root)} if views == "center" else {"root": str(root)}
    data = ImageFolderData(**roots, image_size=16, num_workers=0)
    work = Export(tokenizer, data, views, num_views, shard_size=10, identity={})
    return export(work, out, batch_size=4)


def test_no_other_picture_stands_in_for_one_that_cannot_be_read(tokenizer, tmp_path):
    write_pictures(tmp_path / "pictures", [f"{number}.png" for number in range(6)])
    (tmp_path / "pictures" / "2.png").write_bytes(b"nothing")
    data = ImageFolderData(str(tmp_path / "pictures"), image_size=16, num_workers=0)
    names = [data.train_dataset.source[number].key for number in range(len(data.train_dataset))]
    assert "2.png" in names
    manifest = export_folder(tokenizer, tmp_path / "pictures", tmp_path / "out")
    dataset = TokenDataset(tmp_path / "out")
    assert dataset.keys(0) == [name for name in names if name != "2.png"]
    assert manifest.num_bad == 1
    assert manifest.check["equal_tokens"] == 1


def test_a_picture_that_was_read_for_one_view_only_is_an_error(tokenizer, tmp_path, monkeypatch):
    write_pictures(tmp_path / "pictures", [f"{number}.png" for number in range(6)])
    read = PictureDataset._read

    def fail_once(self, epoch, index):
        return BadSample("x", "empty", "") if (epoch, index) == (1, 1) else read(self, epoch, index)

    monkeypatch.setattr(PictureDataset, "_read", fail_once)
    with pytest.raises(OSError, match="some of its views only"):
        export_folder(tokenizer, tmp_path / "pictures", tmp_path / "out")


def test_a_folder_that_has_changed_since_is_not_continued(tokenizer, tmp_path):
    write_pictures(tmp_path / "pictures", ["b.png", "c.png"])
    export_folder(tokenizer, tmp_path / "pictures", tmp_path / "out", "center", 1)
    write_pictures(tmp_path / "pictures", ["a.png"])
    with pytest.raises(ValueError, match="may have changed"):
        export_folder(tokenizer, tmp_path / "pictures", tmp_path / "out", "center", 1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_tar_file_becomes_a_file_of_its_pictures(tokenizer, tmp_path, num_workers):
    generator = np.random.default_rng(0)
    for shard in range(2):
        with tarfile.open(tmp_path / f"pictures-{shard}.tar", "w") as tar:
            for number in range(5):
                data = io.BytesIO()
                Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(data, "PNG")
                for name, content in (("png", data.getvalue()), ("cls", str(number).encode())):
                    entry = tarfile.TarInfo(f"{shard}{number}.{name}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    data = WebDatasetData(
        shards=None, val_shards=str(tmp_path / "pictures-{0..1}.tar"), image_size=16, num_workers=num_workers
    )
    manifest = export(Export(tokenizer, data, "flip", 1, 10, identity={}), tmp_path / "out", batch_size=4)
    dataset = TokenDataset(tmp_path / "out")
    names = [{key[-2:] for key in dataset.keys(number)} for number in range(2)]
    assert names == [{f"{shard}{number}" for number in range(5)} for shard in range(2)]
    assert manifest.num_classes == 5
    assert manifest.check["equal_tokens"] == 1
    # A file that sorts before those that are there would take the place of the first.
    (tmp_path / "pictures-1.tar").rename(tmp_path / "pictures-2.tar")
    data = WebDatasetData(shards=None, val_shards=str(tmp_path), image_size=16, num_workers=0)
    with pytest.raises(ValueError, match="may have changed"):
        export(Export(tokenizer, data, "flip", 1, 10, identity={}), tmp_path / "out", batch_size=4)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "int32"), (2**31, "int32"), (2**31 + 1, "int64")],
)
def test_tokens_take_the_smallest_integers(size, dtype):
    assert smallest_dtype(size) == getattr(torch, dtype)


@pytest.mark.parametrize(
    ("views", "num_views", "message"),
    [("mirror", 1, "views must be"), ("flip", 2, "has no effect"), ("train", 0, "at least 1")],
)
def test_impossible_views_are_refused(tokenizer, views, num_views, message):
    with pytest.raises(ValueError, match=message):
        work_of(tokenizer, views, num_views)


def test_batches_of_a_loader_have_tokens_and_labels(tmp_path):
    dataset = TokenDataset(write_tokens(tmp_path))
    batch = next(iter(DataLoader(dataset, batch_size=10)))
    assert batch["tokens"].dtype == torch.int64
    assert batch["tokens"][:, 0].tolist() == [0, 1, 10, 11, 20, 21, 30, 31, 40, 41]
    assert batch["labels"].tolist() == [0, 0, 1, 1, 2, 2, 0, 0, 1, 1]


def test_random_views_are_one_of_each_picture_and_change_with_the_epoch(tmp_path):
    dataset = TokenDataset(write_tokens(tmp_path, counts=(20, 20), labels=False), views="random")
    epochs = [[int(dataset[epoch, number]["tokens"][0]) for number in range(24)] for epoch in range(2)]
    assert [token // 10 for token in epochs[0]] == list(range(24))
    assert epochs[0] != epochs[1]
    assert "labels" not in dataset[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_gives_every_item_once_over_all_processes_and_workers(tmp_path, workers):
    folder = write_tokens(tmp_path, counts=(3, 2, 6))
    found = Counter()
    for rank in range(2):
        stream = TokenStream(folder, rank=rank, world_size=2)
        own = [int(batch["tokens"][0, 0]) for batch in DataLoader(stream, batch_size=1, num_workers=workers)]
        assert len(own) == len(stream)
        found.update(own)
    assert found == {picture * 10 + view: 1 for picture in range(11) for view in range(2)}


def test_a_stream_has_another_order_in_another_epoch(tmp_path):
    stream = TokenStream(write_tokens(tmp_path, counts=(8, 8)))
    first = [int(item["tokens"][0]) for item in stream]
    stream.set_epoch(1)
    assert first != [int(item["tokens"][0]) for item in stream]
    stream.set_epoch(0)
    assert first == [int(item["tokens"][0]) for item in stream]


def test_names_of_pictures_survive(tmp_path):
    keys = ["a.png", "späte Äpfel/b.png", "", "c"]
    assert keys_of(encode_keys(keys)) == keys
    assert keys_of(encode_keys([])) == []


def test_a_damaged_file_is_named(tmp_path):
    folder = write_tokens(tmp_path)
    (folder / "tokens-1.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"tokens-1\.safetensors is not a readable file"):
        TokenDataset(folder)[9]


def test_a_missing_file_is_named(tmp_path):
    folder = write_tokens(tmp_path)
    (folder / "tokens-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="copy the whole folder"):
        TokenDataset(folder)


def test_a_foreign_manifest_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text('{"format": 9}')
    with pytest.raises(ValueError, match="is not a manifest"):
        read_manifest(tmp_path)


def test_files_open_with_safetensors_alone(exported):
    _, manifest, folder = exported
    tensors = load_file(folder / manifest.shards[0]["file"])
    assert tensors["tokens"].shape == (4, 2, 1024)
    assert tensors["tokens"].dtype == torch.uint16
