"""Tokens for generators: exporting them, reading them back, and tokenizers as other programs call them."""

from vistok.tokens.dataset import TokenDataset, TokenStream
from vistok.tokens.manifest import Layout, Manifest, read_manifest

__all__ = ["Layout", "Manifest", "TokenDataset", "TokenStream", "read_manifest"]
