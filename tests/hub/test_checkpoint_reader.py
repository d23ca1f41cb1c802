"""Foreign checkpoints give up their tensors and nothing of them is executed."""

import argparse
import collections
import io
import os
import pickle
import random
import struct
import subprocess
import sys
import time
import zipfile

import pytest
import torch
from hostile_files import HARMLESS, HOSTILE, mutations

from vistok.hub.checkpoint import Placeholder, flatten, read_checkpoint


class Unknown:
    """A class that no reader has."""

    def __init__(self):
        self.weight = torch.full((2,), 7.0)


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def saved(request, tmp_path):
    """Saves a value as torch does, in the format of today and that before."""

    def save(value):
        torch.save(value, tmp_path / "file.pt", _use_new_zipfile_serialization=request.param)
        return tmp_path / "file.pt"

    return save


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_tensors_of_every_type_are_read(saved, dtype):
    tensor = torch.arange(24).view(2, 3, 4).to(dtype)
    found = read_checkpoint(saved({"a": tensor, "b": tensor.mT[1:], "empty": tensor[:0]}))
    assert found["a"].dtype == dtype
    assert torch.equal(found["a"], tensor)
    assert torch.equal(found["b"], tensor.mT[1:])
    assert found["empty"].shape == (0, 3, 4)


def test_parameters_and_plain_containers_are_read(saved):
    value = {
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "ordered": collections.OrderedDict(a=torch.zeros(1)),
        "default": collections.defaultdict(int, {"x": 3}),
        "plain": [1, 2.5, True, None, "text", b"bytes", (1, 2), {3}, 2**70],
        "size": torch.Size([2, 3]),
    }
    found = read_checkpoint(saved(value))
    assert torch.equal(found["parameter"], torch.ones(2))
    assert found["default"] == {"x": 3}
    assert found["plain"] == [1, 2.5, True, None, "text", b"bytes", (1, 2), [3], 2**70]
    assert found["size"] == (2, 3)


def test_unknown_instances_are_placeholders_that_keep_their_tensors(saved):
    found = read_checkpoint(saved({"object": Unknown(), "args": argparse.Namespace(lr=0.1), "kind": {Unknown: 1}}))
    assert isinstance(found["object"], Placeholder)
    assert found["args"].attributes == {"lr": 0.1}
    assert torch.equal(flatten(found)["object.weight"], torch.full((2,), 7.0))


def test_a_whole_module_gives_up_its_state_dict(saved):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    found = flatten(read_checkpoint(saved(module)))
    assert found.keys() == module.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in module.state_dict().items())


@pytest.mark.filterwarnings("ignore")
def test_torchscript_gives_up_its_state_dict(tmp_path):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()
    torch.jit.trace(module, torch.zeros(1, 3, 8, 8)).save(str(tmp_path / "model.jit"))
    found = flatten(read_checkpoint(tmp_path / "model.jit"))
    assert {name for name in module.state_dict() if "tracked" not in name} <= set(found)
    assert torch.equal(found["0.weight"], module[0].weight)


def test_reading_leaves_the_file_as_it_is(saved):
    path = saved({"a": torch.zeros(100)})
    before = path.read_bytes()
    read_checkpoint(path)["a"].fill_(1)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "call", [(os.system, ("echo",)), (eval, ("1",)), (subprocess.Popen, ("true",)), (getattr, ("", "x"))]
)
def test_a_call_is_refused_by_name_and_not_executed(saved, tmp_path, call):
    class Bomb:
        def __reduce__(self):
            return call

    with pytest.raises(ValueError, match=rf"asks for \w+\.{call[0].__name__}, which is no data.*nothing was executed"):
        read_checkpoint(saved({"model": {"weight": torch.ones(1)}, "bomb": Bomb()}))


def test_a_call_of_a_third_party_is_not_executed(saved, tmp_path):
    class Trap:
        def __reduce__(self):
            return (torch.hub.load_state_dict_from_url, (f"file://{tmp_path}",))

    assert isinstance(read_checkpoint(saved({"trap": Trap()}))["trap"], Placeholder)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_an_error_within_a_moment(tmp_path, name):
    path = tmp_path / "hostile.pt"
    path.write_bytes(HOSTILE[name]())
    start = time.monotonic()
    with pytest.raises(ValueError, match="hostile"):
        flatten_named(path)
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("name", HARMLESS)
def test_odd_data_is_read_within_a_moment(tmp_path, name):
    path = tmp_path / "odd.pt"
    path.write_bytes(HARMLESS[name]())
    start = time.monotonic()
    assert flatten(read_checkpoint(path)) == {}
    assert time.monotonic() - start < 60


def flatten_named(path):
    """Read and flatten; an error of flattening names the file too."""
    try:
        return flatten(read_checkpoint(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_damaged_file_is_an_error_or_harmless(tmp_path, kind):
    path = tmp_path / "damaged.pt"
    outcomes = collections.Counter()
    for content in mutations(kind, 200, random.Random(0)):
        path.write_bytes(content)
        try:
            tensors = flatten(read_checkpoint(path))
        except ValueError:
            outcomes["error"] += 1
        else:
            outcomes["read"] += 1
            assert sum(tensor.numel() for tensor in tensors.values()) <= len(content)
    assert outcomes["error"] >= 100


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x80\x02}q\x00.", b"PK\x03\x04" + b"\0" * 100, pickle.dumps({"a": 1})]
)
def test_another_format_is_an_error_that_names_the_file(tmp_path, content):
    (tmp_path / "file.bin").write_bytes(content)
    with pytest.raises(ValueError, match="file"):
        read_checkpoint(tmp_path / "file.bin")


def test_a_file_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*nothing"):
        read_checkpoint(tmp_path / "nothing.pt")


def test_a_changed_number_is_noticed(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "file.pt")
    content = bytearray((tmp_path / "file.pt").read_bytes())
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        info = archive.getinfo("file/data/0")
    begin = (
        info.header_offset + 30 + sum(struct.unpack("<HH", content[info.header_offset + 26 : info.header_offset + 30]))
    )
    content[begin + 100] ^= 1
    (tmp_path / "file.pt").write_bytes(content)
    with pytest.raises(ValueError, match="checksum of file/data/0 does not match"):
        read_checkpoint(tmp_path / "file.pt")


def test_reading_needs_no_pickle_module(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "file.pt")
    code = (
        "import pickle, torch\n"
        "from vistok.hub.checkpoint import read_checkpoint\n"
        "def refuse(*arguments, **options): raise AssertionError('unpickled')\n"
        "pickle.Unpickler = pickle._Unpickler = pickle.load = pickle.loads = torch.load = refuse\n"
        f"assert read_checkpoint({str(tmp_path / 'file.pt')!r})['a'].sum() == 2\n"
    )
    environment = {**os.environ, "PYTHONPATH": "tokenizers"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
