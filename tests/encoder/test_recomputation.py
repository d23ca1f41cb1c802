"""Gradient checkpointing of every pair of backbones changes no number, and recomputes."""

import pytest
import torch
from torch import nn

from vistok.decoder import Causal3DDecoder, CosmosDecoder, FeatureDecoder, SwinDecoder
from vistok.encoder import Causal3DEncoder, CosmosEncoder, SwinEncoder, TimmEncoder
from vistok.layers.transformer import TransformerBlock

COSMOS = {"base_channels": 32, "channel_multipliers": (1, 2), "num_blocks": 1, "factor": 8, "z_channels": 8}
CAUSAL = {**COSMOS, "base_channels": 8}
SWIN = {"base_channels": 8, "channel_multipliers": (1, 2), "num_heads": 2, "window_size": 2}
PARTS = {
    "cosmos encoder": (CosmosEncoder, COSMOS, (3, 16, 16)),
    "cosmos decoder": (CosmosDecoder, COSMOS, (8, 2, 2)),
    "causal3d encoder": (Causal3DEncoder, CAUSAL, (3, 5, 16, 16)),
    "causal3d decoder": (Causal3DDecoder, CAUSAL, (8, 2, 2, 2)),
    "swin encoder": (SwinEncoder, SWIN, (3, 16, 16)),
    "swin decoder": (SwinDecoder, SWIN, (16, 2, 2)),
    "timm": (TimmEncoder, {"model": "test_vit", "pretrained": False, "frozen": False}, (3, 32, 32)),
    "features": (FeatureDecoder, {"channels": 4, "width": 8, "num_heads": 2}, (8, 2, 2)),
}


def blocks_of(part):
    """The layers that are recomputed, where that is not all of ``part.blocks``."""
    if isinstance(part, TimmEncoder):
        return list(part.model.blocks)
    if isinstance(part, FeatureDecoder):
        return [module for module in part.modules() if isinstance(module, TransformerBlock)]
    return [block for block in part.blocks if not isinstance(block, nn.Identity)]


@pytest.mark.parametrize("name", PARTS)
def test_recomputed_activations_give_the_same_gradients(name):
    cls, arguments, shape = PARTS[name]
    inputs, found, calls = torch.randn(2, *shape), [], []
    for gradient_checkpointing in (False, True):
        torch.manual_seed(0)
        part = cls(**arguments, gradient_checkpointing=gradient_checkpointing)
        blocks, count = blocks_of(part), []
        for block in blocks:
            block.register_forward_pre_hook(lambda *_, count=count: count.append(0))
        outputs = part(inputs)
        outputs.square().sum().backward()
        found.append([outputs, *(parameter.grad for parameter in part.parameters())])
        calls.append(len(count) / len(blocks))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    assert calls == [1, 2]
