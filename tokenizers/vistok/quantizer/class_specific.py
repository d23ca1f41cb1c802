"""One sub-codebook per class of images.

Codebook groups per category of images: Y. Wang et al.: Switchable Token-Specific Codebook Quantization For Face Image
Compression, https://arxiv.org/abs/2510.22943 (its groups, without its codebooks per token).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from vistok import ops
from vistok.quantizer.base import Quantized
from vistok.quantizer.vq import VectorQuantizer


class ClassSpecificQuantizer(VectorQuantizer):
    """Each class has ``codebook_size`` codes of its own; the index is ``label * codebook_size + local index``.

    With labels an image is quantized with the codes of its class, without them each position takes the closest code
    of all classes. The sub-codebooks are the parts of one table, so that moving averages of all classes are one
    reduction over ranks, whichever classes a rank has seen.

    Args:
        codebook_size: Number of codes of each class.
        dim: Channels of a code.
        num_classes: Number of classes; labels are 0 to ``num_classes - 1``.
        table: ``learned`` by gradient of the codebook loss, ``ema`` moved by averages of the features, ``frozen``.
        distance: ``euclidean``, ``cosine`` or ``dot``.
        gradient: ``straight_through``, ``rotation``, ``rotation_tangential`` or ``none``.
        commitment_weight: Weight of ``mse(features, sg[codes])``.
        codebook_weight: Weight of ``mse(sg[features], codes)``; default 1 if the table learns.
        decay: Decay of the moving averages per optimiser step; default 0.99, only with ``table="ema"``.
        init: Table before the first step: ``normal``, ``scaled_normal``, ``uniform``, ``batch`` (random features of the
            first training batch, of any class).
        seed: Seed of the initial table.

    Raises:
        ValueError: If an argument is out of range or has no effect.

    Example:
        >>> quantizer = ClassSpecificQuantizer(codebook_size=64, dim=4, num_classes=10).eval()
        >>> indices = quantizer(torch.randn(2, 4, 8, 8), labels=torch.tensor([3, 7])).indices
        >>> (indices[0] // 64).unique().item(), (indices[1] // 64).unique().item()
        (3, 7)
    """

    accepts_labels = True

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        num_classes: int,
        table: str = "learned",
        distance: str = "euclidean",
        gradient: str = "straight_through",
        commitment_weight: float = 0.25,
        codebook_weight: float | None = None,
        decay: float | None = None,
        init: str = "normal",
        seed: int = 0,
    ) -> None:
        for name, value, low in (("codebook_size", codebook_size, 2), ("num_classes", num_classes, 1)):
            if type(value) is not int or value < low:
                raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")
        # The others need scores of all codes, or draw on features of all classes.
        for name, value, allowed in (
            ("distance", distance, ("euclidean", "cosine", "dot")),
            ("gradient", gradient, ("straight_through", "rotation", "rotation_tangential", "none")),
            ("init", init, ("normal", "scaled_normal", "uniform", "batch")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
        super().__init__(
            num_classes * codebook_size,
            dim,
            table=table,
            distance=distance,
            gradient=gradient,
            commitment_weight=commitment_weight,
            codebook_weight=codebook_weight,
            decay=decay,
            init=init,
            seed=seed,
        )
        self.num_classes = num_classes
        # Those of the batch that is being quantized: rows do not know their image.
        self._labels: Tensor | None = None

    @override
    def forward(self, features: Float[Tensor, "b d *grid"], labels: Tensor | None = None) -> Quantized:
        if labels is not None:
            self._check_labels(labels, len(features))
        self._labels = labels
        try:
            return super().forward(features, labels)
        finally:
            self._labels = None

    @override
    def _assign(self, rows: Float[Tensor, "n d"], codebook: Float[Tensor, "k d"]) -> Int[Tensor, " n"]:
        labels = self._labels
        if labels is None or not len(labels):
            return super()._assign(rows, codebook)
        metric = "dot" if self.choices["distance"] == "dot" else "euclidean"
        images = self.search_rows(rows).unflatten(0, (len(labels), -1))
        tables = self.search_rows(codebook).unflatten(0, (self.num_classes, -1))
        # One image after the other: neither the codes of all images nor the distances to all classes are ever held.
        local = [
            ops.nearest_code(image, tables.index_select(0, label)[0], metric=metric)
            for image, label in zip(images, labels.long().split(1), strict=True)
        ]
        return (torch.stack(local) + labels.unsqueeze(-1) * tables.shape[1]).flatten()

    def _check_labels(self, labels: Tensor, count: int) -> None:
        if labels.is_floating_point() or labels.shape != (count,):
            raise ValueError(
                f"labels must be {count} integers, one per image, got {labels.dtype} {tuple(labels.shape)}"
            )
        # A compiled graph would break at the check.
        if not count or torch.compiler.is_compiling():
            return
        low, high = labels.aminmax()
        if low < 0 or high >= self.num_classes:
            raise ValueError(
                f"labels must be 0 to {self.num_classes - 1}, got {low} to {high}: set quantizer.num_classes to the "
                "number of classes of the data"
            )
