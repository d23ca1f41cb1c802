"""Bundles: what is written is what is loaded, and nothing else is."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import vistok
from vistok.decoder import CNNDecoder
from vistok.encoder import CNNEncoder
from vistok.hub.bundle import Unfilled
from vistok.quantizer import FSQ, Identity, VectorQuantizer


def make(quantizer=None):
    return vistok.Tokenizer(
        CNNEncoder(base_channels=32, num_blocks=1),
        quantizer or FSQ((8, 5, 5)),
        CNNDecoder(base_channels=32, num_blocks=1),
        preprocessing={"size": [32, 32], "range": [-1, 1]},
    ).eval()


@pytest.fixture
def bundle(tmp_path):
    return vistok.save(make(), tmp_path / "bundle")


def edit_config(bundle, **changes):
    config = json.loads((bundle / "config.json").read_text())
    config.update(changes)
    (bundle / "config.json").write_text(json.dumps(config))


def edit_tensors(bundle, edit):
    tensors = load_file(bundle / "model.safetensors")
    edit(tensors)
    save_file(tensors, bundle / "model.safetensors")


@pytest.mark.parametrize("quantizer", [FSQ((8, 5, 5)), VectorQuantizer(32, 4, init="batch")], ids=["fsq", "vq"])
def test_a_loaded_bundle_gives_the_same_indices_and_images_bit_for_bit(tmp_path, quantizer):
    tokenizer = make(quantizer)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    tokenizer.train()(images)
    tokenizer.quantizer.update()
    tokenizer.eval()
    loaded = vistok.load(vistok.save(tokenizer, tmp_path / "bundle"))
    expected, got = tokenizer.encode(images), loaded.encode(images)
    assert torch.equal(got.indices, expected.indices)
    assert torch.equal(loaded.decode_indices(got.indices), tokenizer.decode(expected.codes))
    assert loaded.preprocessing == tokenizer.preprocessing
    assert not loaded.training


def test_a_bundle_loads_in_another_process_and_folder_without_lightning_and_hydra(bundle, tmp_path):
    code = (
        "import sys, vistok\n"
        f"tok = vistok.load({str(bundle)!r})\n"
        "assert tok.vocab_size == 200\n"
        "heavy = {'lightning', 'hydra', 'omegaconf', 'timm', 'torchmetrics', 'wandb'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(Path("tokenizers").resolve())}
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_run_folder_is_loaded_by_its_bundle(bundle):
    assert vistok.load(bundle.parent).vocab_size == 200


def test_saving_over_a_folder_is_refused_unless_asked_for(bundle):
    before = (bundle / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        vistok.save(make(), bundle)
    assert (bundle / "model.safetensors").read_bytes() == before
    vistok.save(make(FSQ((5, 5))), bundle, overwrite=True)
    assert vistok.load(bundle).vocab_size == 25


def test_a_failure_while_saving_leaves_the_previous_bundle_and_nothing_else(bundle, monkeypatch):
    import vistok.hub.bundle as module

    def full_disk(*arguments, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        vistok.save(make(FSQ((5, 5))), bundle, overwrite=True)
    assert vistok.load(bundle).vocab_size == 200
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(bundle, name):
    (bundle / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"has no {name}; it has \["):
        vistok.load(bundle)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("share", [0, 0.3, 0.99])
def test_a_truncated_file_is_an_error_that_names_it(bundle, name, share):
    content = (bundle / name).read_bytes()
    (bundle / name).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=rf"{name}.*may be truncated"):
        vistok.load(bundle)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "subprocess.Popen",
        "vistok.hub.files.os.system",
        "vistok.config.importlib.import_module",
        "vistok.load",
        "vistok.cli.__main__.main",
        "vistok.training.module.TokenizerModule",
        7,
    ],
)
def test_a_foreign_target_is_refused_and_nothing_is_executed(bundle, tmp_path, target):
    trap = {"_target_": target, "command": f"touch {tmp_path / 'trap'}"}
    edit_config(bundle, quantizer=trap)
    with pytest.raises(ValueError, match="nothing was executed"):
        vistok.load(bundle)
    assert not (tmp_path / "trap").exists()


def test_half_precision_is_widened_and_loads(tmp_path):
    tokenizer = make().bfloat16()
    loaded = vistok.load(vistok.save(tokenizer, tmp_path / "half"))
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, tokenizer.state_dict()[name].to(tensor.dtype)), name


def test_a_foreign_target_is_refused_wherever_it_hides(bundle):
    edit_config(bundle, preprocessing={"size": [32, 32], "list": [{"_target_": "os.system"}]})
    with pytest.raises(ValueError, match=r"config.preprocessing.list\[0\]._target_ is 'os.system'"):
        vistok.load(bundle)


def test_a_pickle_in_place_of_the_weights_is_never_unpickled(bundle, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "trap"),))

    torch.save({"state": Bomb()}, bundle / "model.safetensors")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        vistok.load(bundle)
    assert not (tmp_path / "trap").exists()


def test_an_argument_that_does_not_exist_lists_those_that_do(bundle):
    edit_config(bundle, quantizer={"_target_": "vistok.quantizer.FSQ", "levels": [8, 5, 5], "level": 3})
    with pytest.raises(ValueError, match="FSQ has no argument level; it takes levels, "):
        vistok.load(bundle)


def test_a_config_that_is_not_of_a_bundle_is_an_error(bundle):
    (bundle / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="is not the config of a vistok bundle"):
        vistok.load(bundle)


def test_a_bundle_of_another_format_is_an_error(bundle):
    edit_config(bundle, format=99)
    with pytest.raises(ValueError, match="has format 99, this version of vistok reads format 1"):
        vistok.load(bundle)


def test_tensors_of_the_wrong_shape_are_an_error(bundle):
    edit_tensors(bundle, lambda tensors: tensors.update({"to_codes.weight": torch.zeros(3, 31)}))
    with pytest.raises(ValueError, match=r"to_codes.weight is \(3, 31\), the config asks for \(3, 32\)"):
        vistok.load(bundle)


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("encoder", {"base_channels": 2**20}),
        ("encoder", {"num_blocks": 10**9}),
        ("encoder", {"channel_multipliers": [1] * 200}),
        ("decoder", {"channel_multipliers": [2**62]}),
        ("quantizer", {"_target_": "vistok.quantizer.VectorQuantizer", "codebook_size": 2**36, "dim": 3}),
        ("encoder", {"base_channels": "many"}),
    ],
)
def test_a_config_that_asks_for_more_than_the_file_holds_is_an_error_at_once(bundle, part, changes):
    config = json.loads((bundle / "config.json").read_text())
    kept = {} if part == "quantizer" else config[part]
    edit_config(bundle, **{part: {**kept, **changes}})
    with pytest.raises(ValueError, match=r"config\.json|model\.safetensors"):
        vistok.load(bundle)


def test_tensors_of_the_wrong_dtype_are_an_error(bundle):
    edit_tensors(bundle, lambda tensors: tensors.update({"to_codes.bias": torch.zeros(3, dtype=torch.int64)}))
    with pytest.raises(ValueError, match=r"to_codes.bias is torch.int64"):
        vistok.load(bundle)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_tensors_that_are_not_finite_are_an_error(bundle, value):
    edit_tensors(bundle, lambda tensors: tensors["to_codes.bias"].fill_(value))
    with pytest.raises(ValueError, match=r"to_codes.bias holds NaN or infinite values"):
        vistok.load(bundle)


def test_missing_and_unexpected_tensors_are_named(bundle):
    edit_tensors(bundle, lambda tensors: tensors.update(stranger=tensors.pop("to_codes.bias")))
    with pytest.raises(ValueError, match=r"missing \['to_codes.bias'\], unexpected \['stranger'\]"):
        vistok.load(bundle)


def test_a_place_without_a_bundle_says_what_can_be_loaded(tmp_path):
    with pytest.raises(FileNotFoundError, match="a run folder, a hub id such as owner/name, or family:name"):
        vistok.load(tmp_path / "nothing")
    (tmp_path / "file.ckpt").write_text("")
    with pytest.raises(ValueError, match="is a file: pass the folder of a bundle"):
        vistok.load(tmp_path / "file.ckpt")


def test_a_hub_id_that_cannot_be_fetched_names_the_repository():
    with pytest.raises(FileNotFoundError, match="the hub repository 'nobody/nothing-here' could not be fetched"):
        vistok.load("nobody/nothing-here")


def test_a_hub_repository_is_loaded_from_the_local_cache(bundle, monkeypatch):
    import huggingface_hub

    asked = {}

    def snapshot_download(name, allow_patterns, **options):
        asked.update(name=name, **options)
        return str(bundle)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    options = {"revision": "v1", "token": "secret", "cache_dir": "cache", "local_files_only": True}
    assert vistok.load("owner/name", **options).vocab_size == 200
    assert asked == {"name": "owner/name", **options}


def test_arguments_of_the_hub_have_no_effect_on_a_folder(bundle):
    with pytest.raises(ValueError, match="revision, local_files_only has no effect on the local folder"):
        vistok.load(bundle, revision="v1", local_files_only=True)


def test_building_without_random_numbers_ends_for_initialisers_that_draw_until_they_fit():
    tensor = torch.full((64,), 9.0)
    with Unfilled([(64,)]):
        torch.nn.init.trunc_normal_(tensor, std=0.02)
    assert tensor.abs().max() <= 2


def test_building_that_is_stopped_leaves_gradients_on():
    def build():
        with torch.no_grad():
            for _ in range(10**6):
                torch.relu(torch.ones(1))

    with pytest.raises(ValueError, match="asks for far more"), Unfilled([(1,)]):
        build()
    assert torch.is_grad_enabled()


def test_half_precision_is_that_of_all_but_the_quantizer(tmp_path):
    folder = vistok.save(make(VectorQuantizer(32, 4)), tmp_path / "bundle")
    tokenizer = vistok.load(folder, dtype=torch.bfloat16)
    assert tokenizer.encoder.conv_in.weight.dtype == torch.bfloat16
    assert tokenizer.quantizer.table.dtype == torch.float32
    quantized = tokenizer.encode(torch.rand(1, 3, 16, 16).bfloat16())
    images = tokenizer.decode(quantized.codes)
    assert images.dtype == torch.bfloat16
    assert torch.equal(tokenizer.decode_indices(quantized.indices), images)


def test_a_pushed_tokenizer_is_a_bundle_with_its_card(tmp_path, monkeypatch):
    import huggingface_hub

    seen = {}

    class Api:
        def __init__(self, token):
            seen["token"] = token

        def create_repo(self, repository, **options):
            seen.update(repository=repository, **options)

        def upload_folder(self, repo_id, folder_path, commit_message):
            seen["files"] = sorted(path.name for path in folder_path.iterdir())
            seen["card"] = (folder_path / "README.md").read_text()
            return SimpleNamespace(commit_url="https://hub/commit/1")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    measured = {"metrics": {"psnr": 27.0}, "command": "vistok eval"}
    url = vistok.push_to_hub(make(), "owner/name", measured=measured, private=True, token="secret")
    assert url == "https://hub/commit/1"
    assert seen["files"] == ["README.md", "config.json", "model.safetensors"]
    assert "\n# name\n" in seen["card"]
    assert "psnr: 27" in seen["card"]
    assert (seen["repository"], seen["private"], seen["token"]) == ("owner/name", True, "secret")


def test_the_model_card_quotes_numbers_with_their_protocol(tmp_path):
    measured = {"metrics": {"psnr": 27.123456}, "protocol": {"reference": "held-out"}, "command": "python eval.py"}
    card = (vistok.save(make(), tmp_path / "b", measured=measured) / "README.md").read_text()
    assert "psnr: 27.12" in card
    assert "reference: held-out" in card
    assert "`python eval.py`" in card


def test_the_model_card_lists_usage_per_codebook_scale_and_bit(tmp_path):
    usage = {"per_codebook": {}, "per_bit": {"ones": [0.25, 1.0]}}
    measured = {"metrics": {"psnr": 27.0}, "usage": usage}
    card = (vistok.save(make(), tmp_path / "b", measured=measured) / "README.md").read_text()
    assert "Per bit:\n\n- ones: 0.25, 1" in card
    assert "Per codebook" not in card


def test_the_model_card_says_what_the_codes_are(tmp_path):
    discrete = (vistok.save(make(FSQ((8, 5, 5))), tmp_path / "discrete") / "README.md").read_text()
    assert "described by one index of 200 codes (7.644 bits)." in discrete
    assert "tok.decode_indices(quantized.indices)" in discrete
    continuous = (vistok.save(make(Identity(4)), tmp_path / "continuous") / "README.md").read_text()
    assert "described by 4 continuous numbers." in continuous
    assert "indices" not in continuous
    assert "tok.decode(quantized.codes)  # codes (b 4 h w)" in continuous


def test_a_part_that_cannot_be_described_is_refused_before_anything_is_written(tmp_path):
    tokenizer = make()
    tokenizer.preprocessing = {}
    tokenizer._arguments["preprocessing"] = {"size": torch.zeros(2)}
    with pytest.raises(TypeError, match="Tensor cannot be written into a config"):
        vistok.save(tokenizer, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_family_that_does_not_exist_is_named_with_a_similar_one(bundle):
    with pytest.raises(ValueError, match=r"no family 'llamagn' .*did you mean llamagen\?"):
        vistok.load("llamagn:vq-16", path=bundle / "model.safetensors")


def test_a_bundle_is_not_taken_for_a_checkpoint_of_another_program(bundle):
    with pytest.raises(ValueError, match=r"is a bundle of vistok: load it by vistok.load\('"):
        vistok.load("llamagen:vq-16", path=bundle)


def test_the_card_of_a_run_has_the_name_of_the_run(tmp_path):
    vistok.save(make(), tmp_path / "photos-fsq" / "bundle")
    assert "\n# photos-fsq\n" in (tmp_path / "photos-fsq" / "bundle" / "README.md").read_text()
