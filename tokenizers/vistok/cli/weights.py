"""``vistok weights``: fetch the pretrained networks of losses and metrics into one folder."""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

LPIPS_NETS = ("vgg", "alex", "squeeze")


def main() -> None:
    """Write what is missing, each file complete or not at all; those that cannot be fetched are named at the end."""
    parser = argparse.ArgumentParser(
        prog="vistok weights",
        description="Fetch the networks of LPIPS and FID from torchvision, torchmetrics and torch-fidelity, and models "
        "of timm, into a folder that VISTOK_WEIGHTS or weights= names. Files that are there are kept.",
    )
    parser.add_argument("folder", type=Path, help="where to; made if need be")
    parser.add_argument("--lpips", nargs="*", choices=LPIPS_NETS, default=("vgg", "alex"), help="default: vgg alex")
    parser.add_argument(
        "--timm",
        nargs="*",
        default=(),
        metavar="MODEL",
        help="for fdd= and cmmd=, such as vit_large_patch14_dinov2.lvd142m",
    )
    arguments = parser.parse_args()
    try:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"{arguments.folder} cannot be a folder: {error}")
    failed = 0
    for name, fetch in _files(arguments.lpips, arguments.timm).items():
        target = arguments.folder / name
        if target.exists():
            sys.stdout.write(f"kept     {target}\n")
            continue
        try:
            fetch(target)
        except Exception as error:  # of the network, a hash, the disk or the libraries
            failed += 1
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            sys.stderr.write(f"missing  {target}: {reason}\n")
            continue
        sys.stdout.write(f"written  {target}\n")
    if failed:
        sys.stderr.write(f"error: {failed} files could not be fetched: run it again where there is a network\n")
        sys.exit(1)
    sys.stdout.write(f"set the environment variable VISTOK_WEIGHTS={arguments.folder.resolve()}\n")


def _files(nets: Sequence[str], models: Sequence[str]) -> dict[str, Callable[[Path], None]]:
    """Names of the files, and what writes each."""
    from vistok.loss.lpips import published_files
    from vistok.metric.extractor import INCEPTION_FILE

    files: dict[str, Callable[[Path], None]] = {INCEPTION_FILE: _inception}
    for net in nets:
        files |= {name: partial(_tensors, read) for name, read in published_files(net).items()}
    return files | {f"{model}.safetensors": partial(_timm, model) for model in models}


def _inception(target: Path) -> None:
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    from vistok.hub.files import atomic_write

    # The name ends in the first digits of the SHA-256.
    digits = URL_INCEPTION_V3.rpartition("-")[2].partition(".")[0]
    atomic_write(target, lambda path: torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), digits))


def _tensors(read: Callable[[], dict], target: Path) -> None:
    from safetensors.torch import save_file

    from vistok.hub.files import atomic_write

    tensors = read()
    atomic_write(target, lambda path: save_file(tensors, path))


def _timm(model: str, target: Path) -> None:
    import timm

    tensors = timm.create_model(model, pretrained=True).state_dict()
    _tensors(lambda: {name: tensor.clone().contiguous() for name, tensor in tensors.items()}, target)


if __name__ == "__main__":
    main()
