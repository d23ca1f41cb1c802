"""The log of pictures that could not be read."""

import csv
import logging

from vistok.data.bad_samples import BadSample, BadSampleLog

SAMPLES = [BadSample("a.jpg", "empty", "0 bytes"), BadSample("b,c.jpg", "truncated", 'ends "early"')]


def test_each_sample_is_counted_and_logged_once(caplog):
    log = BadSampleLog()
    with caplog.at_level(logging.WARNING):
        log.add(SAMPLES)
        log.add(SAMPLES[:1])
    assert (len(log), log.keys, log.counts) == (2, ["a.jpg", "b,c.jpg"], {"empty": 1, "truncated": 1})
    assert len(caplog.records) == 2
    assert "a.jpg: empty (0 bytes)" in caplog.text


def test_written_table_reads_back_and_leaves_no_other_file(tmp_path):
    log = BadSampleLog()
    log.add(SAMPLES)
    path = log.write(tmp_path)
    with path.open(newline="", encoding="utf-8") as file:
        assert [BadSample(**row) for row in csv.DictReader(file)] == SAMPLES
    assert list(tmp_path.iterdir()) == [path]
