"""`RecordLog`: what came as bytes is kept as bytes, and is the same records each time."""

from __future__ import annotations

import itertools

import pytest

from sowatch.bpf.record_log import Drained, RecordLog
from sowatch.bpf.records import HEAD, RANGE, RangeRecord, RecordType

NUMBERS = itertools.count(1)


def range_bytes() -> bytes:
    return RANGE.pack(RANGE.size, RecordType.RANGE, 0, 7, 7, 1, next(NUMBERS), 0, 0, 0x1000, 0x2000)


def exit_bytes() -> bytes:
    return HEAD.pack(HEAD.size, RecordType.EXIT, 0, 7, 7, 1, next(NUMBERS), 0, 0)


def a_list() -> list[RangeRecord]:
    return [RangeRecord(0, RecordType.RANGE, 0, 8, 8, 1, next(NUMBERS), 0)]


@pytest.fixture
def batches():
    return [Drained(range_bytes() + exit_bytes() + range_bytes()), a_list(), Drained(b""), Drained(exit_bytes())]


def test_it_gives_each_record_in_order_as_often_as_asked(batches):
    log = RecordLog(batches)
    expected = [record for batch in batches for record in batch]
    assert len(log) == len(expected) == 5
    assert list(log) == list(log) == expected
    assert [list(batch) for batch in log.batches()] == [list(batch) for batch in batches if batch]


def test_a_record_is_found_by_its_position(batches):
    log = RecordLog(batches)
    numbered = list(log.numbered())
    positions = [position for position, _ in numbered]
    assert positions == sorted(set(positions))
    assert list(log.at(positions[1::2])) == numbered[1::2]


def test_a_log_can_be_added_to_another(batches):
    first, second = RecordLog(batches[:2]), RecordLog(batches[2:])
    first.extend(second)
    assert list(first.numbered()) == list(RecordLog(batches).numbered())
    assert len(first) == 5


def test_it_keeps_bytes_not_records():
    drained = Drained(range_bytes() * 10)
    log = RecordLog([drained])
    (kept,) = log._batches
    assert kept is drained.data
