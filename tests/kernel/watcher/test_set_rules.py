"""Rules that change while the watch runs: nothing is missed, nothing told twice, callbacks pass on in order."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from sowatch import Rule
from sowatch.model.errors import SowatchError, UsageError
from sowatch.model.events import LibraryEvent
from sowatch.model.literals import KINDS
from support.kernel import TAG, Calls, Ledger, standing_still
from support.programs import Mapper

Start = Callable[..., Mapper]
OpenLedger = Callable[..., Ledger]


@pytest.fixture
def one(make_library: Any) -> Path:
    return make_library(f"libone{TAG}.so", exports=("one_open", "one_close"))


@pytest.fixture
def two(make_library: Any) -> Path:
    return make_library(f"libtwo{TAG}.so", exports=("two_open",))


ONE = Rule(rf"libone{TAG}", name="one")
TWO = Rule(rf"libtwo{TAG}", name="two")
BOTH = Rule(rf"lib(one|two){TAG}", name="both")


def inode(path: Path) -> int:
    return path.stat().st_ino


def reported(ledger: Ledger, pid: int, path: Path) -> list[tuple[str, str | None, str]]:
    return [(event.event, event.cause, event.rule) for event in ledger.of(pid) if event.library.id.inode == inode(path)]


def begin(start: Start, open_ledger: OpenLedger, rule: Rule, *paths: Path) -> tuple[Mapper, Ledger]:
    """A process that has mapped these files, and a watch that has reported those of them that the rule wants."""
    mapper = start()
    for path in paths:
        mapper.map(path)
    ledger = open_ledger(rule)
    for path in paths:
        if rule.matches_path(str(path)):
            ledger.wait_load(mapper.pid, inode(path))
    return mapper, ledger


def test_what_is_wanted_now_is_loaded_and_what_is_not_any_more_unloaded(
    open_ledger: OpenLedger, start: Start, one: Path, two: Path
) -> None:
    mapper, ledger = begin(start, open_ledger, ONE, one, two)
    ledger.watcher.set_rules(TWO)
    assert reported(ledger, mapper.pid, one) == [("load", "snapshot", "one"), ("unload", "rules", "one")]
    assert reported(ledger, mapper.pid, two) == [("load", "snapshot", "two")]
    assert ledger.watcher.audit().differences == ()


def test_a_rule_that_stays_tells_nothing_anew(open_ledger: OpenLedger, start: Start, one: Path, two: Path) -> None:
    mapper, ledger = begin(start, open_ledger, ONE, one, two)
    ledger.watcher.set_rules(Rule(rf"libone{TAG}|libnever{TAG}", name="one"), TWO)
    assert reported(ledger, mapper.pid, one) == [("load", "snapshot", "one")]
    assert reported(ledger, mapper.pid, two) == [("load", "snapshot", "two")]


def test_a_file_passes_to_the_rule_that_wants_it_now(open_ledger: OpenLedger, start: Start, one: Path) -> None:
    mapper, ledger = begin(start, open_ledger, ONE, one)
    ledger.watcher.set_rules(BOTH, ONE)
    assert reported(ledger, mapper.pid, one) == [
        ("load", "snapshot", "one"),
        ("unload", "rules", "one"),
        ("load", "snapshot", "both"),
    ]
    changes = [(event.event, event.rule) for event in ledger.events if isinstance(event, LibraryEvent)]
    assert changes[2:] == [("unload", "one"), ("deactivate", "one"), ("activate", "both"), ("load", "both")]


def test_the_kernel_asks_again_about_files_that_it_ignored(open_ledger: OpenLedger, start: Start, one: Path) -> None:
    mapper = start()
    ledger = open_ledger(Rule(rf"libnever{TAG}", name="never"))
    mapper.unmap(*mapper.map(one))
    ledger.watcher.audit()  # the answer about it has got to the kernel
    mapper.unmap(*mapper.map(one))
    ledger.watcher.set_rules(ONE)
    mapper.map(one)
    ledger.wait_load(mapper.pid, inode(one))
    assert reported(ledger, mapper.pid, one) == [("load", "mmap", "one")]


def test_a_new_rule_on_symbols_is_applied_to_files_read_before(
    open_ledger: OpenLedger, start: Start, one: Path, two: Path
) -> None:
    mapper, ledger = begin(start, open_ledger, BOTH, one, two)
    ledger.watcher.set_rules(Rule(exports=["two_open"], name="symbols"))
    assert reported(ledger, mapper.pid, two)[1:] == [("unload", "rules", "both"), ("load", "snapshot", "symbols")]
    ledger.watcher.set_rules(Rule(exports=["one_open", "one_close"], name="symbols"))
    assert reported(ledger, mapper.pid, two)[3:] == [("unload", "rules", "symbols")]
    assert reported(ledger, mapper.pid, one)[1:] == [("unload", "rules", "both"), ("load", "snapshot", "symbols")]


def test_a_new_rule_on_executables_sees_those_that_run_and_those_that_start(
    open_ledger: OpenLedger, start: Start, programs: Any
) -> None:
    before, program = start(), Path(programs["mapper"])
    ledger = open_ledger(ONE)
    ledger.watcher.set_rules(Rule(r"/mapper$", name="programs", kind="executable"))
    assert reported(ledger, before.pid, program) == [("load", "snapshot", "programs")]
    after = start()
    ledger.wait_load(after.pid, inode(program))
    assert reported(ledger, after.pid, program) == [("load", "exec", "programs")]


def test_callbacks_of_a_rule_that_is_replaced_end_before_those_of_the_new_one_begin(
    open_ledger: OpenLedger, start: Start, one: Path, wait_until: Any
) -> None:
    mapper = start()
    mapper.map(one)
    made: list[str] = []
    entered, go_on = threading.Event(), threading.Event()

    def slow(_: object) -> None:
        entered.set()
        go_on.wait(10)
        made.append("old deactivate")

    def rule(word: str, deactivate: Callable[[Any], None]) -> Rule:
        return Rule(
            rf"libone{TAG}",
            name="one",
            on_activate=lambda file: made.append(f"{word} activate {file.fileno() >= 0}"),
            on_deactivate=deactivate,
        )

    ledger = open_ledger(rule("old", slow))
    wait_until(lambda: made == ["old activate True"])
    ledger.watcher.set_rules(rule("new", lambda _: made.append("new deactivate")))
    assert entered.wait(10)
    assert made == ["old activate True"]
    go_on.set()
    wait_until(lambda: made == ["old activate True", "old deactivate", "new activate True"])
    assert [(file.rule, file.state) for file in ledger.watcher.registry.files()] == [("one", "attached")]
    ledger.stop()
    assert made[3:] == ["new deactivate"]


def test_a_rule_with_the_same_callbacks_goes_on_with_its_files_active(
    open_ledger: OpenLedger, start: Start, one: Path, two: Path, wait_until: Any
) -> None:
    mapper, calls = start(), Calls()
    mapper.map(one)
    mapper.map(two)
    first = calls.rule(rf"libone{TAG}")
    ledger = open_ledger(first)
    wait_until(lambda: len(calls.made) == 2)
    wider = Rule(
        rf"lib(one|two){TAG}",
        name=first.name,
        on_load=first.on_load,
        on_unload=first.on_unload,
        on_activate=first.on_activate,
        on_deactivate=first.on_deactivate,
    )
    ledger.watcher.set_rules(wider)
    wait_until(lambda: len(calls.made) == 4)
    assert calls.made == [(what, path.name) for path in (one, two) for what in ("activate", "load")]


def test_a_watch_without_a_snapshot_stays_silent_about_what_was_mapped_before(
    open_ledger: OpenLedger, start: Start, one: Path, two: Path
) -> None:
    mapper = start()
    mapper.map(one)
    at = mapper.map(two)
    ledger = open_ledger(ONE, snapshot=False)
    ledger.watcher.set_rules(BOTH)
    mapper.unmap(*at)
    mapper.map(two)
    ledger.wait_load(mapper.pid, inode(two))
    assert reported(ledger, mapper.pid, two) == [("load", "mmap", "both")]
    assert reported(ledger, mapper.pid, one) == []


@pytest.mark.alone
def test_rules_that_change_under_load_lose_nothing(
    start: Start, one: Path, two: Path, programs: Any, deadline: Any
) -> None:
    mapper = start()
    mapper.map(one)
    mapper.map(two)
    libc = Rule(r"/libc\.so\.6$", name="libc")
    choices = [(ONE,), (libc, ONE), (BOTH, libc), (ONE, TWO), (TWO, Rule(r"/ld-|/libc", name="libc"))]
    # The order of events is what counts here; that each is of the schema is seen elsewhere.
    with Ledger(ONE, timeout_s=deadline(20), check=lambda _: None) as ledger:
        command = [programs["storm"], "2", "600", "/bin/true"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as storm:
            turns = 0
            while storm.poll() is None or turns < len(choices):
                ledger.watcher.set_rules(*choices[turns % len(choices)])
                ledger.catch_up()
                turns += 1
        ledger.watcher.set_rules(Rule(name="all", kind=KINDS))
        ledger.wait_for(lambda: ledger.inodes(mapper.pid) >= {inode(one), inode(two)}, "both files under the last rule")
        ledger.wait_equal(mapper.pid)
        assert ledger.controls() == ["ready"]
        assert ledger.watcher.audit().differences == ()


def test_every_load_of_a_rule_that_stays_is_told_while_others_come_and_go(
    open_ledger: OpenLedger, start: Start, one: Path, two: Path
) -> None:
    mapper = start()
    ledger = open_ledger(ONE)
    done = threading.Event()

    def change() -> None:
        while not done.is_set():
            ledger.watcher.set_rules(TWO, ONE)
            ledger.watcher.set_rules(ONE)

    changer = threading.Thread(target=change)
    changer.start()
    try:
        for _ in range(300):
            mapper.unmap(*mapper.map(one))
    finally:
        done.set()
        changer.join()
    ledger.wait_for(lambda: len(ledger.of(mapper.pid)) >= 600, lambda: f"{len(ledger.of(mapper.pid))} of 600 events")
    story = reported(ledger, mapper.pid, one)
    assert [event for event, _, _ in story] == ["load", "unload"] * 300
    assert {rule for _, _, rule in story} == {"one"}
    # A reading that the change makes may see what a call has done before the call itself is told.
    assert {cause for event, cause, _ in story if event == "load"} <= {"mmap", "snapshot"}
    assert {cause for event, cause, _ in story if event == "unload"} <= {"munmap", "rules"}


def test_an_audit_that_runs_into_a_change_of_rules_finds_no_difference(
    open_ledger: OpenLedger, start: Start, one: Path, two: Path
) -> None:
    mapper = start()
    mapper.map(one)
    mapper.map(two)
    ledger = open_ledger(ONE)
    found = []
    auditor = threading.Thread(target=lambda: found.extend(ledger.watcher.audit().differences for _ in range(5)))
    auditor.start()
    while auditor.is_alive():
        ledger.watcher.set_rules(TWO)
        ledger.watcher.set_rules(BOTH)
    auditor.join()
    assert found == [()] * 5


def test_rules_that_contradict_each_other_change_nothing(open_ledger: OpenLedger) -> None:
    ledger = open_ledger(ONE)
    with pytest.raises(UsageError, match="two rules are named 'one'"):
        ledger.watcher.set_rules(ONE, Rule("x", name="one"))
    assert ledger.watcher.rules == (ONE,)


def test_a_watch_that_has_ended_takes_no_rules(open_ledger: OpenLedger) -> None:
    ledger = open_ledger(ONE)
    ledger.stop()
    for ask in (lambda: ledger.watcher.set_rules(TWO), lambda: ledger.watcher.attach_pid(1, "one")):
        with pytest.raises(SowatchError, match="the watch is not running"):
            ask()


def test_rules_that_the_watch_has_not_taken_before_it_ends_are_refused(
    open_ledger: OpenLedger, wait_until: Any, caplog: pytest.LogCaptureFixture
) -> None:
    watcher = open_ledger(ONE).watcher
    engine = watcher._engine
    assert engine is not None
    refused: list[str] = []

    def change() -> None:
        try:
            watcher.set_rules(TWO)
        except SowatchError as error:
            refused.append(str(error))

    changer = threading.Thread(target=change)
    with standing_still(watcher):
        changer.start()
        wait_until(lambda: engine._jobs)
        watcher.stop()  # leaves the thread to itself
        changer.join()
    assert refused == ["the watch has ended. Ask before stop()."]
    assert watcher.rules == (ONE,)
    wait_until(lambda: "sowatch-engine" not in [thread.name for thread in threading.enumerate()])
    assert [one.levelname for one in caplog.records if one.name == "sowatch" and one.exc_info] == []


def test_what_has_not_been_answered_when_the_watch_ends_is_refused(open_ledger: OpenLedger, deadline: Any) -> None:
    ledger = open_ledger(ONE)
    engine = ledger.watcher._engine
    assert engine is not None
    taken = threading.Event()
    answer: Future[None] = engine.request(lambda _: taken.set())
    assert taken.wait(deadline(10))
    assert not answer.done()
    ledger.stop()
    with pytest.raises(SowatchError, match=r"the watch has ended\. Ask before stop\(\)\."):
        answer.result(timeout=0)


def test_the_delays_of_a_rule_that_came_later_are_measured_too(
    open_ledger: OpenLedger, start: Start, one: Path, wait_until: Any
) -> None:
    mapper = start()
    mapper.map(one)
    ledger = open_ledger(TWO)
    ledger.watcher.set_rules(Rule(rf"libone{TAG}", name="one", on_load=lambda _: None))
    timings = ledger.watcher.timings["one"]
    wait_until(lambda: timings.callbacks["on_load"].read().count == 1)
    assert timings.delays["on_load"].read().count == 0
    start().map(one)
    wait_until(lambda: timings.delays["on_load"].read().count == 1)


def test_what_was_detached_by_hand_is_attached_by_hand_again(
    open_ledger: OpenLedger, start: Start, one: Path, wait_until: Any
) -> None:
    mapper, calls = start(), Calls()
    mapper.map(one)
    ledger = open_ledger(calls.rule(rf"libone{TAG}"))
    assert ledger.watcher.detach_pid(mapper.pid, "rule") == 1
    wait_until(lambda: len(calls.made) == 4)
    assert [what for what, _ in calls.made] == ["activate", "load", "unload", "deactivate"]
    with pytest.raises(SowatchError, match="is not registered"):
        ledger.watcher.detach_pid(mapper.pid, "rule")
    assert ledger.watcher.attach_pid(mapper.pid, "rule") == 1
    assert ledger.watcher.attach_pid(mapper.pid, "rule") == 1
    wait_until(lambda: len(calls.made) == 6)
    assert ledger.story(mapper.pid, inode(one)) == [("load", "snapshot"), ("unload", "rules"), ("load", "snapshot")]


def test_what_was_attached_by_hand_in_a_watch_without_a_snapshot_is_unloaded_when_it_goes(
    open_ledger: OpenLedger, start: Start, one: Path, wait_until: Any
) -> None:
    mapper, calls = start(), Calls()
    at = mapper.map(one)
    ledger = open_ledger(calls.rule(rf"libone{TAG}"), snapshot=False)
    assert ledger.watcher.attach_pid(mapper.pid, "rule") == 1
    mapper.unmap(*at)
    ledger.watcher.audit()  # takes in what was on its way
    assert ledger.story(mapper.pid, inode(one)) == [("load", "snapshot"), ("unload", "munmap")]
    wait_until(lambda: len(calls.made) == 4)
    assert [what for what, _ in calls.made] == ["activate", "load", "unload", "deactivate"]
    assert ledger.watcher.registry.files() == ()


def test_attaching_by_hand_tries_a_failed_activation_again(
    open_ledger: OpenLedger, start: Start, one: Path, wait_until: Any
) -> None:
    mapper = start()
    mapper.map(one)
    tries: list[int] = []

    def activate(_: object) -> None:
        tries.append(1)
        if len(tries) == 1:
            raise RuntimeError("not this time")

    ledger = open_ledger(Rule(rf"libone{TAG}", name="one", on_activate=activate))
    wait_until(lambda: len(ledger.watcher.registry.blocked()) == 1)
    ledger.watcher.attach_pid(mapper.pid, "one")
    wait_until(lambda: ledger.watcher.registry.stats.blocked == 1)
    assert ledger.watcher.registry.clear_blocked() == 1
    ledger.watcher.attach_pid(mapper.pid, "one")
    wait_until(lambda: [file.state for file in ledger.watcher.registry.files()] == ["attached"])
    assert len(tries) == 2


def test_a_process_that_has_nothing_of_a_rule_or_is_not_there_cannot_be_attached(
    open_ledger: OpenLedger, start: Start
) -> None:
    ledger, mapper = open_ledger(ONE), start()
    with pytest.raises(SowatchError, match=f"no rules matched for pid {mapper.pid}"):
        ledger.watcher.attach_pid(mapper.pid, "one")
    with pytest.raises(UsageError, match="there is no rule 'two'"):
        ledger.watcher.attach_pid(mapper.pid, "two")
    pid = mapper.pid
    mapper.exit()
    with pytest.raises(SowatchError, match=f"there is no process {pid}"):
        ledger.watcher.attach_pid(pid, "one")
