"""What residual stacks, groups and pyramids of quantizers share: their parts, and training without the last of them."""

import random
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import override

from vistok.quantizer.base import Quantizer, check_indices
from vistok.quantizer.template import SEED_STRIDE, from_template

Template = Quantizer | Mapping[str, Any]


class CompositeQuantizer(Quantizer):
    """Several quantizers of any kind, one after another or side by side.

    A training step may leave out the last parts. How many it keeps follows from the seed and the number of updates
    alone, so every rank, every accumulated batch and every recomputation of an activation checkpoint keeps the same.
    It is drawn outside `forward`, where a compiled graph sees a plain number.

    Args:
        template: Description of the parts, or one description for each.
        count: Number of parts: stages, groups, scales.
        shared: One module takes the place of all parts. Its statistics of all parts are applied together, once per
            update.
        shortens: Whether a training step may leave parts out.
        seed: Seed of the parts and of what a step leaves out.
        **arguments: Passed down into the templates; None leaves them to the template.

    Attributes:
        quantizers: The modules, a single one if shared.
        kept: How many parts the next training step keeps.
    """

    TEMPLATES = ("quantizer",)

    updates: Tensor

    def __init__(
        self,
        template: Template | Sequence[Template],
        count: int,
        *,
        shared: bool,
        shortens: bool,
        seed: int,
        **arguments: Any,
    ) -> None:
        super().__init__()
        check_count("seed", seed, 0)
        if isinstance(template, Sequence):
            if shared or len(template) != count:
                raise ValueError(
                    f"a list of templates needs shared=false and one template for each of the {count} parts; "
                    f"got shared={shared} and {len(template)} templates"
                )
            templates = list(template)
        else:
            templates = [template] * (1 if shared else count)
        # A part may be a composite with parts of its own: no two of them all may draw the same numbers.
        self.quantizers = nn.ModuleList(
            from_template(each, seed * SEED_STRIDE + number, **arguments) for number, each in enumerate(templates)
        )
        self.count = count
        self.shortens = shortens
        self.seed = seed
        self.kept = count
        for part in self.parts():
            _refuse_as_part(part)
        weights = [self.part(number).loss_weights for number in range(count)]
        self._same_losses = all(each == weights[0] for each in weights)
        if self._same_losses:
            self.loss_weights = dict(weights[0])
        else:
            self.loss_weights = {
                f"part{number}_{key}": weight / count
                for number, each in enumerate(weights)
                for key, weight in each.items()
            }
        self.register_buffer("updates", torch.tensor(0))
        self._trained = False
        self.register_load_state_dict_post_hook(_draw_after_loading)

    @abstractmethod
    def choose(self, rng: random.Random) -> int:
        """How many parts a training step keeps; only called if it may leave some out."""

    def draw(self) -> None:
        """Set `kept` for the next training step; the first one keeps all parts."""
        if self.shortens and self.updates:
            self.kept = self.choose(random.Random((int(self.updates) << 32) + self.seed))
        else:
            self.kept = self.count

    def part(self, number: int) -> Quantizer:
        """The quantizer of a stage, group or scale."""
        part = self.quantizers[number % len(self.quantizers)]
        assert isinstance(part, Quantizer)
        return part

    def begin(self) -> int:
        """How many parts this forward runs."""
        if self.training:
            self._trained = True
            return self.kept
        return self.count

    def keep_in_graph(self, codes: Tensor) -> Tensor:
        """Give parts that were left out a gradient of zero: DDP waits for the gradient of every parameter."""
        if self.kept < self.count:
            for parameter in self.parameters():
                if parameter.requires_grad:
                    codes = codes + 0 * parameter.sum()
        return codes

    def mean_losses(self, losses: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The losses of the parts that ran as one: their mean, or side by side if their weights differ."""
        if self._same_losses:
            return {key: torch.stack([each[key] for each in losses]).mean() for key in self.part(0).loss_weights}
        named = {f"part{number}_{key}": loss for number, each in enumerate(losses) for key, loss in each.items()}
        absent = torch.zeros((), device=self.updates.device)
        return {key: named.get(key, absent) for key in self.loss_weights}

    @override
    def update(self) -> None:
        super().update()
        if self.shortens and self._trained:
            self.updates += 1
            self.draw()
        self._trained = False

    @override
    def discard(self) -> None:
        super().discard()
        self._trained = False


class PositionwiseComposite(CompositeQuantizer):
    """A composite whose parts describe the same positions: their indices lie side by side on the last axis."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        parts = [self.part(number) for number in range(self.count)]
        self._widths = [part.num_codebooks for part in parts]
        self.codebook_sizes = tuple(size for part in parts for size in part.codebook_sizes)
        self.bits = float(sum(part.bits for part in parts))

    def join(self, indices: Sequence[Int[Tensor, "..."]]) -> Int[Tensor, "..."]:
        """Indices of the first parts as one tensor."""
        if self.num_codebooks == 1:
            return indices[0]
        columns = [
            each.unsqueeze(-1) if width == 1 else each for each, width in zip(indices, self._widths, strict=False)
        ]
        return torch.cat(columns, dim=-1)

    def split(self, indices: Int[Tensor, "..."]) -> list[Int[Tensor, "..."]]:
        """Inverse of `join`.

        Raises:
            ValueError: If the indices are not valid, or end within a part.
        """
        check_indices(indices, self.codebook_sizes, type(self).__name__, shorter=True)
        if self.num_codebooks == 1:
            return [indices]
        ends = list(accumulate(self._widths))
        if indices.shape[-1] not in ends:
            raise ValueError(
                f"{type(self).__name__} takes the indices of whole parts, {', '.join(map(str, ends))} values on the "
                f"last axis; got {tuple(indices.shape)}"
            )
        widths = self._widths[: ends.index(indices.shape[-1]) + 1]
        columns = indices.split(widths, dim=-1)
        return [each.squeeze(-1) if width == 1 else each for each, width in zip(columns, widths, strict=True)]

    @override
    def shorten(
        self, indices: Int[Tensor, "b ..."], length: int, grid: Sequence[int] | None = None
    ) -> Int[Tensor, "b ..."]:
        parts = self.split(indices)
        check_length(length, len(parts))
        return self.join(parts[:length])


def _draw_after_loading(module: nn.Module, _: Any) -> None:
    assert isinstance(module, CompositeQuantizer)
    module.draw()


def _refuse_as_part(part: Quantizer) -> None:
    name = type(part).__name__
    if not part.codebook_sizes:
        raise ValueError(f"{name} is continuous: only quantizers with codebooks can be the parts of others")
    if part.indices_shape((2, 3))[:2] != (2, 3):
        raise ValueError(f"{name} has no indices of its own for each position: it cannot be the part of another")
    if isinstance(part, CompositeQuantizer) and part.shortens:
        raise ValueError(
            f"{name} leaves out parts in training, which makes gaps in the indices of its composite: let the outermost "
            "quantizer do it (groups of residual stacks are the same codes as a residual stack of groups)"
        )


def check_count(name: str, value: Any, low: int) -> None:
    """Refuse an argument that is not an integer of at least `low`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse an argument that is not one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def check_dropout(dropout: float, name: str, least: int, count: int) -> None:
    """Refuse a probability outside [0, 1], or a smallest number of parts that cannot be kept or has no effect.

    Args:
        dropout: Probability that a training step leaves parts out.
        name: What the caller names `least`.
        least: Smallest number of parts a step keeps.
        count: Number of parts.
    """
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout is a probability, got {dropout}")
    check_count(name, least, 1)
    if least > count:
        raise ValueError(f"{name} must be at most {count}, got {least}")
    if least > 1 and not dropout:
        raise ValueError(f"{name}={least} has no effect without dropout: set dropout, or write {name}=1")


def check_length(length: int, count: int) -> None:
    """Refuse a number of parts that is not between 1 and `count`."""
    if not isinstance(length, int) or not 1 <= length <= count:
        raise ValueError(f"length must lie between 1 and {count}, got {length}")


def keep_prefix(rng: random.Random, dropout: float, least: int, count: int) -> int:
    """All parts; with probability `dropout` only a number of them, uniform from `least` to all."""
    return rng.randint(least, count) if rng.random() < dropout else count


def per_channel(values: Float[Tensor, " d"], like: Float[Tensor, "b d *grid"]) -> Float[Tensor, "1 d *ones"]:
    """Shape one value per channel so that it multiplies features."""
    return values.view(1, -1, *[1] * (like.ndim - 2))
