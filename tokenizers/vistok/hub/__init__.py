"""Tokenizers on disk and on the Hugging Face hub."""

from vistok.hub.bundle import load, push_to_hub, save
from vistok.hub.importers import list_pretrained

__all__ = ["list_pretrained", "load", "push_to_hub", "save"]
