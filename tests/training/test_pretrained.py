"""Training that starts from a tokenizer, whole or in parts."""

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from tiny_runs import TINY

import vistok
from vistok.decoder import CNNDecoder
from vistok.encoder import CNNEncoder
from vistok.quantizer import VectorQuantizer
from vistok.training.run import train

ALL = {"encoder", "to_codes", "quantizer", "from_codes", "decoder"}


def tokenizer(projection="linear", dim=4, **options):
    torch.manual_seed(3)
    return vistok.Tokenizer(
        CNNEncoder(base_channels=32, num_blocks=1),
        VectorQuantizer(32, dim, **options),
        CNNDecoder(base_channels=32, num_blocks=1),
        projection=projection,
    )


@pytest.fixture
def source(tmp_path):
    return vistok.save(tokenizer(), tmp_path / "source")


@pytest.fixture
def start(compose_run, source):
    """``start(*overrides) -> (config, folder)`` of a run that starts from `source`."""

    def make(*overrides, source=source):
        plain = [each for each in TINY if not each.startswith(("encoder.", "decoder."))]
        return compose_run(
            "run", [*plain, f"pretrained.load={source}", "trainer.max_steps=2", "scheduler.warmup_steps=0", *overrides]
        )

    return make


def weights(bundle):
    return load_file(bundle / "model.safetensors")


def equal_modules(before, after):
    """Names of the modules that have the same tensors in two bundles."""
    names = {name.split(".")[0] for name in before} & {name.split(".")[0] for name in after}
    return {
        name
        for name in names
        if {key for key in before if key.startswith(name)} == {key for key in after if key.startswith(name)}
        and all(torch.equal(before[key], after[key]) for key in before if key.startswith(name))
    }


@pytest.mark.parametrize(
    ("overrides", "taken"),
    [
        ([], ALL),
        (["pretrained.parts=[encoder,quantizer]"], {"encoder", "to_codes", "quantizer"}),
        (["pretrained.parts=[quantizer,decoder]"], {"quantizer", "from_codes", "decoder"}),
        (["pretrained.parts=[encoder,decoder]", "quantizer=vq_cosine"], {"encoder", "decoder"}),
    ],
)
def test_training_starts_from_the_weights_that_are_taken(start, source, overrides, taken):
    # With a learning rate of zero it ends where it started.
    config, folder = start(*overrides, "optimizer.lr=0")
    train(config, folder)
    assert equal_modules(weights(source), weights(folder / "bundle")) == taken


def test_the_run_folder_says_what_was_trained(start, source):
    config, folder = start("pretrained.settings={quantizer: {commitment_weight: 0.5}}")
    train(config, folder)
    saved, trained = OmegaConf.load(folder / "config.yaml"), vistok.load(folder / "bundle")
    assert saved.quantizer.codebook_size == saved.tokenizer.quantizer.codebook_size == 32
    assert saved.encoder == saved.tokenizer.encoder
    assert trained.quantizer.loss_weights["commitment"] == 0.5
    assert vistok.load(source).quantizer.loss_weights["commitment"] != 0.5


@pytest.mark.parametrize(
    "frozen", [("encoder", "to_codes", "quantizer"), ("quantizer",), ("from_codes", "decoder")], ids="-".join
)
@pytest.mark.parametrize("table", ["learned", "ema"])
def test_frozen_modules_keep_their_weights_and_the_others_learn(start, tmp_path, frozen, table):
    source = vistok.save(tokenizer(table=table), tmp_path / table)
    config, folder = start(f"module.freeze=[{','.join(frozen)}]", "optimizer.weight_decay=0.1", source=source)
    train(config, folder)
    assert equal_modules(weights(source), weights(folder / "bundle")) == set(frozen)


def test_no_projection_stays_none_in_front_of_a_new_decoder(start, tmp_path):
    source = vistok.save(tokenizer(projection="none", dim=32), tmp_path / "plain")
    frozen = "module.freeze=[encoder,to_codes,quantizer]"
    config, folder = start("pretrained.parts=[encoder,quantizer]", frozen, source=source)
    train(config, folder)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    indices = vistok.load(folder / "bundle").encode(images).indices
    assert torch.equal(indices, vistok.load(source).encode(images).indices)


def test_a_published_checkpoint_is_fine_tuned(start, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    published = diffusers.VQModel(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[32, 32], norm_num_groups=8, latent_channels=4, num_vq_embeddings=16,
    )  # fmt: skip
    published.save_pretrained(tmp_path / "vqmodel")
    path, still = f"pretrained.path={tmp_path / 'vqmodel'}", "optimizer.lr=0"
    config, folder = start(path, still, source="diffusers")
    train(config, folder)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    tuned, source = (vistok.load(folder / "bundle"), vistok.load("diffusers", path=tmp_path / "vqmodel"))
    assert torch.equal(tuned.encode(images).indices, source.encode(images).indices)
    card = (folder / "bundle" / "README.md").read_text()
    assert "- fine-tuned from: diffusers\n- file: vqmodel\n- program: VQModel and AutoencoderKL" in card
    assert torch.equal(tuned.decode(tuned.encode(images).codes), source.decode(source.encode(images).codes))


GAN = [
    "discriminator=patchgan",
    "discriminator.base_channels=32",
    "discriminator.num_layers=1",
    "discriminator.norm=group",
]
HEARD = ["discriminator.adversarial.discriminator_start=0", "discriminator.adversarial.start=0"]


def test_the_discriminator_of_another_run_goes_on(start, compose_run, source, tmp_path):
    config, first = start(*GAN, *HEARD)
    train(config, first)
    last = first / "checkpoints" / "last.ckpt"
    plain = [each for each in TINY if not each.startswith(("encoder.", "decoder."))]
    begin = [f"pretrained.load={first}", f"pretrained.discriminator={last}", "trainer.max_steps=1", "optimizer.lr=0"]
    still = [*GAN, *HEARD, "discriminator.adversarial.lr=0", "scheduler.warmup_steps=0"]
    config, second = compose_run("second", [*plain, *begin, *still])
    train(config, second)
    before, after = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for folder in (first, second)
    )
    weights = [name for name in before if name.startswith("adversarial.discriminator.")]
    assert weights
    assert all(torch.equal(before[name], after[name]) for name in weights)
    config, third = compose_run("third", [*plain, *begin, *still, "discriminator.base_channels=64"])
    with pytest.raises(ValueError, match="give the discriminator of its run"):
        train(config, third)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["quantizer=fsq"], "leave it out, or leave quantizer out of pretrained.parts"),
        (["+quantizer.commitment_weight=1"], "write pretrained.settings.quantizer.commitment_weight=, or leave"),
        (["tokenizer.projection=none"], "tokenizer.projection has no effect beside pretrained.load"),
        (["pretrained.parts=[encoder,codebook]"], "pretrained.parts are some of encoder, quantizer, decoder; got"),
        (["pretrained.settings={quantizer: {commitment: 1}}"], "this quantizer has .*commitment_weight"),
        (["pretrained.settings={quantiser: {}}"], "pretrained.settings.quantiser: parts that are taken are"),
        (["pretrained.settings={quantizer: {codebook_size: 64}}"], r"is \(32, 4\) there and \(64, 4\) here"),
        (["pretrained.path=vq.pt"], "path has no effect on a bundle"),
        (["pretrained.load=null", "pretrained.path=vq.pt"], "no effect without pretrained.load"),
        (["pretrained.discriminator=last.ckpt"], "has no effect without a discriminator"),
        (["module.freeze=[codebook]"], "module.freeze: there is no codebook; this tokenizer has encoder, to_codes"),
        (["module.freeze=[encoder,to_codes,quantizer,from_codes,decoder]"], "leaves nothing to train"),
        (["module.freeze=[decoder]", "discriminator=patchgan"], "needs a decoder that learns"),
    ],
)  # fmt: skip
def test_a_start_that_cannot_be_is_refused_with_what_to_write(start, overrides, message):
    config, folder = start(*overrides)
    with pytest.raises(ValueError, match=message):
        train(config, folder)
