"""What a folder of tokens holds: ``manifest.json``, and the safetensors files that it lists."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from vistok.hub.files import atomic_write
from vistok.tokenizer import Tokenizer

MANIFEST_FILE = "manifest.json"
FORMAT = 1
# Integers that PyTorch, NumPy and safetensors all have and can index.
DTYPES = (torch.uint8, torch.uint16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Layout:
    """What the tokens of one image mean: all that a generator needs to know of a tokenizer.

    Args:
        size: Image size ``[H, W]`` or ``[T, H, W]`` in pixels.
        indices_shape: Shape of the indices of one image, which `Tokenizer.flatten` flattens.
        codebook_sizes: Number of codes of each codebook; the last axis of the indices counts them if there are several.
        scale_lengths: Tokens of each scale of a pyramid; empty if there are no scales.
    """

    size: Sequence[int]
    indices_shape: Sequence[int]
    codebook_sizes: Sequence[int]
    scale_lengths: Sequence[int] = ()

    @classmethod
    def of(cls, tokenizer: Tokenizer, size: Sequence[int] | None = None) -> "Layout":
        """Layout of the tokens of images of `size` pixels (default: the training size).

        Raises:
            ValueError: If the tokenizer is continuous or does not take images of that size.
        """
        tokenizer.sequence_length(size)
        grid = tokenizer.grid(size)
        size = tokenizer.default_size if size is None else size
        assert size is not None  # `grid` has seen to it
        quantizer = tokenizer.quantizer
        return cls(
            list(size),
            list(quantizer.indices_shape(grid)),
            list(quantizer.codebook_sizes),
            list(quantizer.scale_lengths(grid)),
        )

    @property
    def length(self) -> int:
        """Tokens of one image."""
        return math.prod(self.indices_shape)

    @property
    def depth(self) -> int:
        """Tokens of one position."""
        return len(self.codebook_sizes)

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of the positions."""
        return tuple(self.indices_shape if self.depth == 1 else self.indices_shape[:-1])


@dataclass(frozen=True)
class Manifest:
    """Contents of ``manifest.json``.

    Args:
        layout: Of the tokens of every image.
        dtype: Name of the integers in the files.
        views: Names of the views of each picture, in their order in the files.
        num_pictures: Pictures, each with all views.
        num_bad: Pictures that could not be read and are left out.
        labels: Whether every picture has a class label.
        num_classes: One more than the largest label; 0 without labels.
        shards: ``file``, ``num_pictures`` and ``sha256`` of each file, in the order of the pictures.
        tokenizer: ``bundle`` (where it was), ``sha256`` of its weights, and its ``config``.
        data: Where the pictures came from.
        check: How well the first stored tokens decode, see `vistok.tokens.export.check_sample`.
    """

    layout: Layout
    dtype: str
    views: Sequence[str]
    num_pictures: int
    num_bad: int
    labels: bool
    num_classes: int
    shards: Sequence[Mapping[str, Any]]
    tokenizer: Mapping[str, Any]
    data: Mapping[str, Any]
    check: Mapping[str, Any]

    def write(self, folder: Path) -> None:
        """Write ``manifest.json`` in one step."""
        from vistok import __version__

        text = json.dumps({"format": FORMAT, "vistok_version": __version__, **asdict(self)}, indent=2) + "\n"
        atomic_write(folder / MANIFEST_FILE, lambda path: path.write_text(text))


def read_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of a folder of tokens.

    Raises:
        FileNotFoundError: If there is none: no tokens, or an export that has not finished.
        ValueError: If it is not one of this version.
    """
    path = Path(folder).expanduser() / MANIFEST_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path.absolute()}: write tokens there with vistok export-tokens, or run it again to let it finish"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError(f"this version of vistok reads format {FORMAT}")
        content["layout"] = Layout(**content["layout"])
        return Manifest(**{field.name: content[field.name] for field in fields(Manifest)})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a manifest of vistok's tokens: {type(error).__name__}: {error}") from error


def smallest_dtype(codebook_size: int) -> torch.dtype:
    """The smallest integer type for indices from 0 to ``codebook_size - 1``."""
    return next(dtype for dtype in DTYPES if codebook_size - 1 <= torch.iinfo(dtype).max)
