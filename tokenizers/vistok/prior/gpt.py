"""A class-conditional autoregressive model of tokens, in the form of a Llama.

One codebook: P. Sun et al.: Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation (LlamaGen),
https://arxiv.org/abs/2406.06525. Several tokens per position: D. Lee et al.: Autoregressive Image Generation using
Residual Quantization, https://arxiv.org/abs/2203.01941, section 3.2. Factorised tokens: Z. Luo et al.: Open-MAGVIT2,
https://arxiv.org/abs/2409.04410, section 3.2.
"""

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vistok.config import Configurable
from vistok.layers import recompute
from vistok.prior.layers import Block, Rotation, rotation

FORMS = ("flat", "depth")


class GPT(Configurable, nn.Module):
    """Predicts the tokens of an image one after the other, after a token for its class.

    A position has several parts if the tokenizer has several codebooks (groups, residual depth), or if its one token is
    divided into factors. With ``form="flat"`` the parts are tokens of one long sequence, each with codes of its own in
    a joint vocabulary. With ``form="depth"`` the sequence has one step per position, whose input is the sum of the
    embeddings of its parts; a second, small transformer predicts the parts of a position one after the other, from the
    step's output and from the sum of the embeddings of the parts before (the depth transformer of RQ-Transformer,
    the factorised heads of Open-MAGVIT2).

    Where the papers differ, it is LlamaGen's model, apart from its class token, which here takes part in attention as
    every token does. Soft targets of RQ-Transformer are not offered.

    Args:
        codebook_sizes: Codes of each codebook, as `vistok.tokens.Layout` has them. Set by training.
        grid: Shape of the positions. Set by training.
        num_classes: Number of classes; 0: unconditional. Set by training.
        width: Channels.
        depth: Number of blocks.
        num_heads: Heads of the attention.
        form: ``flat`` or ``depth``; positions of one part have only ``flat``.
        head_depth: Blocks of the depth transformer; 0 with ``form="flat"``.
        factors: Bits of each factor of a token, least significant first: ``[6, 12]`` for the 18 bits of Open-MAGVIT2.
            Only with one codebook of ``2 ** sum(factors)`` codes. None does not divide.
        dropout: Of the embeddings of tokens and of the residual branches.
        label_dropout: Probability that training replaces a class by the one that stands for none, for classifier-free
            guidance (J. Ho and T. Salimans, https://arxiv.org/abs/2207.12598).
        gradient_checkpointing: Compute activations again in the backward pass instead of keeping them.

    Attributes:
        part_sizes: Codes of each part of a position.
        num_steps: Length of the sequence.

    Raises:
        ValueError: If an argument is out of range, has no effect, or contradicts another.
    """

    def __init__(
        self,
        codebook_sizes: Sequence[int],
        grid: Sequence[int],
        num_classes: int = 0,
        width: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        form: str = "flat",
        head_depth: int = 0,
        factors: Sequence[int] | None = None,
        dropout: float = 0.1,
        label_dropout: float = 0.1,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        sizes = tuple(codebook_sizes)
        if not sizes or not grid or min([*sizes, *grid]) < 1 or num_classes < 0:
            raise ValueError(
                "codebook_sizes and grid must be positive and num_classes not negative, got "
                f"codebook_sizes={list(sizes)}, grid={list(grid)}, num_classes={num_classes}"
            )
        if form not in FORMS:
            raise ValueError(f"form must be flat or depth, got {form!r}")
        if width % num_heads:
            raise ValueError(f"width must be a multiple of num_heads, got {width} and {num_heads}")
        if depth < 1 or not 0 <= dropout < 1 or not 0 <= label_dropout < 1:
            raise ValueError(
                f"depth must be positive and dropout in [0, 1), got depth={depth}, dropout={dropout}, "
                f"label_dropout={label_dropout}"
            )
        if factors is not None and (list(sizes) != [2 ** sum(factors)] or min(factors) < 1):
            raise ValueError(
                f"factors={list(factors)} divide tokens of one codebook with {2 ** sum(factors)} codes, this tokenizer "
                f"has {' x '.join(map(str, sizes))}: write factors=null, or bits that add up"
            )
        parts = sizes if factors is None else tuple(2**bits for bits in factors)
        if form == "depth" and len(parts) == 1:
            raise ValueError("form=depth is for positions of several parts, these have one token: write form=flat")
        if (head_depth > 0) != (form == "depth"):
            raise ValueError(f"form={form} needs {'head_depth>0' if form == 'depth' else 'head_depth=0'}")
        self.codebook_sizes = sizes
        self.grid = tuple(grid)
        self.num_classes = num_classes
        self.width = width
        self.num_heads = num_heads
        self.form = form
        self.factors = None if factors is None else tuple(factors)
        self.label_dropout = label_dropout
        self.gradient_checkpointing = gradient_checkpointing
        self.part_sizes = parts
        self.part_ends = tuple(accumulate(parts))
        self.num_positions = math.prod(self.grid)
        steps_grid = (*self.grid, len(parts)) if form == "flat" and len(parts) > 1 else self.grid
        self.num_steps = math.prod(steps_grid)
        # Rows of the table and of the head: the codes of part 0, of part 1 and so on.
        self.token_embedding = nn.Embedding(sum(parts), width)
        self.class_embedding = nn.Embedding(num_classes + 1, width)  # the last one: no class
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, num_heads, dropout) for _ in range(depth))
        self.head_blocks = nn.ModuleList(Block(width, num_heads, dropout) for _ in range(head_depth))
        self.head_positions = nn.Parameter(torch.zeros(len(parts), width)) if head_depth else None
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.head = nn.Linear(width, sum(parts), bias=False)
        # Sequences with several parts per position have one axis: an axis of two or four would get as many channels.
        cosines, sines = rotation(steps_grid if steps_grid == self.grid else (self.num_steps,), width // num_heads)
        self.register_buffer("_cosines", cosines, persistent=False)
        self.register_buffer("_sines", sines, persistent=False)
        starts = torch.tensor([0, *self.part_ends[:-1]])
        self.register_buffer("_starts", starts, persistent=False)
        rows = torch.arange(sum(parts))
        inside = (rows >= starts[:, None]) & (rows < torch.tensor(self.part_ends)[:, None])
        self.register_buffer("_inside", inside, persistent=False)
        self.apply(_initialise)
        nn.init.zeros_(self.head.weight)

    _cosines: Tensor
    _sines: Tensor
    _starts: Tensor
    _inside: Bool[Tensor, "parts rows"]

    @property
    def num_parts(self) -> int:
        """Parts of a position."""
        return len(self.part_sizes)

    @property
    def length(self) -> int:
        """Tokens of an image, in the tokenizer's count."""
        return self.num_positions * len(self.codebook_sizes)

    def rotation(self, start: int, end: int) -> Rotation:
        """Rotary embedding of some steps."""
        return self._cosines[start:end], self._sines[start:end]

    def forward(
        self, tokens: Int[Tensor, "b length"], labels: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b length"]:
        """Negative log-likelihood of each token in nats, given those before it.

        Args:
            tokens: Of `vistok.Tokenizer.flatten`, raw ids.
            labels: Classes; in training some are dropped. None: unconditional, which a model with classes learns from
                those that are dropped.

        Raises:
            ValueError: If the tokens have another length.
        """
        if tokens.shape[1] != self.length:
            raise ValueError(f"this model has sequences of {self.length} tokens, got {tuple(tokens.shape)}")
        losses = self.part_losses(self.to_rows(tokens), labels)
        # The factors of a token belong together.
        return losses.sum(2) if self.factors else losses.flatten(1)

    def part_losses(
        self, rows: Int[Tensor, "b positions parts"], labels: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b positions parts"]:
        """Negative log-likelihood of each part in nats, given those before it.

        Args:
            rows: Of `to_rows`.
            labels: As for `forward`.
        """
        embedded = self.dropout(self.token_embedding(rows))
        inputs = embedded.sum(2) if self.form == "depth" else embedded.flatten(1, 2)
        features = torch.cat([self.start(labels, len(rows))[:, None], inputs[:, :-1]], 1)
        for block in self.blocks:
            features = recompute.call(
                block, features, self.rotation(0, self.num_steps), gradient_checkpointing=self.gradient_checkpointing
            )
        if self.form == "depth":
            features = self._expand(features, embedded)
        logits = self.logits(features.unflatten(1, (self.num_positions, self.num_parts)))
        return F.cross_entropy(logits.flatten(0, 2), rows.flatten(), reduction="none").view(rows.shape)

    def _expand(
        self, features: Float[Tensor, "b n e"], embedded: Float[Tensor, "b n parts e"]
    ) -> Float[Tensor, "b n*parts e"]:
        """What the depth transformer makes of all positions at once."""
        assert self.head_positions is not None  # there are with form=depth
        before = embedded.cumsum(2)[:, :, :-1]
        inputs = torch.cat([features[:, :, None], before], 2) + self.head_positions
        inputs = inputs.flatten(0, 1)
        for block in self.head_blocks:
            inputs = recompute.call(block, inputs, None, gradient_checkpointing=self.gradient_checkpointing)
        return inputs.reshape(len(features), -1, self.width)

    def start(self, labels: Int[Tensor, " b"] | None, batch: int) -> Float[Tensor, "b e"]:
        """Embedding of the class token; labels equal to `num_classes` and None stand for no class."""
        if labels is None:
            labels = torch.full((batch,), self.num_classes, device=self.head.weight.device)
        if self.training and self.num_classes and self.label_dropout:
            dropped = torch.rand(len(labels), device=labels.device) < self.label_dropout
            labels = labels.masked_fill(dropped, self.num_classes)
        return self.class_embedding(labels)

    def logits(self, features: Float[Tensor, "b n parts e"]) -> Float[Tensor, "b n parts rows"]:
        """Logits in float32, minus infinity outside the codes of each part."""
        logits = self.head(self.norm(features)).float()
        return logits if self.num_parts == 1 else logits.masked_fill(~self._inside, -math.inf)

    def part_heads(self) -> list[Float[Tensor, "k e"]]:
        """Rows of the head for the codes of each part: their products with normalised features are its logits."""
        return list(self.head.weight.split(self.part_sizes))

    def to_rows(self, tokens: Int[Tensor, "b length"]) -> Int[Tensor, "b positions parts"]:
        """Rows of the table of embeddings: tokens divided into factors, with the offset of each part."""
        if self.factors:
            parts = []
            for bits in self.factors:
                parts.append(tokens & (2**bits - 1))
                tokens = tokens >> bits
            ids = torch.stack(parts, -1)
        else:
            ids = tokens.unflatten(1, (self.num_positions, self.num_parts))
        return ids + self._starts

    def to_tokens(self, rows: Int[Tensor, "b positions parts"]) -> Int[Tensor, "b length"]:
        """Inverse of `to_rows`."""
        ids = rows - self._starts
        if not self.factors:
            return ids.flatten(1)
        shifts = torch.tensor([0, *accumulate(self.factors[:-1])], device=ids.device)
        return (ids << shifts).sum(-1)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
