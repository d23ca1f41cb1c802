"""What ``models=[...]`` takes: tokenizers, autoencoders of diffusers and functions, and what it refuses."""

import sys

import pytest
import torch
from patch_tokenizer import PROTOCOL, make_batches
from safetensors.torch import load_file, save_file

import vistok
from vistok.decoder import CNNDecoder
from vistok.encoder import CNNEncoder
from vistok.evaluation import evaluate
from vistok.evaluation.models import open_models
from vistok.quantizer import FSQ

SMALL = {"base_channels": 32, "channel_multipliers": [1, 1], "num_blocks": 1, "attention": "none"}


@pytest.fixture
def bundle(tmp_path):
    parts = CNNEncoder(**SMALL), FSQ([3, 3]), CNNDecoder(**SMALL)
    return vistok.save(vistok.Tokenizer(*parts), tmp_path / "run" / "bundle")


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module in the working folder."""
    (tmp_path / "third_party.py").write_text(
        "import torch\n\n"
        "def darker(images):\n    return (images + 1) * 0.9 - 1\n\n"
        "def broken(images):\n    return {'sample': images}\n\n"
        "class Model:\n    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    yield "third_party"
    sys.modules.pop("third_party", None)


def run(model, batches):
    return evaluate(model, batches, protocol=PROTOCOL, lpips=None, rfid=False)


def test_a_bundle_and_its_run_folder_are_the_same_tokenizer(bundle):
    for entry in (str(bundle), str(bundle.parent), {"load": str(bundle)}):
        [model] = open_models([entry])
        assert model.name == "run"
        assert isinstance(model.model, vistok.Tokenizer)


def test_a_name_can_be_given(bundle):
    assert open_models([{"load": str(bundle), "name": "mine"}])[0].name == "mine"


@pytest.mark.parametrize("entry", ["third_party:darker", {"function": "third_party:darker"}])
def test_a_function_is_found_in_the_working_folder(entry, module):
    [model] = open_models([entry])
    assert model.name == "darker"
    assert model.model(torch.ones(1)).item() == pytest.approx(0.8)


def test_what_a_function_imports_when_it_is_called_is_found_too(module, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [*sys.path])
    (tmp_path / "first_of_all.py").write_text("factor = 0.5\n")
    # Scripts of research code put their own folder first.
    (tmp_path / "lazy_party.py").write_text(
        "import sys\n\nsys.path.insert(0, '/its/own')\n\n"
        "def half(images):\n    import first_of_all\n\n    return first_of_all.factor * images\n"
    )
    [model] = open_models(["lazy_party:half"])
    assert sys.path[0] == "/its/own"
    assert str(tmp_path) not in sys.path[:-1]
    assert model.model(torch.ones(1)).item() == 0.5
    for name in ("lazy_party", "first_of_all"):
        sys.modules.pop(name)


def test_a_repository_of_the_hub_keeps_its_revision_and_its_name(bundle, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **given: asked.append(given) or str(bundle))
    [model] = open_models([{"load": "owner/tokenizer", "revision": "v1"}])
    assert model.name == "tokenizer"
    assert [given["revision"] for given in asked] == ["v1"]


def test_a_function_has_image_metrics_and_says_that_it_has_no_indices(module, batches):
    [model] = open_models([f"{module}:darker"])
    evaluation = run(model.model, batches)
    assert evaluation.metrics["psnr"] > 10
    assert evaluation.metrics["reconstruct_images_per_second"] > 0
    for name in ("utilisation", "perplexity", "bits_per_pixel", "coded_bits_per_pixel"):
        assert name not in evaluation.metrics
        assert evaluation.missing[name] == "this model gives images and no indices"
    assert [reference.name for reference in evaluation.references] == ["JPEG, quality 1"]


def test_a_function_that_gives_no_images_is_refused(module, batches):
    [model] = open_models([f"{module}:broken"])
    with pytest.raises(ValueError, match="must give a float tensor of images"):
        run(model.model, batches)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda images: images[:, :, :16], "gave .* for images .*: reconstructions have the shape"),
        (lambda images: (images + 1) * 127.5, r"gave values from \S+ to \S+: reconstructions are in \[-1, 1\]"),
        (lambda images: (images * 127.5 + 127.5).byte(), r"float tensor of images in \[-1, 1\] .* got torch.uint8"),
        (lambda images: (images,), "got tuple"),
    ],
    ids=["shape", "range", "dtype", "tuple"],
)
def test_a_function_that_gives_something_else_is_told_what_to_give(model, message, batches):
    with pytest.raises(ValueError, match=message):
        run(model, batches)


def test_reconstructions_in_the_unit_range_carry_a_note(batches):
    assert "must give [-1, 1], as it gets, not [0, 1]" in run(lambda images: (images + 1) / 2, batches).notes["psnr"]
    assert "psnr" not in run(lambda images: images, batches).notes


def test_a_function_cannot_change_the_originals(batches):
    assert run(lambda images: images.mul_(0.5), batches).metrics["psnr"] < 30


def test_an_autoencoder_of_diffusers_is_measured_as_its_own_code_runs_it(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    network = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).eval()
    network.save_pretrained(tmp_path / "vae")
    [model] = open_models([{"diffusers": "AutoencoderKL", "path": str(tmp_path / "vae")}])
    images = make_batches(2)[0]["images"]
    with torch.no_grad():
        assert torch.equal(model.model(images), network.decode(network.encode(images).latent_dist.mode()).sample)
    assert model.name == "vae"
    assert "psnr" in run(model.model, make_batches(2)).metrics
    half = {"diffusers": "AutoencoderKL", "path": str(tmp_path), "subfolder": "vae", "torch_dtype": "bfloat16"}
    evaluation = run(open_models([half | {"name": "half"}])[0].model, make_batches(2))
    assert evaluation.protocol["precision"] == "tokenizer bfloat16; metrics float32"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"foo": 1}, "foo has no effect on AutoencoderKL"),
        ({"subfolder": "vae"}, "there is no folder .*vae"),
        ({"torch_dtype": "half precision"}, "torch_dtype must be float32"),
        ({"diffusers": "VQModel"}, "holds no VQModel of diffusers"),
        ({"path": "lacking"}, "lacks 1 weights, as decoder.conv_in.bias"),
        ({"path": "empty"}, "config.json"),
    ],
)
def test_an_autoencoder_that_is_not_what_was_asked_for_is_refused(entry, message, tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    network = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    for folder in ("whole", "lacking"):
        network.save_pretrained(tmp_path / folder)
    file = tmp_path / "lacking" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if name != "decoder.conv_in.bias"}, file)
    with pytest.raises((ValueError, OSError), match=message):
        open_models([{"diffusers": "AutoencoderKL", "path": "whole"} | entry])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("nothing/here/bundle", "no folder"),
        ("llamagen:vq-17", "llamagen has no checkpoint 'vq-17'"),
        ("nothing.here:function", "cannot be imported"),
        ("third_party:lighter", "third_party has no lighter"),
        ("third_party:Model", "must be a function"),
        ({"function": "third_party"}, "package.module:function"),
        ({"function": "third_party:darker", "path": "x"}, "path has no effect"),
        ({"path": "x"}, "a model is a bundle"),
        ({"load": "x", "diffusers": "VQModel"}, "a model is a bundle"),
        (3, "a model is a bundle"),
        ({"diffusers": "AutoencoderKL"}, "needs the path"),
        ({"diffusers": "AutoencoderXY", "path": "."}, "has no model 'AutoencoderXY'"),
        ({"diffusers": "AutoencoderKL", "path": "nowhere"}, "there is no folder"),
        ({"function": "third_party:darker", "name": "a/b"}, "has no slash"),
    ],
)
def test_what_cannot_be_loaded_is_refused_with_what_to_write(entry, message, module):
    if isinstance(entry, dict) and "diffusers" in entry:
        pytest.importorskip("diffusers", reason="diffusers is not installed")
    with pytest.raises((ValueError, OSError), match=message):
        open_models([entry])


def test_a_library_that_is_not_installed_is_told_how_to_get(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match="pip install diffusers"):
        open_models([{"diffusers": "AutoencoderKL", "path": str(tmp_path)}])


def test_two_models_of_one_name_are_refused(bundle):
    with pytest.raises(ValueError, match="two models are called run: name one of them"):
        open_models([str(bundle), str(bundle)])
