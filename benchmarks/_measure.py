"""Timings relative to a bare matrix product, and peak memory, for the other benchmarks."""

import math
import multiprocessing
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

TILE_SHAPES = ((256, 256), (256, 1024), (512, 512), (512, 1024), (1024, 512), (1024, 1024))
MEBIBYTE = 2**20


def synchronise() -> None:
    """Wait for the GPU if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(function: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    synchronise()
    start = time.perf_counter()
    function()
    synchronise()
    return time.perf_counter() - start


def time_alternating(
    case: Callable[[], object], reference: Callable[[], object], repeats: int = 10
) -> tuple[float, float]:
    """Smallest seconds of each of two functions, called in turn so that both see the same load of the machine."""
    best_case = best_reference = math.inf
    for repeat in range(repeats + 1):
        times = seconds(case), seconds(reference)
        # The first call of each pays for memory and libraries.
        if repeat:
            best_case, best_reference = min(best_case, times[0]), min(best_reference, times[1])
    return best_case, best_reference


def bare_product(rows: Tensor, codebook: Tensor, tile: tuple[int, int]) -> Callable[[], None]:
    """All n x k products, computed into one reused tile of ``tile`` rows and codes."""
    tile_rows, tile_codes = min(tile[0], len(rows)), min(tile[1], len(codebook))
    buffer = rows.new_empty(tile_rows * tile_codes)
    row_parts, code_parts = rows.split(tile_rows), codebook.split(tile_codes)

    def run() -> None:
        for part in row_parts:
            for codes in code_parts:
                torch.mm(part, codes.T, out=buffer[: len(part) * len(codes)].view(len(part), len(codes)))

    return run


def best_bare_product(rows: Tensor, codebook: Tensor, repeats: int = 3) -> Callable[[], None]:
    """The fastest of `bare_product` over `TILE_SHAPES`."""
    products = [bare_product(rows, codebook, tile) for tile in TILE_SHAPES]
    return min(products, key=lambda product: min(seconds(product) for _ in range(repeats)))


def ratio_to_product(case: Callable[[], object], rows: Tensor, codebook: Tensor, repeats: int = 10) -> float:
    """Time of `case` in units of the bare product of rows and codebook."""
    own, product = time_alternating(case, best_bare_product(rows, codebook), repeats)
    return own / product


def peak_extra_memory(prepare: Callable[..., Callable[[], object]], *arguments: object) -> int:
    """Bytes that a function needs at its peak over what was there before the call.

    It runs in a fresh process, where no earlier peak hides it.

    Args:
        prepare: A function of a module; called with `arguments` it builds the inputs, runs the case once on small ones
            so that the libraries are loaded, and returns the case.
        arguments: Passed on; they are pickled.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_in_process, args=(sender, torch.get_num_threads(), prepare, arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError as error:
        raise RuntimeError(f"the measured process ended with exit code {process.exitcode}") from error
    finally:
        process.join()


def _measure_in_process(sender, threads: int, prepare, arguments) -> None:  # noqa: ANN001
    torch.set_num_threads(threads)
    case = prepare(*arguments)
    if torch.cuda.is_available():
        synchronise()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        case()
        synchronise()
        sender.send(torch.cuda.max_memory_allocated() - before)
    else:
        sender.send(_peak_resident(case))


def _peak_resident(case: Callable[[], object]) -> int:
    before = _status("VmRSS")
    try:
        # 5 resets the high-water mark to what is resident now.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _sampled_peak(case) - before
    case()
    return _status("VmHWM") - before


def _sampled_peak(case: Callable[[], object], interval: float = 0.001) -> int:
    peak, done = _status("VmRSS"), threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(interval):
            peak = max(peak, _status("VmRSS"))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        case()
    finally:
        done.set()
        thread.join()
    return max(peak, _status("VmRSS"))


def _status(field: str) -> int:
    """A field of this process's memory in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
