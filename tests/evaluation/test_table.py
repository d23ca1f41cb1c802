"""The table in the terminal."""

import io

import pytest
from patch_tokenizer import PROTOCOL
from rich.console import Console

from vistok.evaluation import Evaluation, Reference, print_table

JPEG = Reference("JPEG, quality 1", 20.194, None, 0.2653)


def make(**metrics):
    notes = {"rfid": "n = 3, biased"} if "rfid" in metrics else {}
    return Evaluation(metrics, {}, PROTOCOL | {"images": 3, "device": "cpu"}, notes, references=[JPEG])


def printed(evaluations, width=120):
    console = Console(file=io.StringIO(), width=width)
    print_table(evaluations, console)
    return console.file.getvalue()


def line(text, name):
    return next(entry for entry in text.splitlines() if entry.strip().startswith(name)).split()


def test_numbers_stand_in_the_row_of_their_tokenizer():
    text = printed({"fsq": make(psnr=21.517, utilisation=0.987), "vq": make(psnr=20.1)})
    assert line(text, "fsq") == ["fsq", "21.52", "98.7%", "-"]
    assert line(text, "vq")[1] == "20.10"


def test_what_does_not_apply_is_a_dash():
    assert line(printed(make(psnr=21.0, utilisation=0.5)), "JPEG")[3:] == ["20.19", "-", "0.2653"]


def test_equal_references_are_shown_once():
    assert printed({"a": make(psnr=21.0), "b": make(psnr=22.0)}).count("JPEG") == 1


def test_notes_stand_below():
    assert "fsq: rfid n = 3, biased" in printed({"fsq": make(rfid=300.0)})


def test_numbers_measured_differently_are_pointed_out():
    other = make(psnr=22.0)
    other.protocol |= {"images": 50_000, "device": "cuda"}
    text = printed({"a": make(psnr=21.0), "b": other})
    assert "Not measured alike, they differ in: images" in text
    assert "device" not in text


def test_different_protocols_are_warned_of_by_name():
    a, b = make(psnr=21.0), make(psnr=22.0)
    a.protocol["protocol"], b.protocol["protocol"] = "vistok", "llamagen"
    text = " ".join(printed({"a": a, "b": b}).split())
    assert "differ in: protocol (vistok, llamagen). Numbers of different protocols are not comparable" in text


def test_equal_protocols_are_not_warned_of():
    assert "Not measured alike" not in printed({"a": make(psnr=21.0), "b": make(psnr=22.0)})


@pytest.mark.parametrize("width", [40, 60, 80])
def test_narrow_terminals_lose_no_digits(width):
    text = "".join(printed(make(psnr=21.517), width).split())
    assert "…" not in text
    assert "21.52" in text


def test_every_distance_that_was_measured_is_shown():
    distances = {"sfid": 7.0, "kid": 0.0125, "precision": 0.5, "recall": 0.25, "inception_score": 9.0}
    text = printed(make(psnr=21.0, ms_ssim=0.75, **distances, fdd=300.0, cmmd=0.5), width=200)
    assert {"0.7500", "7.00", "0.01250", "50.0%", "25.0%", "9.0", "300.0", "0.500"} <= set(line(text, "tokenizer"))


def test_what_does_not_fit_has_a_line_per_metric_and_no_number_in_two():
    metrics = {"psnr": 21.517, "rfid": 9.5, "kid": 0.0125, "precision": 0.5, "recall": 0.25, "perplexity": 12_345.0}
    metrics |= {"ssim": 0.75, "sfid": 7.0, "inception_score": 9.0, "fdd": 300.0, "cmmd": 0.5, "utilisation": 0.5}
    text = printed({f"runs/a-long-name-{number}": make(**metrics) for number in range(2)})
    assert line(text, "PSNR") == ["PSNR", "dB", "21.52", "21.52", "20.19"]
    assert line(text, "perplexity") == ["perplexity", "12,345.0", "12,345.0", "-"]


def test_a_name_is_never_read_as_markup():
    assert "[red]x[/red]" in printed({"[red]x[/red]": make(psnr=1.0)})
