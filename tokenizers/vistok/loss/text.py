"""Text encoders of other libraries: strings in, embeddings out."""

import importlib
from collections.abc import Sequence
from types import ModuleType

from jaxtyping import Float
from torch import Tensor, nn


class OpenCLIPText(nn.Module):
    """The text tower of a model of open_clip, with its tokenizer.

    Args:
        model: Name in open_clip, such as ``ViT-B-16``, or ``hf-hub:owner/name``.
        pretrained: Tag in open_clip, such as ``openai``, or a file of weights; downloaded unless cached. None starts
            from random weights (with ``hf-hub:`` names from those of the hub).

    Attributes:
        dim: Width of the embeddings.

    Raises:
        ImportError: If open_clip is not installed.
    """

    def __init__(self, model: str, pretrained: str | None = None) -> None:
        super().__init__()
        open_clip = _optional("open_clip", "open_clip_torch")
        self.model = open_clip.create_model(model, pretrained=pretrained)
        self.tokenizer = open_clip.get_tokenizer(model)
        self.model.visual = nn.Identity()
        self.dim = self(["a"]).shape[1]

    def forward(self, texts: Sequence[str]) -> Float[Tensor, "b e"]:
        """Embeddings, not normalised; longer texts are cut."""
        ids = self.tokenizer(list(texts))
        return self.model.encode_text(ids.to(next(self.model.parameters()).device))


class TransformersText(nn.Module):
    """The text tower of a CLIP model of transformers, with its tokenizer.

    Args:
        model: Name on the hub, such as ``openai/clip-vit-base-patch16``, or a folder; downloaded unless cached.

    Attributes:
        dim: Width of the embeddings.

    Raises:
        ImportError: If transformers is not installed.
    """

    def __init__(self, model: str) -> None:
        super().__init__()
        transformers = _optional("transformers", "transformers")
        self.model = transformers.CLIPTextModelWithProjection.from_pretrained(model)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        self.dim = int(self.model.config.projection_dim)

    def forward(self, texts: Sequence[str]) -> Float[Tensor, "b e"]:
        """Embeddings, not normalised; longer texts are cut."""
        length = self.model.config.max_position_embeddings
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        return self.model(**tokens.to(self.model.device)).text_embeds


def _optional(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this text encoder needs {module}: pip install {package}") from error
