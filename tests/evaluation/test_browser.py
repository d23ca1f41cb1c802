"""The pages in a real browser, without a network: they load, and nothing is written to the console."""

import shutil
import subprocess

import pytest
from patch_tokenizer import PROTOCOL, make_batches, make_tokenizer

from vistok.evaluation import evaluate, write_report
from vistok.evaluation.comparison import write_comparison

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), "")
# Not part of a page: the browser itself says how many pictures it could not decode.
COUNT = """<script>
onload = () => document.body.dataset.broken = [...document.images].filter(image => !image.naturalWidth).length
</script>"""
pytestmark = pytest.mark.skipif(not BROWSER, reason="no chromium on the path")


def load(page, folder):
    """What the browser made of a page, and what it wrote to its console."""
    offline = ["--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking"]
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command = [BROWSER, *quiet, *offline, "--enable-logging=stderr", "--dump-dom", page.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    return result.stdout, [line for line in result.stderr.splitlines() if ":CONSOLE" in line]


def test_the_pages_load_without_console_messages(tmp_path):
    options = {"protocol": PROTOCOL, "lpips": None, "rfid": False}
    evaluation = evaluate(make_tokenizer(), make_batches(3), **options)
    write_report(evaluation, tmp_path, "a tokenizer", "vistok eval")
    write_comparison({"a tokenizer": evaluation}, tmp_path, "vistok eval")
    for name in ("report.html", "comparison.html"):
        page = (tmp_path / name).read_text(encoding="utf-8")
        (tmp_path / f"counted_{name}").write_text(page.replace("</body>", COUNT + "</body>"), encoding="utf-8")
        content, messages = load(tmp_path / f"counted_{name}", tmp_path)
        assert "a tokenizer" in content
        assert 'data-broken="0"' in content
        assert messages == []


def test_a_message_and_a_missing_picture_would_be_seen(tmp_path):
    page = f"<body><script>missing()</script><img src='http://nowhere.invalid/x.png'>{COUNT}</body>"
    (tmp_path / "page.html").write_text(page)
    content, messages = load(tmp_path / "page.html", tmp_path)
    assert any("missing is not defined" in message for message in messages)
    assert 'data-broken="1"' in content
