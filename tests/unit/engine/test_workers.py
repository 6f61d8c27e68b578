"""RuleWorker: callbacks in order on the rule's own thread, files opened for them, and what a failure leaves behind.

The files are real ones in this process's own view; only the watch that would report them is left out.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sowatch.engine.activation import FileRegistry
from sowatch.engine.published_map import PublishedMap
from sowatch.engine.subscribers import Subscribers
from sowatch.engine.subscription import SubscriberQueue
from sowatch.engine.workers import ActiveFile, RuleWorker
from sowatch.linux.proc import ProcFs
from sowatch.model.errors import EnvironmentFault, SowatchError
from sowatch.model.events import Activate, Deactivate, Library, LibraryEvent, Load, Process, Unload
from sowatch.model.identity import FileId
from sowatch.model.literals import EVENT_KINDS
from sowatch.model.rules import Rule

ME = Process(os.getpid(), 5)


class Watch:
    """Workers and the events that reach them."""

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self.published = PublishedMap()
        self.subscribers = Subscribers(self.published)
        self.registry = FileRegistry(is_alive=lambda _: True)
        self.workers: list[RuleWorker] = []

    def start(self, rule: Rule, after: RuleWorker | None = None, *, limit: int = 100) -> RuleWorker:
        subscription = SubscriberQueue(
            self.subscribers, events=EVENT_KINDS, control=True, limit=limit, limit_bytes=1 << 20, rule=rule.name
        )
        self.workers.append(RuleWorker(rule, subscription, self.registry, ProcFs(), after))
        self.workers[-1].begin(self.subscribers)
        return self.workers[-1]

    def emit(self, *events: LibraryEvent) -> None:
        for event in events:
            self.subscribers.emit(event)
        self.subscribers.hand_over()

    def end(self) -> None:
        """All that was emitted has been worked on afterwards."""
        self.subscribers.end()
        for worker in self.workers:
            worker.join(self._wait_s)
            assert worker.has_ended

    def run(self, rule: Rule, *events: LibraryEvent) -> RuleWorker:
        worker = self.start(rule)
        self.emit(*events)
        self.end()
        return worker


@pytest.fixture
def watch(deadline: Any) -> Iterator[Watch]:
    made = Watch(deadline(10))
    yield made
    made.end()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = tmp_path / "lib.so"
    made.write_bytes(b"the library")
    return made


def library(path: Path) -> Library:
    status = path.stat()
    file_id = FileId(os.major(status.st_dev), os.minor(status.st_dev), status.st_ino)
    return Library(str(path), file_id, host_path=str(path))


def activate(path: Path, t_ns: int | None = 1) -> Activate:
    return Activate("tls", library(path), ME, None, t_ns, 1)


def deactivate(path: Path) -> Deactivate:
    return Deactivate("tls", library(path), None, 1, 1)


def load(path: Path, cause: Any = "mmap", t_ns: int = 1) -> Load:
    return Load("tls", library(path), ME, cause, t_ns, 1)


def unload(path: Path) -> Unload:
    return Unload("tls", library(path), ME, "munmap", 1, 1)


def story_of(seen: list[str]) -> dict[str, Callable[[Any], None]]:
    """All four callbacks; each notes its own name."""

    def note(name: str) -> Callable[[Any], None]:
        return lambda _: seen.append(name)

    return {name: note(name) for name in ("on_load", "on_unload", "on_activate", "on_deactivate")}


# ---- order and threads --------------------------------------------------------------------------


def test_callbacks_come_in_the_order_of_the_events_on_one_thread_that_is_not_the_engines(
    watch: Watch, file: Path
) -> None:
    seen: list[str] = []
    threads: set[threading.Thread] = set()
    rule = Rule(name="tls", **story_of(seen) | {"on_load": lambda _: threads.add(threading.current_thread())})
    watch.run(rule, activate(file), load(file), unload(file), deactivate(file))
    assert seen == ["on_activate", "on_unload", "on_deactivate"]
    (thread,) = threads
    assert (thread.name, thread is threading.current_thread()) == ("sowatch-rule-tls", False)


def test_each_callback_gets_the_event_itself_and_a_rule_without_it_passes_it_over(watch: Watch, file: Path) -> None:
    seen: list[Any] = []
    first, last = load(file), unload(file)
    worker = watch.run(Rule(name="tls", on_unload=seen.append), activate(file), first, last, deactivate(file))
    assert (seen, worker.errors) == ([last], 0)
    assert seen[0] is last


def test_a_slow_callback_holds_up_no_other_rule(watch: Watch, file: Path, deadline: Any) -> None:
    goes_on, is_done = threading.Event(), threading.Event()
    watch.start(Rule(name="tls", on_load=lambda _: goes_on.wait(deadline(10))))
    watch.start(Rule(name="other", on_load=lambda _: is_done.set()))
    watch.emit(load(file), Load("other", library(file), ME, "mmap", 1, 1))
    assert is_done.wait(deadline(10))
    goes_on.set()


# ---- files --------------------------------------------------------------------------------------


def test_on_activate_gets_that_very_file_open_and_only_as_long_as_it_runs(watch: Watch, file: Path) -> None:
    seen: list[ActiveFile] = []
    kept: list[int] = []
    numbers: list[int] = []

    def attach(active: ActiveFile) -> None:
        assert active.is_open
        file.unlink()  # its name says nothing any more
        with open(active.path, "rb") as opened:
            assert opened.read() == b"the library"
        assert os.fstat(active.fileno()).st_ino == active.library.id.inode
        kept.append(os.dup(active.fileno()))
        numbers.append(active.fileno())
        seen.append(active)

    worker = watch.run(Rule(name="tls", on_activate=attach), activate(file))

    (active,) = seen
    assert (active.is_open, worker.errors, watch.registry.blocked()) == (False, 0, ())
    for use in (active.fileno, lambda: active.path):
        with pytest.raises(SowatchError, match=r"os\.dup\(file\.fileno\(\)\)"):
            use()
    active.close()
    with contextlib.suppress(OSError):  # nobody has that number, or somebody has it for another file
        assert os.fstat(numbers[0]).st_ino != active.library.id.inode
    assert os.read(kept[0], 100) == b"the library"
    os.close(kept[0])


def test_on_deactivate_gets_the_file_of_the_activation_closed(watch: Watch, file: Path) -> None:
    seen: list[ActiveFile] = []
    watch.run(Rule(name="tls", on_activate=seen.append, on_deactivate=seen.append), activate(file), deactivate(file))
    assert len(seen) == 2
    assert seen[0] is seen[1]
    assert not seen[1].is_open


def test_a_rule_with_on_deactivate_only_has_the_file_activated_too(watch: Watch, file: Path) -> None:
    seen: list[Library] = []
    rule = Rule(name="tls", on_deactivate=lambda active: seen.append(active.library))
    watch.run(rule, activate(file), deactivate(file))
    assert seen == [library(file)]


def test_a_rule_without_either_callback_opens_no_file(watch: Watch, file: Path) -> None:
    worker = watch.run(Rule(name="tls", on_load=lambda _: None), activate(file), load(file))
    assert (watch.registry.files(), watch.registry.stats.registered) == ((), 0)
    assert worker.timings.attach.read().count == 0


def test_a_file_is_activated_once_and_deactivated_once(watch: Watch, file: Path) -> None:
    seen: list[str] = []
    twice = [activate(file), activate(file), deactivate(file), deactivate(file)]
    watch.run(Rule(name="tls", **story_of(seen)), *twice)
    assert seen == ["on_activate", "on_deactivate"]


# ---- failures -----------------------------------------------------------------------------------


def test_what_a_callback_raises_is_counted_and_logged_and_the_next_event_comes(
    watch: Watch, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[str] = []

    def fail(_: Load) -> None:
        raise ValueError("no such luck")

    worker = watch.run(Rule(name="tls", **story_of(seen) | {"on_load": fail}), load(file), load(file), unload(file))
    assert (worker.errors, seen) == (2, ["on_unload"])
    logged = [one for one in caplog.records if one.levelno == logging.ERROR]
    assert [one.getMessage() for one in logged] == ["on_load of rule 'tls' raised ValueError: no such luck"]
    assert logged[0].exc_info is not None
    assert str(logged[0].exc_info[1]) == "no such luck"
    # It took its time all the same.
    assert worker.timings.callbacks["on_load"].read().count == 2


@pytest.mark.parametrize("callback", ["on_activate", "on_load", "on_unload", "on_deactivate"])
def test_a_callback_that_calls_exit_does_not_end_the_thread(
    watch: Watch, file: Path, caplog: pytest.LogCaptureFixture, callback: str
) -> None:
    seen: list[str] = []

    def fail(_: object) -> None:
        seen.append(callback)
        sys.exit(1)

    rule = Rule(name="tls", **story_of(seen) | {callback: fail})
    worker = watch.run(rule, activate(file), load(file), unload(file), deactivate(file), load(file))
    assert [one for one in seen if one == callback] == [callback] * (2 if callback == "on_load" else 1)
    assert seen[-1] == "on_load"
    assert worker.errors == seen.count(callback)
    assert f"{callback} of rule 'tls' raised SystemExit: 1" in [one.getMessage() for one in caplog.records]


def test_a_file_whose_activation_raises_is_closed_cleaned_up_once_and_blocked(watch: Watch, file: Path) -> None:
    seen: list[ActiveFile] = []
    ends: list[ActiveFile] = []

    def fail(active: ActiveFile) -> None:
        seen.append(active)
        raise ValueError("it has no such symbol")

    worker = watch.run(
        Rule(name="tls", on_activate=fail, on_deactivate=ends.append), activate(file), activate(file), deactivate(file)
    )
    # The second activate is refused, and what was never active is not deactivated.
    assert len(seen) == len(ends) == 1
    assert seen[0] is ends[0]
    assert not seen[0].is_open
    (block,) = watch.registry.blocked()
    assert (block.rule, block.id, block.reason) == ("tls", library(file).id, "it has no such symbol")
    counts = [worker.timings.attach.read().count, worker.timings.callbacks["on_activate"].read().count]
    assert counts == [1, 1]


def test_surroundings_at_fault_do_not_block_the_file(watch: Watch, file: Path) -> None:
    seen: list[ActiveFile] = []

    def fail_once(active: ActiveFile) -> None:
        seen.append(active)
        if len(seen) == 1:
            raise EnvironmentFault("no memory for it")

    watch.run(Rule(name="tls", on_activate=fail_once), activate(file), activate(file))
    assert (len(seen), watch.registry.blocked()) == (2, ())


def test_a_file_that_is_gone_is_not_blocked_and_its_callback_not_called(watch: Watch, file: Path) -> None:
    seen: list[str] = []
    gone = activate(file)
    file.unlink()
    file.write_bytes(b"another one of that name")
    # The inode may be given out again at once.
    where = gone.library.id
    gone = Activate(
        gone.rule, Library(str(file), where._replace(inode=where.inode + 1), host_path=str(file)), ME, None, 1, 1
    )
    worker = watch.run(Rule(name="tls", on_activate=lambda _: seen.append("on_activate")), gone)
    assert (seen, watch.registry.blocked()) == ([], ())
    assert watch.registry.stats.environment_faults == 1
    # An attempt that found nothing took time as well.
    assert worker.timings.attach.read().count == 1


def test_a_clean_up_after_a_file_that_could_not_be_opened_gets_none_of_an_earlier_activation(
    watch: Watch, file: Path
) -> None:
    ends: list[ActiveFile] = []

    def end(active: ActiveFile) -> None:
        ends.append(active)
        file.unlink(missing_ok=True)

    watch.run(Rule(name="tls", on_deactivate=end), activate(file), deactivate(file), activate(file))
    first, second = ends
    assert first is not second
    assert (second.is_open, second.library) == (False, first.library)


def test_a_failed_activation_is_retried_when_it_is_asked_for(watch: Watch, file: Path, deadline: Any) -> None:
    outcomes = [EnvironmentFault("not yet"), None]
    tried = threading.Semaphore(0)

    def attach(_: ActiveFile) -> None:
        outcome = outcomes.pop(0)
        tried.release()
        if outcome is not None:
            raise outcome

    worker = watch.start(Rule(name="tls", on_activate=attach))
    watch.emit(activate(file))
    assert tried.acquire(timeout=deadline(10))
    worker.retry(load(file))
    assert tried.acquire(timeout=deadline(10))
    watch.end()
    assert outcomes == []
    assert [one.state for one in watch.registry.files()] == ["attached"]


@pytest.mark.parametrize("lost", [0, 1], ids=["full", "behind"])
def test_a_retry_reaches_a_worker_whose_queue_is_full_once_and_repeats_no_load(
    watch: Watch, file: Path, deadline: Any, wait_until: Any, lost: int
) -> None:
    outcomes = [EnvironmentFault("not yet"), None]
    loads: list[tuple[int, str]] = []
    is_busy, goes_on = threading.Event(), threading.Event()

    def attach(_: ActiveFile) -> None:
        outcome = outcomes.pop(0)
        if outcome is not None:
            raise outcome

    def on_load(event: Load) -> None:
        loads.append((event.process.pid - ME.pid, event.cause))
        if len(loads) == 2:
            is_busy.set()
            assert goes_on.wait(deadline(10))

    def publish(nth: int) -> Load:
        event = Load("tls", library(file), Process(ME.pid + nth, 5), "mmap", 1, 1)
        watch.published.put(event.process.id, event.library.id, event)
        watch.subscribers.emit(event)
        return event

    worker = watch.start(Rule(name="tls", on_activate=attach, on_load=on_load), limit=2)
    subscription = worker._subscription
    watch.subscribers.emit(activate(file))
    first = publish(0)
    watch.subscribers.hand_over()
    wait_until(lambda: loads)
    publish(1)
    watch.subscribers.hand_over()
    assert is_busy.wait(deadline(10))
    for nth in range(2, 4 + lost):
        publish(nth)
    assert (subscription.waiting, subscription.lost) == (2, lost)

    for _ in range(10):
        worker.retry(first)
    assert (subscription.waiting, subscription.lost) == (3, lost)
    goes_on.set()
    wait_until(lambda: subscription.waiting == 0)
    watch.subscribers.catch_up()
    watch.end()

    assert outcomes == []
    assert [one.state for one in watch.registry.files()] == ["attached"]
    assert loads == [(0, "mmap"), (1, "mmap"), (2, "mmap"), (3, "mmap"), *[(4, "repair")] * lost]


# ---- one rule after the other -------------------------------------------------------------------


def test_a_rule_of_the_same_name_begins_when_the_last_callback_of_the_old_one_is_over(
    watch: Watch, file: Path, deadline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    goes_on, is_called, is_waiting = threading.Event(), threading.Event(), threading.Event()

    def slow(_: Load) -> None:
        is_called.set()
        goes_on.wait(deadline(10))
        seen.append("old")

    def join(wait: Callable[[], None]) -> None:
        is_waiting.set()
        wait()

    old = watch.start(Rule(name="tls", on_load=slow))
    watch.emit(load(file))
    assert is_called.wait(deadline(10))
    old.retire()
    monkeypatch.setattr(old, "join_at_last", partial(join, old.join_at_last))
    new = watch.start(Rule(name="tls", on_load=lambda _: seen.append("new")), old)
    watch.emit(load(file))
    assert is_waiting.wait(deadline(10))
    assert (seen, old.has_ended, new.has_ended) == ([], False, False)

    goes_on.set()
    watch.end()

    # The old one got nothing that came after its end.
    assert seen == ["old", "new"]


def test_a_new_rule_may_activate_what_the_one_before_it_could_not(watch: Watch, file: Path) -> None:
    def fail(_: ActiveFile) -> None:
        raise ValueError("wrong program")

    old = watch.start(Rule(name="tls", on_activate=fail))
    other = watch.start(Rule(name="other", on_activate=fail))
    watch.emit(activate(file), Activate("other", library(file), ME, None, 1, 1))
    for worker in (old, other):
        worker.retire()
        worker.join_at_last()
    assert sorted(one.rule for one in watch.registry.blocked()) == ["other", "tls"]

    seen: list[str] = []
    watch.start(Rule(name="tls", on_activate=lambda _: seen.append("on_activate")), old)
    watch.emit(activate(file))
    watch.end()

    assert seen == ["on_activate"]
    assert [one.rule for one in watch.registry.blocked()] == ["other"]


# ---- the end ------------------------------------------------------------------------------------


def test_who_waits_for_a_callback_that_runs_on_is_told_which_rules(
    watch: Watch, file: Path, deadline: Any, caplog: pytest.LogCaptureFixture
) -> None:
    goes_on, is_called = threading.Event(), threading.Event()

    def slow(_: Load) -> None:
        is_called.set()
        goes_on.wait(deadline(10))

    worker = watch.start(Rule(name="tls", on_load=slow))
    watch.emit(load(file))
    assert is_called.wait(deadline(10))

    worker.join(0.0)

    assert [one.getMessage() for one in caplog.records] == ["a callback of rule 'tls' is still running after 0.0 s"]
    assert not worker.has_ended
    goes_on.set()
    watch.end()
    worker.join(0.0)
    assert len(caplog.records) == 1


def test_a_callback_that_stops_the_watch_does_not_wait_for_itself(watch: Watch, file: Path) -> None:
    workers: list[RuleWorker] = []
    is_started = threading.Event()

    def stop(_: Load) -> None:
        is_started.wait()
        workers[0].join(1e6)

    workers.append(watch.start(Rule(name="tls", on_load=stop)))
    is_started.set()
    watch.emit(load(file))
    watch.end()
    assert workers[0].errors == 0


# ---- what is measured ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cause", "age", "counted"),
    [("mmap", "live", 1), ("repair", "live", 0), ("snapshot", "before", 0)],
)
def test_a_delay_is_that_of_what_happened_while_the_watch_was_on(
    watch: Watch, file: Path, cause: str, age: str, counted: int
) -> None:
    worker = watch.start(Rule(name="tls", on_load=lambda _: None))
    worker.live_since_ns = now_ns = time.monotonic_ns()
    watch.emit(load(file, cause, now_ns + (1 if age == "live" else -1)))
    watch.end()
    assert worker.timings.delays["on_load"].read().count == counted


def test_an_activation_without_a_time_has_no_delay(watch: Watch, file: Path) -> None:
    worker = watch.start(Rule(name="tls", on_activate=lambda _: None))
    worker.live_since_ns = 0
    watch.emit(activate(file, None))
    watch.end()
    assert worker.timings.delays["on_activate"].read().count == 0
    assert [one.state for one in watch.registry.files()] == ["attached"]


def test_an_activation_that_happened_while_the_watch_was_on_has_a_delay(watch: Watch, file: Path) -> None:
    worker = watch.start(Rule(name="tls", on_activate=lambda _: None))
    worker.live_since_ns = 0
    watch.emit(activate(file))
    watch.end()
    assert worker.timings.delays["on_activate"].read().count == 1


def test_nothing_has_a_delay_until_the_watch_is_on(watch: Watch, file: Path) -> None:
    worker = watch.run(Rule(name="tls", on_load=lambda _: None), load(file, t_ns=time.monotonic_ns()))
    assert worker.live_since_ns == sys.maxsize
    assert worker.timings.delays["on_load"].read().count == 0
    assert worker.rule.name == "tls"
