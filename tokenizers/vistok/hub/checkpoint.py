"""Reading foreign checkpoints without running anything that they bring along.

A ``.pt``, ``.ckpt``, ``.bin`` or ``.jit`` file is a pickle, a program for a small stack machine, beside raw numbers.
`read_checkpoint` is such a machine of its own that can build plain containers and tensors and nothing else: it has no
instruction that imports or calls. Instances of unknown classes (callbacks of Lightning, argument namespaces, modules of
TorchScript) become inert `Placeholder` objects that keep what was stored in them; names of the standard library that
are no plain data, such as ``os.system``, are refused.

The numbers are mapped from the file, so reading takes memory only for what is used.
"""

import io
import math
import mmap
import pickletools
import struct
import sys
import zipfile
import zlib
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

MAX_OPERATIONS = 2**20  # of one pickle; a large model with its optimiser has some hundred thousand
MAX_PICKLE_BYTES = 2**28
MAX_DEPTH = 64  # of containers within containers
MAX_VISITS = 2**18  # of containers and values
MAX_DIMENSIONS = 32
# The number that files before the zip format begin with.
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
# Classes and functions of the standard library that stand for plain data.
PLAIN_NAMES = {
    "_codecs": {"encode"},
    "argparse": {"Namespace"},
    "builtins": {
        *("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "range"),
        *("set", "slice", "str", "tuple"),
    },
    "collections": {"Counter", "OrderedDict", "defaultdict", "deque"},
    "copyreg": {"_reconstructor"},
    "datetime": {"date", "datetime", "time", "timedelta", "timezone"},
    "decimal": {"Decimal"},
    "fractions": {"Fraction"},
    "functools": {"partial"},
    "pathlib": {"Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "types": {"SimpleNamespace"},
    "typing": {"Any", "Dict", "List", "Optional", "Tuple", "Union"},
    "uuid": {"UUID"},
}
# What a damaged or hostile file makes parsers raise.
PARSER_ERRORS = (
    ValueError,
    LookupError,
    TypeError,
    OverflowError,
    EOFError,
    struct.error,
    zipfile.BadZipFile,
    NotImplementedError,
    RecursionError,
    RuntimeError,
    zlib.error,
)


class Global(NamedTuple):
    """The name of a class or function in a pickle; never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Placeholder:
    """What stands in for an instance of an unknown class.

    Attributes:
        kind: Name of its class.
        arguments: What it was to be built from.
        attributes: Its state.
        entries: What it holds as a mapping.
        elements: What it holds as a sequence or set.
    """

    def __init__(self, kind: Global, arguments: Any) -> None:
        self.kind = kind
        self.arguments = arguments
        self.attributes: dict[Any, Any] = {}
        self.entries: dict[Any, Any] = {}
        self.elements: list[Any] = []

    def __repr__(self) -> str:
        return f"<{self.kind}, not built>"


class Storage(NamedTuple):
    """Raw numbers of a file, which tensors are views of."""

    dtype: torch.dtype
    key: str
    numel: int


def read_checkpoint(path: str | Path) -> Any:
    """What a checkpoint holds, as plain containers, tensors and placeholders; nothing of it is executed.

    Reads ``.safetensors``, what ``torch.save`` writes (zip files and the format before) and TorchScript archives,
    whichever the file is by its content.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, damaged or of another format, or names something that is refused.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no file {path.absolute()}")
    with path.open("rb") as file:
        start = file.read(16)
        if not start:
            raise ValueError(f"{path} is empty")
        if start[8:9] == b"{":
            return read_safetensors(path)
        # A private copy: tensors can be changed, the file stays as it is.
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    try:
        return _read_zip(path, memory) if start.startswith(b"PK\x03\x04") else _read_legacy(memory)
    except RefusedError as error:
        raise ValueError(f"{path}: {error}") from None
    except PARSER_ERRORS as error:
        raise ValueError(
            f"{path} is not a readable checkpoint ({type(error).__name__}: {error}): it may be truncated, damaged, or "
            "of a format other than safetensors, torch.save or TorchScript"
        ) from error


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; ValueError if it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, *PARSER_ERRORS) as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}): it may be truncated or of another format"
        ) from error


def read_pickle(data: bytes) -> Any:
    """What a pickle without tensors holds, as plain containers and placeholders; nothing of it is executed.

    Raises:
        ValueError: If it is no pickle, or names something that is refused.
    """
    try:
        return Machine(None).run(io.BytesIO(data))
    except RefusedError:
        raise
    except PARSER_ERRORS as error:
        raise ValueError(f"it holds bytes that are no readable pickle ({type(error).__name__}: {error})") from error


def entries(value: Any) -> dict[Any, Any]:
    """What a mapping holds, also one of omegaconf, which is not built; empty for anything else."""
    if isinstance(value, Placeholder):
        value = value.attributes.get("_content")
    items = value.items() if isinstance(value, Mapping) else ()
    return {
        key: item.attributes["_val"] if isinstance(item, Placeholder) and "_val" in item.attributes else item
        for key, item in items
    }


class RefusedError(ValueError):
    """Something in a file that is well formed, and not wanted."""


def flatten(content: Any) -> dict[str, Tensor]:
    """The tensors below mappings and modules, by their dotted names; lists and other objects are passed over.

    Raises:
        ValueError: If containers are nested too deeply.
    """
    found: dict[str, Tensor] = {}
    visits = 0

    def visit(value: Any, name: str, depth: int) -> None:
        nonlocal visits
        visits += 1
        # Containers that hold each other in many ways are few in a file and endless when they are walked.
        if depth > MAX_DEPTH or visits > MAX_VISITS:
            raise ValueError(f"containers are nested more than {MAX_DEPTH} deep or too often, at {name[:100]!r}")
        if isinstance(value, Tensor):
            found[name] = value
            return
        for key, item in _children(value):
            visit(item, f"{name}.{key}" if name else key, depth + 1)

    visit(content, "", 0)
    return found


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    """Named parts of a container; those of a module are its parameters, buffers and submodules."""
    if isinstance(value, Mapping):
        yield from ((key, item) for key, item in value.items() if isinstance(key, str))
    elif isinstance(value, Placeholder):
        yield from ((key, item) for key, item in value.entries.items() if isinstance(key, str))
        for key, item in value.attributes.items():
            if key in ("_parameters", "_buffers", "_modules"):
                yield from _children(item)
            elif isinstance(key, str):
                yield key, item


def _read_zip(path: Path, memory: mmap.mmap) -> Any:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    records: dict[str, zipfile.ZipInfo] = {}
    for info in entries:
        if info.filename in records or ".." in info.filename.split("/") or info.filename.startswith(("/", "\\")):
            raise RefusedError(f"the archive has the entry {info.filename!r} twice or outside of itself")
        records[info.filename] = info
    pickles = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise RefusedError(f"the archive has {len(pickles)} files data.pkl: it was not written by torch.save")
    root = pickles[0].removesuffix("data.pkl")

    def content(name: str) -> tuple[int, int]:
        """Where a record begins, and its length."""
        if name not in records:
            raise RefusedError(f"the archive has no {name}")
        info = records[name]
        # Stored records cannot expand.
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
            raise RefusedError(f"{name} is compressed or encrypted, which torch.save never does")
        header = memory[info.header_offset : info.header_offset + 30]
        if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
            raise RefusedError(f"{name} is not where the archive says")
        begin = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if begin + info.file_size > len(memory):
            raise RefusedError(f"{name} ends after the end of the file")
        if zlib.crc32(memoryview(memory)[begin : begin + info.file_size]) != info.CRC:
            raise RefusedError(f"the checksum of {name} does not match: the file is damaged")
        return begin, info.file_size

    if f"{root}byteorder" in records:
        begin, size = content(f"{root}byteorder")
        if memory[begin : begin + size] != b"little":
            raise RefusedError(f"the numbers are in {memory[begin : begin + size]!r} byte order, not in b'little'")
    begin, size = content(pickles[0])
    if size > MAX_PICKLE_BYTES:
        raise RefusedError(f"{pickles[0]} has {size} bytes, more than any model needs")
    storages: dict[str, tuple[int, int]] = {}

    def storage(key: str) -> tuple[int, int]:
        if key not in storages:
            storages[key] = content(f"{root}data/{key}")
        return storages[key]

    return Machine(lambda spec, *view: _view(memory, *storage(spec.key), spec, *view)).run(
        io.BytesIO(memory[begin : begin + size])
    )


def _read_legacy(memory: mmap.mmap) -> Any:
    """The format before zip files: three small pickles, that of the object, the keys of the storages, and these."""
    memory.seek(0)
    machine = Machine(None)
    try:
        magic = machine.run(memory)
    except ValueError:
        magic = None
    if magic != LEGACY_MAGIC:
        raise RefusedError("it is neither safetensors nor a file of torch.save")
    machine.run(memory)  # version of the format
    system = machine.run(memory)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise RefusedError("the numbers are not in little-endian byte order")
    # The numbers stand behind the object that views them: views are remembered and made afterwards.
    begin = memory.tell()
    specs: dict[str, Storage] = {}

    def remember(spec: Storage, *_: Any) -> None:
        specs[spec.key] = spec

    Machine(remember).run(memory)
    keys = Machine(None).run(memory)
    if not isinstance(keys, list) or not set(specs) <= set(keys):
        raise RefusedError("the list of storages does not fit the object")
    places: dict[str, tuple[int, int]] = {}
    for key in keys:
        size = struct.unpack("<q", memory.read(8))[0] * specs[key].dtype.itemsize
        if size < 0 or memory.tell() + size > len(memory):
            raise RefusedError(f"storage {key} ends after the end of the file")
        places[key] = memory.tell(), size
        memory.seek(size, io.SEEK_CUR)
    memory.seek(begin)
    return Machine(lambda spec, *view: _view(memory, *places[spec.key], spec, *view)).run(memory)


def _view(
    memory: mmap.mmap, begin: int, size: int, spec: Storage, dtype: torch.dtype, offset: Any, shape: Any, strides: Any
) -> Tensor:
    """A tensor over a part of the file, after a check that it stays within its storage."""
    available = size // dtype.itemsize
    if spec.numel * spec.dtype.itemsize > size:
        raise RefusedError(f"storage {spec.key} has {size} bytes, fewer than {spec.numel} numbers of {spec.dtype}")
    plain = all(type(number) is int and number >= 0 for number in (offset, *shape, *strides))
    if not plain or len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
        raise RefusedError(f"a tensor has shape {shape}, strides {strides} and offset {offset}")
    numel = math.prod(shape)
    last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    # More elements than numbers would be a few bytes that take gigabytes as soon as they are copied.
    if numel and (numel > available or last >= available):
        raise RefusedError(f"a tensor of shape {tuple(shape)} is larger than its storage of {available} numbers")
    if not numel:
        return torch.empty(tuple(shape), dtype=dtype)
    if begin % dtype.itemsize:
        numbers = torch.frombuffer(bytearray(memory[begin : begin + size]), dtype=dtype, count=available)
    else:
        numbers = torch.frombuffer(memory, dtype=dtype, count=available, offset=begin)
    return numbers.as_strided(tuple(shape), tuple(strides), offset)


class Machine:
    """Interpreter of pickles that builds plain containers, tensors and placeholders.

    Args:
        view: Makes a tensor of ``(storage, dtype, offset, shape, strides)``; None: there are no tensors.
    """

    def __init__(self, view: Callable[..., Any] | None) -> None:
        self.view = view

    def run(self, file: Any) -> Any:
        """Interpret one pickle from the current position of a file, up to its end.

        Raises:
            RefusedError: If it names something that is not plain data, or is too large.
            ValueError: If it is not a pickle. Other errors of a damaged one are those of `PARSER_ERRORS`.
        """
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if count > MAX_OPERATIONS:
                raise RefusedError(f"the pickle has more than {MAX_OPERATIONS} instructions, more than any model needs")
            if opcode.name == "STOP":
                break
            if opcode.name in CONSTANTS:
                self.stack.append(argument)
            elif opcode.name in VALUES:
                self.stack.append(VALUES[opcode.name]())
            elif (instruction := getattr(self, f"op_{opcode.name.lower()}", None)) is not None:
                instruction(argument)
            else:
                raise RefusedError(f"the pickle has the instruction {opcode.name}, which torch.save never writes")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        """What was put on the stack since the last mark."""
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def op_proto(self, argument: Any) -> None:  # noqa: D102
        pass

    op_frame = op_proto

    def op_mark(self, _: Any) -> None:  # noqa: D102
        self.marks.append(len(self.stack))

    def op_pop(self, _: Any) -> None:  # noqa: D102
        self.stack.pop()

    def op_pop_mark(self, _: Any) -> None:  # noqa: D102
        self.pop_mark()

    def op_dup(self, _: Any) -> None:  # noqa: D102
        self.stack.append(self.stack[-1])

    def op_put(self, number: Any) -> None:  # noqa: D102
        self.memo[number] = self.stack[-1]

    op_binput = op_long_binput = op_put

    def op_memoize(self, _: Any) -> None:  # noqa: D102
        self.memo[len(self.memo)] = self.stack[-1]

    def op_get(self, number: Any) -> None:  # noqa: D102
        self.stack.append(self.memo[number])

    op_binget = op_long_binget = op_get

    def op_append(self, _: Any) -> None:  # noqa: D102
        item = self.stack.pop()
        _elements(self.stack[-1]).append(item)

    def op_appends(self, _: Any) -> None:  # noqa: D102
        items = self.pop_mark()
        _elements(self.stack[-1]).extend(items)

    op_additems = op_appends

    def op_list(self, _: Any) -> None:  # noqa: D102
        self.stack.append(self.pop_mark())

    op_frozenset = op_list

    def op_tuple(self, _: Any) -> None:  # noqa: D102
        self.stack.append(tuple(self.pop_mark()))

    def op_tuple1(self, _: Any) -> None:  # noqa: D102
        self.stack[-1:] = [tuple(self.stack[-1:])]

    def op_tuple2(self, _: Any) -> None:  # noqa: D102
        self.stack[-2:] = [tuple(self.stack[-2:])]

    def op_tuple3(self, _: Any) -> None:  # noqa: D102
        self.stack[-3:] = [tuple(self.stack[-3:])]

    def op_dict(self, _: Any) -> None:  # noqa: D102
        items = self.pop_mark()
        self.stack.append({})
        self._set(items)

    def op_setitem(self, _: Any) -> None:  # noqa: D102
        items = [self.stack.pop(), self.stack.pop()][::-1]
        self._set(items)

    def op_setitems(self, _: Any) -> None:  # noqa: D102
        items = self.pop_mark()
        self._set(items)

    def _set(self, items: Sequence[Any]) -> None:
        target = self.stack[-1]
        entries = target.entries if isinstance(target, Placeholder) else target
        if not isinstance(entries, dict):
            raise ValueError(f"a {type(target).__name__} has no entries")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing tuples of tuples of tuples could take for ever, and no state dict has such names.
            entries[
                key if isinstance(key, str | int | float | bytes | Global | None) else f"<{type(key).__name__}>"
            ] = value

    def op_global(self, argument: Any) -> None:  # noqa: D102
        self.stack.append(_checked(*argument.split(" ", 1)))

    def op_stack_global(self, _: Any) -> None:  # noqa: D102
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(_checked(module, name))

    def op_reduce(self, _: Any) -> None:  # noqa: D102
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(self._construct(function, arguments))

    op_newobj = op_reduce

    def op_newobj_ex(self, _: Any) -> None:  # noqa: D102
        self.stack.pop()  # keyword arguments
        self.op_reduce(None)

    def op_inst(self, argument: Any) -> None:  # noqa: D102
        self.stack.append(self._construct(_checked(*argument.split(" ", 1)), tuple(self.pop_mark())))

    def op_obj(self, _: Any) -> None:  # noqa: D102
        kind, *arguments = self.pop_mark()
        self.stack.append(self._construct(kind, tuple(arguments)))

    def op_build(self, _: Any) -> None:  # noqa: D102
        state = self.stack.pop()
        target = self.stack[-1]
        # The state of a plain container is attributes of a subclass, such as the versions in a state dict.
        if isinstance(target, Placeholder):
            for part in state if isinstance(state, tuple) else (state,):
                if isinstance(part, dict):
                    target.attributes.update(part)

    def op_persid(self, argument: Any) -> None:  # noqa: D102
        self.stack.append(self._storage(argument))

    def op_binpersid(self, _: Any) -> None:  # noqa: D102
        self.stack.append(self._storage(self.stack.pop()))

    def _storage(self, identity: Any) -> Any:
        if not isinstance(identity, tuple) or not identity:
            raise ValueError(f"a persistent object is called {str(identity)[:100]!r}")
        if identity[0] == "module":  # files before the zip format quote the source of a module's class
            return identity[1]
        kind, storage, key, _, numel, *_ = identity
        if kind != "storage" or not isinstance(storage, Global) or type(numel) is not int or numel < 0:
            raise ValueError(f"a persistent object of kind {str(kind)[:100]!r}")
        if storage.name not in DTYPES or not storage.module.startswith("torch"):
            raise RefusedError(f"numbers of type {storage} are not supported")
        return Storage(DTYPES[storage.name], str(key), numel)

    def _construct(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Global):
            raise ValueError(f"a {type(function).__name__} is called")
        if not isinstance(arguments, tuple):
            raise ValueError(f"{function} gets arguments that are no tuple")
        name = str(function)
        if name == "torch._utils._rebuild_tensor_v2" or name == "torch._utils._rebuild_tensor":
            storage, offset, shape, strides = arguments[:4]
            return self._tensor(storage, None, offset, shape, strides)
        if name == "torch._utils._rebuild_tensor_v3":
            storage, offset, shape, strides, _, _, dtype = arguments[:7]
            return self._tensor(storage, _dtype(dtype), offset, shape, strides)
        if name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
            return arguments[0]
        if name == "torch._tensor._rebuild_from_type_v2":
            return self._construct(arguments[0], arguments[2])
        if function.name in ("OrderedDict", "defaultdict", "Counter") and function.module == "collections":
            return _plain_dict(arguments)
        if name in ("torch.Size", "builtins.tuple", "builtins.list", "builtins.set"):
            items = arguments[0] if arguments else ()
            return tuple(items) if name in ("torch.Size", "builtins.tuple") else list(items)
        if name == "_codecs.encode" and arguments and isinstance(arguments[0], str):
            return arguments[0].encode("latin1")  # how bytes are written for Python 2
        return Placeholder(function, arguments)

    def _tensor(self, storage: Any, dtype: torch.dtype | None, offset: Any, shape: Any, strides: Any) -> Any:
        if self.view is None or not isinstance(storage, Storage):
            raise ValueError("a tensor without a storage")
        return self.view(storage, dtype or storage.dtype, offset, tuple(shape), tuple(strides))


def _plain_dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    """The dictionary of ``OrderedDict(pairs)`` or ``defaultdict(factory)``."""
    pairs = arguments[0] if arguments and type(arguments[0]) in (list, tuple) else ()
    return OrderedDict((key, value) for key, value in pairs if isinstance(key, str | int))


def _dtype(value: Any) -> torch.dtype:
    dtype = getattr(torch, value.name, None) if isinstance(value, Global) and value.module == "torch" else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"a tensor of dtype {value}")
    return dtype


def _elements(target: Any) -> list[Any]:
    """The list that an instruction appends to."""
    elements = target.elements if isinstance(target, Placeholder) else target
    if not isinstance(elements, list):
        raise ValueError(f"a {type(target).__name__} has no elements")
    return elements


def _checked(module: Any, name: Any) -> Global:
    """The name of a class or function, unless it is one that data has no use for.

    Nothing is looked up or called, whatever it is; but a file that asks for ``os.system`` should not pass for a
    checkpoint.
    """
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError("a name that is no string")
    # Pickles of the protocols that torch uses call modules as Python 2 did.
    module, name = NAME_MAPPING.get((module, name), (module, name))
    module = IMPORT_MAPPING.get(module, module)
    if module.split(".", 1)[0] in sys.stdlib_module_names and name not in PLAIN_NAMES.get(module, ()):
        raise RefusedError(
            f"it asks for {module}.{name}, which is no data: this is not a harmless checkpoint; nothing was executed"
        )
    return Global(module, name)


# Instructions that put their argument on the stack.
CONSTANTS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
# Instructions that put a value of their own on the stack.
VALUES: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_SET": list,
    "EMPTY_TUPLE": tuple,
}
