"""vistok: train, evaluate and serve visual tokenizers."""

from importlib.metadata import PackageNotFoundError, version

from vistok.config import build, register
from vistok.hierarchical import HierarchicalTokenizer
from vistok.hub import list_pretrained, load, push_to_hub, save
from vistok.quantizer import Quantized, Quantizer
from vistok.tokenizer import Reconstruction, Tokenizer

try:
    __version__ = version("vistok")
except PackageNotFoundError:  # a source tree that was put on the path without being installed
    __version__ = "0.0.0"

__all__ = [
    "HierarchicalTokenizer",
    "Quantized",
    "Quantizer",
    "Reconstruction",
    "Tokenizer",
    "__version__",
    "build",
    "list_pretrained",
    "load",
    "push_to_hub",
    "register",
    "save",
]
