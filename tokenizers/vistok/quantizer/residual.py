"""Residual quantization: each stage quantizes what the stages before left over.

D. Lee et al.: Autoregressive Image Generation using Residual Quantization (RQ-VAE), https://arxiv.org/abs/2203.01941,
section 3.1; stages with scaled features for quantizers of a fixed range: ``ResidualFSQ`` of vector_quantize_pytorch and
J. D. Parker et al., https://arxiv.org/abs/2411.19842.
"""

import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from vistok import ops
from vistok.quantizer.base import Quantized, check_features
from vistok.quantizer.gradient import straight_through
from vistok.quantizer.stages import (
    PositionwiseComposite,
    Template,
    check_choice,
    check_count,
    check_dropout,
    keep_prefix,
    per_channel,
)

COMMITMENTS = ("stage", "cumulative")
GRADIENTS = ("straight_through", "stages")


class ResidualQuantizer(PositionwiseComposite):
    """A stack of quantizers whose codes add up.

    Stage ``i`` quantizes ``rest / s_i`` and adds ``s_i * code``; ``s_i`` is the product of the `stage_factors` of the
    stages before, per channel: 1 for learned codebooks, ``1 / L`` for FSQ with L symmetric levels, ``1 / 2`` for LFQ.
    Quantizers of a fixed range would otherwise use one or two codes in the later stages. If the first stage has
    `stage_limits` c, the features first pass ``c tanh(x / c)``, which keeps every stage in range.

    A loss is the mean over the stages that ran; stages whose loss weights differ keep their losses apart, as
    ``part0_commitment`` and so on.

    Args:
        quantizer: Template of the stages, or a list with one for each: a config or a quantizer, of which only the
            config is used.
        depth: Number of stages.
        shared: One codebook for all stages (RQ-VAE). Moving averages take the features of all stages at once.
        dropout: Probability that a training step keeps only the first stages, a number uniform from `min_depth` to
            `depth`.
        min_depth: See `dropout`.
        commitment: ``stage``: the commitment loss of each stage is that of its own features and codes;
            ``cumulative``: it is that of the input and the sum of the codes up to the stage (RQ-VAE, eq. 8).
        gradient: ``straight_through``: the codes have the gradient of the (clamped) features; the estimators of the
            stages are not used, so stages that learn through theirs (soft one-hot) need ``stages``: the sum of the
            estimators of all stages, for straight-through stages `depth` times the gradient.
        beam: Width of the search for the stages' codes in evaluation, 1 is greedy. The result is the best of the
            search and the greedy codes by squared error. The losses stay those of the greedy codes.
        codebook_size: Of each stage; like the three below it is passed down and None leaves it to the template.
        dim: Channels.
        levels: Of each stage.
        bits: Of each stage.
        scaled: Whether later stages of a fixed range see the rest enlarged to it, see above; false: as it is, and the
            features are not limited (the residual FSQ of Cosmos).
        seed: Seed of the stages and of the dropout.

    Raises:
        ValueError: If an argument is out of range, has no effect, or contradicts the template.
    """

    _scales: Tensor
    _limits: Tensor | None

    def __init__(
        self,
        quantizer: Template | Sequence[Template],
        depth: int,
        shared: bool = False,
        dropout: float = 0.0,
        min_depth: int = 1,
        commitment: str = "stage",
        gradient: str = "straight_through",
        beam: int = 1,
        codebook_size: int | None = None,
        dim: int | None = None,
        levels: Sequence[int] | None = None,
        bits: int | None = None,
        scaled: bool = True,
        seed: int = 0,
    ) -> None:
        check_count("depth", depth, 1)
        check_dropout(dropout, "min_depth", min_depth, depth)
        check_choice("commitment", commitment, COMMITMENTS)
        check_choice("gradient", gradient, GRADIENTS)
        check_count("beam", beam, 1)
        sizes: dict[str, Any] = {"codebook_size": codebook_size, "dim": dim, "levels": levels, "bits": bits}
        super().__init__(quantizer, depth, shared=shared, shortens=dropout > 0, seed=seed, **sizes)
        stages = [self.part(number) for number in range(depth)]
        dims = sorted({stage.dim for stage in stages})
        if len(dims) > 1:
            raise ValueError(f"the codes of all stages are added, so their dim must be equal; got {dims}")
        if commitment == "cumulative" and "commitment" not in self.loss_weights:
            raise ValueError(
                "commitment=cumulative replaces the commitment loss of the stages, which must all have one of the same "
                f"weight; the losses are {self.loss_weights}"
            )
        if beam > 1 and any(stage.codebook is None for stage in stages):
            raise ValueError(f"beam={beam} needs stages with one codebook of at most 2**20 rows: write beam=1")
        self.dim = dims[0]
        self.dropout = dropout
        self.min_depth = min_depth
        self.commitment = commitment
        self.gradient = gradient
        self.beam = beam
        factors = torch.tensor([(1.0,) * self.dim, *(stage.stage_factors for stage in stages[:-1])])
        limits = stages[0].stage_limits
        if not scaled:
            if limits is None and bool((factors == 1).all()):
                raise ValueError(
                    "scaled=false has no effect: stages without a fixed range see the rest as it is anyway"
                )
            factors, limits = torch.ones_like(factors), None
        self.register_buffer("_scales", factors.cumprod(0), persistent=False)
        self.register_buffer("_limits", None if limits is None else torch.tensor(limits), persistent=False)

    @property
    @override
    def codebook(self) -> Float[Tensor, "k d"] | None:
        return self.part(0).codebook if self.count == 1 else None

    @override
    def choose(self, rng: random.Random) -> int:
        return keep_prefix(rng, self.dropout, self.min_depth, self.count)

    @override
    def forward(self, features: Float[Tensor, "b d *grid"], labels: Int[Tensor, " b"] | None = None) -> Quantized:
        self.refuse_labels(labels)
        check_features(features, self.dim, type(self).__name__, finite=not self.training)
        with torch.autocast(features.device.type, enabled=False):
            inputs = rest = self._clamp(features.float())
            codes = torch.zeros_like(inputs)
            indices, losses, commitments = [], [], []
            for number in range(self.begin()):
                scale = per_channel(self._scales[number], rest)
                quantized = self.part(number)(rest / scale)
                stage_codes = quantized.codes * scale
                rest = rest - stage_codes.detach()
                codes = codes + stage_codes
                indices.append(quantized.indices)
                losses.append(quantized.losses)
                if self.commitment == "cumulative":
                    commitments.append(F.mse_loss(inputs, codes.detach()))
            means = self.mean_losses(losses)
            if commitments:
                means["commitment"] = torch.stack(commitments).mean()
            joined = self.join(indices)
            if self.training:
                if self.gradient == "straight_through":
                    codes = straight_through(inputs, codes)
                codes = self.keep_in_graph(codes)
            elif self.beam > 1:
                joined = self._search(inputs, joined)
                codes = self._lookup(joined)
        return Quantized(codes.to(features.dtype), joined, means)

    @override
    def indices_to_codes(
        self, indices: Int[Tensor, "b ..."], grid: Sequence[int] | None = None
    ) -> Float[Tensor, "b d *grid"]:
        """Sum of the codes of the first stages, as many as there are indices."""
        with torch.autocast(indices.device.type, enabled=False):
            return self._lookup(indices)

    @override
    def codes_to_indices(self, codes: Float[Tensor, "b d *grid"]) -> Int[Tensor, "b ..."]:
        """Stage by stage the code nearest to the rest, or the best ones that the beam finds.

        This inverts `indices_to_codes` where the factors nest the ranges of the stages (FSQ with symmetric levels,
        LFQ). Sums of learned codes can coincide or lie closer to another sum's first code: there the result is an
        encoding of the codes, close but not always equal; a wider `beam` comes closer.
        """
        check_features(codes, self.dim, type(self).__name__, finite=True)
        with torch.autocast(codes.device.type, enabled=False):
            rest = codes.detach().float()
            indices = []
            for number in range(self.count):
                stage, scale = self.part(number), per_channel(self._scales[number], rest)
                indices.append(stage.codes_to_indices(rest / scale))
                rest = rest - stage.indices_to_codes(indices[-1]).detach() * scale
            joined = self.join(indices)
            return self._search(codes.detach().float(), joined) if self.beam > 1 else joined

    def _clamp(self, features: Tensor) -> Tensor:
        if self._limits is None:
            return features
        limits = per_channel(self._limits, features)
        return torch.tanh(features / limits) * limits

    def _lookup(self, indices: Tensor) -> Tensor:
        # The same sums as in `forward`: the codes of evaluation are exactly those of their indices.
        stages = [self.part(number).indices_to_codes(each) for number, each in enumerate(self.split(indices))]
        codes = torch.zeros_like(stages[0])
        for scale, stage in zip(self._scales, stages, strict=False):
            codes = codes + stage * per_channel(scale, stage)
        return codes

    @torch.no_grad()
    def _search(self, inputs: Float[Tensor, "b d *grid"], greedy: Int[Tensor, "b ..."]) -> Int[Tensor, "b ..."]:
        """Indices whose codes add up closest to `inputs`: of the last beam, or the greedy ones if they are closer."""
        rest = inputs.movedim(1, -1).reshape(-1, 1, self.dim)
        paths = torch.zeros(len(rest), 1, 0, dtype=torch.int64, device=inputs.device)
        for number, scale in enumerate(self._scales):
            codebook = self.part(number).codebook
            assert codebook is not None
            codebook = codebook * scale
            count = min(self.beam, len(codebook))
            candidates = ops.nearest_codes(rest.flatten(0, 1), codebook, count).unflatten(0, rest.shape[:2])
            # One candidate at a time: all of them together would hold beam**2 vectors per position.
            errors = [(rest - codebook[each]).square().sum(-1) for each in candidates.unbind(-1)]
            # Sorted, because topk may break ties by the size of the batch.
            best = torch.stack(errors, -1).flatten(1).sort(stable=True).indices[:, : self.beam]
            origin = best // count
            chosen = candidates.flatten(1).gather(1, best)
            rest = rest.gather(1, origin.unsqueeze(-1).expand(-1, -1, self.dim)) - codebook[chosen]
            paths = paths.gather(1, origin.unsqueeze(-1).expand(-1, -1, number))
            paths = torch.cat([paths, chosen.unsqueeze(-1)], dim=-1)
        found = paths[:, 0].unflatten(0, (len(inputs), *inputs.shape[2:]))
        found = self.join(list(found.unbind(-1)))
        closer = self._errors(inputs, found) < self._errors(inputs, greedy)
        return torch.where(closer.unsqueeze(-1) if found.ndim > closer.ndim else closer, found, greedy)

    def _errors(self, inputs: Tensor, indices: Tensor) -> Float[Tensor, "b *grid"]:
        return (inputs - self._lookup(indices)).square().movedim(1, -1).contiguous().sum(-1)
