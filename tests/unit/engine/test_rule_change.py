"""RuleChange: built by one thread, applied by another as a whole; workers, inspector and rules change together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sowatch.engine.activation import FileRegistry
from sowatch.engine.address_space import Change, MappedFile
from sowatch.engine.file_inspector import FileFacts
from sowatch.engine.publisher import Publisher, Selection
from sowatch.engine.rule_change import RuleChange
from sowatch.engine.subscription import SubscriberQueue
from sowatch.engine.workers import RuleWorker
from sowatch.linux.proc import ProcFs
from sowatch.model.events import Process
from sowatch.model.literals import EVENT_KINDS
from sowatch.model.rules import Rule, RuleSet
from support.records import Proc
from support.tracking import SSL


class KnowsAll:
    """An inspector that has read every file."""

    def __init__(self, exports: frozenset[str]) -> None:
        self.exports = exports

    def known(self, _: object) -> FileFacts:
        return FileFacts(True)

    def take_finished(self) -> list[object]:
        return []


class Bench:
    """A publisher, and changes of its rules; each callback of `rule` is noted in ``calls``."""

    def __init__(self) -> None:
        self.registry = FileRegistry(is_alive=lambda process: True)
        self.publisher = Publisher(RuleSet([Rule("first")]), self.registry, Selection(), proc_root="/proc")
        self.calls: list[str] = []

    def rule(self, word: str, pattern: str = "libssl", name: str = "tls") -> Rule:
        return Rule(
            pattern,
            name=name,
            on_load=lambda load: self.calls.append(f"{word} load {load.process.pid}"),
            on_unload=lambda unload: self.calls.append(f"{word} unload {unload.process.pid}"),
        )

    def worker(self, rule: Rule, after: RuleWorker | None) -> RuleWorker:
        subscription = SubscriberQueue(
            self.publisher.subscribers,
            events=EVENT_KINDS,
            control=False,
            limit=100,
            limit_bytes=1 << 20,
            rule=rule.name,
        )
        return RuleWorker(rule, subscription, self.registry, ProcFs(), after)

    def change_to(self, *rules: Rule) -> RuleChange:
        return self.publisher.in_force.changed_to(RuleSet(rules), KnowsAll, self.worker)  # type: ignore[arg-type]

    def apply(self, *rules: Rule) -> RuleChange:
        change = self.change_to(*rules)
        self.publisher.change_rules(change)
        return change

    def map(self, pid: int) -> None:
        name = MappedFile(Proc().map(SSL), self.publisher.in_force.rules)
        self.publisher.publish([Change(True, "mmap", 1, Process(pid, 5), "library", name, ((0, 4096),))])


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.publisher.subscribers.end()
    for worker in (*made.publisher.in_force.workers.running, *made.publisher.in_force.workers.retired):
        worker.join_at_last()


Wait = Callable[..., Any]


def test_a_change_that_is_not_applied_begins_and_ends_nothing(bench: Bench, wait_until: Wait) -> None:
    before = bench.apply(bench.rule("old"))
    threads = threading.active_count()

    change = bench.change_to(bench.rule("new"))
    bench.map(10)

    wait_until(lambda: bench.calls == ["old load 10"])
    assert bench.publisher.in_force is before
    assert threading.active_count() == threads
    assert [worker.has_ended for worker in change.workers.running] == [True]
    assert change.workers.retired == before.workers.running


def test_the_old_worker_gets_the_unload_and_the_new_one_what_comes_after_it(bench: Bench, wait_until: Wait) -> None:
    bench.apply(bench.rule("old"))
    bench.map(10)

    change = bench.apply(bench.rule("new"))
    bench.map(11)

    wait_until(lambda: len(bench.calls) == 3)
    assert bench.calls == ["old load 10", "old unload 10", "new load 11"]
    assert bench.publisher.in_force is change


def test_a_worker_whose_rule_keeps_name_and_callbacks_stays_and_is_told_of_nothing_anew(
    bench: Bench, wait_until: Wait
) -> None:
    rule = bench.rule("same")
    before = bench.apply(rule)
    bench.map(10)
    wider = Rule("libssl|libz", name="tls", on_load=rule.on_load, on_unload=rule.on_unload)

    change = bench.apply(wider, bench.rule("other", "libcrypto", "crypto"))
    bench.map(11)

    wait_until(lambda: len(bench.calls) == 2)
    assert bench.calls == ["same load 10", "same load 11"]
    assert change.workers.running[0] is before.workers.running[0]
    assert [worker.rule.name for worker in change.workers.running] == ["tls", "crypto"]
    assert change.workers.retired == ()


def test_rules_without_callbacks_have_no_worker(bench: Bench) -> None:
    assert bench.change_to(Rule("libssl")).workers.running == ()


@pytest.mark.parametrize(
    ("exports", "is_new"), [((), False), (("one",), False), (("one", "two"), False), (("three",), True)]
)
def test_files_are_read_anew_only_for_exports_that_nobody_asked_for(
    bench: Bench, exports: tuple[str, ...], *, is_new: bool
) -> None:
    before = bench.apply(Rule("libssl", name="symbols", exports=("one", "two")))

    change = bench.change_to(Rule("libssl", name="symbols", exports=exports))

    assert (change.inspector is not before.inspector) is is_new
    assert change.inspector.exports == (frozenset(exports) if is_new else {"one", "two"})  # type: ignore[union-attr]


def test_errors_of_callbacks_stay_counted_when_their_rule_and_its_worker_are_gone(
    bench: Bench, wait_until: Wait
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("a callback that fails on purpose")

    bench.apply(Rule("libssl", name="tls", on_load=fail))
    bench.map(10)
    wait_until(lambda: bench.publisher.in_force.workers.errors == 1)

    change = bench.apply(bench.rule("new"))
    assert change.workers.errors == 1
    (retired,) = change.workers.retired
    retired.join_at_last()
    change = bench.apply(bench.rule("newer"))

    assert change.workers.past_errors == change.workers.errors == 1
    assert retired not in change.workers.retired


def test_a_worker_is_live_from_the_first_time_on_that_this_is_noted(bench: Bench) -> None:
    change = bench.apply(bench.rule("old"))
    change.workers.note_live()
    (worker,) = change.workers.running
    first_ns = worker.live_since_ns

    bench.apply(*bench.publisher.in_force.rules, bench.rule("other", name="other")).workers.note_live()

    old, new = bench.publisher.in_force.workers.running
    assert old is worker
    assert old.live_since_ns == first_ns < new.live_since_ns
