"""The batch entropy of two gloo processes, and its gradient after DDP's averaging, equal those of one process."""

import pytest
import torch
import torch.distributed as dist
from two_processes import run_on_two_processes

from vistok.quantizer import LFQ

BITS = 6


def entropy_and_gradient(part):
    """Entropy of ``features * weight + shift`` and its gradient for the parameters; part is a rank's ``(n bits)``."""
    parameters = torch.full((2, BITS), 0.5).requires_grad_()
    rows = part * parameters[0] + parameters[1]
    entropy = LFQ(BITS, temperature=1.0).train()(rows.T.unsqueeze(0)).losses["batch_entropy"]
    return entropy.detach(), torch.autograd.grad(entropy, parameters)[0]


def batch(parts):
    """Features of which the ranks see different kinds."""
    features = torch.randn(sum(parts), BITS, generator=torch.Generator().manual_seed(1))
    features[: parts[0]] += 1
    return features


SPLITS = {"equal": (30, 30), "unequal": (20, 40)}


def worker(rank, folder):
    for name, parts in SPLITS.items():
        entropy, gradient = entropy_and_gradient(batch(parts).split(parts)[rank])
        dist.all_reduce(gradient)
        torch.save((entropy, gradient / 2), folder / f"{name}_{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_on_two_processes(worker, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(("name", "parts"), SPLITS.items())
def test_entropy_and_gradient_of_two_processes_equal_those_of_the_joined_batch(name, parts, results):
    entropy, gradient = entropy_and_gradient(batch(parts))
    for rank in range(2):
        torch.testing.assert_close(results[f"{name}_{rank}"][0], entropy)
        torch.testing.assert_close(results[f"{name}_{rank}"][1], gradient, rtol=1e-5, atol=1e-6)
