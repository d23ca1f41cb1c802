"""Time of `vistok.load` over that of reading the file and building the module: `python benchmarks/load.py`.

Both parts are measured in the same process, alternating; the minimum of each counts.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import vistok
from vistok.decoder import CNNDecoder
from vistok.encoder import CNNEncoder
from vistok.quantizer import VectorQuantizer


def seconds(run: Callable[[], Any]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Print the times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--base-channels", type=int, default=128, help="128: VQGAN f16, 290 MiB")
    arguments = parser.parse_args()
    trunk = {
        "patch_size": 1,
        "base_channels": arguments.base_channels,
        "channel_multipliers": (1, 1, 2, 2, 4),
        "attention": "last",
        "z_channels": 256,
    }
    tokenizer = vistok.Tokenizer(
        CNNEncoder(**trunk), VectorQuantizer(16384, 256), CNNDecoder(**trunk), preprocessing={"size": [256, 256]}
    )
    with tempfile.TemporaryDirectory() as temporary:
        bundle = vistok.save(tokenizer, Path(temporary) / "bundle")
        config = json.loads((bundle / "config.json").read_text())
        plain = {key: value for key, value in config.items() if key not in ("format", "vistok_version")}
        parts: dict[str, Callable[[], Any]] = {
            "read": (bundle / "model.safetensors").read_bytes,
            "build": lambda: vistok.build(plain),
            "load": lambda: vistok.load(bundle),
        }
        times = {name: min(seconds(run) for _ in range(arguments.repeats)) for name, run in parts.items()}
        size = (bundle / "model.safetensors").stat().st_size / 2**20
    ratio = times["load"] / (times["read"] + times["build"])
    shown = ", ".join(f"{name} {value:.3f} s" for name, value in times.items())
    print(f"{size:.0f} MiB, {torch.get_num_threads()} threads: {shown}")
    print(f"load / (read + build) = {ratio:.2f} (target <= 1.5)")


if __name__ == "__main__":
    main()
