"""Calls are counted and timed by the kernel, on every process that has the library, now or later."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sowatch import Rule, Watcher
from sowatch.bpf import probe_object
from sowatch.uprobes import CallCounter, Calls, attacher
from sowatch.uprobes.call_format import Text, Unreadable, parse_function
from sowatch.uprobes.call_records import Call
from support.callers import Caller
from support.programs import build

Probed = Callable[..., Path]
NewCaller = Callable[..., Caller]


def counted(counter: CallCounter) -> dict[tuple[str, int], int]:
    return {(one.site.symbol, one.process.pid): one.calls for one in counter.calls()}


def of(counter: CallCounter, symbol: str) -> Calls:
    (found,) = [one for one in counter.calls() if one.site.symbol == symbol]
    return found


@pytest.fixture(params=["auto", "perf_event"])
def watch_calls(request: pytest.FixtureRequest, closing: Any) -> Callable[..., CallCounter]:
    """``watch_calls(pattern, symbols)`` is a CallCounter below a running Watcher, once with each kind of link."""

    def start(pattern: str, symbols: list[str], **options: Any) -> CallCounter:
        counter = closing.enter_context(CallCounter(symbols, links=request.param, **options))
        closing.enter_context(Watcher(counter.rule(pattern)))
        return counter

    return start


class Speaker:
    """A running tests/programs/speaker.c, whose own functions are traced."""

    def __init__(self, spawn: Any, program: Path) -> None:
        self._process = spawn([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = int(self._process.stdout.readline().split()[1])

    def does(self, line: str) -> None:
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        assert line == "leave" or self._process.stdout.readline().startswith("ok")

    def end(self) -> int:
        self._process.stdin.close()
        return int(self._process.wait())


@pytest.fixture
def speaker(scratch: Path) -> Path:
    """A copy of the program, with frame pointers, as none but the test has."""
    made = build("speaker", scratch / "built", flags=["-fno-omit-frame-pointer", "-rdynamic"])
    return Path(shutil.copyfile(made, scratch / "speaker")).absolute()


@pytest.fixture(params=["auto", "perf_event"])
def records(request: pytest.FixtureRequest, closing: Any, wait_until: Any) -> Callable[..., CallCounter]:
    """``records(program, "f(int) -> int")`` is an attached CallCounter that records each call."""

    def start(program: Path, text: str, **options: Any) -> CallCounter:
        program.chmod(0o755)
        symbol, shown = parse_function(text)
        counter = CallCounter([symbol], links=request.param, call_format=shown, **options)
        closing.enter_context(counter)
        rule = Rule(
            re.escape(str(program)), kind="executable", on_activate=counter.attach, on_deactivate=counter.detach
        )
        closing.enter_context(Watcher(rule))
        return counter

    return start


def attached(counter: CallCounter) -> bool:
    return counter.stats.attached > 0 and counter.stats.attached == counter.stats.expected


def test_calls_of_a_process_that_runs_already_and_of_one_that_comes_are_counted(
    probed: Probed, caller: NewCaller, watch_calls: Any, wait_until: Any
) -> None:
    library = probed()
    before = caller(library)
    counter = watch_calls(re.escape(str(library)), ["plain"])
    wait_until(lambda: attached(counter))
    before.call("plain", times=5)
    later = caller(library)
    later.call("plain", times=3)
    assert counted(counter) == {("plain", before.pid): 5, ("plain", later.pid): 3}


def test_without_cookies_each_function_counts_in_the_processes_that_are_wanted_before_and_after_it_is_attached(
    probed: Probed, caller: NewCaller, closing: Any, wait_until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on kernels before 5.15: each function has an object of its own, loaded when a file is attached."""
    for module in (probe_object, attacher):
        monkeypatch.setattr(module, "has_attach_cookie", lambda: False)
    library = probed()
    early, late, other = (caller(library) for _ in range(3))
    counter = closing.enter_context(CallCounter(["plain", "nested"], links="perf_event", is_filtered=True))
    counter.want(early.pid)
    closing.enter_context(Watcher(counter.rule(re.escape(str(library)))))
    wait_until(lambda: attached(counter))
    assert len(counter.attacher.objects()) == 3
    counter.want(late.pid)
    for one in (early, late, other):
        one.call("plain", times=2)
    assert counted(counter) == {("plain", early.pid): 2, ("plain", late.pid): 2}
    counter.unwant(early.pid)
    for one in (early, late):
        one.call("plain")
    assert counted(counter) == {("plain", early.pid): 2, ("plain", late.pid): 3}


def test_each_call_of_a_recursion_is_counted_and_timed(
    probed: Probed, caller: NewCaller, watch_calls: Any, wait_until: Any
) -> None:
    library = probed()
    process = caller(library)
    counter = watch_calls(re.escape(str(library)), ["recursive"])
    wait_until(lambda: attached(counter))
    process.call("recursive", 9)
    found = of(counter, "recursive")
    assert (found.calls, found.timed, sum(found.latency)) == (10, 10, 10)
    assert found.sum_ns > 0


def test_recursion_deeper_than_is_timed_is_counted_and_said(
    probed: Probed, caller: NewCaller, watch_calls: Any, wait_until: Any
) -> None:
    library = probed()
    process = caller(library)
    counter = watch_calls(re.escape(str(library)), ["recursive"])
    wait_until(lambda: attached(counter))
    process.call("recursive", 19)
    found = of(counter, "recursive")
    assert (found.calls, found.timed, counter.untimed) == (20, 16, 4)
    process.call("recursive", 0)
    assert of(counter, "recursive").timed == 17


def test_a_function_that_is_left_by_longjmp_leaves_nothing_that_falsifies_the_next_call(
    probed: Probed, caller: NewCaller, watch_calls: Any, wait_until: Any
) -> None:
    library = probed()
    process = caller(library)
    counter = watch_calls(re.escape(str(library)), ["jumps"])
    wait_until(lambda: attached(counter))
    process.call("leaves", 100)
    found = of(counter, "jumps")
    assert (found.calls, found.timed, counter.untimed) == (100, 0, 0)
    process.call("jumps", 0, times=7)
    assert of(counter, "jumps").timed == 7


def test_a_function_within_another_is_counted_on_its_own(
    probed: Probed, caller: NewCaller, watch_calls: Any, wait_until: Any
) -> None:
    library = probed()
    process = caller(library)
    counter = watch_calls(re.escape(str(library)), ["plain", "nested"])
    wait_until(lambda: attached(counter))
    process.call("nested", times=4)
    process.call("plain", times=2)
    assert counted(counter) == {("plain", process.pid): 6, ("nested", process.pid): 4}
    assert of(counter, "nested").timed == 4


def test_calls_of_many_threads_are_all_counted(
    probed: Probed, caller: NewCaller, watch_calls: Any, wait_until: Any
) -> None:
    library = probed()
    process = caller(library)
    counter = watch_calls(re.escape(str(library)), ["plain"])
    wait_until(lambda: attached(counter))
    process.call_in_threads("plain", 500, 8)
    found = of(counter, "plain")
    assert (found.calls, found.timed, counter.lost) == (4000, 4000, 0)


def test_a_function_of_one_instruction_is_counted(
    probed: Probed, caller: NewCaller, watch_calls: Any, wait_until: Any
) -> None:
    library = probed()
    process = caller(library)
    counter = watch_calls(re.escape(str(library)), ["only_return"])
    wait_until(lambda: attached(counter))
    process.call("only_return", times=3)
    found = of(counter, "only_return")
    assert (found.calls, found.timed) == (3, 3)


def test_a_function_that_only_symtab_names_is_counted(
    probed: Probed, caller: NewCaller, watch_calls: Any, wait_until: Any
) -> None:
    library = probed()
    process = caller(library)
    counter = watch_calls(re.escape(str(library)), ["hidden"])
    wait_until(lambda: attached(counter))
    process.call("calls_hidden", times=6)
    assert counted(counter) == {("hidden", process.pid): 6}


def test_a_process_that_lives_on_as_its_own_child_is_counted(
    probed: Probed, caller: NewCaller, watch_calls: Any, wait_until: Any
) -> None:
    library = probed()
    process = caller(library)
    counter = watch_calls(re.escape(str(library)), ["plain"])
    wait_until(lambda: attached(counter))
    process.fork_and_leave()
    process.call("plain", times=2)
    assert counted(counter) == {("plain", process.pid): 2}


def test_a_file_that_was_deleted_or_replaced_is_probed_and_so_is_its_successor(
    probed: Probed, caller: NewCaller, watch_calls: Any, wait_until: Any, probed_template: Path
) -> None:
    library = probed()
    old = caller(library)
    fresh = library.with_name("fresh")
    shutil.copyfile(probed_template, fresh)
    fresh.rename(library)
    counter = watch_calls(re.escape(str(library)), ["plain"])
    wait_until(lambda: attached(counter))
    new = caller(library)
    wait_until(lambda: counter.stats.files == 2 and attached(counter))
    old.call("plain", times=2)
    new.call("plain", times=3)
    assert counted(counter) == {("plain", old.pid): 2, ("plain", new.pid): 3}


def test_nothing_is_attached_once_the_last_process_is_gone(
    probed: Probed, caller: NewCaller, watch_calls: Any, wait_until: Any
) -> None:
    library = probed()
    process = caller(library)
    counter = watch_calls(re.escape(str(library)), ["plain"])
    wait_until(lambda: attached(counter))
    process.close_library()
    wait_until(lambda: counter.stats.files == 0)
    assert counter.stats.attached == 0


def test_a_file_that_lingers_covers_the_next_process_from_its_first_call(
    probed: Probed, caller: NewCaller, watch_calls: Any, wait_until: Any
) -> None:
    library = probed()
    first = caller(library)
    counter = watch_calls(re.escape(str(library)), ["plain"], linger_s=60.0)
    wait_until(lambda: attached(counter))
    first.end()
    pids = []
    for _ in range(20):
        short = caller(library)
        short.call("plain")
        short.end()
        pids.append(short.pid)
    assert sorted(pid for _, pid in counted(counter)) == sorted(pids)


def test_a_pattern_counts_each_function_that_it_names(
    probed: Probed, caller: NewCaller, watch_calls: Any, wait_until: Any
) -> None:
    library = probed()
    process = caller(library)
    counter = watch_calls(re.escape(str(library)), ["[np]*e*", "no_such_*"], is_timed=False)
    wait_until(lambda: attached(counter))
    process.call("nested", times=2)
    found = counted(counter)
    assert found[("nested", process.pid)] == 2
    assert [(one.symbol, one.is_permanent) for one in counter.failures] == [("no_such_*", True)]


def values(calls: list[Call]) -> list[tuple[Any, Any]]:
    return [(call.arguments, call.result) for call in calls]


def test_arguments_and_results_are_those_of_each_call(speaker: Path, spawn: Any, records: Any, wait_until: Any) -> None:
    counter = records(speaker, "say(str:8, long, ptr) -> int")
    process = Speaker(spawn, speaker)
    wait_until(lambda: attached(counter))
    for text in ("", "seven77", "eight888", "nine99999"):
        process.does(f"say {text}")
    calls = counter.take_calls()
    assert values(calls) == [
        ((Text("", is_cut=False), 0, "0x10"), 0),
        ((Text("seven77", is_cut=False), 7, "0x10"), 7),
        ((Text("eight888", is_cut=False), 8, "0x10"), 8),
        ((Text("nine9999", is_cut=True), 9, "0x10"), 9),
    ]
    assert {(call.process.pid, call.tid) for call in calls} == {(process.pid, process.pid)}
    assert all(call.spent_ns > 0 for call in calls)


def test_a_pointer_that_leads_nowhere_is_said_and_a_null_pointer_is_none(
    speaker: Path, spawn: Any, records: Any, wait_until: Any
) -> None:
    counter = records(speaker, "say(_, long, str:8)")
    process = Speaker(spawn, speaker)
    wait_until(lambda: attached(counter))
    process.does("say x")
    process.does("literal")
    assert values(counter.take_calls()) == [((1, Unreadable(16)), None), ((-1, None), None)]


def test_a_string_that_comes_into_memory_while_the_function_runs_is_read(
    speaker: Path, spawn: Any, records: Any, wait_until: Any
) -> None:
    counter = records(speaker, "say(str:8, long) -> int")
    process = Speaker(spawn, speaker)
    wait_until(lambda: attached(counter))
    process.does("literal")
    assert values(counter.take_calls()) == [((Text("late", is_cut=False), -1), 0)]


def test_a_result_may_be_a_string(speaker: Path, spawn: Any, records: Any, wait_until: Any) -> None:
    counter = records(speaker, "title(int) -> str")
    process = Speaker(spawn, speaker)
    wait_until(lambda: attached(counter))
    process.does("title 1")
    process.does("title 0")
    assert values(counter.take_calls()) == [((1,), Text("one", is_cut=False)), ((0,), None)]


def test_a_call_that_never_returns_is_told_when_its_process_is_gone(
    speaker: Path, spawn: Any, records: Any, wait_until: Any
) -> None:
    counter = records(speaker, "leave(int) -> int", linger_s=60.0)
    process = Speaker(spawn, speaker)
    wait_until(lambda: attached(counter))
    process.does("leave")
    assert process.end() == 3
    assert counter.take_calls() == []
    (call,) = counter.take_calls(lambda gone: gone.pid == process.pid)
    assert (call.arguments, call.has_returned) == ((3,), False)


def test_records_that_come_faster_than_they_are_taken_are_counted(
    probed: Probed, caller: NewCaller, watch_calls: Any, wait_until: Any
) -> None:
    library = probed()
    process = caller(library)
    counter = watch_calls(re.escape(str(library)), ["plain"], call_format=parse_function("plain(int)")[1])
    wait_until(lambda: attached(counter))
    process.call("plain", 5, times=60_000)
    taken = counter.take_calls()
    assert len(taken) + counter.records_lost == of(counter, "plain").calls == 60_000
    assert 30_000 < len(taken) < 60_000
    assert taken[0].arguments == (5,)


def test_callers_are_counted_by_the_places_that_they_call_from(
    speaker: Path, spawn: Any, records: Any, wait_until: Any
) -> None:
    counter = records(speaker, "say", has_stacks=True)
    process = Speaker(spawn, speaker)
    wait_until(lambda: attached(counter))
    for text in ("say x", "say y", "literal"):
        process.does(text)
    base = min(
        int(line.split("-")[0], 16)
        for line in Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8").splitlines()
        if line.endswith(str(speaker))
    )
    listed = subprocess.run(["nm", "-S", speaker], capture_output=True, text=True, check=True).stdout.splitlines()
    places = {parts[3]: (int(parts[0], 16), int(parts[1], 16)) for line in listed if len(parts := line.split()) == 4}

    def function_at(address: int) -> str:
        return next((name for name, (at, size) in places.items() if at <= address - base <= at + size), "?")

    found = {tuple(map(function_at, stack.addresses))[:2]: stack.calls for stack in counter.stacks()}
    assert found[("relay", "main")] == 2
    assert next(calls for names, calls in found.items() if names[0] == "main") == 1
    assert counter.stacks_lost == 0
