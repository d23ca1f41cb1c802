"""Every encoder, quantizer and decoder that fit together do: forward, backward, a bundle, images from integers.

All pairs run by default, each with one member of the third kind; the full product is marked slow.
"""

from itertools import product
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import vistok

CONFIGS = Path("configs").resolve()
CONV = {"base_channels": 32, "channel_multipliers": [1, 1, 1, 1], "num_blocks": 1}
PATCHES = {"patch_size": 8, "image_size": 32, "width": 32, "depth": 1, "num_heads": 2, "num_frames": None}
FACTOR_8 = {"patch_size": 4, "factor": 8, "base_channels": 32, "channel_multipliers": [1, 1], "num_blocks": 1}
# Small sizes of factor 8, by family; keys that a class does not take are left out.
TINY = {
    "cnn": {"patch_size": 8, "base_channels": 32, "num_blocks": 1},
    "cosmos": FACTOR_8,
    "causal3d": {**FACTOR_8, "time_factor": 1},
    "swin": {"patch_size": 4, "base_channels": 16, "channel_multipliers": [1, 2], "num_heads": 2, "window_size": 4},
    "frozen_vit": {"model": "test_vit", "pretrained": False, "factor": 8},
    "vit_video": {**PATCHES, "num_frames": 2},
    "feature": {"channels": 16, "width": 32, "num_heads": 2},
    "titok": {**PATCHES, "num_tokens": 8},
    "fqgan": {**CONV, "image_size": 32, "depth": 1, "num_heads": 2, "z_channels": 8},
    "gsq": {**CONV, "num_blocks": [1, 1, 1, 1], "middle_blocks": 1, "z_channels": 8},
    "dvae": {"width": 16, "num_blocks": 1, "stem_width": 8},
    "vqvae": {"width": 16, "num_halvings": 3, "num_blocks": 1, "hidden_channels": 8},
    "vit": PATCHES,
    **dict.fromkeys(("vqgan", "movq", "magvit2", "maskgit", "emu3"), CONV),
}
SMALL = {"codebook_size": 16, "levels": [5, 4, 3], "bits": 8}


def names(group):
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def config_of(group, name):
    config = OmegaConf.to_container(OmegaConf.load(CONFIGS / group / f"{name}.yaml"), resolve=True)
    if group == "quantizer":
        return {**config, **{key: value for key, value in SMALL.items() if config.get(key) is not None}}
    family = name if name in TINY else next(key for key in TINY if name.startswith(key))
    config.update({key: value for key, value in TINY[family].items() if key in config})
    if name == "vit_video":
        config["time_patch_size"] = 1
    return config


ENCODERS, QUANTIZERS, DECODERS = names("encoder"), names("quantizer"), names("decoder")
# The partner of a part whose own pairs are not the question.
PARTNER = {"image": "cnn", "sequence": "titok", "video": "causal3d"}


def layout(group, name):
    return vistok.build(config_of(group, name)).layout


def build(encoder, quantizer, decoder):
    torch.manual_seed(0)
    parts = {"encoder": encoder, "quantizer": quantizer, "decoder": decoder}
    configs = {group: config_of(group, name) for group, name in parts.items()}
    tokenizer = vistok.build({"_target_": "vistok.Tokenizer", **configs, "preprocessing": {"size": [32, 32]}})
    # As training and `load` do; convolutions in another format sum in another order.
    return tokenizer.to(memory_format=torch.channels_last)


def assert_trains_and_reloads(tokenizer, folder):
    """A training step reaches every part, and a bundle gives the same images, from integers too."""
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    labels = torch.tensor([0, 1]) if tokenizer.quantizer.accepts_labels else None
    reconstruction = tokenizer.train()(images, labels)
    weights = tokenizer.quantizer.loss_weights
    losses = [weights[name] * loss for name, loss in reconstruction.quantized.losses.items()]
    (reconstruction.images.square().mean() + sum(losses)).backward()
    for part in (tokenizer.encoder, tokenizer.to_codes, tokenizer.from_codes, tokenizer.decoder):
        gradients = [value.grad for value in part.parameters() if value.requires_grad]
        assert all(grad is not None and grad.isfinite().all() for grad in gradients)
        assert not gradients or any(grad.any() for grad in gradients)
    tokenizer.quantizer.update()

    vistok.save(tokenizer.eval(), folder)
    loaded = vistok.load(folder)
    with torch.no_grad():
        quantized = tokenizer.encode(images, labels)
        expected = tokenizer.decode(quantized.codes, (32, 32))
        actual = loaded.encode(images, labels)
        assert torch.equal(actual.indices, quantized.indices)
        torch.testing.assert_close(loaded.decode(actual.codes, (32, 32)), expected)
        if tokenizer.quantizer.codebook_sizes:
            torch.testing.assert_close(loaded.decode_indices(actual.indices, (32, 32)), expected)


@pytest.mark.parametrize(("encoder", "decoder"), list(product(ENCODERS, DECODERS)))
def test_an_encoder_and_a_decoder_of_one_layout_fit_and_others_are_refused(encoder, decoder, tmp_path):
    ours, theirs = layout("encoder", encoder), layout("decoder", decoder)
    if ours != theirs:
        with pytest.raises(ValueError, match=f"of the same layout, both {ours} or both {theirs}"):
            build(encoder, "fsq", decoder)
        return
    assert_trains_and_reloads(build(encoder, "fsq", decoder), tmp_path / "bundle")


@pytest.mark.parametrize(("encoder", "quantizer"), list(product(ENCODERS, QUANTIZERS)))
def test_every_quantizer_fits_every_encoder(encoder, quantizer, tmp_path):
    assert_trains_and_reloads(build(encoder, quantizer, PARTNER[layout("encoder", encoder)]), tmp_path / "bundle")


@pytest.mark.parametrize(("quantizer", "decoder"), list(product(QUANTIZERS, DECODERS)))
def test_every_quantizer_fits_every_decoder(quantizer, decoder, tmp_path):
    assert_trains_and_reloads(build(PARTNER[layout("decoder", decoder)], quantizer, decoder), tmp_path / "bundle")


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_every_allowed_combination_of_three_parts(quantizer, tmp_path):
    count = 0
    for encoder, decoder in product(ENCODERS, DECODERS):
        if layout("encoder", encoder) == layout("decoder", decoder):
            assert_trains_and_reloads(build(encoder, quantizer, decoder), tmp_path / f"{encoder}_{decoder}")
            count += 1
    assert count > 80
