"""Two gloo processes equal one process on the joined batch, for every quantizer: indices, losses, gradients and state.

The quantizers are built before the process group exists, as Lightning does.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from two_processes import run_on_two_processes

import vistok

# These add noise to each token, and keep no state that ranks could disagree about.
NOISY = {"kl", "fsq_dithered"}
CONFIGS = [path for path in sorted(Path("configs/quantizer").glob("*.yaml")) if path.stem not in NOISY]
SMALL = {"codebook_size": 16, "levels": [5, 4, 3], "bits": 6}
# Per-token noise is switched off here, and what is random or happens rarely is switched on.
OVERRIDES = {
    "gumbel": {"assignment": "nearest"},
    "vq_ema": {"revive_below": 0.9, "decay": 0.5},
    "vq_kd": {"init": "kmeans", "kmeans_iterations": 3},
    "rvq": {"dropout": 0.5},
    "multiscale_vq": {"dropout": 1.0},
    "lfq": {"batch_entropy": "full"},
}
BATCH, GRID, STEPS = 4, (4, 4), 3


def make(path):
    config = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    config.update({key: value for key, value in SMALL.items() if config.get(key) is not None})
    config.update(OVERRIDES.get(path.stem, {}))
    return vistok.build(config)


def mean_over_ranks(tensor):
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def train(quantizer, images):
    """A few training steps on this rank's share of the batch, gradients averaged as DDP does."""
    generator = torch.Generator().manual_seed(3)
    records = {}
    for step in range(STEPS):
        batch = torch.randn(BATCH, quantizer.dim, *GRID, generator=generator)
        weights = torch.randn(BATCH, quantizer.dim, *GRID, generator=generator)
        features = batch[images].clone().requires_grad_()
        quantized = quantizer.train()(features)
        terms = [quantizer.loss_weights[name] * loss for name, loss in quantized.losses.items()]
        total = (quantized.codes * weights[images]).mean() + sum(terms)
        (features_grad, *gradients) = torch.autograd.grad(total, [features, *quantizer.parameters()], allow_unused=True)
        records[f"indices/{step}"] = quantized.indices
        # A rank's loss is a mean over its share of the images.
        records[f"features_grad/{step}"] = features_grad * len(features) / BATCH
        for name, loss in quantized.losses.items():
            records[f"loss/{name}/{step}"] = mean_over_ranks(loss.detach().clone())
        with torch.no_grad():
            for (name, parameter), gradient in zip(quantizer.named_parameters(), gradients, strict=True):
                if gradient is None:
                    continue
                records[f"grad/{name}/{step}"] = mean_over_ranks(gradient.clone())
                parameter -= 0.1 * records[f"grad/{name}/{step}"]
        quantizer.update()
    records |= {f"state/{name}": value.clone() for name, value in quantizer.state_dict().items()}
    return records


def worker(rank, folder):
    quantizers = {path.stem: make(path) for path in CONFIGS}
    share = slice(0, BATCH // 2) if rank == 0 else slice(BATCH // 2, BATCH)
    for name, quantizer in quantizers.items():
        torch.save(train(quantizer, share), folder / f"{name}_{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the two processes saved; started once for all tests, since a process takes seconds to import torch."""
    return run_on_two_processes(worker, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_two_processes_train_a_quantizer_as_one_does(path, results):
    joined = train(make(path), slice(None))
    ranks = [results[f"{path.stem}_{rank}"] for rank in range(2)]
    assert joined.keys() == ranks[0].keys() == ranks[1].keys()
    for name, expected in joined.items():
        if name.startswith(("indices/", "features_grad/")):
            actual = torch.cat([rank[name] for rank in ranks])
        else:
            assert torch.equal(ranks[0][name], ranks[1][name]), f"{name} differs between the ranks"
            actual = ranks[0][name]
        torch.testing.assert_close(
            actual, expected, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
