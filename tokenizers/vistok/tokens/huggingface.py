"""Image tokens inside a causal language model of Hugging Face's ``transformers``.

The vocabulary grows by two marks, begin and end of an image, and by the tokenizer's ids, one range per codebook. An
image is one span of a sequence: begin, its tokens in the order of `vistok.Tokenizer.flatten`, end.

Needs ``transformers``, of the extra ``text``.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from vistok.tokenizer import Tokenizer
from vistok.tokens.manifest import Layout


@dataclass(frozen=True)
class ImageVocabulary:
    """Where the image tokens lie in a vocabulary.

    Args:
        first: Id of the mark that begins an image; the mark that ends one and the codes of each codebook follow.
        layout: Of the tokens of an image.
    """

    first: int
    layout: Layout

    @property
    def begin(self) -> int:
        """Id of the mark before an image."""
        return self.first

    @property
    def end(self) -> int:
        """Id of the mark after an image."""
        return self.first + 1

    @property
    def starts(self) -> tuple[int, ...]:
        """Id of the first code of each codebook."""
        return tuple(self.first + 2 + offset for offset in (0, *accumulate(self.layout.codebook_sizes[:-1])))

    @property
    def size(self) -> int:
        """Size of the whole vocabulary."""
        return self.first + 2 + sum(self.layout.codebook_sizes)

    def codes_at(self, position: int) -> tuple[int, int]:
        """First id and end of the range that the token at a position of an image lies in."""
        codebook = position % self.layout.depth
        return self.starts[codebook], self.starts[codebook] + self.layout.codebook_sizes[codebook]

    def to_ids(self, tokens: Int[Tensor, "b length"]) -> Int[Tensor, "b length"]:
        """Ids of the tokens of `vistok.Tokenizer.flatten`.

        Raises:
            ValueError: If the images have another number of tokens.
        """
        if tokens.shape[-1] != self.layout.length:
            raise ValueError(f"images have {self.layout.length} tokens here, got {tuple(tokens.shape)}")
        return tokens + self._starts(tokens)

    def to_tokens(self, ids: Int[Tensor, "b length"]) -> Int[Tensor, "b length"]:
        """Inverse of `to_ids`."""
        return ids - self._starts(ids)

    def _starts(self, like: Tensor) -> Tensor:
        starts = torch.tensor(self.starts, device=like.device)
        return starts.repeat(self.layout.length // self.layout.depth)


CONFIG_KEY = "image_vocabulary"


def extend_vocabulary(
    model: Any, tokenizer: Tokenizer, size: Sequence[int] | None = None, from_codebook: bool = False
) -> ImageVocabulary:
    """Give a causal language model rows for the tokens of images, after the rows that it has.

    Its config then says which these are, so that `vocabulary_of` finds them when the model was saved and loaded again.

    Args:
        model: A ``transformers`` causal language model; its embeddings, and its head, are enlarged in place. The new
            rows start as `transformers` draws them, around the mean of the old ones.
        tokenizer: Of the images.
        size: Of the images in pixels; None: the training size.
        from_codebook: Start the embeddings of codes from the codebook: through a random projection to the model's
            width, scaled to the mean and deviation of the old rows. Codes that are near each other then start near
            each other.

    Raises:
        ValueError: If a codebook is wanted and the tokenizer has no single table.
    """
    codebook = tokenizer.quantizer.codebook
    if from_codebook and codebook is None:
        raise ValueError(
            f"{type(tokenizer.quantizer).__name__} has no single codebook of at most 2**20 rows: write "
            "from_codebook=False"
        )
    old = model.get_input_embeddings().weight
    vocabulary = ImageVocabulary(len(old), Layout.of(tokenizer, size))
    mean, deviation = old.detach().float().mean(0), old.detach().float().std()
    model.resize_token_embeddings(vocabulary.size)
    setattr(model.config, CONFIG_KEY, asdict(vocabulary))
    if from_codebook and codebook is not None:
        with torch.no_grad():
            weight = model.get_input_embeddings().weight
            rows = codebook.detach().float().to(weight.device)
            rows = (rows - rows.mean(0)) / rows.std().clamp(min=1e-12)
            generator = torch.Generator().manual_seed(0)
            projection = torch.randn(rows.shape[1], weight.shape[1], generator=generator) / math.sqrt(rows.shape[1])
            start = vocabulary.starts[0]
            weight[start : start + len(rows)] = (mean + deviation * rows @ projection.to(rows.device)).to(weight.dtype)
    return vocabulary


def vocabulary_of(model: Any) -> ImageVocabulary:
    """The vocabulary that `extend_vocabulary` gave to a model, or to the model that it was loaded from.

    Raises:
        ValueError: If it has none.
    """
    found = getattr(model.config, CONFIG_KEY, None)
    if found is None:
        raise ValueError(
            f"this {type(model).__name__} has no tokens of images: call extend_vocabulary(model, tokenizer)"
        )
    return ImageVocabulary(found["first"], Layout(**found["layout"]))


def interleave(parts: Sequence[Sequence[int] | Tensor], vocabulary: ImageVocabulary) -> Int[Tensor, " n"]:
    """A sequence of text and images.

    Args:
        parts: Text as ids ``(n,)`` (a list or a tensor); an image as ``(1, length)``, what `vistok.Tokenizer.flatten`
            makes of one.
        vocabulary: Of the model.
    """
    sequence = []
    for part in parts:
        ids = torch.as_tensor(part)
        if ids.ndim == 2:
            marks = ids.new_tensor([vocabulary.begin]), ids.new_tensor([vocabulary.end])
            ids = torch.cat([marks[0], vocabulary.to_ids(ids)[0], marks[1]])
        sequence.append(ids.long())
    return torch.cat(sequence)


def split_images(ids: Int[Tensor, " n"], vocabulary: ImageVocabulary) -> tuple[list[Tensor], Int[Tensor, "m length"]]:
    """Text and images of a sequence: the spans of text ids between images, and the tokens of all whole images.

    Raises:
        ValueError: If an image holds something else than its tokens, or something else than its end follows.
    """
    texts, images, place = [], [], 0
    length = vocabulary.layout.length
    for begin in (ids == vocabulary.begin).nonzero().flatten().tolist():
        texts.append(ids[place:begin])
        tokens = ids[begin + 1 : begin + 1 + length]
        place = min(begin + length + 2, len(ids))
        if len(tokens) < length:  # generation stopped inside the image
            place = len(ids)
            break
        ranges = torch.tensor([vocabulary.codes_at(position) for position in range(length)], device=ids.device)
        if not ((tokens >= ranges[:, 0]) & (tokens < ranges[:, 1])).all():
            raise ValueError(f"the image that begins at {begin} holds ids outside its codebooks")
        if not (ids[begin + 1 + length : place] == vocabulary.end).all():
            raise ValueError(f"the image that begins at {begin} is not followed by the mark of its end")
        images.append(vocabulary.to_tokens(tokens[None]))
    texts.append(ids[place:])
    return texts, torch.cat(images) if images else ids.new_zeros(0, length)


class ImageLogitsProcessor(LogitsProcessor):
    """Keeps generation to whole images: after a begin mark the tokens of one image, each of its codebook, then the end.

    Outside of an image the codes and the end mark are forbidden.

    Args:
        vocabulary: Of the model.
        allow_begin: Whether the model may begin an image by itself; otherwise only prompts do.
    """

    def __init__(self, vocabulary: ImageVocabulary, allow_begin: bool = True) -> None:
        self.vocabulary = vocabulary
        self.allow_begin = allow_begin

    def __call__(self, input_ids: Int[Tensor, "b n"], scores: Float[Tensor, "b v"]) -> Float[Tensor, "b v"]:
        """Scores with minus infinity for what cannot come next."""
        vocabulary, length = self.vocabulary, self.vocabulary.layout.length
        # Tokens since the last begin mark; more than an image has if there is none.
        recent = input_ids[:, -length - 2 :].flip(1) == vocabulary.begin
        since = torch.where(recent.any(1), recent.int().argmax(1), length + 2)
        rows = torch.arange(scores.shape[1], device=scores.device)
        allowed = torch.empty_like(scores, dtype=torch.bool)
        for row, position in enumerate(since.tolist()):
            if position < length:
                start, end = vocabulary.codes_at(position)
                allowed[row] = (rows >= start) & (rows < end)
            elif position == length:
                allowed[row] = rows == vocabulary.end
            else:
                allowed[row] = (rows < vocabulary.first) | ((rows == vocabulary.begin) & self.allow_begin)
        return scores.masked_fill(~allowed, -math.inf)
