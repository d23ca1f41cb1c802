"""The trunk of MaskGIT and MaskBit."""

import pytest
import torch
from golden import golden
from golden_trunks import MASKBIT, MASKGIT, load_trunk

from vistok import Tokenizer
from vistok.decoder import MaskGITDecoder
from vistok.encoder import MaskGITEncoder
from vistok.layers import MaskGITResidualBlock
from vistok.quantizer import LFQ, VectorQuantizer

SMALL = {"base_channels": 32, "channel_multipliers": (1, 2), "num_blocks": 1}


@torch.no_grad()
def assert_same(quantizer, names, weights, io, downsample):
    encoder = MaskGITEncoder(**SMALL, downsample=downsample, z_channels=quantizer.dim)
    decoder = MaskGITDecoder(**SMALL, z_channels=quantizer.dim)
    load_trunk(encoder, weights, names, "encoder.")
    load_trunk(decoder, weights, names, "decoder.")
    tokenizer = Tokenizer(encoder, quantizer, decoder, projection="none").eval()
    found = tokenizer.encode(io["x"] * 2 - 1)
    assert torch.equal(found.indices, io["indices"].reshape(found.indices.shape))
    assert len(found.indices.unique()) > 8
    decoded = tokenizer.decode_indices(found.indices) / 2 + 0.5
    torch.testing.assert_close(decoded.clamp(0, 1), io["decoded"].clamp(0, 1), atol=1e-4, rtol=0)


def test_maskgit_is_reproduced():
    weights, io, _ = golden("maskgit_vqgan")
    quantizer = VectorQuantizer(64, 16)
    quantizer.table.data = weights["quantize.embedding.weight"]
    assert_same(quantizer, MASKGIT, weights, io, "pool")


def test_maskbit_is_reproduced():
    weights, io, _ = golden("maskbit_lfq")
    assert_same(LFQ(6), MASKBIT, weights, io, "conv")


def test_the_published_tokenizer_has_as_many_parameters():
    with torch.device("meta"):
        tokenizer = Tokenizer(MaskGITEncoder(), VectorQuantizer(1024, 256), MaskGITDecoder(), projection="none")
    weights = dict(tokenizer.named_parameters())
    assert len(weights) == 168
    assert sum(weight.numel() for weight in weights.values()) == 54_515_587


def test_without_a_skip_connection_the_result_is_mixed_with_itself():
    block = MaskGITResidualBlock(32, 64)
    features = torch.randn(1, 32, 4, 4)
    torch.nn.init.dirac_(block.shortcut.weight)
    assert torch.equal(block(features), 2 * block.residual(features))


def test_padding_is_black():
    encoder = MaskGITEncoder(**SMALL)
    black = torch.full((1, 3, 8, 8), -1.0)
    assert torch.equal(encoder.conv_in(black / 2 + 0.5), torch.zeros(1, 32, 8, 8))
    images = torch.full((1, 3, 16, 16), -1.0)
    assert encoder(images).std((2, 3)).max() < 1e-6


def test_unknown_downsampling_is_an_error():
    with pytest.raises(ValueError, match="downsample must be pool or conv, got 'mean'"):
        MaskGITEncoder(downsample="mean")
