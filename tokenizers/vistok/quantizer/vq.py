"""Vector quantization as six independent choices.

Every published vector quantizer is a point in this space, and its yaml in ``configs/quantizer`` says which:

1. table: free vectors that are learned by gradient, moved by averages of the features, or frozen;
2. projection between the table and the codebook: none, linear, or a bridge;
3. distance: Euclidean, cosine, dot product, or the scores of a learned linear layer;
4. assignment: nearest code, optimal transport, or Gumbel sampling;
5. gradient: straight-through, rotation trick, soft one-hot, or none;
6. revival of dead codes: none, random features, or the anchors of CVQ.

Sources: A. van den Oord et al., https://arxiv.org/abs/1711.00937 (losses, eq. 3; moving averages, appendix A.1);
W. Williams et al., https://arxiv.org/abs/2002.08111 (revival); J. Yu et al., https://arxiv.org/abs/2110.04627 (cosine);
E. Jang et al., https://arxiv.org/abs/1611.01144 (Gumbel). The yaml files name those of each method.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import override

from vistok import distributed, ops
from vistok.quantizer.base import PositionwiseQuantizer, is_recomputation
from vistok.quantizer.bridge import VQBridge
from vistok.quantizer.gradient import rotate, straight_through

CHOICES = {
    "table": ("learned", "ema", "frozen"),
    "projection": ("none", "linear", "bridge"),
    "distance": ("euclidean", "cosine", "dot", "linear"),
    "unit_norm": ("none", "features", "both"),
    "assignment": ("nearest", "sinkhorn", "gumbel"),
    "gradient": ("straight_through", "rotation", "rotation_tangential", "soft", "none"),
    "revival": ("none", "random", "anchor"),
    "init": ("normal", "scaled_normal", "sphere", "uniform", "batch", "kmeans", "file"),
    "average": ("sums", "centroids"),
}
MAX_TABLE_ROWS = 2**20
# Generators keep 32 bits of a seed. A prime, so that the numbers of two quantizers do not meet for a while.
SEED_STRIDE = 1_000_003


class VectorQuantizer(PositionwiseQuantizer):
    """Replace each feature by a code of a table.

    Under DDP the statistics of all ranks are added before they are applied, and every rank revives the same codes with
    the same features: the codebooks stay equal, and equal to those of one process on the joined batch.

    An argument that a choice has no use for must be left out (None); the error says so. The losses are raw values,
    and there is one for each weight that is not zero:

    - ``commitment``: ``mse(features, sg[codes])`` moves the features.
    - ``codebook``: ``mse(sg[features], codes)`` moves the table or its projection.
    - ``soft``: ``mse(features, codes)`` through the soft one-hot of ``gradient="soft"``; moves both.
    - ``sample_entropy``, ``batch_entropy``: entropy in nats of the assignment of a feature, and of the mean assignment
      over all ranks. The weight of the second is negative: it is maximised.
    - ``prior``: KL divergence in nats from the scores of a feature to the uniform distribution.
    - ``orthogonality``: mean squared cosine between pairs of codes, less that of an orthonormal set.

    Args:
        codebook_size: Number of codes K, at least 2.
        dim: Channels of a code.
        table: ``learned`` by gradient of the codebook loss, ``ema`` moved by averages of the features, ``frozen``.
        projection: What turns the table into the codebook: ``none``, ``linear`` (SimVQ, VQGAN-LC), ``bridge`` (FVQ).
        distance: ``euclidean``; ``cosine``; ``dot`` product of feature and code; ``linear``: scores of a learned
            linear layer that does not look at the codes (dVAE).
        unit_norm: Whether features and codes are scaled to unit length: ``none``, ``features``, ``both``. Default:
            ``both`` with cosine distance, else ``none``.
        assignment: Of training; evaluation always takes the best code. ``nearest``, ``sinkhorn`` (OptVQ), ``gumbel``.
        gradient: Estimator for the features: ``straight_through``, ``rotation``, ``rotation_tangential`` (the two
            variants of the rotation trick), ``soft`` (soft one-hot over all codes, which also moves all codes),
            ``none``.
        revival: ``none``; ``random``: a code whose averaged usage falls below `revive_below` becomes a random feature
            of the batch; ``anchor``: each code moves towards its closest feature, the more the less it is used (CVQ).
        commitment_weight: Weight of ``commitment``.
        codebook_weight: Weight of ``codebook``; default 1 if the table or its projection learns.
        soft_weight: Weight of ``soft``; only with ``gradient="soft"``, default 0.
        entropy_weight: Weight of ``sample_entropy``.
        diversity: Weight of ``batch_entropy`` over `entropy_weight`; default 1.
        entropy_temperature: Temperature of the softmax over negative squared distances (or products) in both
            entropies; default 0.01.
        prior_weight: Weight of ``prior``.
        orthogonality_weight: Weight of ``orthogonality``.
        average: ``sums``: moving averages of counts and sums (default). ``centroids``: of the mean feature of each code
            (VQ-KD).
        decay: Decay of all moving averages per optimiser step, in [0, 1); default 0.99.
        eps: Laplace smoothing of the cluster sizes; default 1e-5.
        revive_below: Share of uniform usage, in (0, 1); default 0.1.
        temperature: Of the Gumbel softmax or the soft one-hot; default 1.
        sinkhorn_iterations: Iterations of optimal transport; default 5.
        sinkhorn_epsilon: Entropic regularisation of optimal transport; default 0.1.
        max_memory: MiB that optimal transport may take; with enough for the cost matrix it is faster. Default 256.
        init: Table before the first step. ``uniform`` U(-1/K, 1/K) (default), ``normal`` N(0, 1), ``scaled_normal``
            N(0, 1/dim), ``sphere`` uniform on the unit sphere, ``batch`` random features of the first training batch,
            ``kmeans`` their clusters, ``file``.
        codebook_file: ``.safetensors`` with one tensor or ``.npy``, of shape ``(K, table_dim)``; for ``init="file"``.
            Read before the first training step; a saved bundle does not need it.
        kmeans_iterations: Lloyd iterations of ``init="kmeans"``; default 10.
        table_dim: Channels of the table in front of a linear projection; default `dim`.
        projection_bias: Whether the linear projection has a bias; default True.
        bridge_patch: Codes along each side of a patch of the bridge; default 4.
        bridge_width: Channels of the bridge; default 256.
        bridge_depth: Blocks of the bridge; default 2.
        seed: Seed of the random choices above; they never touch the global random state (Gumbel noise does).

    Raises:
        ValueError: If an argument is out of range or has no effect, or a first batch has too few features.
    """

    table: Tensor
    table_sum: Tensor
    cluster_size: Tensor
    usage: Tensor
    initialised: Tensor
    updates: Tensor

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        table: str = "learned",
        projection: str = "none",
        distance: str = "euclidean",
        unit_norm: str | None = None,
        assignment: str = "nearest",
        gradient: str = "straight_through",
        revival: str = "none",
        commitment_weight: float = 0.25,
        codebook_weight: float | None = None,
        soft_weight: float | None = None,
        entropy_weight: float = 0.0,
        diversity: float | None = None,
        entropy_temperature: float | None = None,
        prior_weight: float = 0.0,
        orthogonality_weight: float = 0.0,
        average: str | None = None,
        decay: float | None = None,
        eps: float | None = None,
        revive_below: float | None = None,
        temperature: float | None = None,
        sinkhorn_iterations: int | None = None,
        sinkhorn_epsilon: float | None = None,
        max_memory: int | None = None,
        init: str = "uniform",
        codebook_file: str | None = None,
        kmeans_iterations: int | None = None,
        table_dim: int | None = None,
        projection_bias: bool | None = None,
        bridge_patch: int | None = None,
        bridge_width: int | None = None,
        bridge_depth: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if unit_norm is None:
            unit_norm = "both" if distance == "cosine" else "none"
        chosen = {
            "table": table,
            "projection": projection,
            "distance": distance,
            "unit_norm": unit_norm,
            "assignment": assignment,
            "gradient": gradient,
            "revival": revival,
            "init": init,
        }
        for name, value in chosen.items():
            if value not in CHOICES[name]:
                raise ValueError(f"{name} must be one of {', '.join(CHOICES[name])}; got {value!r}")
        self.choices: Mapping[str, str] = chosen
        learns = table == "learned" or projection != "none"
        ema, soft, entropy = table == "ema", gradient == "soft", bool(entropy_weight)
        option = self._option
        codebook_weight = option("codebook_weight", codebook_weight, learns, 1.0, "table=learned or a projection")
        soft_weight = option("soft_weight", soft_weight, soft, 0.0, "gradient=soft")
        diversity = option("diversity", diversity, entropy, 1.0, "an entropy_weight")
        self.entropy_temperature = option(
            "entropy_temperature", entropy_temperature, entropy, 0.01, "an entropy_weight"
        )
        self.average = option("average", average, ema, "sums", "table=ema")
        self.decay = option("decay", decay, ema or revival != "none", 0.99, "table=ema or a revival")
        self.eps = option("eps", eps, ema and self.average == "sums", 1e-5, "table=ema with average=sums")
        self.revive_below = option("revive_below", revive_below, revival == "random", 0.1, "revival=random")
        self.temperature = option("temperature", temperature, soft, 1.0, "gradient=soft")
        sinkhorn, needed = assignment == "sinkhorn", "assignment=sinkhorn"
        self.sinkhorn_iterations = option("sinkhorn_iterations", sinkhorn_iterations, sinkhorn, 5, needed)
        self.sinkhorn_epsilon = option("sinkhorn_epsilon", sinkhorn_epsilon, sinkhorn, 0.1, needed)
        self.max_memory = option("max_memory", max_memory, sinkhorn, 256, needed)
        self.codebook_file = option("codebook_file", codebook_file, init == "file", None, "init=file")
        self.kmeans_iterations = option("kmeans_iterations", kmeans_iterations, init == "kmeans", 10, "init=kmeans")
        linear = projection == "linear"
        table_width: int = option("table_dim", table_dim, linear, dim, "projection=linear") or dim
        projection_bias = option("projection_bias", projection_bias, linear, True, "projection=linear")
        bridge = {
            name: option(f"bridge_{name}", value, projection == "bridge", default, "projection=bridge")
            for name, value, default in (
                ("patch", bridge_patch, 4),
                ("width", bridge_width, 256),
                ("depth", bridge_depth, 2),
            )
        }
        if init == "file" and not self.codebook_file:
            raise ValueError("init=file needs codebook_file=PATH, a .safetensors or .npy file with the table")
        for name, value, low in (
            ("codebook_size", codebook_size, 2),
            ("dim", dim, 1),
            ("table_dim", table_width, 1),
            ("kmeans_iterations", self.kmeans_iterations, 1),
            ("sinkhorn_iterations", self.sinkhorn_iterations, 1),
            ("max_memory", self.max_memory, 1),
            *((f"bridge_{name}", value, 1) for name, value in bridge.items()),
        ):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < low):
                raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")
        for name in ("temperature", "entropy_temperature", "sinkhorn_epsilon"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.decay is not None and not 0 <= self.decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {self.decay}")
        if self.revive_below is not None and not 0 < self.revive_below < 1:
            raise ValueError(
                f"revive_below is a share of uniform usage in (0, 1), got {self.revive_below}; "
                "write revival=none to switch revival off"
            )
        if self.average not in (None, *CHOICES["average"]):
            raise ValueError(f"average must be one of {', '.join(CHOICES['average'])}; got {self.average!r}")
        self._refuse_contradictions(table_width, dim)

        self.codebook_sizes = (codebook_size,)
        self.dim = dim
        self.bits = math.log2(codebook_size)
        self.seed = seed
        weights = {
            "commitment": commitment_weight,
            "codebook": codebook_weight,
            "soft": soft_weight,
            "sample_entropy": entropy_weight,
            "batch_entropy": -entropy_weight * (diversity or 0),
            "prior": prior_weight,
            "orthogonality": orthogonality_weight,
        }
        self.loss_weights = {name: weight for name, weight in weights.items() if weight}

        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(codebook_size, table_width, generator=generator)
        if init == "uniform":
            rows = (torch.rand(codebook_size, table_width, generator=generator) * 2 - 1) / codebook_size
        elif init == "scaled_normal":
            rows = rows / math.sqrt(table_width)
        if init == "sphere" or (ema and unit_norm == "both"):
            rows = F.normalize(rows, dim=-1)
        if table == "learned":
            self.table = nn.Parameter(rows)
            self.undecayed = ("table",)
        else:
            self.register_buffer("table", rows)
        if ema and self.average == "sums":
            self.register_buffer("table_sum", rows.clone())
        if revival == "random" or (ema and self.average == "sums"):
            self.register_buffer("cluster_size", torch.ones(codebook_size))
        if revival == "anchor":
            # Starts from zero, so that in the first step every code moves to the data.
            self.register_buffer("usage", torch.zeros(codebook_size))
        starts_later = init in ("batch", "kmeans", "file")
        self.register_buffer("initialised", torch.tensor(not starts_later))
        self.register_buffer("updates", torch.tensor(0))
        self.projection: nn.Module | None = None
        # A seeded start of the layers too, without touching the global random state.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            if projection == "linear":
                self.projection = nn.Linear(table_width, dim, bias=bool(projection_bias))
                if init in ("batch", "kmeans"):
                    # The table starts as features, so the codebook should too.
                    nn.init.eye_(self.projection.weight)
                    if self.projection.bias is not None:
                        nn.init.zeros_(self.projection.bias)
            elif projection == "bridge":
                self.projection = VQBridge(codebook_size, dim, **bridge)
            self.scores = nn.Linear(dim, codebook_size) if distance == "linear" else None
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._touched: Tensor | None = None
        self._cache: tuple[Any, Tensor] | None = None
        # Reading the buffer in every step would make a GPU wait; once it is known to be true it stays so.
        self._known_initialised = not starts_later
        if starts_later:
            self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "_known_initialised", False))

    def _option(self, name: str, value: Any, used: bool, default: Any, needs: str) -> Any:
        """Value of an option, its default, or None if no choice uses it; an error if it is given in vain."""
        if used:
            return default if value is None else value
        # A loss of weight zero is off.
        if value is None or (name.endswith("_weight") and value == 0):
            return None
        raise ValueError(f"{name}={value} has no effect without {needs}: choose that, or write {name}=null")

    def _refuse_contradictions(self, table_dim: int, dim: int) -> None:
        choices = self.choices
        if choices["gradient"] == "soft" and choices["assignment"] == "sinkhorn":
            raise ValueError("gradient=soft needs the scores of every code: use assignment=nearest or gumbel")
        if choices["table"] == "ema" and choices["gradient"] == "soft":
            raise ValueError("gradient=soft moves the codes by gradient, table=ema by averages: use table=learned")
        if choices["distance"] == "linear" and choices["gradient"] != "soft":
            raise ValueError("the linear layer of distance=linear learns through gradient=soft only: set it")
        if choices["projection"] != "none":
            if choices["table"] == "ema" or choices["revival"] != "none":
                raise ValueError(
                    "features cannot be written into a table behind a projection: with projection="
                    f"{choices['projection']} use table=learned or frozen and revival=none"
                )
            if choices["init"] in ("batch", "kmeans") and (choices["projection"] == "bridge" or table_dim != dim):
                raise ValueError(
                    f"init={choices['init']} fills the table with features, which needs projection=none, or "
                    f"projection=linear with table_dim={dim}: use init=normal"
                )

    @property
    @override
    def codebook(self) -> Float[Tensor, "k d"] | None:
        return self._codebook() if self.codebook_size <= MAX_TABLE_ROWS else None

    @property
    @override
    def touched_codes(self) -> list[tuple[nn.Parameter, Tensor]]:
        if self._touched is None or not isinstance(self.table, nn.Parameter):
            return []
        return [(self.table, self._touched)]

    @override
    def quantize(self, rows: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n d"], Int[Tensor, " n"], dict[str, Tensor]]:
        if self.training and not self._known_initialised:
            self._initialise(rows.detach())
        if self.choices["unit_norm"] != "none":
            rows = self.normalise(rows)
        gradient = self.choices["gradient"]
        # With straight-through gradients only the chosen codes get any, so the search sees constants.
        all_codes_learn = (
            gradient == "soft"
            or self.choices["projection"] == "bridge"
            or "sample_entropy" in self.loss_weights
            or "prior" in self.loss_weights
        )
        codebook = self._codebook(differentiable=self.training and all_codes_learn)
        soft_codes = entropies = None
        if gradient == "soft" and self.training:
            soft_codes, indices, *entropies = self._soft_codes(rows, codebook)
        else:
            indices = self._assign(rows.detach(), codebook.detach())
        codes = self._chosen(indices, codebook)
        losses = self._losses(rows, codes, soft_codes, codebook, entropies)
        if self.training:
            self._collect(rows.detach(), indices)
            if soft_codes is not None:
                codes = soft_codes
            elif gradient == "straight_through":
                codes = straight_through(rows, codes)
            elif gradient == "none":
                codes = codes.detach()
            else:
                codes = rotate(rows, codes, tangential=gradient == "rotation_tangential")
        return codes, indices, losses

    @override
    def lookup(self, indices: Int[Tensor, "..."]) -> Float[Tensor, "... d"]:
        indices = indices.long()
        return self._chosen(indices, None if self._gathers_first() else self._codebook(differentiable=self.training))

    @override
    def invert(self, codes: Float[Tensor, "... d"]) -> Int[Tensor, "..."]:
        return ops.nearest_code(codes.reshape(-1, self.dim), self._codebook()).reshape(codes.shape[:-1])

    @override
    @torch.no_grad()
    def update(self) -> None:
        """Move the table towards the collected features of all ranks, then revive dead codes."""
        self._touched = None
        if not self._pending:
            return
        # Kept apart by forward, so that random choices do not depend on how batches are spread over ranks.
        batches = [_finite_rows(rows, indices) for rows, indices in self._pending]
        self.discard()
        rows = torch.cat([rows for rows, _ in batches])
        indices = torch.cat([indices for _, indices in batches])
        counts, sums = ops.code_sums(rows, indices, self.codebook_size)
        distributed.all_reduce_sum(counts)
        if not counts.sum():
            return
        if hasattr(self, "cluster_size"):
            self.cluster_size.lerp_(counts, 1 - self.decay)
        if self.choices["table"] == "ema":
            self._average(counts, distributed.all_reduce_sum(sums))
        self.updates += 1
        if self.choices["revival"] == "random":
            self._revive([rows for rows, _ in batches], counts.sum())
        elif self.choices["revival"] == "anchor":
            self._move_to_anchors(rows, counts)

    @override
    def discard(self) -> None:
        self._pending.clear()

    def normalise(self, rows: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Scale vectors to the length that codes have with ``unit_norm``."""
        return F.normalize(rows, dim=-1)

    def search_rows(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """What the distance compares: the vectors themselves, or their directions."""
        if self.choices["distance"] == "cosine" and self.choices["unit_norm"] != "both":
            return F.normalize(rows, dim=-1)
        return rows

    def _gathers_first(self) -> bool:
        """Whether the codes of a few indices are computed without the whole codebook, for the gradient's sake."""
        return self.training and torch.is_grad_enabled() and self.choices["projection"] != "bridge"

    def _codebook(self, *, differentiable: bool = False) -> Tensor:
        """The effective codebook; without gradient it is kept until the table or the projection changes."""
        with torch.autocast(self.table.device.type, enabled=False):
            return self._float32_codebook(differentiable)

    def _float32_codebook(self, differentiable: bool) -> Tensor:
        if differentiable and torch.is_grad_enabled():
            return self._project(self.table)
        if self.projection is None and self.choices["unit_norm"] != "both":
            return self.table.detach()
        sources = [self.table, *(self.projection.parameters() if self.projection is not None else ())]
        if torch.compiler.is_compiling() or any(source.is_inference() for source in sources):
            with torch.no_grad():
                return self._project(self.table)
        version = [(source.data_ptr(), source._version) for source in sources]
        if self._cache is None or self._cache[0] != version:
            # An inference tensor could not be used in a later backward pass.
            with torch.inference_mode(False), torch.no_grad():
                self._cache = (version, self._project(self.table))
        return self._cache[1]

    def _project(self, rows: Tensor) -> Tensor:
        if self.projection is not None:
            rows = self.projection(rows)
        return self.normalise(rows) if self.choices["unit_norm"] == "both" else rows

    def _chosen(self, indices: Tensor, codebook: Tensor | None) -> Tensor:
        """Codes of indices, with a gradient for the table in training."""
        if self._gathers_first():
            return self._project(F.embedding(indices, self.table))
        assert codebook is not None
        return F.embedding(indices, codebook)

    def _assign(self, rows: Tensor, codebook: Tensor) -> Tensor:
        assignment = self.choices["assignment"] if self.training else "nearest"
        if assignment == "gumbel":
            return self._soft_codes(rows, codebook)[1]
        if self.scores is not None:
            return ops.nearest_code(*self._linear_scores(rows), metric="dot")
        rows, codebook = self.search_rows(rows), self.search_rows(codebook)
        if assignment == "sinkhorn":
            assert self.sinkhorn_iterations
            assert self.sinkhorn_epsilon
            assert self.max_memory
            return ops.sinkhorn_code(
                rows, codebook, self.sinkhorn_iterations, self.sinkhorn_epsilon, self.max_memory * 2**20
            )
        return ops.nearest_code(rows, codebook, metric="dot" if self.choices["distance"] == "dot" else "euclidean")

    def _linear_scores(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and keys whose products are the scores of the linear layer with its bias."""
        assert self.scores is not None
        return (
            F.pad(rows, (0, 1), value=1.0),
            torch.cat([self.scores.weight, self.scores.bias.unsqueeze(-1)], dim=-1),
        )

    def _keys(self, rows: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, str]:
        """Rows, keys and metric of the scores over all codes, for softmaxes."""
        if self.scores is not None:
            return (*self._linear_scores(rows), "dot")
        metric = "dot" if self.choices["distance"] == "dot" else "euclidean"
        return self.search_rows(rows), self.search_rows(codebook), metric

    def _soft_codes(self, rows: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
        """Soft one-hot codes and their indices; with an entropy loss also the entropies, from the same passes."""
        rows, keys, metric = self._keys(rows, codebook)
        seed = None
        if self.choices["assignment"] == "gumbel":
            # Every rank draws other noise, also where all ranks were seeded alike.
            seed = torch.randint(2**31, ()) + distributed.rank()
        temperature = self.temperature or 1.0
        if self.entropy_temperature is None or not rows.requires_grad:
            return ops.soft_one_hot(rows, keys, codebook, temperature, metric, noise_seed=seed)
        return ops.soft_codes(rows, keys, codebook, temperature, self.entropy_temperature, metric, noise_seed=seed)

    def _losses(
        self,
        rows: Tensor,
        codes: Tensor,
        soft_codes: Tensor | None,
        codebook: Tensor,
        entropies: Sequence[Tensor] | None,
    ) -> dict[str, Tensor]:
        wanted = self.loss_weights
        losses = {}
        if "commitment" in wanted:
            losses["commitment"] = F.mse_loss(rows, codes.detach())
        if "codebook" in wanted:
            losses["codebook"] = F.mse_loss(codes, rows.detach())
        if "soft" in wanted:
            losses["soft"] = F.mse_loss(rows, codes if soft_codes is None else soft_codes)
        if "sample_entropy" in wanted:
            assert self.entropy_temperature is not None
            losses["sample_entropy"], mean = entropies or self._entropies(rows, codebook, self.entropy_temperature)
            if "batch_entropy" in wanted:
                # In evaluation ranks may hold different numbers of batches, and one would wait for ever.
                mean = distributed.mean_over_ranks(mean, len(rows)) if self.training else mean
                losses["batch_entropy"] = torch.special.entr(mean).sum()
        if "prior" in wanted:
            losses["prior"] = math.log(self.codebook_size) - self._entropies(rows, codebook, 1.0)[0]
        if "orthogonality" in wanted:
            directions = F.normalize(self._codebook(differentiable=self.training), dim=-1)
            # The squared Gram matrices of the rows and of the columns have the same sum, and that one is d x d.
            gram = directions.T @ directions
            losses["orthogonality"] = gram.square().sum() / self.codebook_size**2 - 1 / self.codebook_size
        return losses

    def _entropies(self, rows: Tensor, codebook: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        rows, keys, metric = self._keys(rows, codebook)
        return ops.soft_assignment(rows, keys, temperature, metric)

    def _collect(self, rows: Tensor, indices: Tensor) -> None:
        moves = self.choices["table"] == "ema" or self.choices["revival"] != "none"
        if moves and not self.frozen and not is_recomputation():
            self._pending.append((rows, indices))

    def _average(self, counts: Tensor, sums: Tensor) -> None:
        if self.average == "centroids":
            used = counts > 0
            centroids = torch.where(used.unsqueeze(-1), sums / counts.clamp(min=1).unsqueeze(-1), self.table)
            self.table.lerp_(self._on_sphere(centroids), 1 - self.decay)
        else:
            self.table_sum.lerp_(sums, 1 - self.decay)
            total = self.cluster_size.sum()
            smoothed = (self.cluster_size + self.eps) / (total + self.codebook_size * self.eps) * total
            torch.div(self.table_sum, smoothed.unsqueeze(-1), out=self.table)
        if self.choices["unit_norm"] == "both":
            self.table.copy_(self.normalise(self.table))

    def _on_sphere(self, rows: Tensor) -> Tensor:
        return self.normalise(rows) if self.choices["unit_norm"] == "both" else rows

    def _random_rows(self, batches: Sequence[Tensor], count: int) -> Tensor:
        return ops.random_rows(batches, count, (self.seed * SEED_STRIDE + int(self.updates)) % 2**32)

    def _revive(self, batches: Sequence[Tensor], tokens: Tensor) -> None:
        uniform_usage = self.cluster_size.mean()
        dead = (self.cluster_size < self.revive_below * uniform_usage).nonzero().squeeze(-1)
        dead = dead[: int(tokens)]
        if not len(dead):
            return
        self.table[dead] = self._random_rows(batches, len(dead))
        self._touched = dead
        # Sums and sizes move along, otherwise the next update would undo the revival.
        self.cluster_size[dead] = uniform_usage
        if hasattr(self, "table_sum"):
            self.table_sum[dead] = self.table[dead] * uniform_usage

    def _move_to_anchors(self, rows: Tensor, counts: Tensor) -> None:
        """Equations 4 to 6 of C. Zheng, A. Vedaldi: Online Clustered Codebook, https://arxiv.org/abs/2307.15139."""
        self.usage.lerp_(counts / counts.sum(), 1 - self.decay)
        share = torch.exp(-self.usage * self.codebook_size * 10 / (1 - self.decay) - 1e-3)
        anchors = ops.closest_rows(self.search_rows(rows), self.search_rows(self.table), rows)
        self.table.lerp_(anchors, share.unsqueeze(-1))
        self._touched = (share > 0.5).nonzero().squeeze(-1)
        if hasattr(self, "table_sum"):
            self.table_sum.copy_(self.table * self.cluster_size.unsqueeze(-1))

    @torch.no_grad()
    def _initialise(self, rows: Tensor) -> None:
        if self.initialised:
            self._known_initialised = True
            return
        if self.choices["init"] == "file":
            self.table.copy_(self._read_codebook_file())
        else:
            rows = rows[_finite(rows)]
            if self.choices["unit_norm"] != "none":
                rows = self.normalise(rows)
            total = sum(distributed.row_counts(len(rows), rows.device))
            if not total:
                return
            if self.choices["init"] == "kmeans":
                if total < self.codebook_size:
                    raise ValueError(
                        f"init=kmeans needs at least codebook_size = {self.codebook_size} features in the first "
                        f"batch, got {total}: raise data.batch_size, or set quantizer.init=batch"
                    )
                assert self.kmeans_iterations
                self.table.copy_(ops.kmeans(rows, self.codebook_size, self.kmeans_iterations, seed=self.seed))
            else:
                self.table.copy_(self._random_rows([rows], self.codebook_size))
        # Ranks may run different devices or libraries: the table of the first one holds.
        distributed.broadcast(self.table)
        if hasattr(self, "table_sum"):
            self.table_sum.copy_(self.table)
        self.initialised.fill_(True)

    def _read_codebook_file(self) -> Tensor:
        assert self.codebook_file
        path = Path(self.codebook_file)
        if not path.is_file():
            raise ValueError(f"codebook_file {path} does not exist")
        if path.suffix == ".npy":
            rows = torch.from_numpy(np.load(path, allow_pickle=False))
        elif path.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors = load_file(path)
            if len(tensors) != 1:
                raise ValueError(f"codebook_file {path} must hold one tensor, got {sorted(tensors)}")
            rows = next(iter(tensors.values()))
        else:
            raise ValueError(f"codebook_file must end in .safetensors or .npy, got {path.name}")
        if rows.shape != self.table.shape:
            raise ValueError(
                f"codebook_file {path} has shape {tuple(rows.shape)}, but codebook_size and table_dim ask for "
                f"{tuple(self.table.shape)}"
            )
        return rows.to(self.table)

    def extra_repr(self) -> str:
        """One line for ``print(quantizer)``."""
        return f"{super().extra_repr()}, " + ", ".join(f"{name}={value}" for name, value in self.choices.items())


def _finite_rows(rows: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    finite = _finite(rows)
    return (rows, indices) if finite.all() else (rows[finite], indices[finite])


def _finite(rows: Tensor) -> Tensor:
    """Which rows have no NaN or infinite value; the others belong to a step that the training will reject."""
    # The largest magnitude of a row that holds NaN is NaN.
    return torch.linalg.vector_norm(rows, torch.inf, dim=-1) < torch.inf
