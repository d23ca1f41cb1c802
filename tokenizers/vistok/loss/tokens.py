"""A decoder that predicts the tokens of a teacher: the first stage of TiTok."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vistok.hub.bundle import load
from vistok.loss.frozen import Frozen, full_precision
from vistok.loss.term import Term
from vistok.tokenizer import Reconstruction, Tokenizer


class TokenPrediction(Term):
    """Cross entropy, in nats, of decoded logits and the tokens that a frozen tokenizer gives the images.

    Q. Yu et al.: An Image is Worth 32 Tokens, https://arxiv.org/abs/2406.07550, section 3.3: the first stage, whose
    teacher ("proxy codes") is the tokenizer of MaskGIT. `vistok.decoder.TiTokDecoder` with `teacher_codebook_size`
    decodes logits; `vistok.training.pretrained.second_stage` makes of it what the second stage begins with.

    Args:
        teacher: What `vistok.load` takes; a tokenizer with one codebook.
        path: Of ``family:name``: its file; None: downloaded.
        weight: See `vistok.loss.Term`.
        label_smoothing: Share of the target that is spread over all tokens, in [0, 1).

    Raises:
        ValueError: If an argument is out of range, or the teacher has no single codebook.
        FileNotFoundError: If there is no teacher.
    """

    def __init__(
        self, teacher: str | Path, path: str | Path | None = None, weight: float = 1.0, label_smoothing: float = 0.0
    ) -> None:
        super().__init__(weight)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        tokenizer = load(teacher, path=path)
        if tokenizer.quantizer.num_codebooks != 1 or tokenizer.encoder.layout != "image":
            raise ValueError(
                f"a teacher has one token for each place of an image, {teacher} has codebooks of "
                f"{tokenizer.quantizer.codebook_sizes} on features of layout {tokenizer.encoder.layout}"
            )
        self.teacher = Frozen(tokenizer)
        self.label_smoothing = label_smoothing

    def attach(self, tokenizer: Tokenizer) -> None:
        """Check that the decoder gives logits of the teacher's tokens."""
        wanted, got = self.teacher.network.vocab_size, getattr(tokenizer.decoder, "teacher_codebook_size", None)
        if tokenizer.output != "features" or got != wanted:
            kind = type(tokenizer.decoder).__name__
            raise ValueError(
                f"the decoder must predict logits of the {wanted} codes of the teacher, {kind} decodes "
                f"{tokenizer.output}: set decoder=titok decoder.teacher_codebook_size={wanted} and leave out "
                "decoder.pixel_decoder"
            )
        if tokenizer.decoder.factor != self.teacher.network.factor:
            raise ValueError(
                f"the teacher has a token for every {self.teacher.network.factor} pixels: set the patch_size "
                f"{tokenizer.decoder.factor} of encoder and decoder to it"
            )

    def forward(self, reconstruction: Reconstruction, batch: Mapping[str, Any]) -> Float[Tensor, ""]:
        """Mean over positions; no gradient reaches the teacher."""
        with torch.no_grad(), full_precision(batch["images"]):
            targets = self.teacher.network.encode(batch["images"].float()).indices
        return F.cross_entropy(reconstruction.images.float(), targets, label_smoothing=self.label_smoothing)
