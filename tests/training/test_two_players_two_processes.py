"""Two gloo processes train both players as one process does on the joined batch, without an unused-parameter flag."""

import json

import lightning
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from test_all_pairs import DECODERS, ENCODERS, PARTNER, build, layout
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader
from two_players import make_batches, make_module
from two_processes import run_on_two_processes

from vistok.training.module import TokenizerModule
from vistok.training.sharded import ShardedStrategy, ShardedTokenizerModule, divide, whole

STEPS = 6
# Each closed gate leaves parameters without a gradient for a while; the penalty comes in some steps only.
CASES = {
    "gates": {"discriminator_start": 2, "start": 4, "weight_decay": 0.1},
    "everything": {"max_adaptive_weight": 1e4, "lecam": 0.1, "r1": 1.0, "r1_every": 2, "warmup": 3},
    "scheduled": {"start": 1, "schedules": {"l2": {"kind": "linear", "start": 3, "end": 3}}},
    "accumulated": {"discriminator_start": 1, "start": 2, "max_adaptive_weight": 1e4},
    "accumulated, fixed": {"discriminator_start": 1, "start": 2, "lecam": 0.1, "r1": 1.0, "r1_every": 2},
}
# Those that divided parameters allow.
SHARDED = ("gates", "scheduled", "accumulated, fixed")


def adamw(module):
    # A large epsilon keeps rounding errors of small gradients from becoming whole steps.
    return torch.optim.AdamW(module.parameters(), lr=1e-3, eps=1e-2)


def trained(case, folder, rank=0, world_size=1, batches=None, sharded=False):
    """State of a module after the training of a case, on this rank's half of every batch."""
    kind = ShardedTokenizerModule if sharded else TokenizerModule
    module = make_module("group", optimizer=adamw, kind=kind, **CASES[case])
    parts = []
    for batch in batches or make_batches(STEPS):
        share = len(batch["keys"]) // world_size
        mine = slice(rank * share, (rank + 1) * share)
        parts.append({name: values[mine] for name, values in batch.items()})
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=world_size,
        strategy=ShardedStrategy()
        if sharded
        else DDPStrategy(process_group_backend="gloo")
        if world_size > 1
        else "auto",
        accumulate_grad_batches=2 if case.startswith("accumulated") else 1,
        gradient_clip_val=0.05,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        default_root_dir=folder,
    )
    trainer.fit(module, *(DataLoader(rows, batch_size=None) for rows in (parts, parts[:1])))
    state = {name: whole(value) for name, value in module.state_dict().items()}
    return {**state, "skipped_steps": torch.tensor(module.skipped_steps)}


def broken_batches():
    """One picture of the second process is not finite."""
    batches = make_batches(3)
    batches[1]["images"][3, 0, 0, 0] = torch.nan
    return batches


def differences(encoder, decoder, mesh):
    """Largest difference that dividing a tokenizer makes to its images and to its gradients."""
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    results = []
    for divided in (False, True):
        tokenizer = build(encoder, "fsq", decoder).to(memory_format=torch.contiguous_format)
        if divided:
            divide(tokenizer.encoder, mesh)
            divide(tokenizer.decoder, mesh)
        reconstructions = tokenizer(images).images
        reconstructions.square().mean().backward()
        gradients = {name: whole(value.grad) for name, value in tokenizer.named_parameters() if value.requires_grad}
        results.append({"images": reconstructions.detach(), **gradients})
    first, second = results
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def worker(rank, folder):
    for case in CASES:
        torch.save(trained(case, folder, rank, 2), folder / f"{case}_{rank}.pt")
    for case in SHARDED:
        torch.save(trained(case, folder, rank, 2, sharded=True), folder / f"sharded {case}_{rank}.pt")
    torch.save(trained("gates", folder, rank, 2, broken_batches(), sharded=True), folder / f"sharded broken_{rank}.pt")
    mesh = init_device_mesh("cpu", (2,))
    pairs = [(name, PARTNER[layout("encoder", name)]) for name in ENCODERS]
    pairs += [(PARTNER[layout("decoder", name)], name) for name in DECODERS]
    torch.save({" ".join(pair): differences(*pair, mesh) for pair in pairs}, folder / f"divided_{rank}.pt")
    torch.save(trained("gates", folder, rank, 2, broken_batches()), folder / f"broken_{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the two processes wrote; started once for all tests, since a process takes seconds to import torch."""
    folder = tmp_path_factory.mktemp("ranks")
    run_on_two_processes(worker, folder)
    return folder


def load(folder, name):
    return [torch.load(folder / f"{name}_{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_both_players_as_one_on_the_joined_batch(case, folder, tmp_path):
    first, second = load(folder, case)
    for name, value in trained(case, tmp_path).items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(
            first[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("case", SHARDED)
def test_processes_that_share_parameters_train_as_those_that_hold_all(case, folder):
    states = load(folder, f"sharded {case}")
    for name, value in load(folder, case)[0].items():
        assert torch.equal(states[0][name], states[1][name]), name
        torch.testing.assert_close(states[0][name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_dividing_the_parameters_changes_neither_images_nor_gradients_of_any_backbone(folder):
    for ours in load(folder, "divided"):
        assert len(ours) > 20
        assert max(ours.values()) < 1e-5, ours


@pytest.mark.parametrize("kind", ["", "sharded "])
def test_a_batch_that_is_not_finite_on_one_rank_is_skipped_by_all_and_saved_by_that_one(folder, kind):
    for state in load(folder, f"{kind}broken"):
        assert state.pop("skipped_steps") == 1
        assert all(value.isfinite().all() for value in state.values())
    names = sorted(path.name for path in (folder / "nonfinite").iterdir())
    assert names == ["step000001_rank1_batch0.json", "step000001_rank1_batch0.safetensors"]
    assert json.loads((folder / "nonfinite" / names[0]).read_text())["keys"] == ["1-2", "1-3"]
