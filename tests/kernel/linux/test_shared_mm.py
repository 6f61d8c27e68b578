"""Who shares an address space, as the kernel compares them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sowatch.engine.sharer_search import MANY_SEARCHED, MANY_SHARING, MOST_ROUNDS, SharerSearch
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


def taken(search: SharerSearch) -> list[set[int] | None]:
    """What would have to be scanned if nothing happened between the rounds."""
    return list(search.rounds(nothing, can_find=True))


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
    assert taken(search) == []
    assert not search.is_asked
    with mapper.fork(how="clonevm") as sharer:
        search.ask(start_of(mapper))
        assert taken(search) == [{mapper.pid, sharer.pid}]


class Listing(ProcFs):
    """Something happens after each of the first listings of all processes."""

    __slots__ = ("happens",)

    def __init__(self, happens: list[Callable[[], object]]) -> None:
        self.happens: list[Callable[[], object]] = []
        super().__init__()  # lists them, too
        self.happens = happens

    def pids(self) -> list[int]:
        found = super().pids()
        if self.happens:
            self.happens.pop(0)()
        return found


@pytest.mark.parametrize("forks", [1, 2, MOST_ROUNDS + 1])
def test_a_sharer_that_is_forked_after_the_others_were_listed_is_found(
    mapper: Mapper, search: SharerSearch, forks: int
) -> None:
    with ExitStack() as stack:
        sharers: list[int] = []

        def fork() -> None:
            sharers.append(stack.enter_context(mapper.fork(how="clonevm")).pid)

        search._proc = Listing([fork] * forks)
        search.ask(start_of(mapper))
        assert taken(search) == [{mapper.pid, *sharers} if forks < MOST_ROUNDS else None]


@pytest.mark.parametrize("forks", [1, MOST_ROUNDS])
def test_a_sharer_that_is_forked_before_the_scan_has_tracked_the_others_is_found_after_it(
    mapper: Mapper, search: SharerSearch, forks: int
) -> None:
    with ExitStack() as stack:
        sharers = {mapper.pid, stack.enter_context(mapper.fork(how="clonevm")).pid}
        search.ask(start_of(mapper))
        rounds = search.rounds(nothing, can_find=True)
        for _ in range(forks):
            assert next(rounds) == sharers
            sharers.add(stack.enter_context(mapper.fork(how="clonevm")).pid)
        assert list(rounds) == [sharers if forks < MOST_ROUNDS else None]


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
    search.ask(start_of(mapper), start_of(mapper))


def executed_after(search: SharerSearch, mapper: Mapper) -> None:
    search.ask(start_of(mapper))
    assert taken(search) == []
    search.ask({os.getpid(): ProcFs().stat(os.getpid()).start_ns})  # type: ignore[union-attr]
    assert taken(search) == []
    search.ask({}, {mapper.pid + 1: 1, mapper.pid: 1})
    assert not search.is_asked
    search.ask({}, start_of(mapper))


def executed_before_the_last_full_scan(search: SharerSearch, mapper: Mapper) -> None:
    executed_after(search, mapper)
    assert taken(search) == [None]
    search.ask({}, start_of(mapper))
    assert not search.is_asked
    search.needs_full_scan = True


def one_after_the_other_very_many(search: SharerSearch, mapper: Mapper) -> None:
    search._searched = dict.fromkeys(range(1 << 22, (1 << 22) + MANY_SEARCHED), 1)
    search.ask(start_of(mapper))


@pytest.mark.parametrize(
    "ask",
    [
        ended,
        other_with_its_pid,
        very_many,
        one_after_the_other_very_many,
        whatever,
        executed_before,
        executed_after,
        executed_before_the_last_full_scan,
    ],
)
def test_all_are_to_be_scanned_where_the_sharers_cannot_be_found(
    mapper: Mapper, search: SharerSearch, ask: Callable[[SharerSearch, Mapper], None]
) -> None:
    ask(search, mapper)
    assert taken(search) == [None]
    assert not search.is_asked


def test_pids_of_another_namespace_are_not_compared(mapper: Mapper, search: SharerSearch) -> None:
    search.ask(start_of(mapper))
    assert list(search.rounds(nothing, can_find=False)) == [None]
