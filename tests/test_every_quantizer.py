"""Every quantizer inside a tokenizer: one training step, a bundle, and images from integers alone."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import vistok

CONFIGS = sorted(Path("configs/quantizer").glob("*.yaml"))
SMALL = {"codebook_size": 32, "levels": [5, 4, 3], "bits": 8}
BACKBONE = {"channels": 3, "patch_size": 4, "base_channels": 32, "channel_multipliers": [1], "num_blocks": 1}


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def tokenizer(request):
    quantizer = OmegaConf.to_container(OmegaConf.load(request.param), resolve=True)
    quantizer.update({key: value for key, value in SMALL.items() if quantizer.get(key) is not None})
    return vistok.build(
        {
            "_target_": "vistok.Tokenizer",
            "encoder": {"_target_": "vistok.encoder.CNNEncoder", **BACKBONE},
            "quantizer": quantizer,
            "decoder": {"_target_": "vistok.decoder.CNNDecoder", **BACKBONE},
            "preprocessing": {"size": [32, 32]},
        }
    )


def train_step(tokenizer, images):
    optimizer = torch.optim.AdamW(tokenizer.parameters(), 1e-3)
    reconstruction = tokenizer.train()(images)
    weights = tokenizer.quantizer.loss_weights
    losses = [weights[name] * loss for name, loss in reconstruction.quantized.losses.items()]
    ((reconstruction.images - images).square().mean() + sum(losses)).backward()
    optimizer.step()
    tokenizer.quantizer.update()


def test_a_training_step_moves_the_encoder_and_the_decoder(tokenizer):
    before = {name: parameter.clone() for name, parameter in tokenizer.named_parameters()}
    train_step(tokenizer, torch.rand(4, 3, 32, 32) * 2 - 1)
    moved = [name for name, value in tokenizer.named_parameters() if not torch.equal(value, before[name])]
    assert any(name.startswith("encoder.") for name in moved)
    assert any(name.startswith("decoder.") for name in moved)
    assert all(torch.isfinite(parameter).all() for parameter in tokenizer.parameters())


def test_a_bundle_gives_the_same_codes_integers_and_images(tokenizer, tmp_path):
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    train_step(tokenizer, images)
    vistok.save(tokenizer.eval(), tmp_path / "bundle")
    loaded = vistok.load(tmp_path / "bundle")
    ours, theirs = tokenizer.encode(images), loaded.encode(images)
    torch.testing.assert_close(theirs.codes, ours.codes)
    assert torch.equal(theirs.indices, ours.indices)
    if not tokenizer.quantizer.codebook_sizes:
        return
    ids = loaded.flatten(theirs.indices, offsets=True)
    assert ids.shape == (4, loaded.sequence_length())
    assert ids.max() < sum(loaded.quantizer.codebook_sizes)
    indices = loaded.unflatten(ids, offsets=True)
    torch.testing.assert_close(loaded.decode_indices(indices), loaded.decode(theirs.codes))


def test_bits_per_pixel_count_every_integer(tokenizer):
    quantizer = tokenizer.quantizer
    if not quantizer.codebook_sizes:
        assert tokenizer.bits_per_pixel() == float("inf")
        return
    bits = torch.tensor(quantizer.codebook_sizes).double().log2().mean().item() * tokenizer.sequence_length()
    assert tokenizer.bits_per_pixel() == pytest.approx(bits / 32**2)
