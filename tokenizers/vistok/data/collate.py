"""How samples are joined to a batch."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import get_worker_info

from vistok.data.bad_samples import BadSample
from vistok.data.transforms import to_model_range

Sample = dict[str, Any]
Batch = dict[str, Any]


class LazySamples:
    """Samples that are made while they are looped over, so that beside a batch only one of its pictures is in memory.

    Args:
        make: Makes a sample from an item.
        items: As many as samples.
    """

    def __init__(self, make: Callable[[Any], Sample | BadSample], items: Sequence[Any]) -> None:
        self.make = make
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Sample | BadSample]:
        return map(self.make, self.items)


def collate(
    samples: LazySamples | Sequence[Sample | BadSample], channels: int, size: int | Sequence[int], raw: bool = False
) -> Batch:
    """Join samples to a batch.

    Args:
        samples: Each a dict of ``image`` (uint8 ``(c s s)``, of a video ``(c t s s)``), ``key``, and where there are
            any ``label``, ``text`` and ``bad`` (the samples it stands in for); or a `BadSample`, which is left out of
            the batch and reported.
        channels: Channels of a batch without pictures.
        size: Their side in pixels, or all sizes of a video, ``(T, H, W)``; of a batch without pictures.
        raw: Whether to leave the images uint8, in channels-last memory order: a quarter of the bytes for a loading
            process to hand over.

    Returns:
        ``images`` float32 ``(b c s s)`` in [-1, 1], ``keys``, ``bad``, and ``labels`` int64 ``(b,)`` and ``texts`` if
        every sample has one. ``b`` is 0 if every sample is bad.
    """
    images = None
    good, bad = [], []
    for sample in samples:
        if isinstance(sample, BadSample):
            bad.append(sample)
            continue
        if images is None:
            images = _empty_images(len(samples), *sample["image"].shape)
        images[len(good)] = sample["image"]
        bad.extend(sample.get("bad", ()))
        good.append({name: sample.get(name) for name in ("key", "label", "text")})
    if images is None:
        images = _empty_images(0, channels, *((size, size) if isinstance(size, int) else size))
    batch = {"images": images[: len(good)], "keys": [sample["key"] for sample in good], "bad": bad}
    if good and all(sample["label"] is not None for sample in good):
        batch["labels"] = torch.tensor([sample["label"] for sample in good], dtype=torch.int64)
    if good and all(sample["text"] is not None for sample in good):
        batch["texts"] = [sample["text"] for sample in good]
    return batch if raw else in_model_range(batch)


def in_model_range(batch: Batch) -> Batch:
    """A batch whose images are float32 in [-1, 1], converted where they lie; one that has them is left as it is."""
    images = batch.get("images")
    return batch | {"images": to_model_range(images)} if images is not None and images.dtype == torch.uint8 else batch


def _empty_images(count: int, channels: int, *size: int) -> UInt8[Tensor, "b c *size"]:
    """Room for pictures in channels-last order, that of decoders, so that a picture is copied row by row.

    In a loading process it is shared memory from the start: what is handed over is not copied once more.
    """
    shape = count, *size, channels
    images = torch.empty(0, dtype=torch.uint8)
    if count and get_worker_info() is not None:
        images.set_(torch.UntypedStorage._new_shared(math.prod(shape)))
    return images.resize_(shape).movedim(-1, 1)
