"""Calls that may never return: given up in time, left behind, counted, and heard of when they do return."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from sowatch.linux.timeout_worker import CallTimeout, TimeoutWorker


@pytest.fixture
def gate() -> Any:
    opened = threading.Event()
    yield opened
    opened.set()


def test_what_a_call_returns_or_raises_comes_back() -> None:
    worker = TimeoutWorker("test")
    assert worker.run(lambda: 42, 5) == 42
    with pytest.raises(KeyError):
        worker.run(lambda: {}["x"], 5)
    worker.close()


def test_a_call_that_hangs_is_given_up_and_the_next_one_is_made(gate: threading.Event, wait_until: Any) -> None:
    worker = TimeoutWorker("test")
    returned = threading.Event()
    with pytest.raises(CallTimeout):
        worker.run(gate.wait, 0.01, on_return=returned.set)
    assert worker.abandoned == 1
    assert worker.run(lambda: "next", 5) == "next"
    assert not returned.is_set()
    gate.set()
    wait_until(returned.is_set, 5, "the call that was given up returned")
    assert worker.abandoned == 0
    worker.close()


def test_a_call_that_gets_on_is_not_given_up(gate: threading.Event) -> None:
    worker = TimeoutWorker("test")
    turns: list[int] = []

    def meanwhile() -> None:
        turns.append(1)
        if len(turns) == 40:
            gate.set()

    worker.run(gate.wait, 0.02, progress=lambda: len(turns), meanwhile=meanwhile, turn_s=0.002)
    assert len(turns) >= 40
    worker.close()


def test_beyond_the_most_that_may_hang_each_call_is_refused_until_one_has_returned(
    gate: threading.Event, wait_until: Any
) -> None:
    worker = TimeoutWorker("test", max_abandoned=2)
    for _ in range(2):
        with pytest.raises(CallTimeout) as found:
            worker.run(gate.wait, 0.01)
        assert not found.value.is_refused
    with pytest.raises(CallTimeout) as found:
        worker.run(lambda: 1, 5)
    assert found.value.is_refused
    gate.set()
    wait_until(lambda: worker.abandoned == 0, 5, "both returned")
    assert worker.run(lambda: 1, 5) == 1
    worker.close()
