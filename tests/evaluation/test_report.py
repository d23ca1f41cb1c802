"""The three files of a report: complete, self-contained, escaped."""

import base64
import dataclasses
import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from patch_tokenizer import PROTOCOL, make_batches, make_tokenizer
from PIL import Image

from vistok.evaluation import Evaluation, evaluate, read_evaluation, write_report

TITLE = "<b>fsq</b> & | friends"
COMMAND = "vistok eval bundle='runs/<x>' && true"


@pytest.fixture(scope="module")
def evaluation():
    torch.manual_seed(0)
    batches = make_batches(3, 2, size=(16, 24))
    batches[0]["keys"][0] = "<script>alert(1)</script>.png"
    usage = {"utilisation": 0.5}
    options = {"lpips": None, "rfid": False, "examples": 5, "train_usage": usage}
    return evaluate(make_tokenizer("separate"), batches, protocol=PROTOCOL, **options)


@pytest.fixture(scope="module")
def folder(evaluation, tmp_path_factory):
    return write_report(evaluation, tmp_path_factory.mktemp("report") / "new", TITLE, COMMAND)


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


def test_nothing_but_the_three_files_is_left(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.json", "report.html", "report.md"]


def test_a_failure_leaves_the_earlier_report_whole(evaluation, folder, monkeypatch):
    before = (folder / "report.html").read_text(encoding="utf-8")
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(evaluation, folder, "other", "other")
    assert (folder / "report.html").read_text(encoding="utf-8") == before


def test_saved_metrics_are_read_back(evaluation, folder):
    saved = read_evaluation(folder)
    assert saved.metrics == evaluation.metrics
    assert saved.references == evaluation.references
    assert saved.per_image == evaluation.per_image
    assert saved.per_codebook == evaluation.per_codebook
    assert saved.missing == evaluation.missing


def test_the_file_holds_no_invalid_numbers(tmp_path):
    evaluation = Evaluation(
        {"psnr": math.nan, "rfid": math.inf, "ssim": 0.5}, {}, PROTOCOL | {"images": 1, "size": [8, 8]}
    )
    write_report(evaluation, tmp_path, "x", "y")
    text = (tmp_path / "metrics.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail)["metrics"] == {"psnr": None, "rfid": None, "ssim": 0.5}
    assert read_evaluation(tmp_path).metrics == {"ssim": 0.5}


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "metrics.json").write_text('{"loss": 1}')
    with pytest.raises(ValueError, match=r"got \['loss'\]"):
        read_evaluation(tmp_path)


def test_the_page_loads_nothing_from_elsewhere(page):
    sources = re.findall(r"""(?:src|srcset|href|url)\s*[=(]\s*["']?([^"')\s]+)""", page)
    assert len(sources) > 10
    assert all(source.startswith(("data:image/png;base64,", "data:,")) for source in sources)
    assert "http" not in page.lower()


def test_the_page_has_no_script(page):
    assert "<script" not in page.lower()


def test_all_strings_are_escaped(page):
    for text in (
        "&lt;b&gt;fsq&lt;/b&gt; &amp; | friends",
        "&lt;script&gt;alert(1)",
        "runs/&lt;x&gt;&#x27; &amp;&amp; true",
    ):
        assert text in page


def test_every_element_is_closed(page):
    class Checker(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open_tags = []

        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "link", "img", "source"):
                self.open_tags.append(tag)

        def handle_endtag(self, tag):
            assert self.open_tags.pop() == tag

    checker = Checker()
    checker.feed(page)
    assert checker.open_tags == []


def test_every_example_is_shown_with_original_reconstruction_and_error(evaluation, page):
    figures = re.findall(r'<div class="row">(.*?)</div>', page)
    assert len(figures) == 5 + len(evaluation.random) == len(evaluation.worst) + len(evaluation.best) + 5
    first = re.findall(r"base64,([^\"]+)", figures[0])
    shown = [Image.open(io.BytesIO(base64.b64decode(picture))) for picture in first]
    assert [picture.mode for picture in shown] == ["RGB", "RGB", "L", "RGB", "RGB"]
    assert np.array_equal(np.asarray(shown[0]), evaluation.worst[0].original.movedim(0, -1).numpy())


@pytest.mark.parametrize("suffix", ["html", "md"])
def test_reports_show_numbers_references_reasons_protocol_and_command(evaluation, folder, suffix):
    text = (folder / f"report.{suffix}").read_text(encoding="utf-8")
    shown = [
        f"{evaluation.metrics['psnr']:.2f}",
        "JPEG, quality 1",
        "switched off",
        "data range 1",
        "vistok eval bundle=",
    ]
    assert [part for part in shown if part not in text] == []


def test_the_page_names_the_training_usage(page):
    assert "In training: utilisation 50.0%" in page


def test_columns_per_codebook_scale_and_bit_are_saved_and_shown(evaluation, page, tmp_path):
    assert "<th>codebook</th><th>codes</th><th>utilisation</th>" in page
    scales = {"tokens": [1.0, 96.0], "utilisation": [0.5, 1.0], "entropy_bits": [0.0, 0.75]}
    columns = {"per_scale": scales, "per_bit": {"ones": [0.25, 1.0], "entropy_bits": [0.8113, 0.0]}}
    metrics = evaluation.metrics | {"dead_bits": 1.0}
    binary = dataclasses.replace(evaluation, metrics=metrics, **columns)
    saved = read_evaluation(write_report(binary, tmp_path, "x", "y"))
    assert {name: getattr(saved, name) for name in columns} == columns
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "1 of 2 bits never change." in text
    assert "<td>0</td><td>0.25</td><td>0.8113</td>" in text
    assert "<th>scale</th><th>tokens</th>" in text


def test_bars_in_names_do_not_break_the_table(folder):
    lines = (folder / "report.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# &lt;b>fsq&lt;/b> & \\| friends"


def test_an_evaluation_without_pictures_has_a_report(evaluation, tmp_path):
    bare = Evaluation.from_json(json.loads(json.dumps(evaluation.to_json())))
    write_report(bare, tmp_path, "x", "y")
    assert "Worst reconstructions" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_continuous_tokenizer_has_a_report(tmp_path):
    options = {"lpips": None, "rfid": False}
    continuous = evaluate(make_tokenizer("continuous"), make_batches(2, size=(16, 24)), protocol=PROTOCOL, **options)
    write_report(continuous, tmp_path, "x", "y")
    assert "Codebook usage" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "a continuous tokenizer has no codes" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_details_are_cut_where_the_error_is_largest(evaluation, page):
    figure = re.findall(r'<div class="row">(.*?)</div><figcaption>(.*?)<', page)[0]
    top, left = map(int, re.search(r"row (\d+), column (\d+)", figure[1]).groups())
    detail = re.findall(r"base64,([^\"]+)", figure[0])[3]
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(detail))))
    original = evaluation.worst[0].original.movedim(0, -1).numpy()
    assert np.array_equal(shown, original[top : top + 16, left : left + 16])
    error = (evaluation.worst[0].original.float() - evaluation.worst[0].reconstruction.float()).abs().mean(0)
    means = torch.nn.functional.avg_pool2d(error[None], 16, 1)[0]
    assert means[top, left] == pytest.approx(means.max().item(), abs=0.5)


def test_the_entropy_by_position_is_saved_and_shown(evaluation, folder, page):
    saved = read_evaluation(folder)
    assert torch.equal(saved.position_entropy, evaluation.position_entropy)
    assert saved.position_entropy.shape == (4, 6)
    assert 'alt="Entropy by position"' in page


def alternatives(page):
    return re.findall(r'alt="([^"]+)"', page)


def test_a_codebook_has_a_map(evaluation, tmp_path):
    one = {"codebook_sizes": (9,), "per_codebook": {}, "shared_bits": torch.zeros(0, 0)}
    mapped = dataclasses.replace(evaluation, usage=[torch.arange(9)], codebook_maps=[torch.randn(9, 2)], **one)
    write_report(mapped, tmp_path, "x", "y")
    shown = alternatives((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "Map of the codebook" in shown
    assert "Usage by codebook" not in shown


def test_several_codebooks_have_their_usage_maps_and_what_they_share(evaluation, tmp_path):
    usage, maps = [torch.arange(9)] * 3, [torch.randn(9, 2), torch.zeros(0, 2), torch.randn(9, 2)]
    several = dataclasses.replace(evaluation, usage=usage, codebook_maps=maps, codebook_sizes=(9,) * 3)
    write_report(several, tmp_path, "x", "y")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    shown = alternatives(text)
    assert {"Usage by codebook", "Bits that codebooks share", "Map of codebook 0", "Map of codebook 2"} <= set(shown)
    assert "Map of codebook 1" not in shown
    assert "of 3 codebooks the first" not in text
    few = dataclasses.replace(several, codebook_maps=maps[:1], shared_bits=evaluation.shared_bits[:2, :2])
    write_report(few, tmp_path, "x", "y")
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("of 3 codebooks the first") == 2


def test_what_codebooks_share_is_saved(evaluation, folder):
    assert evaluation.shared_bits.shape == (3, 3)
    assert torch.equal(read_evaluation(folder).shared_bits, evaluation.shared_bits)


def test_long_tables_are_folded(evaluation, tmp_path):
    columns = {"per_scale": {"utilisation": [0.5] * 20, "entropy_bits": [0.25] * 20, "tokens": [4.0] * 20}}
    write_report(dataclasses.replace(evaluation, **columns), tmp_path, "x", "y")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<details><summary>20 scales</summary>" in text
    assert "Usage by scale" in alternatives(text)
    assert "<summary>3 codebooks" not in text


def test_codebooks_of_one_bit_are_shown_as_bits(evaluation, tmp_path):
    bits = {"per_bit": {"ones": [0.5] * 3, "entropy_bits": [1.0] * 3}}
    metrics = evaluation.metrics | {"dead_bits": 0.0}
    write_report(dataclasses.replace(evaluation, metrics=metrics, **bits), tmp_path, "x", "y")
    shown = alternatives((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "Ones by bit" in shown
    assert "Usage by codebook" not in shown
    assert "Occurrences of codes" not in shown
