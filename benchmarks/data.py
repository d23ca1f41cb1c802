"""Images per second of the loaders, beside torchvision's ImageFolder and beside decoding alone.

Every row decodes the same files with as many processes: ``decode`` only decodes their bytes, which are in memory, with
the fastest decoder at hand, and is the limit; ``torchvision`` is its ImageFolder, transforms and DataLoader;
``folder`` and ``shards`` are vistok's as a Trainer gets them, whose device makes float32 of uint8; ``, float32``: the
main process does. Rows are timed in turn, round after round, and the median of each counts.

    python benchmarks/data.py --json benchmarks/results/data.json
"""

import argparse
import io
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms as tv
from torchvision.datasets import ImageFolder as TorchvisionFolder
from torchvision.io import ImageReadMode, decode_jpeg

from vistok.data import ImageFolderData, WebDatasetData
from vistok.data.convert import Recipe, convert
from vistok.data.image_folder import ImageFolder, find_classes, find_images
from vistok.data.photos import GRAY, TRAIN, photo_path

TARGETS = {"torchvision": 1.5, "decode": 0.85}


def write_pictures(folder: Path, count: int, width: int, height: int) -> None:
    """Crops of the embedded photographs as JPEG files of quality 95 in two classes."""
    names = sorted(TRAIN | GRAY)
    for number in range(count):
        with Image.open(photo_path(names[number % len(names)])) as photo:
            scale = max(width / photo.width, height / photo.height)
            side = max(width, round(photo.width * scale)), max(height, round(photo.height * scale))
            picture = photo.convert("RGB").resize(side, Image.Resampling.LANCZOS).rotate(number % 7, expand=False)
        left, top = (picture.width - width) * (number % 5) // 4, (picture.height - height) * (number % 3) // 2
        path = folder / f"class{number % 2}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.crop((left, top, left + width, top + height)).save(path, quality=95)


def decode_all(
    files: list[bytes], decoder: str, start: multiprocessing.Barrier, seconds: multiprocessing.Queue
) -> None:
    """Decode bytes that are in memory; a process of its own."""
    torch.set_num_threads(1)
    start.wait()
    begin = time.perf_counter()
    for data in files:
        DECODERS[decoder](data)
    seconds.put(time.perf_counter() - begin)


def by_torchvision(data: bytes) -> None:
    """Decode by torchvision."""
    decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)


def by_pillow(data: bytes) -> None:
    """Decode by Pillow."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()


DECODERS: dict[str, Callable[[bytes], None]] = {"torchvision": by_torchvision, "pillow": by_pillow}


def fastest_decoder(files: list[bytes]) -> str:
    """Name of the decoder that is faster on these files."""
    times = {}
    for name, decoder in DECODERS.items():
        rounds = []
        for _ in range(3):
            begin = time.process_time()
            for data in files[:100]:
                decoder(data)
            rounds.append(time.process_time() - begin)
        times[name] = min(rounds)
    return min(times, key=times.__getitem__)


def decoding_rate(files: list[bytes], decoder: str, workers: int) -> float:
    """Images per second of processes that do nothing but decode."""
    context = multiprocessing.get_context("fork")
    start, seconds = context.Barrier(workers), context.Queue()
    processes = [
        context.Process(target=decode_all, args=(files[number::workers], decoder, start, seconds))
        for number in range(workers)
    ]
    for process in processes:
        process.start()
    slowest = max(seconds.get() for _ in processes)
    for process in processes:
        process.join()
    return len(files) / slowest


def loading_rate(batches: Iterator[dict | list]) -> float:
    """Images per second of a loader, from its first batch on: its processes have started by then."""
    next(batches)
    begin = time.perf_counter()
    count = sum(len(batch["images"] if isinstance(batch, dict) else batch[0]) for batch in batches)
    return count / (time.perf_counter() - begin)


def measure(folder: Path, pictures: int, shape: tuple[int, int], arguments: argparse.Namespace) -> dict:
    """All rows for pictures of one shape."""
    source = folder / f"{shape[0]}x{shape[1]}"
    write_pictures(source, pictures, *shape)
    paths = find_images(source)
    files = [(source / path).read_bytes() for path in paths]
    shards = folder / f"shards-{shape[0]}"
    convert(ImageFolder(source, paths, find_classes(paths)), shards, Recipe(), shard_samples=100)
    size, workers, batch_size = arguments.size, arguments.workers, arguments.batch_size
    options = {"image_size": size, "batch_size": batch_size, "num_workers": workers}
    epochs = arguments.epochs

    def torchvision_loader() -> Iterator[list]:
        steps = [
            tv.Resize(size, tv.InterpolationMode.BICUBIC),
            tv.RandomCrop(size),
            tv.RandomHorizontalFlip(),
            tv.ToTensor(),
            tv.Normalize([0.5] * 3, [0.5] * 3),
        ]
        dataset = TorchvisionFolder(str(source), tv.Compose(steps))
        epoch = torch.utils.data.ConcatDataset([dataset] * epochs)
        return iter(DataLoader(epoch, batch_size, shuffle=True, num_workers=workers, drop_last=True))

    def folder_loader(raw: bool = True, **more: object) -> Iterator[dict]:
        data = ImageFolderData(str(source), str(repeated), str(source / "class0"), **options, **more)
        return iter(data.make_train_loader(None, 0, 1, raw=raw))

    def shard_loader(raw: bool = True) -> Iterator[dict]:
        data = WebDatasetData(str(shards), str(shards / "none"), pictures * epochs, **options)
        return iter(data.make_train_loader(None, 0, 1, raw=raw))

    (shards / "none").mkdir()
    (shards / "none" / "0.tar").touch()
    # One long epoch for everybody: between epochs the processes of a loader have nothing to do.
    repeated = folder / f"{source.name}.txt"
    repeated.write_text("\n".join(paths * epochs))
    decoder = fastest_decoder(files)
    rows: dict[str, Callable[[], float]] = {
        "decode": lambda: decoding_rate(files * epochs, decoder, workers),
        "torchvision": lambda: loading_rate(torchvision_loader()),
        "folder": lambda: loading_rate(folder_loader()),
        "shards": lambda: loading_rate(shard_loader()),
        "folder, float32": lambda: loading_rate(folder_loader(raw=False)),
        "shards, float32": lambda: loading_rate(shard_loader(raw=False)),
    }
    if min(shape) >= 4 * size:
        rows["folder, reduced decoding"] = lambda: loading_rate(folder_loader(reduced_decode=True))
    rates: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(arguments.rounds):
        for name, row in rows.items():
            rates[name].append(row())
    medians = {name: statistics.median(values) for name, values in rates.items()}
    result = {"pictures": f"{pictures} JPEG files, {shape[0]}x{shape[1]}", "decoder": decoder}
    print(f"\n{result['pictures']}; fastest decoder: {decoder}")
    print(f"{'':26}{'images/s':>10}{'x torchvision':>16}{'of decode':>12}")
    for name, rate in medians.items():
        # Ratios of the same round, so that a change in the machine's load falls out.
        ratios = {
            other: statistics.median(a / b for a, b in zip(rates[name], rates[other], strict=True)) for other in TARGETS
        }
        result[name] = {"images_per_second": round(rate, 1), **{k: round(v, 3) for k, v in ratios.items()}}
        print(f"{name:26}{rate:10.1f}{ratios['torchvision']:16.2f}{ratios['decode']:12.2f}")
    return result


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="pixels of the training crops")
    parser.add_argument("--pictures", type=int, default=400, help="files of each shape")
    parser.add_argument("--epochs", type=int, default=4, help="passes over the files in one timing")
    parser.add_argument("--rounds", type=int, default=5, help="how often all rows are timed")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of every row")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--json", type=Path, help="where to write the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        shapes = [(arguments.size, arguments.size), (500, 375), (4 * arguments.size + 256, 4 * arguments.size)]
        counts = [arguments.pictures, arguments.pictures // 2, arguments.pictures // 4]
        results = [measure(Path(folder), count, shape, arguments) for count, shape in zip(counts, shapes, strict=True)]
    size, faster, share = arguments.size, TARGETS["torchvision"], TARGETS["decode"]
    print(f"\ntargets for pictures of {size} pixels: {faster} x torchvision, {share} of decode")
    if arguments.json:
        machine = {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "workers": arguments.workers,
            "batch_size": arguments.batch_size,
            "crop": arguments.size,
            "targets": TARGETS,
        }
        arguments.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
