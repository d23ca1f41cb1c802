"""What happens to thousands of damaged and hostile checkpoints: `python benchmarks/fuzz_reader.py`.

Every file is read by `vistok.hub.checkpoint.read_checkpoint`; a bundle's files are loaded by `vistok.load`. Counted are
clear errors (ValueError), files that were read although damaged (the damage was in numbers of a format without
checksums, or had no effect), and anything else; beside these the longest time and the growth of the process.
"""

import argparse
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

import vistok
from vistok.decoder import CNNDecoder
from vistok.encoder import CNNEncoder
from vistok.hub.checkpoint import flatten, read_checkpoint
from vistok.quantizer import FSQ

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "hub"))
from hostile_files import HARMLESS, HOSTILE, damaged, mutations

COLUMNS = ("files", "error", "read", "other", "slowest s", "MiB")


def peak() -> float:
    """Highest memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def attack(contents: Iterable[bytes], write: Callable[[bytes], object], read: Callable[[], object]) -> list[str]:
    """Write and read each file; a row of the table."""
    outcomes: Counter[str] = Counter()
    slowest, before = 0.0, peak()
    for content in contents:
        write(content)
        start = time.perf_counter()
        try:
            read()
        except ValueError:
            outcomes["error"] += 1
        except Exception as error:
            outcomes["other"] += 1
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        else:
            outcomes["read"] += 1
        slowest = max(slowest, time.perf_counter() - start)
    counts = [outcomes.total(), *(outcomes[name] for name in COLUMNS[1:4])]
    return [*map(str, counts), f"{slowest:.2f}", f"{peak() - before:.0f}"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=2000, help="damaged files of each kind")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| attack | " + " | ".join(COLUMNS) + " |")
    print("|---|" + "---|" * len(COLUMNS))
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "file.pt"

        def show(name: str, row: list[str]) -> None:
            print(f"| {name} | {' | '.join(row)} |", flush=True)

        def read() -> None:
            flatten(read_checkpoint(path))

        for kind in ("zip", "legacy", "safetensors"):
            files = mutations(kind, arguments.files, random.Random(arguments.seed))
            show(f"damaged {kind}", attack(files, path.write_bytes, read))
        tokenizer = vistok.Tokenizer(
            CNNEncoder(base_channels=32, num_blocks=1), FSQ((5, 5)), CNNDecoder(base_channels=32, num_blocks=1)
        )
        bundle = vistok.save(tokenizer, Path(temporary) / "bundle")
        for name in ("config.json", "model.safetensors"):
            original = (bundle / name).read_bytes()
            files = damaged(original, arguments.files // 10, random.Random(arguments.seed))
            show(f"damaged {name}", attack(files, (bundle / name).write_bytes, lambda: vistok.load(bundle)))
            (bundle / name).write_bytes(original)
        for name, content in {**HOSTILE, **HARMLESS}.items():
            show(name, attack([content()], path.write_bytes, read))


if __name__ == "__main__":
    main()
