"""Calls are counted and timed by the kernel, on every process that has the library, now or later."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sowatch import Watcher
from sowatch.uprobes import CallCounter, Calls
from support.callers import Caller

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
