"""FID of the same files by torch-fidelity, pytorch-fid and vistok.

    python benchmarks/fid_side_by_side.py --bundle runs/.../bundle --shards '/data/val-{00000..00003}.tar'
    python benchmarks/fid_side_by_side.py --blur 4 --shards '/data/val-{00000..00003}.tar'
    python benchmarks/fid_side_by_side.py --originals FOLDER --reconstructions FOLDER

Originals and reconstructions (of a tokenizer, of a blur, or two folders of PNG files of the same names) are written as
PNG files, resized by Pillow (bicubic) to each of the sizes. Then three programs score these files:

- torch-fidelity, whose Inception resizes as TensorFlow 1 does, against vistok with `extractor_resize: tf1`;
- pytorch-fid, whose Inception resizes as PyTorch does, against vistok with `extractor_resize: torch`. Its weights are a
  download; it gets those of `VISTOK_WEIGHTS` and keeps its own network, reading, resize and loop.

The root of a product of covariances is where the programs differ by themselves, for fewer images than its 2048
dimensions by more than the target. So there is also vistok's Frechet distance of pytorch-fid's statistics: what remains
between it and vistok is due to the features. Written to `benchmarks/results/fid_side_by_side.md`.
"""

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter
from pytorch_fid import fid_score, inception
from torch import Tensor
from torch_fidelity import calculate_metrics

import vistok
from vistok.data import WebDatasetData
from vistok.hub.bundle import find_bundle
from vistok.metric import FeatureDistances, Inception
from vistok.metric.distances import frechet_distance
from vistok.metric.extractor import INCEPTION_FILE
from vistok.metric.image import to_uint8
from vistok.metric.weights import find_weights

RESULTS = Path(__file__).parent / "results"
TARGET = 1e-3
SIDES = ("reconstructions", "originals")


class Scores(NamedTuple):
    """FID of one set of files."""

    tf1: float
    torch_fidelity: float
    torch: float
    pytorch_fid: float
    pytorch_fid_statistics: float


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", help="bundle folder, run folder or hub id")
    parser.add_argument("--blur", type=float, help="instead of a tokenizer: radius of a Gaussian blur in pixels")
    parser.add_argument("--shards", help="brace pattern of tar files")
    parser.add_argument("--originals", type=Path, help="instead of shards: folder of PNG files")
    parser.add_argument("--reconstructions", type=Path, help="and of PNG files of the same names")
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--size", type=int, default=128, help="side in pixels that is reconstructed")
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 299], help="sides of the files")
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    folders = options.originals is not None and options.reconstructions is not None
    if folders == (options.shards is not None) or (not folders and (options.bundle is None) == (options.blur is None)):
        parser.error("write --shards with --bundle or --blur, or --originals and --reconstructions")
    rows: dict[int, Scores] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for size in options.sizes:
            for side in SIDES:
                (Path(scratch) / str(size) / side).mkdir(parents=True)
        number = write_files(read_pairs(options) if folders else make_pairs(options), options, Path(scratch))
        for size in options.sizes:
            started = time.perf_counter()
            rows[size] = score(Path(scratch) / str(size), options)
            print(f"{size} pixels, {time.perf_counter() - started:.0f} s: {rows[size]._asdict()}", flush=True)
    write(rows, number, options)


def make_pairs(options: argparse.Namespace) -> Iterator[tuple[Image.Image, Image.Image]]:
    """Reconstructions and originals of pictures of shards."""
    data = WebDatasetData(
        None, options.shards, image_size=options.size, eval_batch_size=options.batch_size, num_workers=0
    )
    tokenizer = None
    if options.bundle is not None:
        tokenizer = vistok.load(find_bundle(options.bundle), device=torch.device(options.device))
    for batch in data.eval_dataloader():
        originals = pictures(batch["images"])
        if tokenizer is None:
            ours = [picture.filter(ImageFilter.GaussianBlur(options.blur)) for picture in originals]
        else:
            with torch.inference_mode():
                ours = pictures(tokenizer(batch["images"].to(options.device)).images)
        yield from zip(ours, originals, strict=True)


def pictures(images: Tensor) -> list[Image.Image]:
    """8-bit pictures of images in [-1, 1]."""
    return [Image.fromarray(np.ascontiguousarray(image.movedim(0, -1).numpy())) for image in to_uint8(images).cpu()]


def read_pairs(options: argparse.Namespace) -> Iterator[tuple[Image.Image, Image.Image]]:
    """Reconstructions and originals of two folders."""
    names = [
        sorted(path.name for path in folder.glob("*.png")) for folder in (options.reconstructions, options.originals)
    ]
    if names[0] != names[1] or not names[0]:
        raise SystemExit(
            f"the folders must hold PNG files of the same names, they have {len(names[0])} and {len(names[1])}"
        )
    for name in names[0]:
        ours, original = (Image.open(folder / name) for folder in (options.reconstructions, options.originals))
        yield ours.convert("RGB"), original.convert("RGB")


def write_files(pairs: Iterator[tuple[Image.Image, Image.Image]], options: argparse.Namespace, scratch: Path) -> int:
    """Write pairs in every size; returns their number."""
    number = 0
    for number, pair in zip(count(1), islice(pairs, options.images), strict=False):
        for size in options.sizes:
            for side, picture in zip(SIDES, pair, strict=True):
                resized = picture.resize((size, size), Image.Resampling.BICUBIC)
                resized.save(scratch / str(size) / side / f"{number:06}.png")
    return number


def score(folder: Path, options: argparse.Namespace) -> Scores:
    """What each program says of the files below a folder."""
    sides = [folder / side for side in SIDES]
    files = [sorted(side.glob("*.png")) for side in sides]
    ours = {resize: vistok_fid(files, resize, options) for resize in ("tf1", "torch")}
    metrics = calculate_metrics(
        input1=str(sides[0]),
        input2=str(sides[1]),
        fid=True,
        cuda=options.device.startswith("cuda"),
        batch_size=options.batch_size,
        feature_extractor_weights_path=str(find_weights(INCEPTION_FILE)),
        cache=False,
        save_cpu_ram=True,  # no processes of its own to read the files
        verbose=False,
    )
    printed, ours_of_theirs = pytorch_fid(files, options)
    return Scores(ours["tf1"], metrics["frechet_inception_distance"], ours["torch"], printed, ours_of_theirs)


def vistok_fid(files: Sequence[Sequence[Path]], resize: str, options: argparse.Namespace) -> float:
    """What vistok says of files."""
    distances = FeatureDistances(Inception(resize=resize), ["rfid"]).to(options.device)
    for start in range(0, len(files[0]), options.batch_size):
        batch = [read(side[start : start + options.batch_size]).to(options.device) for side in files]
        distances.update(*batch)
    return distances.compute()["rfid"]


def read(files: Sequence[Path]) -> Tensor:
    """Values in [0, 255] of pictures, ``(b 3 h w)``."""
    return torch.stack([torch.from_numpy(np.array(Image.open(file))).movedim(-1, 0) for file in files]).float()


def pytorch_fid(files: Sequence[Sequence[Path]], options: argparse.Namespace) -> tuple[float, float]:
    """What pytorch-fid says, NaN if its root fails, and vistok's Frechet distance of its statistics."""
    weights = torch.load(find_weights(INCEPTION_FILE), map_location="cpu", weights_only=True)
    inception.load_state_dict_from_url = lambda *_, **__: weights
    block = inception.InceptionV3.BLOCK_INDEX_BY_DIM[2048]
    network = inception.InceptionV3([block]).to(options.device)
    settings = (network, options.batch_size, 2048, options.device, 0)
    (mean, covariance), (other_mean, other_covariance) = (
        fid_score.calculate_activation_statistics(side, *settings) for side in files
    )
    statistics = (mean, covariance, other_mean, other_covariance)
    ours = float(frechet_distance(*map(torch.from_numpy, statistics)))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return float(fid_score.calculate_frechet_distance(*statistics)), ours
    except ValueError as error:
        print(f"pytorch-fid: {error}")
        return float("nan"), ours


def write(rows: dict[int, Scores], number: int, options: argparse.Namespace) -> None:
    """Write ``fid_side_by_side.md`` and ``.json``, and print the table."""
    source = Path(options.shards or options.originals).name
    codec = f"a blur of {options.blur:g} pixels" if options.blur is not None else "a tokenizer"
    codec = "PNG files of a folder" if options.shards is None else codec
    lines = [
        f"# {number} pictures of {source}, reconstructions: {codec}",
        "",
        "| side | vistok, tf1 | torch-fidelity | difference | vistok, torch | pytorch-fid | difference "
        "| of its statistics | torch - tf1 |",
        "|---" * 9 + "|",
    ]
    for size, scores in rows.items():
        differences = [
            f"{value:+.1e}{'' if abs(value) < TARGET else ' !'}"
            for value in (
                scores.tf1 - scores.torch_fidelity,
                scores.torch - scores.pytorch_fid,
                scores.torch - scores.pytorch_fid_statistics,
            )
        ]
        cells = [
            *(str(size), f"{scores.tf1:.4f}", f"{scores.torch_fidelity:.4f}", differences[0]),
            *(f"{scores.torch:.4f}", f"{scores.pytorch_fid:.4f}", *differences[1:]),
            f"{scores.torch - scores.tf1:+.4f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Target: differences below {TARGET:g}; others have an exclamation mark. `of its statistics` is the difference "
        "to vistok's Frechet distance of pytorch-fid's means and covariances. Written by "
        "`python benchmarks/fid_side_by_side.py`.",
        "",
    ]
    settings = {"images": number, "source": source, "codec": codec, "device": options.device, "target": TARGET}
    values = {str(size): scores._asdict() for size, scores in rows.items()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "fid_side_by_side.json").write_text(json.dumps(settings | {"sides": values}, indent=2) + "\n")
    (RESULTS / "fid_side_by_side.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
