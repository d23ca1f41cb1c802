"""Product quantization: the channels are split into groups, each with a quantizer of its own.

H. Jégou et al.: Product Quantization for Nearest Neighbor Search, https://doi.org/10.1109/TPAMI.2010.57. With one
shared spherical codebook: GSQ, https://arxiv.org/abs/2412.02632; with nested masking: MGVQ, https://arxiv.org/abs/2507.07997;
with disentanglement: FQGAN, https://arxiv.org/abs/2411.16681.
"""

import random
from collections.abc import Sequence
from itertools import combinations, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from vistok.quantizer.base import Quantized, check_features
from vistok.quantizer.stages import PositionwiseComposite, Template, check_count


class GroupedQuantizer(PositionwiseComposite):
    """Groups of channels, quantized side by side; a loss is the mean over the groups that ran.

    Args:
        quantizer: Template of a group, or a list with one for each: a config or a quantizer, of which only the config
            is used.
        groups: Number of groups, at least 2, of consecutive channels.
        shared: One codebook for all groups (GSQ).
        masking: None, or one threshold for each group, from 0 and not decreasing (MGVQ): a training step draws one
            number uniform in [0, 1) and leaves out the groups whose threshold lies above it. Their codes are zero and
            their indices absent, so that the decoder learns to do without the last groups.
        disentanglement_weight: Weight of ``disentanglement``, the squared cosine between the codes of two groups, mean
            over positions and pairs of groups that ran (FQGAN). Its gradient reaches the features.
        codebook_size: Of each group; like `levels` and `bits` it is passed down and None leaves it to the template.
        dim: Channels of all groups together; a multiple of `groups`, each group gets an equal share.
        levels: Of each group.
        bits: Of each group.
        seed: Seed of the groups and of the masking.

    Raises:
        ValueError: If an argument is out of range, has no effect, or contradicts the template.
    """

    def __init__(
        self,
        quantizer: Template | Sequence[Template],
        groups: int,
        shared: bool = False,
        masking: Sequence[float] | None = None,
        disentanglement_weight: float = 0.0,
        codebook_size: int | None = None,
        dim: int | None = None,
        levels: Sequence[int] | None = None,
        bits: int | None = None,
        seed: int = 0,
    ) -> None:
        check_count("groups", groups, 2)
        if dim is not None and (not isinstance(dim, int) or dim < 1 or dim % groups):
            raise ValueError(f"dim must be a multiple of groups = {groups}, got {dim!r}")
        if masking is not None and (
            len(masking) != groups
            or masking[0] != 0
            or not 0 < masking[-1] <= 1
            or any(low > high for low, high in pairwise(masking))
        ):
            raise ValueError(
                f"masking has one threshold for each of the {groups} groups, from 0 and not decreasing up to 1, such "
                f"as {[0.0, *(0.2,) * (groups - 1)]}; got {list(masking)}"
            )
        if disentanglement_weight < 0:
            raise ValueError(f"disentanglement_weight must be a number of at least 0, got {disentanglement_weight}")
        sizes: dict[str, Any] = {"codebook_size": codebook_size, "levels": levels, "bits": bits}
        sizes["dim"] = None if dim is None else dim // groups
        super().__init__(quantizer, groups, shared=shared, shortens=masking is not None, seed=seed, **sizes)
        self._dims = [self.part(number).dim for number in range(groups)]
        self.dim = sum(self._dims)
        self.masking = masking
        if disentanglement_weight:
            if len(set(self._dims)) > 1:
                raise ValueError(f"disentanglement_weight compares codes of equal dim, got groups of {self._dims}")
            self.loss_weights["disentanglement"] = disentanglement_weight

    @property
    @override
    def stage_factors(self) -> tuple[float, ...]:
        return sum((self.part(number).stage_factors for number in range(self.count)), ())

    @property
    @override
    def stage_limits(self) -> tuple[float, ...] | None:
        limits = [self.part(number).stage_limits for number in range(self.count)]
        if any(each is None for each in limits):
            return None
        return sum((each for each in limits if each is not None), ())

    @override
    def choose(self, rng: random.Random) -> int:
        assert self.masking is not None
        drawn = rng.random()
        return sum(threshold <= drawn for threshold in self.masking)

    @override
    def forward(self, features: Float[Tensor, "b d *grid"], labels: Int[Tensor, " b"] | None = None) -> Quantized:
        self.refuse_labels(labels)
        check_features(features, self.dim, type(self).__name__, finite=not self.training)
        with torch.autocast(features.device.type, enabled=False):
            groups = features.float().split(self._dims, dim=1)
            quantized = [self.part(number)(groups[number]) for number in range(self.begin())]
            codes = self._concatenate([each.codes for each in quantized])
            losses = self.mean_losses([each.losses for each in quantized])
            if "disentanglement" in self.loss_weights:
                losses["disentanglement"] = _mean_squared_cosine([each.codes for each in quantized])
            if self.training:
                codes = self.keep_in_graph(codes)
        return Quantized(codes.to(features.dtype), self.join([each.indices for each in quantized]), losses)

    @override
    def indices_to_codes(
        self, indices: Int[Tensor, "b ..."], grid: Sequence[int] | None = None
    ) -> Float[Tensor, "b d *grid"]:
        """Codes of the first groups, as many as there are indices, and zeros for the others."""
        parts = self.split(indices)
        with torch.autocast(indices.device.type, enabled=False):
            return self._concatenate([self.part(number).indices_to_codes(each) for number, each in enumerate(parts)])

    @override
    def codes_to_indices(self, codes: Float[Tensor, "b d *grid"]) -> Int[Tensor, "b ..."]:
        check_features(codes, self.dim, type(self).__name__, finite=True)
        groups = codes.split(self._dims, dim=1)
        return self.join([self.part(number).codes_to_indices(group) for number, group in enumerate(groups)])

    def _concatenate(self, codes: list[Tensor]) -> Tensor:
        absent = codes[0].new_zeros(len(codes[0]), sum(self._dims[len(codes) :]), *codes[0].shape[2:])
        return torch.cat([*codes, absent], dim=1)


def _mean_squared_cosine(codes: Sequence[Float[Tensor, "b d *grid"]]) -> Float[Tensor, ""]:
    """Mean over positions and pairs; 0 if there is no pair."""
    squares = [F.cosine_similarity(a, b, dim=1).square().mean() for a, b in combinations(codes, 2)]
    return torch.stack(squares).mean() if squares else codes[0].new_zeros(())
