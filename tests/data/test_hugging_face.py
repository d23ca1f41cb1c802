"""Data sets of the Hugging Face library."""

import builtins
import io
from pathlib import Path

import pytest
from PIL import Image

from vistok.data import HuggingFaceData, HuggingFaceStreamData
from vistok.data.convert import Recipe, convert
from vistok.data.hugging_face import HuggingFaceSet, HuggingFaceStream
from vistok.data.sources import open_source
from vistok.data.webdataset import BadShardError

# Of the library's own hashing, with some versions of dill.
pytestmark = pytest.mark.filterwarnings("ignore:Cannot locate reference")


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8), value).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path) -> str:
    """A set of eight training and four test pictures with class and caption, as ``save_to_disk`` writes it."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["even", "odd"]),
            "caption": datasets.Value("string"),
        }
    )
    splits = {}
    for split, count in (("train", 8), ("test", 4)):
        rows = [
            {"image": {"bytes": png(n), "path": None}, "label": n % 2, "caption": f"gray {n}"} for n in range(count)
        ]
        splits[split] = datasets.Dataset.from_list(rows, features=features)
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "set"))
    return str(tmp_path / "set")


def test_set_trains_with_labels_and_texts(folder):
    columns = {"label_key": "label", "text_key": "caption"}
    data = HuggingFaceData(folder, val_split="test", image_size=8, batch_size=4, num_workers=0, **columns)
    batches = list(data.train_dataloader())
    assert sorted(int(key) for batch in batches for key in batch["keys"]) == list(range(8))
    for batch in batches:
        assert batch["labels"].tolist() == [int(key) % 2 for key in batch["keys"]]
        assert batch["texts"] == [f"gray {key}" for key in batch["keys"]]
    assert data.protocol["num_images"] == 4


@pytest.mark.parametrize("streaming", [False, True])
def test_set_is_converted_byte_by_byte(folder, tmp_path, streaming):
    source = open_source(f"hf:{folder}", label_key="label", streaming=streaming)
    manifest = convert(source, tmp_path / "out", Recipe(), num_workers=0)
    assert (manifest.num_samples, manifest.classes) == (8, ["even", "odd"])
    assert png(3) in (tmp_path / "out" / "00000.tar").read_bytes()


@pytest.fixture
def files(tmp_path) -> str:
    """Four parquet files of six training pictures each and one of six test pictures."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for name, numbers in {**{f"train-{n}": range(6 * n, 6 * n + 6) for n in range(4)}, "test-0": range(6)}.items():
        rows = [{"image": {"bytes": png(n), "path": None}, "label": n} for n in numbers]
        (tmp_path / "files").mkdir(exist_ok=True)
        datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "files" / f"{name}.parquet"))
    return str(tmp_path / "files")


def stream(name: str, **options) -> HuggingFaceStreamData:
    given = {"val_split": "test", "image_size": 8, "batch_size": 2, "num_workers": 0, "label_key": "label"}
    return HuggingFaceStreamData(name, **given | {"samples_per_epoch": 24, "val_samples": 5} | options)


def labels(loader) -> list[int]:
    return [label for batch in loader for label in batch["labels"].tolist()]


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_gives_every_picture_once_in_another_order_each_epoch(files, workers):
    loader = stream(files, num_workers=workers).train_dataloader()
    epochs = [labels(loader) for _ in range(2)]
    assert sorted(epochs[0]) == list(range(24))
    assert epochs[0] != sorted(epochs[0])
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_resumes_with_the_next_batch(files, workers):
    whole, resumed = (stream(files, num_workers=workers).train_dataloader() for _ in range(2))
    resumed.load_state_dict({"epoch": 0, "batch": 5})
    assert labels(resumed) == labels(whole)[10:]


def test_stream_is_divided_among_ranks(files):
    parts = [labels(stream(files).make_train_loader(None, rank, 2)) for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == list(range(24))


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_evaluates_the_first_pictures_once(files, workers):
    data = stream(files, num_workers=workers)
    assert sorted(labels(data.eval_dataloader())) == list(range(5))
    assert data.protocol["num_images"] == 5


@pytest.mark.parametrize("workers", [0, 2])
def test_first_pictures_are_those_of_the_first_files(files, tmp_path, workers):
    for number in (2, 3):
        (Path(files) / f"train-{number}.parquet").rename(Path(files) / f"test-{number}.parquet")
    data = stream(files, num_workers=workers, val_samples=9)
    assert sorted(labels(data.eval_dataloader())) == [0, 1, 2, 3, 4, 5, 12, 13, 14]


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_file_is_reported_and_the_run_goes_on_or_stops(files, workers):
    path = Path(files) / "train-2.parquet"
    data = stream(files, num_workers=workers)
    assert data.count("train") == 24
    path.write_bytes(path.read_bytes()[:300])
    batches = list(data.train_dataloader())
    assert len(batches) == 12
    assert {label for batch in batches for label in batch["labels"].tolist()} == {*range(12), *range(18, 24)}
    (kind,) = {bad.kind for batch in batches for bad in batch["bad"]}
    assert kind == "bad shard"
    with pytest.raises(BadShardError, match="train, shard 2"):
        list(stream(files, num_workers=workers, on_bad_shard="stop").train_dataloader())


@pytest.fixture
def holes(tmp_path) -> str:
    """Three pictures, one by its address, one that is missing, one whose address is wrong; without label and text."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.Value("int64"), "caption": datasets.Value("string")}
    )
    (tmp_path / "0.png").write_bytes(png(0))
    images = [{"bytes": None, "path": f"file://{tmp_path}/0.png"}, None, {"bytes": None, "path": "file:///nowhere.png"}]
    rows = [{"image": image, "label": None, "caption": None} for image in images]
    (tmp_path / "holes").mkdir()
    # Written by pyarrow, since `to_parquet` would put the files behind the addresses into it.
    table = datasets.Dataset.from_list(rows, features=features).data.table
    pytest.importorskip("pyarrow.parquet").write_table(table, str(tmp_path / "holes" / "train-0.parquet"))
    return str(tmp_path / "holes")


@pytest.mark.parametrize("streaming", [False, True])
def test_picture_by_address_is_fetched_and_what_is_missing_is_a_bad_sample(holes, tmp_path, streaming):
    source = open_source(f"hf:{holes}", label_key="label", text_key="caption", streaming=streaming)
    manifest = convert(source, tmp_path / "out", Recipe(), num_workers=0, max_bad_share=1)
    assert [(bad.key, bad.kind) for bad in manifest.bad] == [("1", "empty"), ("2", "unreadable")]
    assert png(0) in (tmp_path / "out" / "00000.tar").read_bytes()
    assert b".cls" not in (tmp_path / "out" / "00000.tar").read_bytes()


def test_missing_pictures_of_a_stream_keep_their_reason(holes):
    options = {"split": "other", "val_split": "train", "val_samples": 3, "text_key": "caption"}
    (batch,) = stream(holes, **options, eval_batch_size=3, max_bad_share=1).eval_dataloader()
    assert (batch["keys"], "labels" in batch, "texts" in batch) == (["0/0"], False, False)
    assert [(bad.key, bad.kind) for bad in batch["bad"]] == [("0/1", "empty"), ("0/2", "unreadable")]
    assert batch["bad"][0].reason == "row 0/1 has no picture in 'image'"


def test_split_of_a_saved_set_is_the_one_asked_for(folder, tmp_path):
    HuggingFaceSet(folder)._rows.save_to_disk(str(tmp_path / "single"))
    assert [len(HuggingFaceSet(folder, split)) for split in ("train", "test", "train[:25%]", "train[-3:]")] == [
        8,
        4,
        2,
        3,
    ]
    with pytest.raises(ValueError, match="has no split 'val'; there are train, test"):
        HuggingFaceSet(folder, "val")
    with pytest.raises(ValueError, match="has no split 'validation'; there are train"):
        HuggingFaceSet(str(tmp_path / "single"), "validation")
    with pytest.raises(ValueError, match=r"a stream has no slices, got the split 'train\[:2\]'"):
        HuggingFaceStream(folder, "train[:2]")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image_key": "caption"}, "column 'caption' of .* not pictures: set image_key to another column"),
        ({"label_key": "caption"}, "column 'caption' of .* labels are integers: set label_key to"),
    ],
)
def test_column_of_another_kind_is_named(folder, columns, message):
    with pytest.raises(ValueError, match=message):
        HuggingFaceSet(folder, **columns)


def test_stream_without_a_length_asks_for_it(files):
    with pytest.raises(ValueError, match=r"data\.samples_per_epoch is not set"):
        stream(files, samples_per_epoch=None).train_dataloader()


def test_stream_that_knows_its_length_needs_none(folder):
    data = stream(folder, samples_per_epoch=None, val_samples=None, text_key="caption")
    assert (data.count("train"), data.count("eval")) == (8, 4)
    assert {text for batch in data.train_dataloader() for text in batch["texts"]} == {f"gray {n}" for n in range(8)}


def test_missing_column_lists_those_that_are_there(folder):
    with pytest.raises(ValueError, match="has no column 'img'; there are image, label, caption"):
        HuggingFaceSet(folder, image_key="img")


def test_missing_set_is_named(tmp_path):
    pytest.importorskip("datasets", reason="datasets is not installed")
    with pytest.raises(FileNotFoundError, match="nowhere, split 'train', is not here"):
        HuggingFaceSet(str(tmp_path / "nowhere"))


def test_missing_library_says_what_to_install(monkeypatch):
    original = builtins.__import__

    def without_datasets(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(ImportError, match=r"pip install datasets"):
        HuggingFaceSet("owner/name")


def test_same_split_twice_and_settings_of_other_sources_are_refused():
    with pytest.raises(ValueError, match="both see the split 'train'"):
        HuggingFaceData("owner/name", val_split="train")
    with pytest.raises(ValueError, match="settings of a Hugging Face set"):
        open_source("/photos", label_key="label")
    with pytest.raises(ValueError, match="settings of a Hugging Face set"):
        open_source("/photos", image_key="img")
    with pytest.raises(ValueError, match="split=val has no effect on a folder"):
        open_source("/photos", split="val")
    with pytest.raises(ValueError, match="root=/sets is where torchvision keeps its sets"):
        open_source("hf:owner/name", root=Path("/sets"))
