"""``vistok compare``: saved evaluations side by side."""

from pathlib import Path

import pytest

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


def test_names_are_what_differs_between_the_folders():
    assert compare.names_of([Path("/r/a/eval"), Path("/r/b/eval/metrics.json")]) == ["a/eval", "b/eval"]
    assert compare.names_of([Path("/r/a")]) == ["a"]
