"""Lightning with two processes trains every quantizer inside a tokenizer as one process does on the joined batch.

The process group does not exist yet when the quantizers are built: Lightning makes it when the training starts.
"""

import lightning
import pytest
import torch
from omegaconf import OmegaConf
from test_quantizers_two_processes import CONFIGS, OVERRIDES, SMALL
from two_processes import run_on_two_processes

import vistok
from vistok.decoder import CNNDecoder
from vistok.encoder import CNNEncoder
from vistok.loss import ReconstructionLoss
from vistok.training.module import TokenizerModule
from vistok.training.schedule import constant

BATCH, STEPS = 4, 2
BACKBONE = {"patch_size": 4, "base_channels": 32, "num_blocks": 1}


def make(path):
    config = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    config.update({key: value for key, value in SMALL.items() if config.get(key) is not None})
    config.update(OVERRIDES.get(path.stem, {}))
    torch.manual_seed(0)
    tokenizer = vistok.Tokenizer(CNNEncoder(**BACKBONE), vistok.build(config), CNNDecoder(**BACKBONE))
    return TokenizerModule(
        tokenizer,
        ReconstructionLoss(l2=1.0),
        # A step in proportion to the gradient: others amplify rounding errors of small gradients.
        optimizer=lambda module: torch.optim.SGD(module.parameters(), lr=0.1),
        scheduler=constant,
        whiten=False,  # the first batch of a rank is not that of one process
    )


def batches(share):
    """As the ranks of a run get them: the same batches, each its part of the images."""
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(BATCH, 3, 16, 16, generator=generator) * 2 - 1 for _ in range(STEPS)]
    return [{"images": each[share], "keys": [], "bad": []} for each in images]


def fit(module, share, **options):
    trainer = lightning.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        **options,
    )
    loader = torch.utils.data.DataLoader(batches(share), batch_size=None)
    trainer.fit(module, loader, loader)
    return {name: value.clone() for name, value in module.tokenizer.state_dict().items()}


def worker(rank, folder):
    modules = {path.stem: make(path) for path in CONFIGS}
    share = slice(0, BATCH // 2) if rank == 0 else slice(BATCH // 2, BATCH)
    for name, module in modules.items():
        torch.save(fit(module, share, strategy="ddp", devices=2), folder / f"{name}_{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the two processes saved; started once for all tests, since a process takes seconds to import torch."""
    return run_on_two_processes(worker, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_two_processes_under_lightning_train_a_tokenizer_as_one_does(path, results):
    joined = fit(make(path), slice(None))
    ranks = [results[f"{path.stem}_{rank}"] for rank in range(2)]
    for name, expected in joined.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), f"{name} differs between the ranks"
        torch.testing.assert_close(
            ranks[0][name], expected, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
