"""Tiles: an n x k matrix of scores is computed piece by piece and never held.

A tile has one row per code and one column per feature row, ``(codes, rows)``: reductions over the codes then run down
the columns, which vectorises for any number of codes.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Inputs = ParamSpec("Inputs")
Result = TypeVar("Result")

METRICS = ("euclidean", "dot")
# BLAS sums in another order for a handful of rows than for a full block, so a row would be quantized differently
# alone and in a batch. Padding to whole blocks of rows makes each row independent of its neighbours.
ROW_BLOCK = 16
# Wider tiles make products with few channels slower, narrower ones read the codes more often.
MAX_TILE_ROWS = 512
# An accelerator has no such cache, but many cores to keep busy: 64 MiB of scores.
ACCELERATOR_TILE_ELEMENTS = 2**24
# exp(-60) is 1e-26, nothing beside the largest term of a softmax; below -87 results are denormal and processors slow
# down several times.
LOWEST_EXPONENT = -60.0


@functools.cache
def cache_bytes() -> int:
    """Size of the second-level cache of a core; 1 MiB where the system does not tell."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
        return int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]]
    except (OSError, ValueError, KeyError, IndexError):
        return 2**20


def tile_shape(rows: int, codes: int, device: torch.device, buffers: int = 1) -> tuple[int, int]:
    """Numbers of rows and of codes of a tile; the rows in whole blocks.

    Args:
        rows: Rows there are.
        codes: Codes there are.
        device: On a CPU the tiles fill the second-level caches of all threads, each a power of two of scores.
        buffers: Tiles that are in use at a time.
    """
    elements = ACCELERATOR_TILE_ELEMENTS
    if device.type == "cpu":
        elements = 2 ** (cache_bytes() // 4 // buffers * torch.get_num_threads()).bit_length() // 2
    tile_rows = max(ROW_BLOCK, min(MAX_TILE_ROWS, rows + -rows % ROW_BLOCK))
    return tile_rows, max(1, min(codes, elements // tile_rows))


def pad_rows(rows: Tensor) -> Tensor:
    """`rows` with zeros appended up to a whole block."""
    missing = -len(rows) % ROW_BLOCK
    return F.pad(rows, (0, 0) * (rows.ndim - 1) + (0, missing)) if missing else rows


def slices(total: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size`."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def product(codes: Tensor, rows: Tensor, buffer: Tensor) -> Tensor:
    """``codes @ rows.T`` at the start of the flat `buffer`."""
    return torch.mm(codes, rows.T, out=buffer[: len(codes) * len(rows)].view(len(codes), len(rows)))


def with_bias(codebook: Tensor, rows: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and rows with one channel more, so that their plain product is ``rows @ codebook.T + bias``."""
    return torch.cat([codebook, bias.unsqueeze(-1)], -1), torch.cat([rows, rows.new_ones(len(rows), 1)], -1)


def half_norms(codebook: Tensor) -> Tensor:
    """``|e|^2 / 2`` of each code: ``z e - |e|^2 / 2`` orders codes as the Euclidean distance does."""
    return codebook.square().sum(-1) / 2


def check_metric(metric: str) -> None:
    """Raise a ValueError if `metric` is not one of `METRICS`."""
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}; got {metric!r}")


def in_float32(function: Callable[Inputs, Result]) -> Callable[Inputs, Result]:
    """Run a kernel without gradient, autocast and TF32: in bf16 several per cent of the indices change."""

    @functools.wraps(function)
    def run(*args: Inputs.args, **kwargs: Inputs.kwargs) -> Result:
        device = next(argument.device for argument in args if isinstance(argument, Tensor))
        with torch.no_grad(), torch.autocast(device.type, enabled=False), full_precision():
            return function(*args, **kwargs)

    return run


@contextmanager
def full_precision() -> Iterator[None]:
    """Matrix products in float32 proper, whatever the user allows elsewhere."""
    backends = [torch.backends.cuda.matmul, torch.backends.mkldnn]
    backends = [getattr(backend, "matmul", backend) for backend in backends]
    if all(hasattr(backend, "fp32_precision") for backend in backends):
        # The older interface below raises an error once a program has used this one.
        before = [backend.fp32_precision for backend in backends]
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision
        return
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
