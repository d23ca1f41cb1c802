"""The layouts of other programs, read as their own data sets read them."""

import json
import linecache
import pickle
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch
from token_folder import write_tokens
from torch.utils.data import DataLoader, Dataset

from vistok.tokens import Layout, TokenDataset
from vistok.tokens.layouts import LAYOUTS, write_layout


class LlamaGenCodes(Dataset):
    """``CustomDataset`` of LlamaGen's ``dataset/imagenet.py``, of `count` pictures in place of ImageNet's number."""

    def __init__(self, code_path, size, count):
        self.features, self.labels = (f"{code_path}/imagenet{size}_{kind}" for kind in ("codes", "labels"))
        self.flip = "flip" in self.features
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        features = np.load(f"{self.features}/{index}.npy")
        if self.flip:
            view = torch.randint(low=0, high=features.shape[1], size=(1,)).item()
            features = features[:, view]
        return torch.from_numpy(features), torch.from_numpy(np.load(f"{self.labels}/{index}.npy"))


class RARLines(Dataset):
    """``PretoeknizedDataSetJSONL`` of 1d-tokenizer's ``data/webdataset_reader.py``."""

    def __init__(self, path):
        self.path = str(path)
        with path.open() as file:
            self.count = sum(1 for _ in file)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        data = json.loads(linecache.getline(self.path, index + 1).strip())
        return torch.tensor(data["class_id"]), torch.tensor(data["tokens"])


class HaltonCodes(Dataset):
    """``CodeDataset`` of Halton-MaskGIT's ``Dataset/dataset.py``."""

    def __init__(self, folder):
        self.files = sorted(path for path in folder.iterdir() if path.name.endswith(".pth"))

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        data = pickle.loads(self.files[index].read_bytes())
        data["code"] = data["code"].astype(np.int32)
        return data


@pytest.mark.parametrize("views", [1, 2])
def test_llamagen_trains_on_one_view_of_each_picture(tmp_path, views):
    folder = write_layout(TokenDataset(write_tokens(tmp_path, views=views)), "llamagen")
    loader = DataLoader(LlamaGenCodes(folder, 8, 5), batch_size=5)
    seen = set()
    for _ in range(20):
        x, y = next(iter(loader))
        z_indices, c_indices = x.reshape(x.shape[0], -1), y.reshape(-1)
        assert z_indices.shape == (5, 4)
        assert z_indices.dtype == c_indices.dtype == torch.int64
        assert (z_indices[:, 0] // 10).tolist() == [0, 1, 2, 3, 4]
        assert c_indices.tolist() == [0, 1, 2, 0, 1]
        seen |= set((z_indices[:, 0] % 10).tolist())
    assert seen == set(range(views))


def test_rar_trains_on_every_view(tmp_path):
    folder = write_layout(TokenDataset(write_tokens(tmp_path)), "rar")
    conditions, tokens = next(iter(DataLoader(RARLines(folder / "tokens.jsonl"), batch_size=100)))
    assert tokens.tolist() == [[10 * picture + view] * 4 for picture in range(5) for view in range(2)]
    assert tokens.dtype == conditions.dtype == torch.int64
    assert conditions.tolist() == [0, 0, 1, 1, 2, 2, 0, 0, 1, 1]


def test_halton_maskgit_trains_on_grids(tmp_path):
    folder = write_layout(TokenDataset(write_tokens(tmp_path)), "halton")
    batch = next(iter(DataLoader(HaltonCodes(folder / "Train"), batch_size=100)))
    code = batch["code"].long()
    assert code.shape == (10, 2, 2)
    assert code[:, 1, 1].tolist() == [10 * picture + view for picture in range(5) for view in range(2)]
    assert batch["y"].tolist() == [0, 0, 1, 1, 2, 2, 0, 0, 1, 1]


def test_halton_maskgit_has_no_place_for_several_codebooks(tmp_path, monkeypatch):
    dataset = TokenDataset(write_tokens(tmp_path))
    object.__setattr__(dataset.manifest, "layout", Layout([8, 8], [2, 2], [64, 64]))
    with pytest.raises(ValueError, match="one grid"):
        write_layout(dataset, "halton")
    assert not (tmp_path / "halton").exists()


def test_layouts_of_classes_need_labels(tmp_path):
    with pytest.raises(ValueError, match="write layouts="):
        write_layout(TokenDataset(write_tokens(tmp_path, labels=False)), "rar")


@pytest.mark.parametrize("name", LAYOUTS)
def test_processes_that_finish_at_once_leave_one_whole_layout(tmp_path, name):
    write_tokens(tmp_path)
    before, barrier = set(tmp_path.iterdir()), Barrier(4)

    def write(_):
        dataset = TokenDataset(tmp_path)
        barrier.wait()
        return write_layout(dataset, name)

    with ThreadPoolExecutor(4) as threads:
        folders = set(threads.map(write, range(4)))
    assert set(tmp_path.iterdir()) - before == folders
    assert len(folders) == 1


def test_a_layout_of_other_tokens_is_refused(tmp_path):
    write_layout(TokenDataset(write_tokens(tmp_path)), "rar")
    with pytest.raises(ValueError, match="delete it"):
        write_layout(TokenDataset(write_tokens(tmp_path, counts=(4, 2))), "rar")


def test_a_layout_is_not_written_again(tmp_path, monkeypatch):
    dataset = TokenDataset(write_tokens(tmp_path))
    folder = write_layout(dataset, "rar")
    monkeypatch.setitem(LAYOUTS, "rar", None)
    assert write_layout(dataset, "rar") == folder
