"""The Frechet inception distance of generated images. Heusel et al., 2017, https://arxiv.org/abs/1706.08500."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from safetensors import safe_open
from torch import Tensor

from vistok.data import decode_image, to_uint8
from vistok.data.module import refuse_native
from vistok.hub.files import sha256
from vistok.metric.distances import Frechet, read_statistics, set_reference
from vistok.metric.extractor import Extractor
from vistok.metric.precision import float64_device

SAMPLES_FILE = "samples.safetensors"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def fid(
    samples: Iterable[Tensor],
    reference: Path | Iterable[Tensor],
    extractor: Extractor,
    device: torch.device,
) -> dict[str, Any]:
    """Frechet inception distance of generated images, and how it was measured.

    Args:
        samples: Batches of generated images, uint8 ``(b c h w)``.
        reference: Batches of pictures of the same form, whose number may differ; or a file of statistics ``.npz`` with
            ``mu`` and ``sigma``, such as ADM's of ImageNet.
        extractor: Gives the features, `vistok.metric.Inception`.
        device: Where it runs.

    Returns:
        ``fid``, ``num_samples``, ``num_reference`` (None for a file), ``protocol``, and ``note`` of what a reader of
        the number must know, or None.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If there are fewer than two images, they have other than 1 or 3 channels, or the file is another.
    """
    extractor.to(device)
    protocol = {**extractor.protocol, "precision": "float32 network, float64 statistics"}
    frechet = _add(None, samples, False, extractor, device)
    if isinstance(reference, Path):
        set_reference(frechet, *read_statistics(reference))
        num_reference = None
        protocol |= {"reference": f"statistics of {reference.name}", "reference_sha256": sha256(reference)}
    else:
        frechet = _add(frechet, reference, True, extractor, device)
        num_reference = int(frechet.real_features_num_samples)
        protocol |= {"reference": "pictures, after resize and crop"}
    value, num_samples = float(frechet.compute()), int(frechet.fake_features_num_samples)
    num_features = len(frechet.fake_features_sum)
    least = num_samples if num_reference is None else min(num_samples, num_reference)
    note = f"biased: fewer images ({least}) than features ({num_features})" if least < num_features else None
    return {
        "fid": value,
        "num_samples": num_samples,
        "num_reference": num_reference,
        "note": note,
        "protocol": protocol,
    }


@torch.inference_mode()
def _add(
    frechet: Frechet | None, batches: Iterable[Tensor], real: bool, extractor: Extractor, device: torch.device
) -> Frechet:
    """Sums of the features of batches, added to those that there are."""
    for images in batches:
        if images.shape[1] not in (1, 3):
            raise ValueError(f"FID is of images with 1 or 3 channels, got {images.shape[1]}")
        features = extractor(images.to(device).float().expand(-1, 3, -1, -1)).pooled.to(float64_device(device))
        if frechet is None:
            frechet = Frechet(features.shape[1]).to(features.device)
        frechet.update(features, real=real)
    if frechet is None:
        raise ValueError("a Frechet distance needs at least 2 images, got 0")
    return frechet


def read_samples(source: str | Path, batch_size: int) -> Iterator[Tensor]:
    """Batches uint8 ``(b c h w)`` of generated images from disk.

    Args:
        source: Folder of `vistok sample`; of pictures, in any nesting; or ``.npz`` with ``arr_0`` uint8 ``(n h w c)``,
            as ADM's evaluator takes it.
        batch_size: Images of a batch.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If the file is another, or pictures differ in size.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".npz":
            raise ValueError(f"samples are a folder or a .npz file, got {path}")
        with np.load(path) as file:
            images = file["arr_0"] if "arr_0" in file else np.empty(0)
            if images.dtype != np.uint8 or images.ndim != 4:
                raise ValueError(f"{path} must hold arr_0, uint8 (n h w c); it has {sorted(file)}")
        yield from torch.from_numpy(images).permute(0, 3, 1, 2).split(batch_size)
    elif (path / SAMPLES_FILE).is_file():
        with safe_open(path / SAMPLES_FILE, framework="pt") as file:
            images = file.get_slice("images")
            for start in range(0, images.get_shape()[0], batch_size):
                yield images[start : start + batch_size]
    else:
        pictures = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        if not pictures:
            raise FileNotFoundError(f"{path} has no {SAMPLES_FILE} and no pictures ({', '.join(SUFFIXES)})")
        for start in range(0, len(pictures), batch_size):
            images = [decode_image(file) for file in pictures[start : start + batch_size]]
            if len({image.shape for image in images}) > 1:
                raise ValueError(f"the pictures of {path} differ in size: make them all as large as the reference")
            yield torch.stack(images)


def read_pictures(data: Any, size: Sequence[int]) -> Iterator[Tensor]:
    """Batches uint8 ``(b c h w)`` of the evaluation pictures of a data config, in the size ``(c, h, w)`` of samples.

    Raises:
        ValueError: If the samples are not square, as these pictures are.
    """
    channels, height, width = size
    if height != width:
        raise ValueError(f"data gives square pictures, the samples are {height} x {width}: set fid_reference=FILE.npz")
    module = instantiate(data, image_size=width, eval_size=width, channels=channels, _convert_="all")
    refuse_native(module)
    for batch in module.eval_dataloader():
        yield to_uint8(batch["images"])
