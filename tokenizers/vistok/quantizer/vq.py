"""Vector quantization with a codebook that follows the features by exponential moving averages.

A. van den Oord, O. Vinyals, K. Kavukcuoglu: Neural Discrete Representation Learning, https://arxiv.org/abs/1711.00937,
appendix A.1 (moving averages) and equation 3 (commitment loss). Revival of dead codes: J. Williams et al.,
Hierarchical Quantized Autoencoders, https://arxiv.org/abs/2002.08111. Unlike the first implementations the averages
start at one feature per
code: starting the cluster sizes at zero sends every unused code to about 1e5 in the first step.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from vistok import distributed
from vistok.ops import nearest_code
from vistok.quantizer.base import PositionwiseQuantizer

INITS = ("normal", "batch", "kmeans")


class VectorQuantizer(PositionwiseQuantizer):
    """Nearest code by Euclidean distance, straight-through gradient, codebook by moving averages.

    Under DDP the counts and sums of all ranks are added before they are applied, and every rank revives the same codes
    with the same features: the codebooks stay equal, and equal to those of one process on the joined batch.

    Args:
        codebook_size: Number of codes, at least 2.
        dim: Channels of a code.
        decay: Decay of the moving averages per optimiser step, in [0, 1).
        eps: Laplace smoothing of the cluster sizes.
        commitment_weight: Weight beta of the commitment loss ``mse(features, sg[codes])``.
        revive_below: A code whose averaged usage falls below this share of uniform usage is replaced by a random
            feature of the batch; 0 switches revival off.
        init: Codebook before the first training step. ``normal`` draws it at the scale of unit-variance features,
            ``batch`` copies random features of the first training batch, ``kmeans`` clusters that batch.
        kmeans_iterations: Lloyd iterations of ``init="kmeans"``.
        seed: Seed of the random choices above; they never touch the global random state.

    Raises:
        ValueError: If an argument is out of range, or ``kmeans`` meets a first batch with fewer features than codes.
    """

    table: Tensor
    table_sum: Tensor
    cluster_size: Tensor
    initialised: Tensor
    updates: Tensor

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        decay: float = 0.99,
        eps: float = 1e-5,
        commitment_weight: float = 0.25,
        revive_below: float = 0.1,
        init: str = "batch",
        kmeans_iterations: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, low in (
            ("codebook_size", codebook_size, 2),
            ("dim", dim, 1),
            ("kmeans_iterations", kmeans_iterations, 1),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        if not 0 <= revive_below < 1:
            raise ValueError(f"revive_below is a share of uniform usage in [0, 1), got {revive_below}")
        if init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}; got {init!r}")
        self.codebook_sizes = (codebook_size,)
        self.dim = dim
        self.bits = math.log2(codebook_size)
        self.decay = decay
        self.eps = eps
        self.revive_below = revive_below
        self.init = init
        self.kmeans_iterations = kmeans_iterations
        self.seed = seed
        self.loss_weights = {"commitment": commitment_weight}
        table = torch.randn(codebook_size, dim, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("table", table)
        self.register_buffer("table_sum", table.clone())
        self.register_buffer("cluster_size", torch.ones(codebook_size))
        self.register_buffer("initialised", torch.tensor(init == "normal"))
        self.register_buffer("updates", torch.tensor(0))
        self._pending: list[tuple[Tensor, Tensor]] = []
        # Reading the buffer in every step would make a GPU wait; once it is known to be true it stays so.
        self._known_initialised = False
        self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "_known_initialised", False))

    @property
    @override
    def codebook(self) -> Float[Tensor, "k d"]:
        return self.table

    @override
    def quantize(self, rows: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n d"], Int[Tensor, " n"], dict[str, Tensor]]:
        if self.training and not self._known_initialised:
            self._initialise(rows.detach())
        indices = nearest_code(rows.detach(), self.table)
        codes = self.lookup(indices)
        losses = {"commitment": F.mse_loss(rows, codes)}
        if self.training:
            self._collect(rows.detach(), indices)
            codes = rows + (codes - rows).detach()
        return codes, indices, losses

    @override
    def lookup(self, indices: Int[Tensor, "..."]) -> Float[Tensor, "... d"]:
        return F.embedding(indices.long(), self.table)

    @override
    def invert(self, codes: Float[Tensor, "... d"]) -> Int[Tensor, "..."]:
        return nearest_code(codes.reshape(-1, self.dim), self.table).reshape(codes.shape[:-1])

    @override
    @torch.no_grad()
    def update(self) -> None:
        """Move the codebook towards the collected features of all ranks, then revive dead codes."""
        if not self._pending:
            return
        rows = torch.cat([rows for rows, _ in self._pending])
        indices = torch.cat([indices for _, indices in self._pending])
        self.discard()
        counts, sums = self._sums_by_code(rows, indices)
        self.cluster_size.lerp_(counts, 1 - self.decay)
        self.table_sum.lerp_(sums, 1 - self.decay)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + self.eps) / (total + self.codebook_size * self.eps) * total
        torch.div(self.table_sum, smoothed.unsqueeze(-1), out=self.table)
        self.updates += 1
        if self.revive_below:
            self._revive(rows)

    @override
    def discard(self) -> None:
        self._pending.clear()

    def _collect(self, rows: Tensor, indices: Tensor) -> None:
        # A recomputation by activation checkpointing runs inside the backward pass: it repeats a forward whose
        # features were already collected.
        if torch._C._current_graph_task_id() != -1:
            return
        finite = rows.isfinite().all(-1)
        self._pending.append((rows[finite], indices[finite]))

    def _sums_by_code(self, rows: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Number and sum of the features of each code, over all ranks."""
        counts = torch.bincount(indices, minlength=self.codebook_size).to(self.table.dtype)
        sums = torch.zeros_like(self.table).index_add_(0, indices, rows)
        return distributed.all_reduce_sum(counts), distributed.all_reduce_sum(sums)

    def _random_rows(self, rows: Tensor, count: int) -> Tensor:
        """`count` random features of all ranks, alike on every rank and without repetition if there are enough."""
        total = sum(distributed.row_counts(len(rows), rows.device))
        generator = torch.Generator().manual_seed((self.seed << 32) + int(self.updates))
        if count <= total:
            positions = torch.randperm(total, generator=generator)[:count]
        else:
            positions = torch.randint(total, (count,), generator=generator)
        return distributed.take_rows(rows, positions.to(rows.device))

    def _revive(self, rows: Tensor) -> None:
        uniform_usage = self.cluster_size.mean()
        dead = (self.cluster_size < self.revive_below * uniform_usage).nonzero().squeeze(-1)
        dead = dead[: sum(distributed.row_counts(len(rows), rows.device))]
        if not len(dead):
            return
        self.table[dead] = self._random_rows(rows, len(dead))
        # Sums and sizes move along, otherwise the next update would undo the revival.
        self.cluster_size[dead] = uniform_usage
        self.table_sum[dead] = self.table[dead] * uniform_usage

    @torch.no_grad()
    def _initialise(self, rows: Tensor) -> None:
        if self.initialised:
            self._known_initialised = True
            return
        rows = rows[rows.isfinite().all(-1)]
        total = sum(distributed.row_counts(len(rows), rows.device))
        if not total:
            return
        if self.init == "kmeans" and total < self.codebook_size:
            raise ValueError(
                f"init=kmeans needs at least codebook_size = {self.codebook_size} features in the first batch, "
                f"got {total}: "
                "raise data.batch_size, or set quantizer.init=batch"
            )
        self.table.copy_(self._random_rows(rows, self.codebook_size))
        if self.init == "kmeans":
            for _ in range(self.kmeans_iterations):
                counts, sums = self._sums_by_code(rows, nearest_code(rows, self.table))
                used = counts > 0
                self.table[used] = sums[used] / counts[used].unsqueeze(-1)
        # Ranks may run different devices or libraries: the codebook of the first one holds.
        distributed.broadcast(self.table)
        self.table_sum.copy_(self.table)
        self.initialised.fill_(True)
