"""``vistok shards``: write pictures or videos into tar shards for ``data=webdataset`` and ``data=video_shards``."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vistok.data.convert import Conversion
    from vistok.data.manifest import Manifest

EXAMPLES = """examples:
  vistok shards /my/photos shards/train                           copy the files as they are
  vistok shards /my/photos shards/train --size 256 --quality 95   short side to 256 pixels, as JPEG
  vistok shards /my/photos shards/val --list val.txt --size 256 --crop --resize adm
  vistok shards torchvision:cifar10 shards/cifar10 --split train
  vistok shards hf:uoft-cs/cifar100 shards/cifar100 --split train --image-key img --label-key fine_label
  vistok shards /my/videos shards/train --videos                  copy video files and folders of numbered pictures
  vistok shards /my/videos shards/train --videos --size 256       encode them with a short side of 256 pixels
then:
  vistok train data=webdataset data.shards=shards/train data.val_shards=shards/val
  vistok train data=video_shards data.shards=shards/train data.val_shards=shards/val

A conversion that was interrupted goes on when the same command is given again; one that is complete is verified."""
VIDEO_SHARD_BYTES = 10**9  # so that an interruption costs no more than that


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="vistok shards",
        description="Write pictures or videos into tar shards, with a manifest of counts and checksums.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="folder | torchvision:NAME | hf:NAME or hf:FOLDER")
    parser.add_argument("dest", type=Path, help="folder of the shards, one for each split")
    parser.add_argument("--videos", action="store_true", help="look for videos in the folder instead of pictures")
    parser.add_argument("--list", type=Path, metavar="FILE", help="text file of paths below the folder, one per line")
    parser.add_argument("--split", default="train", help="of a torchvision or Hugging Face set (default: train)")
    parser.add_argument(
        "--root", type=Path, default=Path("data"), help="where torchvision keeps its sets (default: data)"
    )
    parser.add_argument("--image-key", default="image", help="column of a Hugging Face set (default: image)")
    parser.add_argument("--label-key", help="column of integer labels")
    parser.add_argument("--text-key", help="column of captions")
    parser.add_argument("--streaming", action="store_true", help="read a Hugging Face set without storing it")
    parser.add_argument("--size", type=int, help="short side in pixels (default: files are copied unchanged)")
    parser.add_argument("--resize", default="short_side", help="short_side | adm (default: short_side)")
    parser.add_argument(
        "--filter", default="bicubic", help="bicubic | bilinear | lanczos | box | opencv_bilinear (default: bicubic)"
    )
    parser.add_argument("--crop", action="store_true", help="cut the centre square")
    parser.add_argument("--format", help="jpg | png | webp (default: jpg, or png for 4 channels)")
    parser.add_argument("--quality", type=int, help="1 to 100, of jpg and webp (default: 95)")
    parser.add_argument("--channels", type=int, default=3, help="3 | 1 | 4 of pictures written anew (default: 3)")
    parser.add_argument("--crf", type=int, help="0 (best) to 51, of videos that are encoded (default: 18)")
    parser.add_argument("--shard-samples", type=int, default=1000, help="most samples per shard (default: 1000)")
    parser.add_argument("--shard-bytes", type=int, help="most bytes per shard (default: no limit; of videos 1e9)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument("--max-bad-share", type=float, default=0.01, help="stop above this share (default: 0.01)")
    return parser


def main() -> None:
    """Run the command line."""
    arguments = parser().parse_args()
    try:
        manifest = run(arguments)
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted: give the same command again to go on\n")
        sys.exit(130)
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("VISTOK_TRACEBACK"):
            raise
        sys.stderr.write(f"error: {error}\n(VISTOK_TRACEBACK=1 shows where it was raised)\n")
        sys.exit(2)
    content = manifest.content
    bad = f"; {len(manifest.bad)} bad {content} left out, listed in manifest.json" if manifest.bad else ""
    data = "video_shards" if arguments.videos else "webdataset"
    sys.stdout.write(
        f"{manifest.num_samples} {content} in {len(manifest.shards)} shards, {manifest.num_bytes / 1e6:.1f} MB, "
        f"verified{bad}\ntrain with: vistok train data={data} data.shards={arguments.dest} data.val_shards=...\n"
    )


def recipe_of(arguments: argparse.Namespace) -> "Conversion":
    """What becomes of each sample.

    Raises:
        ValueError: If a setting would have no effect.
    """
    from vistok.data.convert import Recipe

    resize = arguments.size, arguments.filter, arguments.resize, arguments.crop
    if not arguments.videos:
        if arguments.crf is not None:
            raise ValueError(f"--crf {arguments.crf} has no effect on pictures: leave it out or add --videos")
        return Recipe(*resize, arguments.format, arguments.quality, arguments.channels)

    from vistok.data.video_recipe import VideoRecipe

    for name in ("format", "quality", "channels"):
        if (value := getattr(arguments, name)) != parser().get_default(name):
            raise ValueError(f"--{name} {value} has no effect on videos: leave it out")
    return VideoRecipe(*resize, arguments.crf)


def run(arguments: argparse.Namespace) -> "Manifest":
    """Convert what the arguments say."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from vistok.data.convert import convert
    from vistok.data.pictures import PictureSource
    from vistok.data.sources import open_source

    recipe = recipe_of(arguments)
    source = open_source(
        arguments.source,
        arguments.list,
        arguments.split,
        arguments.root,
        arguments.image_key,
        arguments.label_key,
        arguments.text_key,
        arguments.streaming,
        arguments.videos,
    )
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}")
    with Progress(*columns, TimeRemainingColumn(), disable=not sys.stderr.isatty()) as bars:
        bar = bars.add_task(
            str(arguments.dest), total=len(source) if isinstance(source, PictureSource) else None, speed=""
        )

        def progress(done: int) -> None:
            speed = bars.tasks[0].speed
            bars.update(bar, completed=done, speed=f"{speed:.3g} {recipe.content}/s" if speed else "")

        return convert(
            source,
            arguments.dest,
            recipe,
            arguments.shard_samples,
            VIDEO_SHARD_BYTES if arguments.shard_bytes is None and arguments.videos else arguments.shard_bytes,
            arguments.workers,
            arguments.max_bad_share,
            progress,
        )


if __name__ == "__main__":
    main()
