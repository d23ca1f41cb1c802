"""The same reconstructions under every protocol of ``configs/protocol``: how far published conventions lie apart.

    python benchmarks/protocols.py --bundle runs/.../bundle --shards '/data/val-{00000..00003}.tar'

Every row scores the same images and the same reconstructions; only rounding, Inception's resize, SSIM's window and
range and LPIPS's network differ. What a protocol does before the tokenizer sees the images (resize filter and crop) is
not in the table, since the reconstructions would be others. Needs the weights of Inception and LPIPS
(`VISTOK_WEIGHTS`).
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

import vistok
from vistok.data import WebDatasetData
from vistok.evaluation.measures import ImageMeasures
from vistok.evaluation.protocol import Protocol
from vistok.hub.bundle import find_bundle
from vistok.metric import FeatureDistances, Inception
from vistok.metric.image import to_pixels

RESULTS = Path(__file__).parent / "results"
PROTOCOLS = Path(__file__).parent.parent / "configs" / "protocol"
COLUMNS = (
    ("rFID", "rfid", ".2f"),
    ("PSNR dB", "psnr", ".3f"),
    ("SSIM", "ssim", ".4f"),
    ("LPIPS vgg", "lpips_vgg", ".4f"),
    ("LPIPS alex", "lpips_alex", ".4f"),
)


class Group(NamedTuple):
    """Protocols that give the same numbers, and what measures them."""

    rules: Protocol
    measures: ImageMeasures | FeatureDistances


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", required=True, help="bundle folder, run folder or hub id")
    parser.add_argument("--shards", required=True, help="brace pattern of tar files")
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--size", type=int, default=128, help="side in pixels")
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    protocols = [instantiate(OmegaConf.load(path), _convert_="all") for path in sorted(PROTOCOLS.glob("*.yaml"))]
    protocols.sort(key=lambda rules: rules.name != "vistok")
    rows, count, seconds = measure(protocols, options)
    write(rows, options, count, seconds)


def measure(protocols: Sequence[Protocol], options: argparse.Namespace) -> tuple[dict, int, float]:
    """Numbers of every protocol by name, number of images, and seconds."""
    device, started, count = torch.device(options.device), time.perf_counter(), 0
    tokenizer = vistok.load(find_bundle(options.bundle), device=device)
    by_image: list[Group] = []
    by_features: list[Group] = []
    for images in batches(options):
        images = images.to(device)
        with torch.inference_mode():
            reconstructions = tokenizer.decode(tokenizer.encode(images).codes, images.shape[2:])
        if not count:
            by_image = [
                Group(rules, ImageMeasures(images.shape[1:], device, rules=rules, distances=()))
                for rules in distinct([image_rules(rules) for rules in protocols])
            ]
            by_features = [
                Group(rules, FeatureDistances(Inception(resize=rules.extractor_resize), ["rfid"]).to(device))
                for rules in distinct([rules.features() for rules in protocols])
            ]
        with torch.inference_mode():
            for group in by_image:
                group.measures.update(reconstructions, images, [str(count + i) for i in range(len(images))])
            for rules, distances in by_features:
                distances.update(to_pixels(reconstructions, rules.feature_rounding), to_pixels(images))
        count += len(images)
        print(f"\r{count} images, {time.perf_counter() - started:.0f} s", end="", flush=True)
    print()
    numbers = [(rules, measures.compute()[0]) for rules, measures in by_image]
    distances = [(rules, measures.compute()) for rules, measures in by_features]
    rows = {}
    for rules in protocols:
        values = dict(next(found for same, found in numbers if same == image_rules(rules)))
        values |= next(found for same, found in distances if same == rules.features())
        if len(rules.lpips_nets) == 1:
            values = {f"lpips_{rules.lpips}" if name == "lpips" else name: value for name, value in values.items()}
        rows[rules.name] = {name: values[name] for _, name, _ in COLUMNS if name in values}
    return rows, count, time.perf_counter() - started


def image_rules(rules: Protocol) -> Protocol:
    """What the image metrics of a protocol depend on."""
    return Protocol(
        name="",
        rounding=rules.rounding,
        feature_rounding=rules.feature_rounding,
        ssim_window=rules.ssim_window,
        ssim_data_range=rules.ssim_data_range,
        lpips=rules.lpips,
    )


def distinct(protocols: Sequence[Protocol]) -> list[Protocol]:
    """Each once."""
    return [rules for number, rules in enumerate(protocols) if rules not in protocols[:number]]


def batches(options: argparse.Namespace) -> Iterator[Tensor]:
    """The first images of the shards, in [-1, 1]."""
    data = WebDatasetData(
        None, options.shards, image_size=options.size, eval_batch_size=options.batch_size, num_workers=0
    )
    left = options.images
    for batch in data.eval_dataloader():
        yield batch["images"][:left]
        left -= len(batch["images"])
        if left <= 0:
            return


def write(rows: dict, options: argparse.Namespace, count: int, seconds: float) -> None:
    """Write ``protocols.json`` and ``protocols.md``."""
    title = f"{count} images of {options.size} pixels from {Path(options.shards).name}, the same reconstructions"
    settings = {"images": count, "size": options.size, "shards": Path(options.shards).name, "seconds": round(seconds)}
    versions = {"torch": torch.__version__, "device": options.device}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "protocols.json").write_text(json.dumps({**settings, **versions, "protocols": rows}, indent=2) + "\n")
    lines = [f"# {title}", "", "| protocol | " + " | ".join(column for column, _, _ in COLUMNS) + " |"]
    lines.append("|---" * (len(COLUMNS) + 1) + "|")
    for name, values in rows.items():
        cells = [format(values[metric], form) if metric in values else "-" for _, metric, form in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "Written by `python benchmarks/protocols.py`; what each protocol does is in `configs/protocol/`.", ""]
    (RESULTS / "protocols.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
