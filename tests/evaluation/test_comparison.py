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


@pytest.mark.parametrize("name", ["comparison.md", "comparison.html"])
def test_the_comparison_carries_its_notes_and_its_protocol(name, tmp_path):
    options = {"protocol": PROTOCOL, "lpips": None, "rfid": False, "examples": 0}
    batches = make_batches(3)
    evaluations = {
        "light": evaluate(lambda images: (images + 1) / 2, batches, **options),
        "same": evaluate(lambda images: images, batches, **options),
    }
    page = (write_comparison(evaluations, tmp_path, "command") / name).read_text(encoding="utf-8")
    assert "light: psnr is of reconstructions from 0" in page
    assert "synthetic" in page
    assert "rounded to 8 bits before every metric" in page


def test_a_reason_that_several_models_share_is_given_once(folder):
    page = (folder / "comparison.html").read_text(encoding="utf-8")
    assert page.count("no ms_ssim: needs sides") == 1
    assert "<th>&lt;ours&gt;, theirs</th>" in page


def test_metrics_are_by_name(folder):
    metrics = json.loads((folder / "comparison.json").read_text())
    assert metrics["theirs"]["psnr"] > metrics["<ours>"]["psnr"]
    assert "utilisation" not in metrics["theirs"]


FUNCTIONS = """
def same(x):
    return x

def dark(x):
    return 0.9 * x

def broken(x):
    return x[..., :-1]

def unforeseen(x):
    return x.missing
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    (tmp_path / "two_functions.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    yield
    __import__("sys").modules.pop("two_functions", None)


def config(*overrides):
    with initialize_config_dir(str(configs_folder()), version_base="1.3"):
        small = ["data.image_size=64", "data.num_workers=0", "rfid=false", "lpips=null", "device=cpu"]
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
    [[], ["bundle=a", "models=[b]"], ["models=[]"], ["models=runs/a"], ["models={load: runs/a}"]],
    ids=["neither", "both", "none", "text", "mapping"],
)
def test_what_names_no_model_is_refused(overrides, tmp_path):
    with pytest.raises(ValueError, match=r"models=\["):
        evaluate_models(config(*overrides), tmp_path, "command")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rfid=maybe", "rfid must be true or false, got 'maybe'"),
        ("references=2", "references must be true or false, got 2"),
        ("examples=abc", "examples must be a whole number, got 'abc'"),
        ("examples=true", "examples must be a whole number, got True"),
        ("cache_gib=much", "cache_gib must be a number, got 'much'"),
        ("distances=fid", r"distances are rfid, .*; got \['fid'\]"),
    ],
)
def test_a_setting_of_another_kind_is_refused_by_name(override, message, functions, tmp_path):
    with pytest.raises(ValueError, match=message):
        evaluate_models(config("bundle=two_functions:same", override), tmp_path, "command")


def test_one_distance_needs_no_list(functions, tmp_path):
    settings = config("bundle=two_functions:same", "distances=kid", f"weights={tmp_path}")
    evaluate_models(settings, tmp_path / "out", "command")
    missing = json.loads((tmp_path / "out" / "metrics.json").read_text())["missing"]
    assert "there is no file" in missing["kid"]
    assert missing["sfid"] == "switched off"


def test_one_model_can_have_a_name_too(functions, tmp_path):
    evaluate_models(config("bundle={function:'two_functions:same',name:mine}"), tmp_path / "out", "command")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["title"] == "mine"


def test_a_wrong_model_is_refused_before_anything_is_measured(functions, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        evaluate_models(config("models=[two_functions:same,runs/nothing]"), tmp_path / "out", "command")
    assert not (tmp_path / "out").exists()


def test_a_model_that_fails_loses_no_numbers_of_the_others(functions, tmp_path, caplog):
    models = "models=[two_functions:broken,two_functions:same,two_functions:unforeseen]"
    with pytest.raises(ValueError, match=r"2 of 3 models cannot be measured: broken \(ValueError: the model gave"):
        evaluate_models(config(models), tmp_path / "out", "command")
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()).keys() == {"same"}
    assert (tmp_path / "out" / "same" / "report.html").is_file()
    for name in ("comparison.md", "comparison.html"):
        page = (tmp_path / "out" / name).read_text()
        assert "broken" in page
        assert "AttributeError" in page
    # A traceback is of use where nobody foresaw the mistake.
    tracebacks = {record.args[0]: bool(record.exc_info) for record in caplog.records if record.levelname == "ERROR"}
    assert tracebacks == {"broken": False, "unforeseen": True}


def test_data_that_fails_is_not_blamed_on_a_model(functions, tmp_path):
    settings = config(
        "models=[two_functions:same,two_functions:dark]", "data=image_folder", f"data.val_root={tmp_path}/x"
    )
    with pytest.raises((ValueError, OSError), match="x"):
        evaluate_models(settings, tmp_path / "out", "command")
    assert not (tmp_path / "out").exists()


def test_nothing_is_kept_unless_it_is_asked_for(functions, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setenv("VISTOK_CACHE", str(tmp_path / "kept"))
    monkeypatch.setattr("vistok.evaluation.run.evaluate", lambda *_, cache, **__: seen.append(cache) or 1 / 0)
    for overrides in (["bundle=two_functions:same"], ["bundle=two_functions:same", "cache=auto", "cache_gib=0.5"]):
        with pytest.raises(ZeroDivisionError):
            evaluate_models(config(*overrides), tmp_path / "out", "command")
    assert seen[0] is None
    assert (seen[1].folder, seen[1].limit) == (tmp_path / "kept", 2**29)
    with pytest.raises(ValueError, match="cache_gib must be positive"):
        evaluate_models(config("bundle=two_functions:same", "cache_gib=0"), tmp_path / "out", "command")
