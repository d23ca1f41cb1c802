"""Runs a function on two gloo processes."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# What torchrun sets and Lightning looks for.
TORCHRUN = {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}


def run_on_two_processes(worker: Callable[[int, Path], object], folder: Path) -> dict[str, Any]:
    """What the two processes saved in a folder as ``name.pt``, by name.

    Args:
        worker: Called with the rank and the folder; a function of a module, since the processes import it.
        folder: Empty.
    """
    mp.spawn(_run, (worker, folder), nprocs=2)
    return {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}


def _run(rank: int, worker: Callable[[int, Path], object], folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(TORCHRUN, RANK=str(rank), LOCAL_RANK=str(rank))
    # A file instead of a port, which another program could take before the first process does.
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    worker(rank, folder)
    dist.barrier()
    # Gloo's threads may still drop tensors while the interpreter shuts down, which aborts the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
