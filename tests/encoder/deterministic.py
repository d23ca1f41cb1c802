"""Weights and inputs that are the same wherever they are computed, to compare with numbers of other programs."""

import math

import torch


def waves(*shape, phase=0.0):
    """Values in [-1, 1] that do not depend on a random generator."""
    positions = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(12.9898 * positions + phase).float().reshape(shape)


@torch.no_grad()
def fill(module):
    """Set every parameter to a scaled wave, in the order of `named_parameters`."""
    for number, (name, parameter) in enumerate(module.named_parameters()):
        wave = waves(*parameter.shape, phase=number)
        if parameter.ndim > 1:
            parameter.copy_(wave / math.sqrt(parameter[0].numel() / 3))
        else:
            parameter.copy_(0.1 * wave + ("norm" in name and name.endswith("weight")))
    return module
