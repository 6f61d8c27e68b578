"""Who shares an address space, as the kernel compares them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sowatch.engine.sharer_search import MANY_SHARING, SharerSearch
from sowatch.engine.table import MappingTable
from sowatch.linux.proc import ProcFs
from sowatch.linux.shared_mm import find_sharers
from sowatch.model.rules import RuleSet
from sowatch.sources.unread import UnreadProcesses
from support.programs import Mapper

PROC = ProcFs()


@pytest.fixture
def mapper(programs: Any, tmp_path: Path) -> Iterator[Mapper]:
    with Mapper(programs["mapper"], tmp_path) as found:
        yield found


@pytest.fixture
def search() -> Iterator[SharerSearch]:
    unread = UnreadProcesses()
    source: Any = SimpleNamespace(unread=unread)
    yield SharerSearch(source, MappingTable(RuleSet(())), PROC)
    unread.close()


def start_of(mapper: Mapper) -> dict[int, int]:
    stat = PROC.stat(mapper.pid)
    assert stat
    return {mapper.pid: stat.start_ns}


def nothing() -> None:
    pass


def test_a_process_that_shares_the_address_space_is_found_and_no_other(mapper: Mapper) -> None:
    with mapper.fork() as child, mapper.fork(how="clonevm") as sharer:
        assert find_sharers(PROC, mapper.pid, PROC.pids()) == {sharer.pid}
        assert find_sharers(PROC, sharer.pid, PROC.pids()) == {mapper.pid}
        assert find_sharers(PROC, child.pid, PROC.pids()) == set()


def test_a_sharer_whose_first_thread_has_ended_is_found_by_another(mapper: Mapper) -> None:
    with mapper.fork(how="clonevm") as sharer:
        sharer.emit("leaderexit")
        assert find_sharers(PROC, mapper.pid, PROC.pids()) == {sharer.pid}
        assert find_sharers(PROC, sharer.pid, PROC.pids()) is None


def test_who_the_sharers_of_one_that_has_ended_are_cannot_be_determined(mapper: Mapper) -> None:
    mapper.close()
    assert find_sharers(PROC, mapper.pid, PROC.pids()) is None


def test_only_a_process_with_a_sharer_is_to_be_scanned_and_together_with_that(
    mapper: Mapper, search: SharerSearch
) -> None:
    search.ask(start_of(mapper))
    assert search.is_due(0.0)
    assert search.take(nothing, can_find=True) == set()
    assert not search.is_asked
    with mapper.fork(how="clonevm") as sharer:
        search.ask(start_of(mapper))
        assert search.take(nothing, can_find=True) == {mapper.pid, sharer.pid}


def ended(search: SharerSearch, mapper: Mapper) -> None:
    search.ask(start_of(mapper))
    mapper.close()


def other_with_its_pid(search: SharerSearch, mapper: Mapper) -> None:
    search.ask({mapper.pid: 1})


def very_many(search: SharerSearch, mapper: Mapper) -> None:
    search.ask(start_of(mapper) | {os.getpid() + one: 1 for one in range(MANY_SHARING)})


def whatever(search: SharerSearch, mapper: Mapper) -> None:
    search.ask(start_of(mapper))
    search.needs_full_scan = True


def executed_before(search: SharerSearch, mapper: Mapper) -> None:
    search.ask(start_of(mapper), {mapper.pid})


def executed_after(search: SharerSearch, mapper: Mapper) -> None:
    search.ask(start_of(mapper))
    assert search.take(nothing, can_find=True) == set()
    search.ask({}, {mapper.pid + 1})
    assert not search.is_asked
    search.ask({}, {mapper.pid})


@pytest.mark.parametrize("ask", [ended, other_with_its_pid, very_many, whatever, executed_before, executed_after])
def test_all_are_to_be_scanned_where_the_sharers_cannot_be_found(
    mapper: Mapper, search: SharerSearch, ask: Callable[[SharerSearch, Mapper], None]
) -> None:
    ask(search, mapper)
    assert search.take(nothing, can_find=True) is None
    assert not search.is_asked


def test_pids_of_another_namespace_are_not_compared(mapper: Mapper, search: SharerSearch) -> None:
    search.ask(start_of(mapper))
    assert search.take(nothing, can_find=False) is None
