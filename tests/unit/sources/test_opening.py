"""`Opening`: a source that is opened on a thread of its own belongs to one Watcher, or is closed."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any, cast

import pytest

from sowatch.model.config import Config
from sowatch.model.errors import BpfError, UsageError
from sowatch.sources.base import EventSource
from sowatch.sources.select import Opening


class Source:
    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


def opening(source: Source, may_open: threading.Event | None = None, config: Config | None = None) -> Opening:
    def open_source(_: Config) -> EventSource:
        if may_open is not None:
            may_open.wait()
        return cast("EventSource", source)

    return Opening(open_source, config or Config())


def test_the_source_is_given_once_and_belongs_to_the_caller() -> None:
    source = Source()
    begun = opening(source)

    assert begun(Config()) is cast("EventSource", source)
    begun.close()
    assert source.closed == 0
    with pytest.raises(UsageError):
        begun(Config())


def test_a_source_that_nobody_takes_is_closed_once(wait_until: Callable[..., Any]) -> None:
    source, may_open = Source(), threading.Event()
    begun = opening(source, may_open)

    begun.close()
    may_open.set()

    wait_until(lambda: source.closed, what="the source to be closed")
    begun.close()
    assert source.closed == 1


def test_what_opening_raises_is_raised_to_who_takes_the_source() -> None:
    def refuse(_: Config) -> EventSource:
        raise BpfError("loading the BPF programs", 1, "no")

    begun = Opening(refuse, Config())

    with pytest.raises(BpfError, match="loading the BPF programs"):
        begun(Config())


def test_a_source_of_another_configuration_is_not_given() -> None:
    source = Source()
    begun = opening(source)

    with pytest.raises(UsageError):
        begun(Config(max_processes=17))
    begun(Config())  # it still is for its own
    begun.close()
    assert source.closed == 0


def test_the_switch_interval_is_what_it_was_once_the_source_is_open() -> None:
    before = sys.getswitchinterval()

    opening(Source())(Config())

    assert sys.getswitchinterval() == before
