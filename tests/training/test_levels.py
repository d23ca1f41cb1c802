"""Training a tokenizer with several levels of codes."""

import json

import torch
from tiny_runs import QUANTIZERS

import vistok
from vistok.training.run import train


def test_every_level_is_trained_measured_and_saved(tiny):
    config, folder = tiny("levels", "tokenizer=hierarchical", "tokenizer.width=32", *QUANTIZERS["vq_ema"])
    metrics = train(config, folder)
    tokenizer = vistok.load(folder)
    assert tokenizer.scale_lengths(tokenizer.grid()) == (1, 4)
    # 5 bits for each token of a map of 8 x 8 and one of 16 x 16, on evaluation images of 128 x 128 pixels.
    assert metrics["bits_per_pixel"] == 5 * (64 + 256) / 128**2
    for level in range(2):
        part = tokenizer.quantizer.part(level)
        assert part.initialised
        assert torch.isfinite(part.codebook).all()
    assert json.loads((folder / "bundle" / "config.json").read_text())["_target_"] == "vistok.HierarchicalTokenizer"
