"""Tokenizers on disk and on the Hugging Face hub."""

from vistok.hub.bundle import load, save

__all__ = ["load", "save"]
