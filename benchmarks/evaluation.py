"""Time of a whole evaluation against its floor: the tokenizer and the networks alone on the same images.

    python benchmarks/evaluation.py                       # 256 noise pictures of 128 pixels through a small tokenizer
    python benchmarks/evaluation.py --images 256 1024 --cases evaluation
    python benchmarks/evaluation.py --bundle runs/.../bundle --images 2000 --size 256 --batch-size 50

The floor runs encoding and decoding, and Inception on originals and reconstructions, and keeps nothing. Evaluation does
that, the metrics of every image, all distances, codebook usage, and the examples and references of the report; the
roots of covariances and the references cost the same for 128 images or more, so a ratio is of that number. `lpips`
has LPIPS too, whose network is then part of the floor; `cached` finds the features of the originals in the cache, and
its floor runs Inception on reconstructions only. Both sides run in turn in one process; the smallest of the rounds is
shown, with `--memory` also what a process needs at its peak over its inputs. Times are of the processor (user and
system) on a CPU, and of the clock on a GPU. Needs the weights of Inception and LPIPS (`VISTOK_WEIGHTS`). Written to
`benchmarks/results/evaluation.json`, where rows of other cases and numbers of images stay.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import torch
from _measure import MEBIBYTE, peak_extra_memory, synchronise
from torch import Tensor

import vistok
from vistok.decoder import CNNDecoder
from vistok.encoder import CNNEncoder
from vistok.evaluation import evaluate
from vistok.evaluation.models import device_of
from vistok.loss.lpips import LPIPS
from vistok.metric import Inception
from vistok.metric.image import to_pixels
from vistok.quantizer import FSQ

RESULTS = Path(__file__).parent / "results"
TARGET = 1.25
CASES = ("evaluation", "lpips", "cached")
PROTOCOL = {"dataset": "noise", "split": "none", "resize": "none", "crop": "none"}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", help="bundle folder, run folder or hub id; default: a small tokenizer")
    parser.add_argument("--images", type=int, nargs="+", default=[256])
    parser.add_argument("--size", type=int, default=128, help="side in pixels")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--memory", action="store_true", help="measure memory too, in processes of their own")
    options = parser.parse_args()
    torch.manual_seed(0)
    file = RESULTS / "evaluation.json"
    rows = json.loads(file.read_text()) if file.exists() else {}
    for name, images in product(options.cases, options.images):
        row = measure(name, images, options)
        print(name, images, {key: round(value, 3) for key, value in row.items()}, flush=True)
        settings = {"bundle": options.bundle, "size": options.size, "batch_size": options.batch_size}
        versions = {"device": options.device, "torch": torch.__version__, "threads": torch.get_num_threads()}
        rows[f"{name}, {images} images"] = {**row, "target": TARGET, **settings, **versions, "rounds": options.rounds}
        RESULTS.mkdir(exist_ok=True)
        file.write_text(json.dumps(rows, indent=2) + "\n")


def measure(name: str, images: int, options: argparse.Namespace) -> dict[str, float]:
    """Figures of a case."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = options, images, "vgg" if name == "lpips" else None, folder if name == "cached" else None
        whole, least = prepare(evaluation, *arguments), prepare(floor, *arguments)
        if name == "cached":
            whole()
        row = compare(whole, least, options)
        if options.memory:
            for side, case in (("memory_mib", evaluation), ("floor_memory_mib", floor)):
                row[side] = peak_extra_memory(partial(prepare, case), *arguments) / MEBIBYTE
    return row


def compare(whole: Callable[[], None], least: Callable[[], None], options: argparse.Namespace) -> dict[str, float]:
    """Seconds of both sides and their ratio."""
    times = [(seconds(whole, options), seconds(least, options)) for _ in range(options.rounds)]
    best, best_floor = (min(column) for column in zip(*times, strict=True))
    return {"seconds": best, "floor_seconds": best_floor, "ratio": best / best_floor}


def seconds(function: Callable[[], None], options: argparse.Namespace) -> float:
    """Of the processor on a CPU, where other processes then count less; of the clock on a GPU."""
    clock = time.perf_counter if options.device.startswith("cuda") else time.process_time
    synchronise()
    start = clock()
    function()
    synchronise()
    return clock() - start


def prepare(
    case: Callable[..., None], options: argparse.Namespace, count: int, lpips: str | None, cache: str | None
) -> Callable[[], None]:
    """A case with its inputs, run once on one batch."""
    parts = {"base_channels": 32, "attention": "none", "num_blocks": 1}
    tokenizer = (
        vistok.load(options.bundle)
        if options.bundle
        else vistok.Tokenizer(CNNEncoder(**parts), FSQ([8, 5, 5, 5]), CNNDecoder(**parts)).eval()
    ).to(options.device)
    small = torch.rand(count, 3, 12, 12)
    images = torch.nn.functional.interpolate(small, options.size, mode="bicubic").clamp(0, 1) * 2 - 1
    case(tokenizer, images[: options.batch_size], options.batch_size, lpips, None)
    return partial(case, tokenizer, images, options.batch_size, lpips, cache)


def evaluation(
    tokenizer: vistok.Tokenizer, images: Tensor, batch_size: int, lpips: str | None, cache: str | None
) -> None:
    """Everything that ``eval.py`` measures."""
    batches = ({"images": part} for part in images.split(batch_size))
    evaluate(tokenizer, batches, protocol=PROTOCOL, lpips=lpips, distances=None, cache=cache)


@torch.inference_mode()
def floor(tokenizer: vistok.Tokenizer, images: Tensor, batch_size: int, lpips: str | None, cache: str | None) -> None:
    """The tokenizer, Inception on both sides, on one where the other is cached, and the network of LPIPS."""
    device = device_of(tokenizer)
    inception = Inception().to(device)
    network = LPIPS(lpips).to(device) if lpips is not None else None
    for part in images.split(batch_size):
        part = part.to(device)
        reconstructions = tokenizer.decode(tokenizer.encode(part).codes)
        for pixels in (reconstructions,) if cache is not None else (reconstructions, part):
            inception(to_pixels(pixels))
        if network is not None:
            network(reconstructions, part)


if __name__ == "__main__":
    main()
