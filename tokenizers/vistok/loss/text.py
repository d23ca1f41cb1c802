"""Text encoders of other libraries: strings in, embeddings or features of each word out."""

import importlib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vistok.decoder.base import Decoder
from vistok.loss.frozen import Frozen, full_precision


class OpenCLIPText(nn.Module):
    """The text tower of a model of open_clip, with its tokenizer.

    Args:
        model: Name in open_clip, such as ``ViT-B-16``, or ``hf-hub:owner/name``.
        pretrained: Tag in open_clip, such as ``openai``, or a file of weights; downloaded unless cached. None starts
            from random weights (with ``hf-hub:`` names from those of the hub).
        pooled: One embedding for each text. False: the features of all its positions after the last norm,
            ``(b m dim)``, which decoders with `text_dim` take; of ``ViT-L-14-336`` and ``openai`` in TA-TiTok.

    Attributes:
        dim: Width of the embeddings or features.

    Raises:
        ImportError: If open_clip is not installed.
    """

    def __init__(self, model: str, pretrained: str | None = None, pooled: bool = True) -> None:
        super().__init__()
        self.pooled = pooled
        open_clip = _optional("open_clip", "open_clip_torch")
        self.model = open_clip.create_model(model, pretrained=pretrained)
        self.tokenizer = open_clip.get_tokenizer(model)
        self.model.visual = nn.Identity()
        self.dim = self(["a"]).shape[-1]

    def forward(self, texts: Sequence[str]) -> Float[Tensor, "b *m e"]:
        """Embeddings, not normalised, or features; longer texts are cut."""
        ids = self.tokenizer(list(texts)).to(next(self.model.parameters()).device)
        if self.pooled:
            return self.model.encode_text(ids)
        # The only place that has the features in one layout in all versions of open_clip.
        norm, features = getattr(self.model, "text", self.model).ln_final, []
        handle = norm.register_forward_hook(lambda module, arguments, output: features.append(output))
        try:
            self.model.encode_text(ids)
        finally:
            handle.remove()
        return features[0]


class TransformersText(nn.Module):
    """The text tower of a CLIP model of transformers, with its tokenizer.

    Args:
        model: Name on the hub, such as ``openai/clip-vit-base-patch16``, or a folder; downloaded unless cached.
        pooled: See `OpenCLIPText`. Positions behind the end of a text differ from those of open_clip, which fills
            texts up with another token.

    Attributes:
        dim: Width of the embeddings or features.

    Raises:
        ImportError: If transformers is not installed.
    """

    def __init__(self, model: str, pooled: bool = True) -> None:
        super().__init__()
        self.pooled = pooled
        transformers = _optional("transformers", "transformers")
        self.model = transformers.CLIPTextModelWithProjection.from_pretrained(model)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        self.dim = int(self.model.config.projection_dim if pooled else self.model.config.hidden_size)

    def forward(self, texts: Sequence[str]) -> Float[Tensor, "b *m e"]:
        """Embeddings, not normalised, or features; longer texts are cut."""
        tokens = self.tokenizer(
            list(texts),
            padding=True if self.pooled else "max_length",
            truncation=True,
            max_length=self.model.config.max_position_embeddings,
            return_tensors="pt",
        )
        output = self.model(**tokens.to(self.model.device))
        return output.text_embeds if self.pooled else output.last_hidden_state


class TextFeatures(Frozen):
    """What a decoder with `text_dim` is told of the texts of a batch, as TA-TiTok's is (https://arxiv.org/abs/2501.07730).

    Args:
        encoder: ``encoder(texts) -> (b length text_dim)`` of a sequence of strings, with an attribute ``dim``, such as
            ``OpenCLIPText("ViT-L-14-336", "openai", pooled=False)``. It is not trained and in no state dict.
        decoder: The decoder, for a check.

    Raises:
        ValueError: If the decoder takes no texts, or features of another width.
    """

    def __init__(self, encoder: nn.Module, decoder: Decoder) -> None:
        super().__init__(encoder)
        if decoder.text_dim is None:
            raise ValueError(f"{type(decoder).__name__} takes no texts: use text_encoder=null, or set decoder.text_dim")
        if (dim := getattr(encoder, "dim", None)) != decoder.text_dim:
            raise ValueError(
                f"the decoder takes features of texts with {decoder.text_dim} channels, {type(encoder).__name__} gives "
                f"{dim}: choose another text_encoder, or decoder.text_dim={dim}"
            )

    def forward(self, batch: Mapping[str, Any]) -> Float[Tensor, "b m t"]:
        """Features of the ``texts`` of a batch, one string for each of its ``images``.

        Raises:
            ValueError: If the batch has no texts, or not one for each image, or the encoder pools them.
        """
        texts, images = batch.get("texts"), batch["images"]
        if texts is None or len(texts) != len(images):
            raise ValueError(
                f"this decoder needs one text for each of the {len(images)} images of a batch, got "
                f"{'none' if texts is None else len(texts)}: choose data with texts"
            )
        with torch.no_grad(), full_precision(images):
            features = self.network(list(texts))
        if features.ndim != 3:
            raise ValueError(
                f"{type(self.network).__name__} gives one embedding for each text, {tuple(features.shape)}, a decoder "
                "takes the features of all positions: set text_encoder.pooled=false"
            )
        return features


def text_features(encoder: nn.Module | None, decoder: Decoder) -> TextFeatures | None:
    """`TextFeatures` where there is an encoder.

    Raises:
        ValueError: If a decoder that needs texts has no encoder for them, or as `TextFeatures` does.
    """
    if encoder is not None:
        return TextFeatures(encoder, decoder)
    if decoder.text_dim is not None:
        raise ValueError(
            f"{type(decoder).__name__} decodes with the help of texts: give it their encoder, such as "
            '"text_encoder={_target_: vistok.loss.OpenCLIPText, '
            'model: ViT-L-14-336, pretrained: openai, pooled: false}"'
        )
    return None


def _optional(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this text encoder needs {module}: pip install {package}") from error
