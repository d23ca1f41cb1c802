"""Time and memory of a training step of a quantizer, beside the bound and beside a peer.

    python benchmarks/quantizers.py                             every case: minutes
    python benchmarks/quantizers.py --cases vq_ema_16k rvq      some of them
    python benchmarks/quantizers.py --quick                     small sizes, to see that all cases run

A step is forward, backward through ``codes.sum()`` plus the weighted losses, and ``update()``. The bound is the bare
product of all tokens with all codes, one reused tile of scores at a time: any search without an index has to do it. The
peer is `vector_quantize_pytorch`, told to do the same work. Times are minima over repeats in which case and reference
alternate. Extra memory is the peak of a step in a fresh process above what it starts with, less its outputs and
gradients; parameters and inputs are there before it starts.
"""

import argparse
import ctypes
import gc
import json
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _measure import MEBIBYTE, best_bare_product, peak_extra_memory, time_alternating
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import vistok
from vistok.quantizer import VectorQuantizer

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "quantizer"
# The resolution of a process's peak memory, in MB: pages, and what the allocator keeps.
RESOLUTION = 2.0
# No table starts from features and nothing is revived: that is not part of every step, and peers do it otherwise.
PLAIN = {"init": "normal", "revival": "none", "revive_below": None}


@dataclass(frozen=True)
class Case:
    """One measurement and what is expected of it.

    Attributes:
        method: Name of the yaml in ``configs/quantizer``.
        overrides: What differs from the yaml.
        peer: Class of `vector_quantize_pytorch` and its arguments; None if it has no such quantizer, or none that fits
            into memory.
        products: Numbers of codes and channels of the products that bound the time, and how many of them there are;
            None for quantizers without a search.
        tokens: Tokens of the batch.
        assignment: Whether only the assignment to codes is measured, without losses and backward.
        max_ratio: Target: time over that of the products.
        min_speedup: Target: the peer's time over the time.
        max_extra: Target: extra memory in MB.
        spares: Target: no more extra memory than the peer.
    """

    method: str
    overrides: Mapping[str, Any]
    peer: tuple[str, Mapping[str, Any]] | None = None
    products: tuple[int, int, int] | None = None
    tokens: int = 4096
    assignment: bool = False
    max_ratio: float | None = None
    min_speedup: float | None = None
    max_extra: float | None = None
    spares: bool = False

    def shrunk(self) -> "Case":
        """The same with few tokens and codes."""
        products = None if self.products is None else (min(self.products[0], 256), *self.products[1:])
        peer = None if self.peer is None else (self.peer[0], _shrunk(self.peer[1]))
        return replace(self, overrides=_shrunk(self.overrides), peer=peer, products=products, tokens=256)


def _shrunk(arguments: Mapping[str, Any]) -> dict[str, Any]:
    smaller = {"codebook_size": 256, "bits": 8}
    return {key: min(value, smaller[key]) if value and key in smaller else value for key, value in arguments.items()}


def sizes(codebook_size: int, dim: int, **overrides: Any) -> dict[str, Any]:
    """Arguments of our quantizers and of the peer's alike."""
    return {"codebook_size": codebook_size, "dim": dim, **overrides}


# The peer's options for the decay and commitment of our yaml; without a quantizer that rotates by default.
VQ_PEER = {"decay": 0.99, "commitment_weight": 0.25, "rotation_trick": False}
STAGE = {
    "_target_": "vistok.quantizer.VectorQuantizer",
    **{"table": "ema", "commitment_weight": 0.25, "decay": 0.99, "init": "normal"},
}
RVQ = {"shared": False, "commitment": "stage", "quantizer": STAGE}
RVQ_STACK = {"_target_": "vistok.quantizer.ResidualQuantizer", "depth": 4, "commitment": "stage", "quantizer": STAGE}
RFSQ_LEVELS = [8, 5, 5, 3]
RFSQ_STACK = {
    "_target_": "vistok.quantizer.ResidualQuantizer",
    "depth": 4,
    "quantizer": {"_target_": "vistok.quantizer.FSQ", "form": "symmetric", "bound": "clamp"},
}
GROUPED = {"groups": 2, "shared": False, "masking": None}
NO_ENTROPY = {"entropy_weight": 0.0, "diversity": None, "entropy_temperature": None}
VQ_ENTROPY = {"entropy_weight": 0.05, "entropy_temperature": 0.01}

CASES = {
    "vq_ema_16k": Case(
        "vq_ema",
        sizes(16384, 64, **PLAIN),
        peer=("VectorQuantize", sizes(16384, 64, **VQ_PEER)),
        products=(16384, 64, 1),
        max_ratio=2,
        min_speedup=10,
        max_extra=64,
    ),
    "vq_ema_262k": Case("vq_ema", sizes(262144, 16, **PLAIN), products=(262144, 16, 1), max_ratio=2, max_extra=64),
    "ibq_262k": Case("ibq", sizes(262144, 64, **NO_ENTROPY), products=(262144, 64, 1), max_ratio=12, max_extra=256),
    "ibq_entropy_262k": Case("ibq", sizes(262144, 64), products=(262144, 64, 1), max_ratio=18, max_extra=256),
    "vq_entropy_262k": Case(
        "vq", sizes(262144, 64, **VQ_ENTROPY), products=(262144, 64, 1), max_ratio=18, max_extra=256
    ),
    "optvq_65k": Case("optvq", sizes(65536, 64), products=(65536, 64, 1), assignment=True, max_ratio=20, max_extra=256),
    "optvq_65k_held": Case(
        "optvq",
        sizes(65536, 64, max_memory=1400),
        products=(65536, 64, 1),
        assignment=True,
        max_ratio=9,
        max_extra=1400,
    ),
    "lfq_18": Case(
        "lfq",
        {"bits": 18},
        peer=("LFQ", {"codebook_size": 2**18, "entropy_loss_weight": 0.1, "commitment_loss_weight": 0.25}),
        tokens=512,
        min_speedup=100,
        max_extra=64,
    ),
    "lfq_18_4096": Case("lfq", {"bits": 18}, max_extra=64),
    "bsq_18": Case(
        "bsq",
        {"bits": 18, "batch_entropy": "full"},
        peer=("LFQ", {"codebook_size": 2**18, "entropy_loss_weight": 0.1, "spherical": True}),
        tokens=512,
        min_speedup=100,
        max_extra=64,
    ),
    "bsq_18_4096": Case("bsq", {"bits": 18, "batch_entropy": "full"}, max_extra=64),
    "simvq_16k": Case(
        "simvq",
        sizes(16384, 128, projection_bias=False),
        peer=("SimVQ", sizes(16384, 128, rotation_trick=False)),
        products=(16384, 128, 1),
        min_speedup=1.5,
        spares=True,
    ),
    "fvq_16k": Case("fvq", sizes(16384, 64), products=(16384, 64, 1)),
    "rvq": Case(
        "rvq",
        sizes(1024, 64, **RVQ),
        peer=("ResidualVQ", sizes(1024, 64, num_quantizers=4, **VQ_PEER)),
        products=(1024, 64, 4),
        min_speedup=5,
        spares=True,
    ),
    "grouped_rvq": Case(
        "grouped_vq",
        sizes(1024, 64, **GROUPED, quantizer=RVQ_STACK),
        peer=("GroupedResidualVQ", sizes(1024, 64, num_quantizers=4, groups=2, **VQ_PEER)),
        products=(1024, 32, 8),
        min_speedup=1,
        spares=True,
    ),
    "fsq": Case("fsq", {}, peer=("FSQ", {"levels": [8, 5, 5, 5]}), min_speedup=1, spares=True),
    "rfsq": Case(
        "rfsq",
        {"levels": RFSQ_LEVELS},
        peer=("ResidualFSQ", {"levels": RFSQ_LEVELS, "num_quantizers": 4}),
        min_speedup=1,
        spares=True,
    ),
    "grouped_rfsq": Case(
        "grouped_vq",
        {"codebook_size": None, "dim": None, "levels": RFSQ_LEVELS, **GROUPED, "quantizer": RFSQ_STACK},
        peer=("GroupedResidualFSQ", {"dim": 8, "groups": 2, "levels": RFSQ_LEVELS, "num_quantizers": 4}),
        min_speedup=1,
        spares=True,
    ),
}


def make_quantizer(case: Case) -> vistok.Quantizer:
    """Our quantizer, in training mode."""
    config = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{case.method}.yaml"), resolve=True)
    assert isinstance(config, dict)
    # Replaced, not merged: a template is given whole.
    return vistok.build({**{str(key): value for key, value in config.items()}, **case.overrides}).train()


def make_peer(case: Case) -> nn.Module:
    """The peer's quantizer, in training mode."""
    import vector_quantize_pytorch

    assert case.peer is not None
    name, arguments = case.peer
    torch.manual_seed(0)
    return getattr(vector_quantize_pytorch, name)(**arguments).train()


def our_step(quantizer: vistok.Quantizer, features: Tensor) -> tuple[Tensor, Tensor]:
    """Forward, backward and update."""
    # Channels last in memory, as the peer takes them and as convolutions in that format give them.
    codes, indices, losses = quantizer(features.movedim(-1, 1))
    total = codes.sum() + sum(quantizer.loss_weights[name] * value for name, value in losses.items())
    total.backward()
    quantizer.update()
    return codes, indices


def our_assignment(quantizer: vistok.Quantizer, features: Tensor) -> tuple[Tensor]:
    """Optimal transport only."""
    assert isinstance(quantizer, VectorQuantizer)
    codebook = quantizer.codebook
    assert codebook is not None
    return (quantizer._assign(features.detach()[0], codebook),)


def peer_step(quantizer: nn.Module, features: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and backward; the peer updates its averages in the forward."""
    codes, indices, *losses = quantizer(features)
    (codes.sum() + sum(loss.sum() for loss in losses)).backward()
    return codes, indices


def workload(name: str, who: str, quick: bool, device: str) -> tuple[Callable[[], Any], Callable[[], int]]:
    """What to measure, and a function that gives the bytes of its outputs and gradients afterwards.

    Args:
        name: Of the case.
        who: ``ours`` or ``peer``.
        quick: Whether to shrink the case.
        device: Where it runs.
    """
    case = CASES[name].shrunk() if quick else CASES[name]
    ours = make_quantizer(case).to(device)
    if who == "ours":
        module: nn.Module = ours
        step = partial(our_assignment if case.assignment else our_step, ours)
    else:
        module = make_peer(case).to(device)
        step = partial(peer_step, module)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, case.tokens, ours.dim, generator=generator).to(device).requires_grad_()
    outputs: list[Tensor] = []

    def run() -> None:
        features.grad = None
        module.zero_grad(set_to_none=True)
        outputs[:] = step(features)

    def kept_bytes() -> int:
        gradients = [each.grad for each in (features, *module.parameters()) if each.grad is not None]
        return sum(each.nbytes for each in (*outputs, *gradients))

    return run, kept_bytes


def memory_workload(name: str, who: str, quick: bool, device: str) -> Callable[[], None]:
    """The same after a small step of its kind, so that what libraries allocate once is not counted."""
    workload(name, who, True, device)[0]()
    step, _ = workload(name, who, quick, device)
    gc.collect()
    # Freed memory that the allocator has kept would serve the step without being seen (glibc).
    ctypes.CDLL(None).malloc_trim(0)
    return step


def extra_megabytes(name: str, who: str, quick: bool, device: str, kept_bytes: int) -> float:
    """Extra memory of a step, of which so many bytes are outputs and gradients."""
    peak = peak_extra_memory(memory_workload, name, who, quick, device)
    return max(0, peak - kept_bytes) / MEBIBYTE


def measure(name: str, repeats: int, quick: bool, device: str) -> dict[str, Any]:
    """Times in ms, extra memory in MB, and whether the targets of a case are met."""
    case = CASES[name].shrunk() if quick else CASES[name]
    step, kept_bytes = workload(name, "ours", quick, device)
    times: list[float] = []
    result: dict[str, Any] = {"case": name, "tokens": case.tokens}
    if case.products is not None:
        codes, dim, count = case.products
        product = best_bare_product(
            torch.randn(case.tokens, dim, device=device), torch.randn(codes, dim, device=device)
        )
        seconds, bound = time_alternating(step, product, repeats)
        times.append(seconds)
        result["product_ms"] = 1e3 * bound * count
    if case.peer is not None:
        peer, peer_kept_bytes = workload(name, "peer", quick, device)
        # A peer that takes minutes is not repeated.
        seconds, other = time_alternating(step, peer, 1 if (case.min_speedup or 0) >= 100 else repeats)
        times.append(seconds)
        result["peer_ms"] = 1e3 * other
        result["peer_extra_mb"] = extra_megabytes(name, "peer", quick, device, peer_kept_bytes())
    result["ms"] = 1e3 * min(times or time_alternating(step, lambda: None, repeats)[:1])
    result["extra_mb"] = extra_megabytes(name, "ours", quick, device, kept_bytes())
    if "product_ms" in result:
        result["ratio"] = result["ms"] / result["product_ms"]
    if "peer_ms" in result:
        result["speedup"] = result["peer_ms"] / result["ms"]
    limits = {"ratio": case.max_ratio, "speedup": case.min_speedup, "extra_mb": case.max_extra}
    if case.spares:
        limits["extra_mb"] = result["peer_extra_mb"] + RESOLUTION
    result["targets"] = {
        key: {"limit": limit, "met": result[key] >= limit if key == "speedup" else result[key] <= limit}
        for key, limit in limits.items()
        if limit is not None
    }
    return result


def show(results: Sequence[Mapping[str, Any]]) -> Table:
    """All results side by side; beside a value its target, in red if it is missed."""
    headers = {
        **{"ms": "ms", "product_ms": "product ms", "ratio": "ratio", "peer_ms": "peer ms", "speedup": "times faster"},
        **{"extra_mb": "extra MB", "peer_extra_mb": "peer MB"},
    }
    table = Table("case", *headers.values())
    for column in table.columns[1:]:
        column.justify = "right"
    for result in results:
        cells = []
        for key in headers:
            cell = f"{result[key]:.3g}" if key in result else ""
            if key in result["targets"]:
                target = result["targets"][key]
                sign, colour = ">=" if key == "speedup" else "<=", "green" if target["met"] else "red"
                cell += f" [{colour}]{sign} {target['limit']:.3g}[/]"
            cells.append(cell)
        table.add_row(result["case"], *cells)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes, one repeat; targets mean nothing then")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    # Wide enough for the table where there is no terminal.
    console = Console(width=None if sys.stdout.isatty() else 120)
    machine = {
        "processor": torch.cuda.get_device_name(options.device) if options.device != "cpu" else processor(),
        "threads": options.threads,
        "torch": torch.__version__,
        "quick": options.quick,
    }
    results = []
    for name in options.cases:
        with console.status(name):
            results.append(measure(name, 1 if options.quick else options.repeats, options.quick, options.device))
        # After every case, so that an interruption keeps what there is.
        if options.json:
            options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    console.print(show(results))


def processor() -> str:
    """Name of the CPU."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.machine()


if __name__ == "__main__":
    main()
