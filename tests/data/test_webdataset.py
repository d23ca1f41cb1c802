"""Tar shards."""

import io
import os
import tarfile
from pathlib import Path

import jaxtyping
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from vistok.data.transforms import EvalTransform, TrainTransform
from vistok.data.webdataset import BadShardError, ShardDataset, count_samples, expand_shards

# Torch warns of more workers than cores, of which a test machine may have one.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(file, "PNG")
    return file.getvalue()


def write_shard(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as shard:
        for key, parts in samples.items():
            for extension, data in parts.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                shard.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def shards(tmp_path) -> list[Path]:
    """Four shards of 10 samples each; the gray value and the class of sample n are n."""
    return [
        write_shard(
            tmp_path / f"part-{number}.tar",
            {f"{n:03d}": {"png": png(n), "cls": str(n).encode()} for n in range(10 * number, 10 * number + 10)},
        )
        for number in range(4)
    ]


def train_set(shards, **options) -> ShardDataset:
    return ShardDataset(shards, TrainTransform(4), 4, **{"batch_size": 4, "shuffle_buffer": 8} | options)


def eval_set(shards, **options) -> ShardDataset:
    return ShardDataset(shards, EvalTransform(4), 4, batch_size=4, train=False, **options)


def batches(dataset, workers=0, start=0, epoch=0) -> list[list[str]]:
    dataset.set_epoch(epoch)
    dataset.start_at(start)
    return [batch["keys"] for batch in DataLoader(dataset, batch_size=None, num_workers=workers)]


def keys(dataset, **options) -> list[str]:
    return [key for batch in batches(dataset, **options) for key in batch]


def test_braces_are_expanded_and_missing_shards_named(shards):
    folder = shards[0].parent
    assert expand_shards(f"{folder}/part-{{0..3}}.tar") == shards
    with pytest.raises(FileNotFoundError, match=rf"2 of the 6 .* such as part-4\.tar; .*{folder} holds 4 \.tar files"):
        expand_shards(f"{folder}/part-{{0..5}}.tar")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        expand_shards(f"{folder}/nowhere/{{0..5}}.tar")


def test_list_of_shards_is_told_how_to_be_one_pattern(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"several of them joined by ::, got \['a.tar', 'b.tar'\]"):
        expand_shards(["a.tar", "b.tar"])  # pyright: ignore[reportArgumentType]


def test_folder_of_shards_needs_no_braces(shards):
    assert expand_shards(str(shards[0].parent)) == shards
    (shards[0].parent / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty has no \.tar files"):
        expand_shards(f"{shards[0].parent}/empty")


def test_pipes_and_urls_are_read_like_files(shards):
    folder = shards[0].parent
    for pattern in (f"pipe:cat {folder}/part-{{0..3}}.tar", f"file://{folder}/part-{{0..3}}.tar"):
        assert keys(eval_set(expand_shards(pattern))) == [f"{n:03d}" for n in range(40)]


@pytest.mark.parametrize("cut", [4096 + 600, 4096])
def test_truncated_pipe_is_reported(shards, cut):
    seen = list(eval_set([f"pipe:head -c {cut} {shards[0]} # .tar", shards[1]]))
    assert {bad.kind for batch in seen for bad in batch["bad"]} == {"bad shard"}
    assert {f"{n:03d}" for n in range(10, 20)} < {key for batch in seen for key in batch["keys"]}


def test_failing_command_is_reported(shards):
    seen = list(eval_set(["pipe:cat /nowhere/part.tar 2> /dev/null", shards[1]], num_samples=10))
    assert {bad.kind for batch in seen for bad in batch["bad"]} == {"bad shard"}


@pytest.mark.parametrize("workers", [0, 2])
def test_shard_that_vanishes_during_training_is_reported_and_the_epoch_goes_on(shards, workers):
    dataset = train_set(shards)
    shards[2].unlink()
    seen = list(DataLoader(dataset, batch_size=None, num_workers=workers))
    assert len(seen) == 10
    assert ("part-2.tar", "bad shard") in {(bad.key, bad.kind) for batch in seen for bad in batch["bad"]}


def test_process_whose_only_shard_has_vanished_goes_on_with_others(shards):
    datasets = [train_set(shards, batch_size=2, rank=rank, world_size=4) for rank in range(4)]
    shards[2].unlink()
    assert [len(list(dataset)) for dataset in datasets] == [5, 5, 5, 5]
    for shard in shards:
        shard.unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"no sample can be read from shards such as .*: No such file or directory\)"):
        list(datasets[0])


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_shard_stops_the_run_where_asked_to(shards, workers):
    dataset = train_set(shards, on_bad_shard="stop")
    shards[2].unlink()
    with pytest.raises(BadShardError, match=r"shard part-2\.tar: .*No such file"):
        list(DataLoader(dataset, batch_size=None, num_workers=workers))
    with pytest.raises(ValueError, match="must be skip or stop, got 'halt'"):
        train_set(shards, on_bad_shard="halt")


def test_caption_of_a_sample_is_its_text(tmp_path):
    shard = write_shard(tmp_path / "a.tar", {f"{n}": {"png": png(n), "txt": f"gray {n}".encode()} for n in range(4)})
    assert next(iter(eval_set([shard])))["texts"] == ["gray 0", "gray 1", "gray 2", "gray 3"]


def test_every_picture_format_of_folders_is_read(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "TIFF")
    shard = write_shard(tmp_path / "a.tar", {"1": {"tif": file.getvalue()}})
    assert keys(eval_set([shard])) == ["1"]


def test_samples_are_counted_in_the_headers(shards):
    assert count_samples(shards[0]) == 10
    assert train_set(shards).num_samples == 40


def test_pixels_and_labels_belong_to_their_keys(shards):
    for dataset in (train_set(shards), eval_set(shards)):
        for batch in dataset:
            numbers = torch.tensor([int(key) for key in batch["keys"]])
            assert torch.equal(batch["labels"], numbers)
            assert torch.allclose(batch["images"], (numbers / 127.5 - 1)[:, None, None, None].expand(-1, 3, 4, 4))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_epoch_has_every_sample_once_in_an_order_of_its_own(shards, workers):
    first, again, other = (keys(train_set(shards), workers=workers, epoch=epoch) for epoch in (0, 0, 1))
    assert sorted(first) == [f"{n:03d}" for n in range(40)]
    assert first == again != other


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("start", [1, 4, 9])
def test_starting_in_the_middle_gives_the_rest_of_the_epoch(shards, workers, start):
    whole = batches(train_set(shards), workers=workers)
    assert len(whole) == 10
    assert batches(train_set(shards), workers=workers, start=start) == whole[start:]


def test_ranks_and_workers_have_disjoint_shards(shards):
    parts = [keys(train_set(shards, batch_size=5, rank=rank, world_size=2), workers=2) for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == [f"{n:03d}" for n in range(40)]


@pytest.mark.parametrize("workers", [0, 3])
def test_more_readers_than_shards_divide_the_samples(shards, workers):
    parts = [keys(eval_set(shards[:2], rank=rank, world_size=3), workers=workers) for rank in range(3)]
    assert sorted(key for part in parts for key in part) == [f"{n:03d}" for n in range(20)]


def test_longer_epoch_repeats_the_shards_with_new_crops(shards):
    repeated = keys(train_set(shards, num_samples=80))
    assert sorted(repeated) == sorted(2 * [f"{n:03d}" for n in range(40)])
    assert repeated[:40] != repeated[40:]


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_has_every_sample_once(shards, workers):
    found = keys(eval_set(shards[:3]), workers=workers)
    assert sorted(found) == [f"{n:03d}" for n in range(30)]
    assert workers or found == sorted(found)


def test_bad_sample_is_reported_replaced_in_training_and_dropped_in_evaluation(tmp_path):
    parts = {f"{n}": {"png": png(n)} for n in range(8)}
    parts["2"], parts["5"] = {"png": b""}, {"txt": b"no picture"}
    shard = write_shard(tmp_path / "a.tar", parts)
    for dataset, sizes in ((train_set([shard], num_samples=8), [4, 4]), (eval_set([shard]), [3, 3])):
        seen = list(dataset)
        assert [len(batch["keys"]) for batch in seen] == sizes
        assert {(bad.key, bad.kind) for batch in seen for bad in batch["bad"]} == {("2", "empty"), ("5", "no image")}
        assert not {"2", "5"} & {key for batch in seen for key in batch["keys"]}


def test_start_in_the_middle_is_exact_with_bad_samples_too(tmp_path):
    parts = {f"{n:02d}": {"png": png(n) if n % 3 else b""} for n in range(24)}
    shard = write_shard(tmp_path / "a.tar", parts)
    whole = batches(train_set([shard]))
    assert [batches(train_set([shard]), start=start) for start in range(6)] == [whole[start:] for start in range(6)]


@pytest.mark.parametrize("cut", [4096 + 600, 4096, 4096 + 100], ids=["in data", "between members", "in a header"])
def test_truncated_shard_is_reported_and_the_next_one_read(shards, cut):
    # A member takes 512 bytes of header and 512 of data, so a sample of two members takes 2048.
    shards[1].write_bytes(shards[1].read_bytes()[:cut])
    seen = list(eval_set(shards[:3]))
    found = {key for batch in seen for key in batch["keys"]}
    assert (
        {f"{n:03d}" for n in [*range(11), *range(20, 30)]}
        <= found
        <= {f"{n:03d}" for n in [*range(12), *range(20, 30)]}
    )
    assert [(bad.key, bad.kind) for batch in seen for bad in batch["bad"]] == [("part-1.tar", "bad shard")]


def test_file_that_is_no_tar_is_reported_even_after_the_last_batch(shards):
    shards[3].write_bytes(b"no tar" * 200)
    seen = list(eval_set(shards[2:]))
    assert sum(len(batch["keys"]) for batch in seen) == 10
    assert [bad.key for batch in seen for bad in batch["bad"]] == ["part-3.tar"]


def test_shards_without_pictures_and_unreadable_ones_are_errors(tmp_path):
    empty = write_shard(tmp_path / "a.tar", {"1": {"txt": b""}})
    with pytest.raises(ValueError, match="no pictures in 1 shards"):
        train_set([empty])
    dotted = write_shard(tmp_path / "c.tar", {"photo.0001": {"png": png(1)}})
    with pytest.raises(ValueError, match="name has, after its first dot, one of jpg"):
        train_set([dotted])
    unreadable = write_shard(tmp_path / "b.tar", {f"{n}": {"jpg": b"x"} for n in range(8)})
    with pytest.raises(ValueError, match="5 samples in a row"):
        list(train_set([unreadable], max_bad=5))


def test_real_shards_are_read_whole():
    folder = os.environ.get("VISTOK_TEST_DATA")
    if folder is None:
        pytest.skip("VISTOK_TEST_DATA is not set to the folder of test data")
    paths = expand_shards(f"{folder}/imagenette128/val-{{00000..00003}}.tar")
    dataset = ShardDataset(paths, EvalTransform(128), 128, batch_size=50, train=False)
    seen = list(dataset)
    assert dataset.num_samples == sum(len(batch["keys"]) for batch in seen) == 3000
    assert set(torch.cat([batch["labels"] for batch in seen]).tolist()) == set(range(10))
    assert not any(batch["bad"] for batch in seen)
