"""Files that attack their reader, and damaged ones."""

import io
import json
import pickle
import struct
import zipfile

import torch
from safetensors.torch import save as to_safetensors


def archive(pickled, storages=(), root="file", **extra):
    """A file of torch.save with a pickle of our making."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr(f"{root}/data.pkl", pickled)
        for key, content in enumerate(storages):
            file.writestr(f"{root}/data/{key}", content)
        for name, content in extra.items():
            file.writestr(name, content)
    return buffer.getvalue()


def tensor(numel=4, offset=0, shape=(4,), strides=(1,), key="0"):
    """Pickle of a tensor with the given view of its storage."""
    numbers = b"".join(
        [
            b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n",
            b"X" + struct.pack("<I", len(key)) + key.encode(),
            b"X\x03\x00\x00\x00cpu" + long(numel) + b"tQ",
        ]
    )
    view = long(offset) + b"(" + b"".join(map(long, shape)) + b"t(" + b"".join(map(long, strides)) + b"t"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + numbers + view + b"\x89}tR."


def long(number):
    encoded = pickle.encode_long(number)
    return b"\x8a" + bytes([len(encoded)]) + encoded


def call(module, name, argument="echo trap"):
    return (
        b"\x80\x02c"
        + f"{module}\n{name}\n".encode()
        + b"X"
        + struct.pack("<I", len(argument))
        + argument.encode()
        + b"\x85R."
    )


def nested_dictionaries(depth):
    """Dictionaries that hold the one before under two names."""
    layer = b"q\x00}(X\x01\x00\x00\x00ah\x00X\x01\x00\x00\x00bh\x00u"
    return b"\x80\x02}" + layer * depth + b"."


def compressed():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("file/data.pkl", b"\x80\x02" + b"]" * 2**24 + b".")
    return buffer.getvalue()


def twice():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("file/data.pkl", tensor())
        file.writestr("other/data.pkl", call("os", "system"))
    return buffer.getvalue()


def header(content, length=None):
    text = json.dumps(content).encode() if isinstance(content, dict) else content
    return struct.pack("<Q", len(text) if length is None else length) + text


ONES = struct.pack("<4f", *[1.0] * 4)
HOSTILE = {
    "os.system": lambda: archive(call("os", "system")),
    "builtins.exec": lambda: archive(call("builtins", "exec", "1")),
    "getattr chain": lambda: archive(call("builtins", "getattr")),
    "subprocess.Popen": lambda: archive(call("subprocess", "Popen")),
    "legacy os.system": lambda: call("os", "system"),
    "instance of os.system": lambda: archive(b"\x80\x02(X\x04\x00\x00\x00echoios\nsystem\n."),
    "path traversal": lambda: archive(tensor(), [ONES], **{"file/../../trap": b"x"}),
    "absolute path": lambda: archive(tensor(), [ONES], **{"/tmp/trap": b"x"}),
    "storage elsewhere": lambda: archive(tensor(key="../../../etc/passwd"), [ONES]),
    "two pickles": twice,
    "zip bomb": compressed,
    "storage larger than the file": lambda: archive(tensor(numel=2**40, shape=(2**40,)), [ONES]),
    "tensor larger than its storage": lambda: archive(tensor(shape=(2**30,)), [ONES]),
    "expanded to a terabyte": lambda: archive(tensor(shape=(2**40,), strides=(0,)), [ONES]),
    "negative offset": lambda: archive(tensor(offset=-4), [ONES]),
    "negative stride": lambda: archive(tensor(strides=(-1,)), [ONES]),
    "negative shape": lambda: archive(tensor(shape=(-4,)), [ONES]),
    "shape beyond 64 bits": lambda: archive(tensor(shape=(2**70,)), [ONES]),
    "memo of 4 billion": lambda: archive(b"\x80\x02]r\xff\xff\xff\xffj\xfe\xff\xff\xff."),
    "string of 4 GB": lambda: archive(b"\x80\x02X\xff\xff\xff\xffabc."),
    "bytes of 2**60": lambda: archive(b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"abc."),
    "frame of 2**60": lambda: archive(b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"."),
    "number with a million digits": lambda: archive(b"\x80\x02L" + b"9" * 10**6 + b"L\n."),
    "ten million instructions": lambda: archive(b"\x80\x02" + b"N0" * 5 * 10**6 + b"N."),
    "exponential walk": lambda: archive(nested_dictionaries(60)),
    "stack underflow": lambda: archive(b"\x80\x02aaa."),
    "unknown opcode": lambda: archive(b"\x80\x02\xff."),
    "extension registry": lambda: archive(b"\x80\x02\x82\x01."),
    "no end": lambda: archive(b"\x80\x02]"),
    "persistent object": lambda: archive(b"\x80\x02(X\x04\x00\x00\x00evilX\x01\x00\x00\x000tQ."),
    "header of 2**63 bytes": lambda: header(b'{"a":1}', 2**63 - 1),
    "header that is no JSON": lambda: header(b"{" * 1000),
    "offsets beyond the file": lambda: header({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
    "shape that contradicts the offsets": lambda: (
        header({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}) + b"1234"
    ),
    "negative shape in a header": lambda: (
        header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}) + b"1234"
    ),
}

# Attacks on other readers that are only odd data to this one.
HARMLESS = {
    "million lists in each other": lambda: archive(b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."),
    "exponential hash": lambda: archive(b"\x80\x02}" + b"q\x01)" + b"q\x00h\x00\x86" * 60 + b"K\x01s" + b"\x85."),
}


def originals():
    """Small files of every format."""
    value = {"state_dict": {"weight": torch.arange(12.0).view(3, 4), "bias": torch.ones(3)}, "epoch": 3, "name": "x"}
    files = {}
    for name, zipped in (("zip", True), ("legacy", False)):
        buffer = io.BytesIO()
        torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
        files[name] = buffer.getvalue()
    files["safetensors"] = to_safetensors(value["state_dict"])
    return files


def mutations(kind, count, generator):
    """Damaged copies of a file: cut off, bits turned over, bytes replaced, parts doubled or zeroed."""
    return damaged(originals()[kind], count, generator)


def damaged(original, count, generator):
    """Damaged copies of some bytes."""
    for _ in range(count):
        content = bytearray(original)
        how = generator.choice(("cut", "flip", "bytes", "double", "zero"))
        begin = generator.randrange(len(content))
        if how == "cut":
            del content[begin:]
        elif how == "flip":
            for _ in range(generator.randint(1, 8)):
                content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        elif how == "bytes":
            content[begin : begin + 8] = generator.randbytes(min(8, len(content) - begin))
        elif how == "double":
            content[begin:begin] = content[begin : begin + generator.randint(1, 64)]
        else:
            length = min(generator.randint(1, 64), len(content) - begin)
            content[begin : begin + length] = bytes(length)
        yield bytes(content)
