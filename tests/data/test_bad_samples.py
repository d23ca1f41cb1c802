"""The log of pictures that could not be read."""

import csv
import logging

import pytest

from vistok.data.bad_samples import BadSample, BadSampleLimit, BadSampleLog, TooManyBadSamplesError

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


def test_share_above_the_limit_stops_with_counts_and_list():
    limit = BadSampleLimit(0.1, minimum=20)
    limit.add(15, SAMPLES)
    limit.add(1, SAMPLES)  # seen before
    limit.add(2, SAMPLES)
    with pytest.raises(
        TooManyBadSamplesError, match=r"3 of 21 .*\(2 empty, 1 truncated\).*0\.1 allows:\n  a\.jpg: empty"
    ):
        limit.add(0, [BadSample("c.jpg", "empty", "0 bytes")])


def test_impossible_share_is_refused():
    with pytest.raises(ValueError, match="between 0 and 1, got 5"):
        BadSampleLimit(5)
