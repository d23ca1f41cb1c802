"""What holds for every pair of convolutional encoder and decoder."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import vistok
from vistok.decoder import CNNDecoder, MAGVIT2Decoder, MaskGITDecoder, MoVQDecoder
from vistok.encoder import CNNEncoder, MAGVIT2Encoder, MaskGITEncoder
from vistok.layers import ResidualBlock
from vistok.quantizer import FSQ

SMALL = {"base_channels": 32, "channel_multipliers": (1, 2), "num_blocks": 1, "z_channels": 4}
TRUNK = {"patch_size": 1, "attention": "last"}
PAIRS = {
    "cnn": (CNNEncoder, CNNDecoder, TRUNK),
    "movq": (CNNEncoder, MoVQDecoder, TRUNK),
    "magvit2": (MAGVIT2Encoder, MAGVIT2Decoder, {}),
    "maskgit": (MaskGITEncoder, MaskGITDecoder, {}),
}


def tokenizer(name, **arguments):
    encoder, decoder, own = PAIRS[name]
    arguments = SMALL | own | arguments
    return vistok.Tokenizer(encoder(**arguments), FSQ((5, 5, 5)), decoder(**arguments))


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("size", [(8, 8), (4, 6), (16, 10)])
@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_any_size_come_back_in_their_size(name, size, channels):
    model = tokenizer(name, channels=channels)
    images = torch.rand(2, channels, *size) * 2 - 1
    assert model.encoder(images).shape == (2, 4, size[0] // 2, size[1] // 2)
    assert model(images).images.shape == images.shape


@pytest.mark.parametrize("name", PAIRS)
def test_every_parameter_has_a_gradient(name):
    model = tokenizer(name)
    model(torch.randn(2, 3, 8, 8)).images.square().sum().backward()
    assert [key for key, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()] == []


@pytest.mark.parametrize("name", PAIRS)
def test_the_last_layer_makes_the_images(name):
    model = tokenizer(name)
    assert model.decoder.last_layer is model.decoder.conv_out.weight


@pytest.mark.parametrize("name", PAIRS)
def test_recomputed_activations_give_the_same_gradients(name):
    images = torch.randn(2, 3, 8, 8)
    found, calls = [], []
    for gradient_checkpointing in (False, True):
        torch.manual_seed(0)
        model = tokenizer(name, gradient_checkpointing=gradient_checkpointing)
        blocks = [module for module in model.modules() if isinstance(module, ResidualBlock)]
        count = [0]
        for block in blocks:
            block.register_forward_pre_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        decoded = model(images).images
        decoded.square().sum().backward()
        found.append([decoded, *(weight.grad for weight in model.parameters())])
        calls.append(count[0] / len(blocks))
    assert all(torch.equal(kept, recomputed) for kept, recomputed in zip(*found, strict=True))
    assert calls == [1, 2]


@pytest.mark.parametrize("name", PAIRS)
def test_impossible_arguments_are_errors(name):
    for part in PAIRS[name][:2]:
        with pytest.raises(ValueError, match="channels must be 1, 3 or 4, got 2"):
            part(channels=2)
        with pytest.raises(ValueError, match="num_blocks must be a positive number of residual blocks"):
            part(num_blocks=0)
        with pytest.raises(ValueError, match="z_channels must be a positive number of channels, got 0"):
            part(z_channels=0)


@pytest.mark.parametrize("name", ["cnn", "vqgan_f16", "vqgan_f8", "movq", "magvit2", "maskgit"])
def test_the_encoder_and_decoder_of_one_name_fit_together(name):
    with initialize_config_dir(str(Path("configs").resolve()), version_base="1.3"):
        config = compose("train", overrides=[f"encoder={name}", f"decoder={name}"])
    parts = [OmegaConf.to_container(config[group], resolve=True) for group in ("encoder", "decoder")]
    with torch.device("meta"):
        encoder, decoder = (vistok.build(part) for part in parts)
        assert vistok.Tokenizer(encoder, FSQ((5, 5, 5)), decoder)
    assert encoder.dim == decoder.dim


@pytest.mark.parametrize("name", ["vqgan_f16", "vqgan_f8", "movq"])
def test_the_default_decoder_fits_every_trunk(name):
    with initialize_config_dir(str(Path("configs").resolve()), version_base="1.3"):
        config = compose("train", overrides=[f"encoder={name}"])
    parts = [OmegaConf.to_container(config[group], resolve=True) for group in ("encoder", "decoder")]
    with torch.device("meta"):
        encoder, decoder = (vistok.build(part) for part in parts)
    assert (encoder.factor, encoder.dim) == (decoder.factor, decoder.dim)
