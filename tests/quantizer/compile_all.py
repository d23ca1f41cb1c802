"""Compiles every quantizer without a graph break; run by test_compile.py, which cannot have the shape checks' hook.

Prints one line per quantizer and mode that fails.
"""

import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf

import vistok

SMALL = {"codebook_size": 32, "levels": [5, 4, 3], "bits": 8}


def make(path):
    config = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    config.update({key: value for key, value in SMALL.items() if config.get(key) is not None})
    return vistok.build(config)


def check(path):
    torch.manual_seed(0)
    quantizer = make(path).train()
    features = torch.randn(4, quantizer.dim, 4, 4)
    # Codebooks that start from data do so before the first lookup, which is not the hot path.
    quantizer(features)
    quantizer.discard()
    for training in (True, False):
        quantizer.train(training)
        torch._dynamo.reset()
        compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
        torch.manual_seed(1)
        expected = quantizer(features.requires_grad_())
        torch.manual_seed(1)
        actual = compiled(features)
        torch.testing.assert_close(actual.codes, expected.codes)
        assert torch.equal(actual.indices, expected.indices)
        if training:
            gradients = [
                torch.autograd.grad(
                    (result.codes * result.codes.detach()).sum() + sum(result.losses.values()),
                    [features, *quantizer.parameters()],
                    allow_unused=True,
                )
                for result in (actual, expected)
            ]
            for ours, theirs in zip(*gradients, strict=True):
                if theirs is not None and theirs.any():
                    torch.testing.assert_close(ours, theirs)
        quantizer.discard()


if __name__ == "__main__":
    torch.set_num_threads(1)
    failed = False
    for path in map(Path, sys.argv[1:]):
        try:
            check(path)
        except Exception as error:
            failed = True
            sys.stdout.write(f"{path.stem}: {type(error).__name__}: {str(error)[:600]}\n")
    sys.exit(failed)
