"""Engine: its thread takes records in, answers questions in turn, and when it ends everybody is told.

The source is a descriptor and records that a test puts there; table, publisher and reconciler are the real ones.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from sowatch.engine import loop
from sowatch.engine.publisher import Selection
from sowatch.engine.reconciler import Reconciler
from sowatch.model.errors import SowatchError
from sowatch.model.events import Load, Ready, Stopped
from support.engines import CURL, FIRST, NGINX, Source, Watch
from support.records import PAGE
from support.tracking import SSL


@pytest.fixture
def watch() -> Iterator[Watch]:
    made = Watch()
    yield made
    made.source.on_drain = lambda: None
    made.engine.stop()


ENDED = r"the watch has ended\. Ask before stop\(\)\."


# ---- from start to stop -------------------------------------------------------------------------


def test_a_watch_reports_the_snapshot_then_ready_then_what_happens_and_stopped_last(watch: Watch) -> None:
    ready = watch.engine.start(FIRST)
    assert isinstance(ready, Ready)
    assert ready is watch.engine.ready
    assert (ready.strategy, ready.guarantee, ready.hooks, ready.processes, ready.mappings) == (
        "core",
        "exact",
        "syscall",
        1,
        1,
    )
    assert ready.limits == Source.limits

    watch.source.send(CURL.intro(t=30), CURL.map(SSL, t=31))
    assert watch.engine.ask(lambda: len(watch.publisher.published.where(lambda _: True))) == 2
    watch.engine.stop()

    found = list(watch.reader)
    assert [one.event for one in found] == ["activate", "load", "ready", "load", "deactivate", "stopped"]
    assert [(one.process.pid, one.cause) for one in found if isinstance(one, Load)] == [(10, "snapshot"), (11, "mmap")]
    stopped = found[-1]
    assert isinstance(stopped, Stopped)
    assert (stopped.loads, stopped.unloads, stopped.lost) == (2, 0, 0)


def test_what_comes_behind_the_last_turn_of_a_watch_that_is_stopped_is_reported(watch: Watch) -> None:
    watch.engine.start(FIRST)
    drain = watch.source.drain

    def put_behind() -> list[Any]:
        taken = drain()
        watch.source.drain = drain  # type: ignore[method-assign]
        watch.source.put(CURL.intro(t=30), CURL.map(SSL, t=31))
        return taken

    def stop() -> None:
        watch.engine._stop.set()
        watch.source.drain = put_behind  # type: ignore[method-assign]

    watch.engine.ask(stop, synced=False)
    watch.engine.stop()
    assert watch.events() == ["activate", "load", "ready", "load", "deactivate", "stopped"]


def test_stop_may_come_again_and_before_the_start(watch: Watch) -> None:
    assert not watch.engine.is_running
    watch.engine.start(FIRST)
    assert watch.engine.is_running
    watch.engine.stop()
    assert not watch.engine.is_running
    assert not watch.engine._thread.is_alive()  # type: ignore[union-attr]
    watch.engine.stop()
    assert watch.source.closes == 2  # whose close is safe to call again

    other = Watch()
    other.engine.stop()
    assert other.source.closes == 1


def test_a_silent_start_reports_neither_loads_of_what_is_mapped_already_nor_their_unloads() -> None:
    watch = Watch(silent=True)
    watch.engine.start(FIRST)
    # Unmapped it is no news, mapped anew it is.
    watch.source.send(NGINX.range(PAGE, 2 * PAGE, t=30), NGINX.map(SSL, t=31))
    watch.engine.ask(lambda: None)
    watch.engine.stop()
    assert watch.events() == ["ready", "activate", "load", "deactivate", "stopped"]


def test_ready_names_at_most_five_processes_that_do_not_answer(watch: Watch) -> None:
    watch.source.unread.update(dict.fromkeys(range(20, 27), 0.0))
    assert watch.engine._unread_limits() == (
        "processes that do not answer, to be read as soon as they do: 7 (20, 21, 22, 23, 24, ...)",
    )
    ready = watch.engine._make_ready(1, 0.1)
    assert isinstance(ready, Ready)
    assert ready.limits == Source.limits + watch.engine._unread_limits()
    for pid in (20, 21):
        del watch.source.unread[pid]
    (limit,) = watch.engine._unread_limits()
    assert limit.endswith(": 5 (22, 23, 24, 25, 26)")
    watch.source.unread.clear()
    assert watch.engine._unread_limits() == ()


def test_a_process_is_unread_since_it_hung_and_not_if_it_answered_meanwhile(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: 107.0))
    watch.source.unread.update({0: 1.0, 20: 100.0, 21: None})  # type: ignore[dict-item]
    # 0 stands for whoever it was; 21 was read again between the two looks.
    assert watch.engine.unread == {20: 7.0}


def test_the_poll_interval_is_that_of_a_source_that_polls(watch: Watch) -> None:
    assert watch.engine.poll_interval_s is None
    watch.source.polls = SimpleNamespace(interval_s=2.5)
    assert watch.engine.poll_interval_s == 2.5
    watch.source.polls = None


# ---- failures -----------------------------------------------------------------------------------


def test_start_raises_what_the_snapshot_raised_and_readers_get_stopped(
    watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    watch.source.error = OSError("no /proc")
    with pytest.raises(OSError, match="no /proc"):
        watch.engine.start(FIRST)
    assert watch.events() == ["stopped"]
    assert [one.getMessage() for one in caplog.records if one.levelno == logging.ERROR] == ["the watch ended"]
    with pytest.raises(SowatchError, match=ENDED):
        watch.engine.ask(lambda: 1)


def test_a_source_that_fails_ends_the_watch_and_every_question(
    watch: Watch, caplog: pytest.LogCaptureFixture, wait_until: Any
) -> None:
    watch.engine.start(FIRST)
    second: list[BaseException] = []

    def ask_second() -> None:
        try:
            watch.engine.ask(lambda: 1)
        except SowatchError as error:
            second.append(error)

    asker = threading.Thread(target=ask_second, daemon=True)

    def fail() -> None:
        raise OSError("the ring is gone")

    def while_it_is_answered() -> None:
        asker.start()
        wait_until(lambda: watch.engine._jobs)
        watch.source.on_drain = fail

    watch.engine.ask(while_it_is_answered, synced=False)

    assert watch.events()[-2:] == ["deactivate", "stopped"]
    asker.join()
    (error,) = second
    assert str(error) == "the watch has ended. Ask before stop()."
    assert not watch.engine.is_running
    assert "the watch ended" in caplog.text
    assert "the ring is gone" in caplog.text


def test_a_thread_that_hangs_is_left_to_itself_and_closes_the_source_when_it_ends(
    watch: Watch, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, deadline: Any
) -> None:
    monkeypatch.setattr(loop, "STOP_S", 0.0)
    watch.engine.start(FIRST)
    is_stuck, goes_on = threading.Event(), threading.Event()

    def hang() -> None:
        is_stuck.set()
        goes_on.wait(deadline(60))

    failures: list[str] = []

    def ask() -> None:
        try:
            watch.engine.ask(hang, synced=False)
        except SowatchError as error:
            failures.append(str(error))

    asker = threading.Thread(target=ask, daemon=True)
    asker.start()
    assert is_stuck.wait(deadline(10))

    watch.engine.stop()

    assert watch.source.closes == 0
    assert not watch.engine.is_running
    assert [one.getMessage() for one in caplog.records if one.levelno == logging.ERROR] == [
        "the draining thread has not ended within 0 s; it is left to itself"
    ]
    with pytest.raises(SowatchError, match=ENDED):
        watch.engine.ask(lambda: 1)
    # Whoever has asked before is not left waiting for it.
    asker.join(deadline(10))
    assert failures == ["the watch has ended. Ask before stop()."]

    goes_on.set()
    assert watch.source.is_closed.wait(deadline(10))
    assert watch.events()[-1] == "stopped"


# ---- questions ----------------------------------------------------------------------------------


def test_a_question_is_answered_on_the_engines_thread(watch: Watch) -> None:
    watch.engine.start(FIRST)
    assert watch.engine.ask(lambda: threading.current_thread().name) == "sowatch-engine"


@pytest.mark.parametrize(("synced", "expected"), [(True, [10, 11]), (False, [10])])
def test_an_answer_has_what_is_in_the_ring_if_it_is_synced(
    watch: Watch, monkeypatch: pytest.MonkeyPatch, synced: bool, expected: list[int]
) -> None:
    monkeypatch.setattr(loop, "TICK_S", 1e6)
    watch.engine.start(FIRST)
    # Nothing has woken the thread for these yet.
    watch.source.put(CURL.intro(t=30), CURL.map(SSL, t=31))
    pids = watch.engine.ask(lambda: sorted(process.pid for process in watch.engine.mappings()), synced=synced)
    assert pids == expected


def test_what_a_question_raises_is_raised_where_it_was_asked_and_the_watch_goes_on(watch: Watch) -> None:
    watch.engine.start(FIRST)
    with pytest.raises(KeyError, match="nobody"):
        watch.engine.ask(lambda: {}["nobody"])
    assert watch.engine.ask(lambda: 3) == 3


def test_a_question_after_the_end_is_refused(watch: Watch) -> None:
    watch.engine.start(FIRST)
    watch.engine.stop()
    with pytest.raises(SowatchError, match=ENDED):
        watch.engine.ask(lambda: 1)


def test_a_question_waits_while_a_full_scan_rests_and_is_answered_after_it(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    rests = [True, True, True]
    syncs: list[int] = []
    monkeypatch.setattr(Reconciler, "is_resting", property(lambda _: bool(rests) and rests.pop()))
    sync = Reconciler.sync
    monkeypatch.setattr(Reconciler, "sync", lambda self: (syncs.append(len(rests)), sync(self))[1])
    watch.engine.start(FIRST)
    rests[:] = [True]

    assert watch.engine.ask(lambda: len(rests)) == 0

    # It was put off once, and synced again when its turn came.
    assert syncs == [1, 0]


def test_a_question_that_need_not_be_synced_does_not_wait_for_a_rest(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Reconciler, "is_resting", property(lambda _: True))
    watch.engine.start(FIRST)
    assert watch.engine.ask(lambda: 1, synced=False) == 1
    assert watch.engine._deferred == []


def test_a_question_that_waits_for_a_rest_learns_of_the_end(
    watch: Watch, monkeypatch: pytest.MonkeyPatch, deadline: Any
) -> None:
    is_deferred = threading.Event()

    def is_resting(_: Reconciler) -> bool:
        if watch.engine._jobs or is_deferred.is_set():
            return True
        is_deferred.set()
        return True

    monkeypatch.setattr(loop, "REST_S", 1e6)
    watch.engine.start(FIRST)
    monkeypatch.setattr(Reconciler, "is_resting", property(is_resting))
    failures: list[str] = []

    def ask() -> None:
        try:
            watch.engine.ask(lambda: 1)
        except SowatchError as error:
            failures.append(str(error))

    asker = threading.Thread(target=ask, daemon=True)
    asker.start()
    assert is_deferred.wait(deadline(10))
    watch.engine.stop()
    asker.join(deadline(10))
    assert failures == ["the watch has ended. Ask before stop()."]


def test_a_question_is_answered_at_last_though_a_full_scan_rests_and_rests(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, syncs = [100.0], []

    def is_resting(_: Reconciler) -> bool:
        now[0] += 0.01
        return True

    fake = SimpleNamespace(monotonic=lambda: now[0], time_ns=lambda: 1, sleep=lambda _: None)
    monkeypatch.setattr(loop, "time", fake)
    monkeypatch.setattr(loop, "TICK_S", 0.0)
    monkeypatch.setattr(Reconciler, "is_resting", property(is_resting))
    monkeypatch.setattr(Reconciler, "sync", lambda _: syncs.append(now[0]))
    watch.engine.start(FIRST)

    begun_s = now[0]
    assert watch.engine.ask(lambda: now[0]) >= begun_s + loop.REST_S
    # It is tried again from time to time, not with each turn of the thread.
    assert 3 < len(syncs) < 3 + loop.REST_S / (loop.DEFERRED_S - 0.02)


# ---- the map ------------------------------------------------------------------------------------


def test_a_query_has_the_files_of_one_process_or_of_all(watch: Watch) -> None:
    watch.engine.start(FIRST)
    watch.source.send(CURL.intro(t=30), CURL.map(SSL, t=31))
    assert sorted(watch.engine.query().processes) == [10, 11]
    ((pid, process),) = watch.engine.query(11).processes.items()
    assert (pid, process.process.pid, process.is_announced) == (11, 11, True)
    assert [(one.name.path, one.ranges, one.range_count) for one in process.files] == [
        (SSL.path, ((PAGE, 2 * PAGE),), None)
    ]
    assert watch.engine.query(12).processes == {}


def test_a_thread_that_was_left_fails_in_silence_as_what_it_uses_has_ended(
    watch: Watch, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, deadline: Any
) -> None:
    monkeypatch.setattr(loop, "STOP_S", 0.0)
    watch.engine.start(FIRST)
    is_stuck, goes_on = threading.Event(), threading.Event()

    def hang() -> None:
        if not is_stuck.is_set():
            is_stuck.set()
            goes_on.wait(deadline(60))

    watch.source.on_drain = hang
    watch.source.send()
    assert is_stuck.wait(deadline(10))
    watch.engine.stop()
    watch.publisher._registry.clear(timeout_s=0)  # as `Watcher.stop` does then
    watch.source.put(CURL.intro(t=30), CURL.map(SSL.but(inode=777), t=31))
    goes_on.set()

    assert watch.source.is_closed.wait(deadline(10))
    assert [one.getMessage() for one in caplog.records if one.levelno == logging.ERROR] == [
        "the draining thread has not ended within 0 s; it is left to itself"
    ]


def test_what_a_query_has_does_not_change_afterwards(watch: Watch) -> None:
    watch.engine.start(FIRST)
    watch.source.send(CURL.intro(t=30), CURL.map(SSL, t=31))
    first, other = watch.engine.query(11), SSL.but(path="/usr/lib/libssl.so.1.1", inode=103)
    watch.source.send(CURL.map(other, 8 * PAGE, t=32), CURL.range(PAGE, 2 * PAGE, t=33))
    assert [one.name.path for one in watch.engine.query(11).processes[11].files] == [other.path]
    (file,) = first.processes[11].files
    assert (file.name.path, file.load is not None) == (SSL.path, True)


def test_of_a_process_on_its_way_to_exec_the_query_says_so(watch: Watch) -> None:
    watch.engine.start(FIRST)

    def announce(is_announced: bool) -> None:
        (process,) = watch.engine._table.processes(10)
        process.is_announced = is_announced

    watch.engine.ask(lambda: announce(False))
    try:
        assert not watch.engine.query(10).processes[10].is_announced
    finally:
        watch.engine.ask(lambda: announce(True))


def test_what_is_known_of_a_file_says_whether_it_is_selected_and_was_reported(watch: Watch) -> None:
    watch.engine.start(FIRST)
    known = watch.engine.query(10, lambda name: name.path == SSL.path)
    process = known.processes[10]
    (file,) = process.files
    assert (file.name.path, file.kind, file.ranges, process.is_selected) == (
        SSL.path,
        "library",
        ((PAGE, 2 * PAGE),),
        True,
    )
    assert file.load is not None
    assert (file.load.rule, file.load.process.pid) == ("tls", 10)
    assert (known.tracked, watch.engine.open_verdicts(), known.is_silent_start) == ("entry of 10", "verdicts", False)

    watch.publisher.selection = Selection(excluded_pids=frozenset({10}))
    assert not watch.engine.query(10).processes[10].is_selected


def test_of_all_processes_those_are_known_that_have_a_wanted_file(watch: Watch) -> None:
    watch.engine.start(FIRST)
    watch.source.unread[10] = 1.5
    everyone = watch.engine.query(None, lambda _: False)
    assert (dict(everyone.processes), everyone.tracked, everyone.unread_since_s) == ({}, None, None)
    # The process that was asked for is there, whatever it has.
    one = watch.engine.query(10, lambda _: False)
    assert [(pid, process.files) for pid, process in one.processes.items()] == [(10, ())]
    assert one.unread_since_s == 1.5
    watch.source.unread.clear()
