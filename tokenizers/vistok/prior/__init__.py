"""Generators over the tokens of a tokenizer."""

from vistok.prior.bundle import load_prior, save_prior
from vistok.prior.gpt import GPT
from vistok.prior.sampling import Sampling, generate

__all__ = ["GPT", "Sampling", "generate", "load_prior", "save_prior"]
