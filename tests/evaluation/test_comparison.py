"""Several models on the same images: one comparison beside their reports, from Python and from the command line."""

import json

import pytest
from hydra import compose, initialize_config_dir
from patch_tokenizer import PROTOCOL, make_batches, make_tokenizer

from vistok.cli.hydra_app import configs_folder
from vistok.evaluation import evaluate
from vistok.evaluation.comparison import write_comparison
from vistok.evaluation.run import evaluate_models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    options = {"protocol": PROTOCOL, "lpips": None, "rfid": False, "examples": 2}
    batches = make_batches(3, 2, size=(16, 24))
    evaluations = {
        "<ours>": evaluate(make_tokenizer(), batches, **options),
        "theirs": evaluate(lambda images: images * 0.9, batches, **options),
    }
    return write_comparison(evaluations, tmp_path_factory.mktemp("comparison"), "vistok eval models=[a,b]")


def test_every_file_has_both_models(folder):
    for name, text in (
        ("comparison.md", "&lt;ours>"),
        ("comparison.html", "&lt;ours&gt;"),
        ("comparison.json", "<ours>"),
    ):
        page = (folder / name).read_text(encoding="utf-8")
        assert text in page
        assert "theirs" in page


def test_the_page_shows_the_same_random_images_of_both(folder):
    page = (folder / "comparison.html").read_text(encoding="utf-8")
    figures = [part.split("</div>")[0] for part in page.split('<div class="row">')[1:]]
    assert [figure.count("<img") for figure in figures] == [3, 3]


def test_the_page_says_that_a_function_has_no_indices(folder):
    page = (folder / "comparison.html").read_text(encoding="utf-8")
    assert "this model gives images and no indices" in page
    assert "utilisation" in page


def test_metrics_are_by_name(folder):
    metrics = json.loads((folder / "comparison.json").read_text())
    assert metrics["theirs"]["psnr"] > metrics["<ours>"]["psnr"]
    assert "utilisation" not in metrics["theirs"]


@pytest.fixture
def functions(tmp_path, monkeypatch):
    (tmp_path / "two_functions.py").write_text("def same(x):\n    return x\n\n\ndef dark(x):\n    return 0.9 * x\n")
    monkeypatch.chdir(tmp_path)
    yield
    __import__("sys").modules.pop("two_functions", None)


def config(*overrides):
    with initialize_config_dir(str(configs_folder()), version_base="1.3"):
        small = ["data.image_size=64", "data.num_workers=0", "rfid=false", "lpips=null", "cache=null", "device=cpu"]
        return compose("eval", overrides=[*small, *overrides])


def test_each_model_has_a_folder_and_all_have_a_comparison(functions, tmp_path):
    models = "models=[two_functions:same,{function:'two_functions:dark',name:darker}]"
    metrics = evaluate_models(config(models), tmp_path / "out", "command")
    assert metrics["same"]["psnr"] == 100 > metrics["darker"]["psnr"]
    for name in ("comparison.json", "comparison.html", "same/report.html", "darker/metrics.json"):
        assert (tmp_path / "out" / name).is_file()
    with pytest.raises(FileExistsError, match="holds a report already"):
        evaluate_models(config(models), tmp_path / "out", "command")


def test_a_bundle_alone_has_its_report_in_the_folder_itself(functions, tmp_path):
    metrics = evaluate_models(config("bundle=two_functions:same"), tmp_path / "out", "command")
    assert metrics["psnr"] == 100
    assert (tmp_path / "out" / "metrics.json").is_file()


@pytest.mark.parametrize(
    "overrides",
    [[], ["bundle=a", "models=[b]"], ["models=[]"]],
    ids=["neither", "both", "none"],
)
def test_what_names_no_model_is_refused(overrides, tmp_path):
    with pytest.raises(ValueError, match=r"models=\["):
        evaluate_models(config(*overrides), tmp_path, "command")


def test_a_wrong_model_is_refused_before_anything_is_measured(functions, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        evaluate_models(config("models=[two_functions:same,runs/nothing]"), tmp_path / "out", "command")
    assert not (tmp_path / "out").exists()
