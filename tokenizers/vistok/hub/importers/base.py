"""What importers of published checkpoints share: tensors that are taken by name, and the description of a family."""

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vistok.quantizer import VectorQuantizer
from vistok.tokenizer import Tokenizer

# State of our quantizers that no other program has: whether they have started, and for how many steps they learned.
OWN_STATE = ("initialised", "updates")
# What options can be; those that are not named here are checked where they are used.
FLAGS = ("unit_norm", "unit_features", "unit_range", "whole_codebook", "znorm")
COUNTS = (
    *("num_heads", "num_heads_encoder", "num_heads_decoder", "head_dim"),
    *("num_quantizers", "norm_num_groups", "index_bits"),
)
LISTS = ("levels", "scales")


class Checkpoint:
    """Tensors of a published checkpoint, each to be taken or dropped by name exactly once.

    Args:
        tensors: By the names of the original program.
        config: Original configuration that lay beside the file; empty if there was none.
        options: What cannot be inferred from the tensors and was said by the user, or is known of a published file.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, options: Mapping[str, Any] = {}
    ) -> None:
        self.tensors = dict(tensors)
        self.config = config or {}
        self._options = dict(options)
        self._asked: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor that is still to be taken."""
        return tuple(self._get(name).shape)

    def take(self, name: str) -> Tensor:
        """Hand out a tensor, floats as float32."""
        tensor = self._get(name)
        del self.tensors[name]
        return tensor.float() if tensor.is_floating_point() else tensor

    def count(self, template: str) -> int:
        """How many of the names ``template.format(0)``, ``template.format(1)`` and so on there are without a gap."""
        number = 0
        while template.format(number) in self.tensors:
            number += 1
        return number

    def drop(self, *patterns: str) -> None:
        """Leave out tensors on purpose: what is only for training, or follows from other tensors."""
        for name in [name for name in self.tensors if any(fnmatch.fnmatchcase(name, each) for each in patterns)]:
            del self.tensors[name]

    def option(self, name: str, default: Any) -> Any:
        """What the user says about something that tensors do not tell; ValueError if an option cannot be that."""
        self._asked.add(name)
        value = self._options.get(name)
        if value is None:
            return default
        if name in FLAGS and not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {value!r}")
        if name in COUNTS and not _positive(value):
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if name in LISTS:
            if isinstance(value, str) or not isinstance(value, Sequence) or not all(map(_positive, value)):
                raise ValueError(f"{name} must be a list of positive integers such as [8, 5, 5], got {value!r}")
            return list(value)
        return value

    def size(self, default: int) -> list[int]:
        """Height and width of the pictures in pixels, from option ``size``: a side, or both."""
        value = self.option("size", default)
        sides = list(value) if isinstance(value, Sequence) else [value, value]
        if len(sides) != 2 or not all(map(_positive, sides)):
            raise ValueError(f"size must be a side in pixels, or [height, width], got {value!r}")
        return sides

    def finish(self) -> None:
        """Raise a ValueError if a tensor was neither taken nor dropped, or an option had no effect."""
        if self.tensors:
            names = sorted(self.tensors)
            raise ValueError(
                f"{len(names)} tensors have no place in the model: {names[:5]}{'...' if len(names) > 5 else ''}; "
                "choose another family, if the checkpoint is of one"
            )
        unused = sorted(set(self._options) - self._asked)
        if unused:
            raise ValueError(
                f"{', '.join(unused)} has no effect on this checkpoint; it takes {', '.join(sorted(self._asked))}"
            )

    def _get(self, name: str) -> Tensor:
        if name not in self.tensors:
            names = sorted(self.tensors)
            raise ValueError(
                f"the checkpoint has no tensor {name}; it has {names[:5]}{'...' if len(names) > 5 else ''}: "
                "it is of another family, or incomplete"
            )
        return self.tensors[name]


def _positive(value: Any) -> bool:
    return type(value) is int and value > 0


@dataclass(frozen=True)
class Published:
    """A checkpoint that its authors published.

    Attributes:
        name: How it is called behind the name of its family.
        source: Id of a repository on the Hugging Face hub, or a URL.
        file: File in the repository; None: its name is not known.
        parameters: Parameters that inference needs, in millions.
        licence: Of the weights, as far as their authors state it.
        options: What its tensors do not tell.
    """

    name: str
    source: str
    file: str | None = None
    parameters: float | None = None
    licence: str = "not stated"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """Checkpoints of one program.

    Attributes:
        name: How `vistok.load` calls it.
        title: Method and repository.
        marks: Names, with ``*``, of tensors that every checkpoint of the family has.
        convert: Builds the tokenizer of a checkpoint and takes all of its tensors.
        published: What the authors published.
    """

    name: str
    title: str
    marks: tuple[str, ...]
    convert: Callable[[Checkpoint], Tokenizer]
    published: tuple[Published, ...] = ()

    def recognises(self, names: Mapping[str, Any]) -> bool:
        """Whether tensors of these names may be of this family."""
        return all(fnmatch.filter(names, mark) for mark in self.marks)


def preprocessing(
    checkpoint: Checkpoint,
    *,
    filter: str,
    antialias: bool = True,
    mode: str = "short_side",
    range: tuple[float, float] = (-1, 1),
    size: int = 256,
    **more: Any,
) -> dict[str, Any]:
    """How the original program prepares pictures, in the form that a bundle records.

    Args:
        checkpoint: Its option ``size`` is the side of the pictures in pixels, or both sides.
        filter: Of the resize.
        antialias: Whether the filter grows with the reduction.
        mode: What is resized to the size.
        range: Of the values that the original program takes. The tokenizer takes [-1, 1] like every other.
        size: Default of the option.
        **more: Further facts.
    """
    resize = {"filter": filter, "mode": mode} | ({} if antialias else {"antialias": False})
    original = {} if range == (-1, 1) else {"original_range": list(range)}
    return {
        "size": checkpoint.size(size),
        "channels": 3,
        "resize": resize,
        "crop": "center",
        "range": [-1, 1],
        **original,
        **more,
    }


def codebook(table: Tensor, **choices: Any) -> VectorQuantizer:
    """A quantizer for the rows of a table; `choices` are those of `VectorQuantizer`."""
    size, dim = table.shape
    return VectorQuantizer(size, dim, **choices)


@torch.no_grad()
def fill(tokenizer: Tokenizer, values: Mapping[str, Tensor]) -> Tokenizer:
    """Put tensors into a tokenizer, by our names; 1x1 convolutions and linear layers may stand for each other.

    Raises:
        ValueError: If one is missing, has no place or another shape, or is not finite.
    """
    state = tokenizer.state_dict()
    missing = [name for name in state if name not in values and name.rpartition(".")[2] not in OWN_STATE]
    if missing or not set(values) <= set(state):
        raise ValueError(
            f"no tensors for {missing[:5]}, no place for {sorted(set(values) - set(state))[:5]}: the checkpoint is of "
            "another family, or incomplete"
        )
    for name, value in values.items():
        target = state[name]
        if _squeezed(value) != _squeezed(target):
            raise ValueError(f"{name} is {tuple(value.shape)} in the checkpoint, expected {tuple(target.shape)}")
        if not torch.isfinite(value).all():
            raise ValueError(f"{name} holds NaN or infinite values")
        target.copy_(value.reshape(target.shape))
    for name, target in state.items():
        if name.rpartition(".")[2] == "initialised":
            target.fill_(True)
    return tokenizer.to(memory_format=torch.channels_last).eval()  # pyright: ignore


def _squeezed(tensor: Tensor) -> list[int]:
    return [length for length in tensor.shape if length != 1]


def square_root(number: int, what: str) -> int:
    """Side of a square; ValueError if the number is no square."""
    side = math.isqrt(number)
    if side * side != number:
        raise ValueError(f"{what} are {number}, not the cells of a square")
    return side
