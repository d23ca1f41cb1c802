"""The recipes of published tokenizers: their size, and that each of them trains."""

import math

import pytest
import timm
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torchvision import models

import vistok
from vistok.training.run import train

# Of the whole tokenizer, in millions as published, or exactly where the original program was counted.
PARAMETERS = {
    "vqgan_f16": "72.1",
    "llamagen_vq16": 71_883_403,
    "magvit2_f16": 49_751_442 + 65_376_387,
    "bsqvit_f8": "174.8",
}
CNN = ["encoder.base_channels=32", "decoder.base_channels=32", "encoder.num_blocks=1", "decoder.num_blocks=1"]
VIT = ["encoder.width=32", "encoder.depth=1", "encoder.num_heads=2"]
OPENS = ["discriminator.adversarial.discriminator_start=0", "discriminator.adversarial.start=1"]
PATCHGAN = [*OPENS, "discriminator.base_channels=8"]
TINY = {
    "vqgan_f16": [*CNN, *PATCHGAN, "quantizer.dim=8", "quantizer.codebook_size=16"],
    "llamagen_vq16": [*CNN, *PATCHGAN, "quantizer.codebook_size=16", "~data.crop_scale"],
    "magvit2_f16": [CNN[0], CNN[2], *PATCHGAN, "quantizer.bits=6", "encoder.z_channels=6"],
    "bsqvit_f8": [*VIT, *OPENS, "quantizer.bits=6", "decoder.head_width=32", "discriminator.max_channels=8"],
    "titok_l32": [
        *(*VIT, *PATCHGAN, "encoder.num_tokens=4", "quantizer.codebook_size=16"),
        *("loss.terms.perceptual.model=test_resnet", "loss.terms.perceptual.size=null"),
    ],
    "vqkd": [
        *(*VIT, "decoder.width=32", "decoder.num_heads=2", "decoder.channels=64", "quantizer.codebook_size=16"),
        *("loss.terms.distillation.model=test_vit", "loss.terms.distillation.level=-1"),
        "loss.terms.distillation.size=64",
    ],
}
COMMON = [
    *("data=photos", "data.image_size=64", "data.eval_size=64", "data.batch_size=2", "data.samples_per_epoch=8"),
    *("trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.limit_val_batches=1", "trainer.accelerator=cpu"),
    *("trainer.precision=32-true", "scheduler.warmup_steps=0", "callbacks.progress=null", "logger=csv"),
    *("final.lpips=null", "final.rfid=false", "final.usage_tokens_per_code=0"),
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Folder with random weights of the networks that the losses of the recipes take."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    features = {f"features.{name}": value for name, value in models.vgg16().features.state_dict().items()}
    save_file(features, folder / "vgg16_features.safetensors")
    linear = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) / c for i, c in enumerate((64, 128, 256, 512, 512))}
    save_file(linear, folder / "lpips_vgg_lin.safetensors")
    for model in ("test_vit", "test_resnet"):
        save_file(timm.create_model(model).state_dict(), folder / f"{model}.safetensors")
    return folder


@pytest.mark.parametrize("recipe", PARAMETERS)
def test_a_recipe_has_the_published_number_of_parameters(recipe, compose_run):
    config, _ = compose_run(recipe, [f"experiment={recipe}"])
    with torch.device("meta"):
        tokenizer = vistok.build(OmegaConf.to_container(config.tokenizer, resolve=True))
    count, published = sum(value.numel() for value in tokenizer.parameters()), PARAMETERS[recipe]
    assert (f"{count / 1e6:.1f}" if isinstance(published, str) else count) == published


@pytest.mark.parametrize("recipe", TINY)
def test_a_recipe_trains(recipe, compose_run, weights, monkeypatch):
    monkeypatch.setenv("VISTOK_WEIGHTS", str(weights))
    config, folder = compose_run(recipe, [f"experiment={recipe}", *COMMON, *TINY[recipe]])
    metrics = train(config, folder)
    assert metrics["train_steps"] == 2
    assert (folder / "bundle" / "model.safetensors").is_file()
    if recipe != "vqkd":
        assert math.isfinite(metrics["psnr"])
