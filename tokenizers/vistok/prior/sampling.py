"""Sampling from a `GPT`, one token at a time, with cached keys and values."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vistok.prior.gpt import GPT
from vistok.prior.layers import Rotation, Step, multiply, product_with

Trunk = Callable[[Tensor, Rotation | None, Step], Tensor]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn from logits.

    Args:
        temperature: Divides the logits; 0: always the most likely token.
        top_k: Only the so many most likely tokens; None: all.
        top_p: Only the most likely tokens that together have this probability, in (0, 1].
        guidance: Scale s of classifier-free guidance: logits are ``none + s (class - none)``; 1: no guidance.

    Raises:
        ValueError: If a value is out of range or has no effect.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "guidance"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{name} must be a number, got {value!r}")
        if self.top_k is not None and not isinstance(self.top_k, int):
            raise ValueError(f"top_k must be an integer or null, got {self.top_k!r}")
        if self.temperature < 0 or (self.top_k is not None and self.top_k < 1) or not 0 < self.top_p <= 1:
            raise ValueError(
                "temperature must be at least 0, top_k at least 1 or null and top_p in (0, 1]; got "
                f"temperature={self.temperature}, top_k={self.top_k}, top_p={self.top_p}"
            )
        if not self.temperature and (self.top_k is not None or self.top_p < 1):
            raise ValueError("temperature=0 takes the most likely token: top_k and top_p have no effect")

    def draw(self, logits: Float[Tensor, "b k"], generator: torch.Generator | None = None) -> Int[Tensor, " b"]:
        """One index per row."""
        if not self.temperature:
            return logits.argmax(-1)
        order = None
        if self.top_k is not None or self.top_p < 1:
            # In descending order, so that what follows looks at the kept ones only.
            logits, order = logits.topk(min(self.top_k or logits.shape[-1], logits.shape[-1]))
        probabilities = (logits / self.temperature).softmax(-1)
        if self.top_p < 1:
            # The token that crosses the threshold stays.
            probabilities *= probabilities.cumsum(-1) - probabilities < self.top_p
        drawn = _draw(probabilities, generator)
        return (drawn if order is None else order.gather(1, drawn)).squeeze(1)

    def guide(self, logits: Float[Tensor, "n k"]) -> Float[Tensor, "b k"]:
        """Guided logits of rows with their class, then as many without; without guidance, the rows as they are."""
        if self.guidance == 1:
            return logits
        conditional, unconditional = logits.chunk(2)
        return unconditional.lerp(conditional, self.guidance)


def _draw(weights: Float[Tensor, "b k"], generator: torch.Generator | None) -> Int[Tensor, "b 1"]:
    """A column per row, with a probability proportional to its weight.

    As `torch.multinomial` does, from one random number per row in place of one per weight, which would take a third of
    a step on a CPU; and without waiting for a GPU.
    """
    ends = weights.cumsum(-1)
    # Random numbers are below 1, so that the product is below the last end, and no column without weight is drawn.
    places = torch.rand(len(ends), 1, generator=generator, device=ends.device, dtype=ends.dtype) * ends[:, -1:]
    # Weights that are not numbers give a place after the last one; `generate` then raises an error.
    return torch.searchsorted(ends, places, right=True).clamp_(max=ends.shape[1] - 1)


class Decoder:
    """The blocks of a model with their caches, one step at a time.

    Args:
        blocks: Of the model.
        shape: Of the keys of a block: ``(b, heads, length, channels of a head)``.
        like: Of its device and dtype.
        compile: Backend of `torch.compile`; None: do not. A compiled step always looks at the whole cache, so it is
            compiled once.
    """

    def __init__(self, blocks: nn.ModuleList, shape: Sequence[int], like: Tensor, compile: str | None = None) -> None:
        self.caches = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in blocks]
        self.blocks = blocks
        self.length = shape[2]
        self.compiled = compile is not None
        weights = [layer.weight for layer in blocks.modules() if isinstance(layer, nn.Linear)]
        # torch.compile does not take weights in oneDNN's order.
        self.multiply = multiply if self.compiled else product_with(weights, shape[0])
        self.positions = torch.arange(self.length, device=like.device)
        self.run: Trunk = self._run if compile is None else torch.compile(self._run, backend=compile, dynamic=False)

    def __call__(self, x: Float[Tensor, "b e"], position: int, rotation: Rotation | None) -> Float[Tensor, "b e"]:
        """Output of the token at a position, whose predecessors are in the caches."""
        place = self.positions[position : position + 1]
        if self.compiled:
            return self.run(x, rotation, Step(place, self.length, (self.positions <= place)[None], self.multiply))
        return self.run(x, rotation, Step(place, position + 1, None, self.multiply))

    def _run(self, x: Tensor, rotation: Rotation | None, step: Step) -> Tensor:
        for block, cache in zip(self.blocks, self.caches, strict=True):
            x = block.step(x, rotation, cache, step)  # type: ignore[operator]
        return x


@torch.inference_mode()
def generate(
    prior: GPT,
    labels: Int[Tensor, " b"] | None = None,
    sampling: Sampling | None = None,
    *,
    num_images: int | None = None,
    compile: str | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "b length"]:
    """Draw the tokens of images.

    On a CPU the weights are copied for the time of the call, in the order that is fastest for the number of images.

    Args:
        prior: In evaluation mode.
        labels: A class for each image; for models without classes, give `num_images` instead.
        sampling: How to draw; default: from the model's own distribution.
        num_images: How many images, without labels.
        compile: Backend of `torch.compile` for the steps, such as ``inductor``; None: do not compile.
        generator: Source of the draws, on the device of the model.

    Returns:
        Raw ids, as `vistok.Tokenizer.unflatten` takes them.

    Raises:
        ValueError: If labels and model do not fit, or there is nothing that guidance could lead away from, or
            the model gives numbers that are not finite.
    """
    sampling = sampling or Sampling()
    if prior.training:
        raise ValueError("sampling is for evaluation: call prior.eval() first")
    if (labels is None) == (num_images is None):
        raise ValueError("give either labels or num_images")
    if labels is not None and not prior.num_classes:
        raise ValueError("this model has no classes: give num_images instead of labels")
    if labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) <= prior.num_classes:
        raise ValueError(
            f"labels are 0 to {prior.num_classes - 1}, or {prior.num_classes} for no class; got {int(labels.min())} "
            f"to {int(labels.max())}"
        )
    if sampling.guidance != 1 and labels is None:
        raise ValueError(f"guidance={sampling.guidance} needs labels: write guidance=1")
    count = len(labels) if labels is not None else int(num_images or 0)
    x = prior.start(labels, count)
    if sampling.guidance != 1:
        x = torch.cat([x, prior.start(None, count)])
    copies = len(x) // count
    heads = (prior.num_heads, prior.width // prior.num_heads)
    part_heads = prior.part_heads()
    to_logits = product_with(part_heads, len(x))
    trunk = Decoder(prior.blocks, (len(x), heads[0], prior.num_steps, heads[1]), x, compile)
    depth = Decoder(prior.head_blocks, (len(x), heads[0], prior.num_parts, heads[1]), x, compile)
    sums = []
    rows = torch.empty(count, prior.num_positions * prior.num_parts, dtype=torch.int64, device=x.device)

    def choose(features: Tensor, index: int) -> Tensor:
        """Draw the part that `index` counts over all positions; returns its embedding."""
        part = index % prior.num_parts
        logits = sampling.guide(to_logits(prior.norm(features), part_heads[part]).float())
        drawn = sampling.draw(logits, generator) + (prior.part_ends[part] - prior.part_sizes[part])
        rows[:, index] = drawn
        return prior.token_embedding(drawn).repeat(copies, 1)

    for step in range(prior.num_steps):
        features = trunk(x, step, prior.rotation(step, step + 1))
        sums.append(features.sum(dtype=torch.float32))
        if prior.head_positions is None:
            x = choose(features, step)
            continue
        x = torch.zeros_like(features)
        for part, position in enumerate(prior.head_positions):
            inputs = (x if part else features) + position
            x = x + choose(depth(inputs, part, None), step * prior.num_parts + part)
    if not torch.stack(sums).isfinite().all():
        raise ValueError(f"the model gives numbers that are not finite in {x.dtype}: load it with dtype=float32")
    return prior.to_tokens(rows.unflatten(1, (prior.num_positions, prior.num_parts)))
