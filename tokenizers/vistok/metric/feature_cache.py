"""Features of original images kept on disk, so that the next evaluation on the same images does not compute them.

What is kept is looked up by the images themselves: the key of a batch is a hash of its pixels and of everything else
that its features depend on (network, hash of its weights, its resize, versions of the libraries, device and precision
of products). Other files, shards, counts, resize filters, crops or roundings are other pixels, and so another key.
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vistok.hub.files import atomic_file
from vistok.metric.extractor import Extractor, Features

log = logging.getLogger(__name__)
CACHE_VARIABLE = "VISTOK_CACHE"
PACKAGES = ("torch", "torch-fidelity", "timm")
FORMAT = 1
# Whatever else lies in the folder is not ours to delete.
KEPT = re.compile(r"[0-9a-f]{64}\.safetensors")


def default_folder() -> Path:
    """``$VISTOK_CACHE``, or ``vistok`` in the cache folder of the user."""
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vistok" / "features"


class FeatureCache:
    """Features by batch, one safetensors file each.

    Files are written atomically; one that is damaged counts as absent and is replaced. A file of Inception has about
    20 kB for each image. The folder may be deleted at any time. One that cannot be written to, as on a full disk, costs
    a warning and no evaluation.

    Args:
        folder: Created when the first features are kept.
        limit: Most bytes of all files. Those that were not used for longest are deleted to make room, but none that
            this object used: of a set that is too large a part is kept, instead of each file displacing the next that
            is needed. None: no limit.

    Attributes:
        hits: Images whose features were found.
        misses: Images whose features were computed.
        unkept: Images among `misses` whose features were not kept, since the limit left no room or writing failed.
    """

    def __init__(self, folder: str | Path, limit: int | None = None) -> None:
        self.folder, self.limit = Path(folder).expanduser(), limit
        self.hits = self.misses = self.unkept = 0
        self._failed = False
        self._used: set[Path] = set()
        self._sizes: dict[Path, int] = {}

    def __call__(self, extractor: Extractor, pixels: Float[Tensor, "b 3 *size"]) -> Features:
        """Features of images or videos of values in [0, 255].

        Raises:
            ValueError: If the extractor does not state the hash of its weights.
        """
        path = self.folder / f"{self.key(extractor, pixels)}.safetensors"
        features = _read(path, pixels.device)
        if features is not None:
            self.hits += len(pixels)
            self._used.add(path)
            # Another process may just have deleted it.
            with suppress(FileNotFoundError):
                os.utime(path)
            return features
        features = extractor(pixels)
        self.misses += len(pixels)
        if not (self._make_room(features) and self._keep(path, features)):
            self.unkept += len(pixels)
        return features

    def size(self) -> int:
        """Bytes of all that is kept in the folder."""
        return sum(_kept(self.folder).values())

    def _keep(self, path: Path, features: Features) -> bool:
        """Whether the features could be written."""
        try:
            _write(path, features)
            self._sizes[path] = path.stat().st_size
        except (SafetensorError, OSError) as error:
            if not self._failed:
                log.warning("features of originals cannot be kept in %s: %s", self.folder, error)
            self._failed = True
            return False
        self._used.add(path)
        return True

    def _make_room(self, features: Features) -> bool:
        """Whether the features fit, after files that this object did not use were deleted as far as need be."""
        if self.limit is None:
            return True
        if not self._sizes:
            self._sizes = _kept(self.folder)
        # The head of a file has less than 4 KiB.
        needed = 4096 + sum(value.nbytes for value in features if value is not None)
        for path in [path for path in self._sizes if path not in self._used]:
            if sum(self._sizes.values()) + needed <= self.limit:
                break
            path.unlink(missing_ok=True)
            del self._sizes[path]
        return sum(self._sizes.values()) + needed <= self.limit

    def key(self, extractor: Extractor, pixels: Float[Tensor, "b 3 *size"]) -> str:
        """Hash of everything that the features depend on."""
        if "sha256" not in extractor.protocol:
            raise ValueError("features are only kept of a network that states the SHA-256 of its weights: cache=None")
        # A quarter of the bytes where, as always in evaluation, originals were rounded to 8 bits.
        whole = pixels.byte()
        array = (whole if torch.equal(whole.to(pixels.dtype), pixels) else pixels).cpu().contiguous().numpy()
        digest = hashlib.sha256(json.dumps(surroundings(extractor.protocol, pixels), sort_keys=True).encode())
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
        return digest.hexdigest()


def surroundings(network: Mapping[str, Any], pixels: Tensor) -> dict[str, Any]:
    """What the features depend on beside the images."""
    device = pixels.device
    return {
        "format": FORMAT,
        "network": dict(network),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": torch.get_float32_matmul_precision(),
    }


def _kept(folder: Path) -> dict[Path, int]:
    """Sizes of the files of features in a folder, what was not used for longest first."""
    found = []
    for path in folder.glob("*.safetensors"):
        # Another process may delete files meanwhile.
        with suppress(FileNotFoundError):
            if KEPT.fullmatch(path.name):
                found.append((path.stat().st_mtime_ns, path, path.stat().st_size))
    return {path: size for _, path, size in sorted(found)}


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path, device: torch.device) -> Features | None:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            checksum = (file.metadata() or {}).get("sha256")
    except (SafetensorError, OSError):
        return None
    if checksum != _checksum(tensors):
        return None
    return Features(**{name: tensor.to(device) for name, tensor in tensors.items()})


def _write(path: Path, features: Features) -> None:
    tensors = {name: value.cpu().contiguous() for name, value in features._asdict().items() if value is not None}
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata={"sha256": _checksum(tensors)})
