"""Failures of callbacks in the log: each kind once a minute, with its type and traceback."""

from __future__ import annotations

import logging

import pytest

from sowatch.engine.failure_log import EVERY_S, FailureLog


class Clock:
    now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


def test_a_kind_is_logged_once_a_minute_with_how_many_came_since(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    log = FailureLog(logging.getLogger("sowatch"), clock)

    for _ in range(4):
        log.note("on_load of rule 'tls'", ValueError("no"))
    log.note("on_load of rule 'tls'", KeyError("k"))
    log.note("on_unload of rule 'tls'", ValueError("no"))
    clock.now_s += EVERY_S
    log.note("on_load of rule 'tls'", ValueError("later"))

    assert [one.getMessage() for one in caplog.records] == [
        "on_load of rule 'tls' raised ValueError: no",
        "on_load of rule 'tls' raised KeyError: 'k'",
        "on_unload of rule 'tls' raised ValueError: no",
        "on_load of rule 'tls' raised ValueError: later (3 more since the last such line)",
    ]
    assert all(one.exc_info is not None and one.exc_info[1] is not None for one in caplog.records)


def test_types_that_are_made_as_it_goes_are_not_all_remembered(caplog: pytest.LogCaptureFixture) -> None:
    log = FailureLog(logging.getLogger("sowatch"))
    for number in range(1_000):
        log.note("on_load", type(f"Error{number}", (Exception,), {})("x"))
    assert len(log._logged) <= 256
    assert len(caplog.records) == 1_000
