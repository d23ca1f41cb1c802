"""``vistok compare``: saved evaluations side by side."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from vistok.cli import compare
from vistok.evaluation import Evaluation, write_report


def saved(folder, protocol, psnr):
    described = {"dataset": "x", "split": "val", "resize": "none", "crop": "none", "protocol": protocol}
    return write_report(Evaluation({"psnr": psnr}, {}, described), folder, "t", "c")


def run(monkeypatch, *paths):
    monkeypatch.setattr("sys.argv", ["vistok compare", *map(str, paths)])
    compare.main()


def test_evaluations_of_different_protocols_are_shown_with_a_warning(tmp_path, monkeypatch, capsys):
    a, b = saved(tmp_path / "a", "vistok", 21.5), saved(tmp_path / "b", "llamagen", 23.25)
    run(monkeypatch, a, b / "metrics.json")
    text = " ".join(capsys.readouterr().out.split())
    assert "21.50" in text
    assert "23.25" in text
    assert "differ in: protocol (vistok, llamagen)" in text


def test_a_missing_file_ends_with_a_message(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "nothing")
    assert "nothing" in capsys.readouterr().err


def test_a_folder_of_several_reports_is_told_which_there_are(tmp_path, monkeypatch, capsys):
    saved(tmp_path / "both" / "a", "vistok", 21.5)
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "both")
    assert f"write {tmp_path / 'both' / 'a'}" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["not json", "[{}]", "{}", '{"metrics": 3, "protocol": {}}'])
def test_a_file_that_is_no_evaluation_is_named(text, tmp_path, monkeypatch, capsys):
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path)
    assert f"{tmp_path / 'metrics.json'} is no saved evaluation" in capsys.readouterr().err


def test_two_files_of_one_folder_are_both_shown(tmp_path, monkeypatch, capsys):
    for name, psnr in (("before", 21.5), ("after", 23.25)):
        (saved(tmp_path, "vistok", psnr) / "metrics.json").rename(tmp_path / f"{name}.json")
    run(monkeypatch, tmp_path / "before.json", tmp_path / "after.json")
    text = capsys.readouterr().out
    assert "21.50" in text
    assert "23.25" in text


def test_the_runs_of_a_sweep_are_compared_whatever_their_folders_are_called(tmp_path, capsys):
    for name in ("10", "9_b", "size=64"):
        saved(tmp_path / name, "vistok", 20.0)
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    compare.CompareRuns().on_multirun_end(config)
    assert list(json.loads((tmp_path / "comparison.json").read_text())) == ["9_b", "10", "size=64"]


def test_names_are_what_differs_between_the_folders():
    assert compare.names_of([Path("/r/a/eval"), Path("/r/b/eval/metrics.json")]) == ["a/eval", "b/eval"]
    assert compare.names_of([Path("/r/a")]) == ["a"]
