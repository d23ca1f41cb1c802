"""How samples are joined to a batch."""

from collections.abc import Sequence
from typing import Any

import torch

from vistok.data.bad_samples import BadSample
from vistok.data.transforms import to_model_range

Sample = dict[str, Any]
Batch = dict[str, Any]


def collate(samples: Sequence[Sample | BadSample], channels: int, size: int, raw: bool = False) -> Batch:
    """Join samples to a batch.

    Args:
        samples: Each a dict of ``image`` (uint8 ``(c s s)``), ``key``, and where there are any ``label``, ``text`` and
            ``bad`` (the samples it stands in for); or a `BadSample`, which is left out of the batch and reported.
        channels: Channels of the pictures.
        size: Their side in pixels.
        raw: Whether to leave the images uint8: a quarter of the bytes for a loading process to hand over.

    Returns:
        ``images`` float32 ``(b c s s)`` in [-1, 1], ``keys``, ``bad``, and ``labels`` int64 ``(b,)`` and ``texts`` if
        every sample has one. ``b`` is 0 if every sample is bad.
    """
    bad = [sample for sample in samples if isinstance(sample, BadSample)]
    good = [sample for sample in samples if not isinstance(sample, BadSample)]
    images = torch.empty(len(good), channels, size, size, dtype=torch.uint8)
    for row, sample in enumerate(good):
        images[row] = sample["image"]
        bad.extend(sample.get("bad", ()))
    batch = {
        "images": images if raw else to_model_range(images),
        "keys": [sample["key"] for sample in good],
        "bad": bad,
    }
    if good and all(sample.get("label") is not None for sample in good):
        batch["labels"] = torch.tensor([sample["label"] for sample in good], dtype=torch.int64)
    if good and all(sample.get("text") is not None for sample in good):
        batch["texts"] = [sample["text"] for sample in good]
    return batch
