"""Golden outputs of original programs, saved as their checkpoints are."""

import torch

from vistok.hub.importers import import_pretrained


def imported(family, content, folder, **options):
    """The tokenizer of a checkpoint that a program saved."""
    torch.save(content, folder / "checkpoint.pt")
    return import_pretrained(family, folder / "checkpoint.pt", **options)
