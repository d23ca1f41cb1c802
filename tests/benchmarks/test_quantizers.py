"""The quantizer benchmark: it measures the same work as the peer, and memory without outputs and gradients."""

import importlib
import json
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path("benchmarks").resolve()


@pytest.fixture
def quantizers(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("quantizers")


def names_of_cases():
    import ast

    tree = ast.parse((BENCHMARKS / "quantizers.py").read_text())
    cases = next(node for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "CASES")
    return [key.value for key in cases.value.keys]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", names_of_cases())
def test_every_case_runs_small_and_its_peer_has_the_same_number_of_codes(quantizers, name):
    step, kept_bytes = quantizers.workload(name, "ours", True, "cpu")
    step()
    assert kept_bytes() > 0
    case = quantizers.CASES[name].shrunk()
    if case.peer is None:
        return
    step, _ = quantizers.workload(name, "peer", True, "cpu")
    step()
    peer = quantizers.make_peer(case)
    sizes = {
        module.codebook_size for module in peer.modules() if isinstance(getattr(module, "codebook_size", None), int)
    }
    assert sizes == set(quantizers.make_quantizer(case).codebook_sizes)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["vq_ema_16k", "simvq_16k"])
def test_ours_and_the_peer_have_the_same_losses_for_the_same_codebook(quantizers, name):
    case = quantizers.CASES[name].shrunk()
    ours, peer = quantizers.make_quantizer(case), quantizers.make_peer(case)
    with torch.no_grad():
        if name == "simvq_16k":
            peer.frozen_codebook.copy_(ours.table)
            peer.code_transform.weight.copy_(ours.projection.weight)
        else:
            peer._codebook.embed.copy_(ours.table[None])
    features = torch.randn(1, 64, ours.dim)
    codes, indices, losses = ours(features.movedim(-1, 1))
    expected_codes, expected_indices, *expected = peer(features)
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(codes.movedim(1, -1), expected_codes)
    total = sum(ours.loss_weights[key] * value for key, value in losses.items())
    torch.testing.assert_close(total, sum(loss.sum() for loss in expected))


def test_the_peak_of_a_step_leaves_out_its_outputs_and_gradients(quantizers):
    step, kept_bytes = quantizers.workload("fsq", "ours", True, "cpu")
    step()
    tokens, dim = 256, 4
    assert kept_bytes() == tokens * dim * 4 + tokens * 8 + tokens * dim * 4


def test_results_are_written_with_machine_and_targets(quantizers, tmp_path):
    path = tmp_path / "results.json"
    quantizers.main(["--quick", "--threads", "1", "--cases", "vq_ema_262k", "--json", str(path)])
    written = json.loads(path.read_text())
    assert written["machine"]["threads"] == 1
    (result,) = written["results"]
    assert result["case"] == "vq_ema_262k"
    assert result["ratio"] == pytest.approx(result["ms"] / result["product_ms"])
    assert result["extra_mb"] >= 0
    assert set(result["targets"]) == {"ratio", "extra_mb"}
