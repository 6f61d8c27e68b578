"""Engine: one turn of its thread after the other, in quiet, in a storm, and where signals and wakes come in between."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from sowatch.engine import loop
from sowatch.engine.reconciler import Reconciler
from support.engines import FIRST, Watch


@pytest.fixture
def watch() -> Iterator[Watch]:
    made = Watch()
    yield made
    made.source.on_drain = lambda: None
    made.engine.stop()


def test_the_thread_ticks_once_a_second_even_if_nothing_happens(
    watch: Watch, monkeypatch: pytest.MonkeyPatch, deadline: Any
) -> None:
    monkeypatch.setattr(loop, "TICK_S", 0.0)
    ticks = threading.Semaphore(0)
    monkeypatch.setattr(Reconciler, "tick", lambda _: ticks.release())
    watch.engine.start(FIRST)
    for _ in range(3):
        assert ticks.acquire(timeout=deadline(10))


def test_in_a_storm_of_wakes_the_thread_pauses_so_that_records_come_together(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, pauses = [100.0], []

    class Poller:
        def __init__(self) -> None:
            self.left = 3 * loop.BUSY_WAKES + 1

        def poll(self, timeout_s: float) -> list[object]:
            assert timeout_s >= 0
            self.left -= 1
            if not self.left:
                watch.engine._stop.set()
            now[0] += step_s
            return []

    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=pauses.append))
    monkeypatch.setattr(watch.engine, "reconciler", QuietReconciler())
    step_s = 0.0001
    watch.engine._loop(Poller())  # type: ignore[arg-type]
    assert set(pauses) == {loop.BATCH_S}
    assert len(pauses) in (2, 3)

    pauses.clear()
    watch.engine._stop.clear()
    step_s = 2 * loop.BUSY_WINDOW_S
    watch.engine._loop(Poller())  # type: ignore[arg-type]
    assert pauses == []


@pytest.mark.parametrize(
    ("taken", "pauses"), [(loop.STORM_RECORDS - 1, 1), (loop.STORM_RECORDS, 6), (loop.FLOOD_RECORDS + 1, 1)]
)
def test_a_storm_lasts_as_long_as_a_pause_brings_many_records_and_none_is_made_when_more_are_there(
    watch: Watch, monkeypatch: pytest.MonkeyPatch, taken: int, pauses: int
) -> None:
    now, made = [100.0], []

    class Poller:
        def __init__(self) -> None:
            self.left = loop.BUSY_WAKES + 6

        def poll(self, _: float) -> list[object]:
            self.left -= 1
            if not self.left:
                watch.engine._stop.set()
            now[0] += 0.0001
            return []

    class Reconciler(QuietReconciler):
        drained = 0

        def drain(self) -> int:
            """As many as each pause brings, and none without one."""
            brought, self.drained = (len(made) - self.drained) * taken, len(made)
            return brought

    def sleep(seconds: float) -> None:
        made.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    monkeypatch.setattr(watch.engine, "reconciler", Reconciler())
    watch.engine._loop(Poller())  # type: ignore[arg-type]
    assert made == [loop.BATCH_S] * pauses


@pytest.mark.parametrize(
    ("taken", "step_s", "pauses"),
    [
        (loop.BUSY_RECORDS // 3, 0.001, 1),
        (loop.BUSY_RECORDS // 3, loop.BUSY_WINDOW_S, 0),
        (loop.FLOOD_RECORDS + 1, 0.001, 0),
    ],
)
def test_many_records_within_a_few_wakes_are_a_storm_too(
    watch: Watch, monkeypatch: pytest.MonkeyPatch, taken: int, step_s: float, pauses: int
) -> None:
    now, made = [100.0], []

    class Poller:
        def __init__(self) -> None:
            self.left = 4

        def poll(self, _: float) -> list[object]:
            self.left -= 1
            if not self.left:
                watch.engine._stop.set()
            now[0] += step_s
            return []

    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=made.append))
    monkeypatch.setattr(watch.engine, "reconciler", QuietReconciler(taken))
    watch.engine._loop(Poller())  # type: ignore[arg-type]
    assert made == [loop.BATCH_S] * pauses


class QuietReconciler:
    """One that has nothing to do, and notes when it was called."""

    is_resting = False

    def __init__(self, taken: int = 0) -> None:
        self.calls: list[str] = []
        self.taken = taken

    def tick(self) -> None:
        self.calls.append("tick")

    def drain(self) -> int:
        self.calls.append("drain")
        return self.taken

    def do_what_is_due(self, now: float) -> None:
        del now
        self.calls.append("due")

    def next_work_at(self, next_tick: float) -> float:
        return next_tick


def test_each_turn_drains_and_then_does_what_is_due_with_one_tick_a_second(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]

    class Poller:
        def poll(self, _: float) -> list[object]:
            now[0] += 0.25
            if now[0] == 103.0:
                watch.engine._stop.set()
            return []

    quiet = QuietReconciler()
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(watch.engine, "reconciler", quiet)
    watch.engine._loop(Poller())  # type: ignore[arg-type]
    assert quiet.calls == (["drain", "due"] * 4 + ["tick"]) * 2 + ["drain", "due"] * 4


def test_a_wake_is_heard_once_and_publishes_what_waited_for_facts(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushes: list[float] = []
    monkeypatch.setattr(watch.publisher, "flush", flushes.append)
    watch.engine.wake()
    watch.engine._on_wake()
    assert len(flushes) == 1
    with pytest.raises(BlockingIOError):  # nothing is left that would wake the thread again
        os.eventfd_read(watch.engine.wake.fd)


def test_a_poll_that_a_signal_interrupts_is_made_again(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    polls: list[float] = []

    class Poller:
        def poll(self, timeout_s: float) -> list[tuple[int, int]]:
            polls.append(timeout_s)
            if len(polls) == 1:
                raise InterruptedError
            watch.engine._stop.set()
            return []

    monkeypatch.setattr(watch.engine, "reconciler", QuietReconciler())
    watch.engine._loop(Poller())  # type: ignore[arg-type]
    assert len(polls) == 2


def test_work_that_is_overdue_does_not_make_the_poll_wait_for_ever(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    class Poller:
        def poll(self, timeout_s: float) -> list[tuple[int, int]]:
            waits.append(timeout_s)
            watch.engine._stop.set()
            return []

    late = QuietReconciler()
    late.next_work_at = lambda _: -1e9  # type: ignore[method-assign]
    monkeypatch.setattr(watch.engine, "reconciler", late)
    watch.engine._loop(Poller())  # type: ignore[arg-type]
    # poll(2) takes a negative time for no limit.
    assert waits == [0.0]
