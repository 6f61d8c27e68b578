"""A process without any right has as many mappings as the kernel lets it have: the others are told all the same."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from sowatch import Config, Load, Rule, Watcher
from sowatch.bpf.records import MAX_FILE_RANGES
from sowatch.model.literals import KINDS
from support.forced import FORCED
from support.kernel import Ledger
from support.programs import Mapper

pytestmark = pytest.mark.alone

#: Half of the mappings that a process may have by default (vm.max_map_count).
COUNT = 20_000
NOBODY = 65534
STRATEGIES = [FORCED["strategy"]] if FORCED else ["core", "prebuilt", "procfs"]
OFTEN = {"poll_interval_s": 0.05, "poll_cpu_percent": 100}
TAG = f"many{os.getpid()}"


QUEUE_BYTES = 1 << 20


class Ranges:
    """``ranges`` of tests/programs, as nobody."""

    def __init__(self, program: Path, words: Sequence[str | Path]) -> None:
        command = [program, *words]
        if os.geteuid() == 0:
            command = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *command]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid
        assert self._line().startswith("ready ")

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def ask(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        assert self._line() == "done\n"

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def hostile(programs: Any, closing: contextlib.ExitStack) -> Callable[..., Ranges]:
    """``hostile(how, *words)`` runs until the test ends."""
    program = programs.variant("ranges", "-pthread")

    def run(*words: str | Path) -> Ranges:
        running = Ranges(program, words)
        closing.callback(running.close)
        return running

    return run


def sparse(scratch: Path, name: str, pages: int) -> Path:
    made = scratch / name
    with made.open("wb") as file:
        file.truncate(pages * 4096)
    return made


@pytest.fixture
def honest_load(start: Callable[[], Mapper], library: Callable[..., Path]) -> Iterator[Callable[[Ledger], None]]:
    """``honest_load(ledger)`` maps a new library in a process of its own, and waits until that was told."""
    number = 0

    def load(ledger: Ledger) -> None:
        nonlocal number
        number += 1
        mapper, file = start(), library(f"libhonest{number}-{TAG}.so")
        mapper.map(file)
        ledger.wait_load(mapper.pid, file.stat().st_ino)

    yield load
    assert number


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_file_in_very_many_ranges_hides_nobodys_loads_and_is_told_by_its_first_and_their_number(
    strategy: str, open_ledger: Callable[..., Ledger], hostile: Any, scratch: Path, honest_load: Any
) -> None:
    file = sparse(scratch, f"libmany-{TAG}.so", 2 * COUNT)
    inode = file.stat().st_ino
    ledger = open_ledger(Rule(TAG, kind=KINDS), config=Config(**{"strategy": strategy, **FORCED, **OFTEN}))

    ranges = hostile("split", file, str(COUNT))
    honest_load(ledger)
    ledger.wait_load(ranges.pid, inode)

    def kept() -> Any:
        ours = [one for one in ledger.watcher.snapshot() if one.process.pid == ranges.pid]
        return ours and ours[0].range_count is not None and ours[0]

    mapped = ledger.wait_for(kept, "more ranges of the file than are kept")
    assert len(mapped.ranges) == 2
    assert MAX_FILE_RANGES < mapped.range_count <= COUNT
    assert [one for one in ledger.watcher.audit().differences if one.pid == ranges.pid] == []

    ranges.ask("toggle")
    honest_load(ledger)
    assert [one for one in ledger.watcher.audit().differences if one.pid == ranges.pid] == []
    assert inode in ledger.inodes(ranges.pid)

    ranges.ask("drop")
    ledger.wait_unload(ranges.pid, inode)
    honest_load(ledger)
    assert [one for one in ledger.watcher.audit().differences if one.pid == ranges.pid] == []


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_very_many_ranges_from_before_the_start_are_in_the_snapshot(
    strategy: str, open_ledger: Callable[..., Ledger], hostile: Any, scratch: Path, honest_load: Any
) -> None:
    file = sparse(scratch, f"libmany-{TAG}.so", 2 * COUNT)
    ranges = hostile("split", file, str(COUNT))

    ledger = open_ledger(Rule(TAG, kind=KINDS), config=Config(**{"strategy": strategy, **FORCED, **OFTEN}))

    load = ledger.wait_load(ranges.pid, file.stat().st_ino)
    assert (load.cause, len(load.ranges)) == ("snapshot", 2)
    # Where the kernel counts, the last of them that it does not list are left out.
    assert COUNT - MAX_FILE_RANGES < load.range_count <= COUNT
    honest_load(ledger)
    ranges.ask("drop")
    ledger.wait_unload(ranges.pid, file.stat().st_ino)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_threads_that_map_and_unmap_beside_very_many_ranges_hide_nobodys_loads(
    strategy: str, open_ledger: Callable[..., Ledger], hostile: Any, scratch: Path, honest_load: Any
) -> None:
    many, other = sparse(scratch, f"libmany-{TAG}.so", 2 * COUNT), sparse(scratch, f"libother-{TAG}.so", 1)
    ledger = open_ledger(Rule(TAG, kind=KINDS), config=Config(**{"strategy": strategy, **FORCED, **OFTEN}))

    ranges = hostile("churn", many, str(COUNT // 2), other)
    for _ in range(5):
        honest_load(ledger)
    ledger.wait_load(ranges.pid, many.stat().st_ino)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_children_of_one_with_very_many_ranges_are_each_told_of(
    strategy: str, open_ledger: Callable[..., Ledger], hostile: Any, scratch: Path, honest_load: Any
) -> None:
    file = sparse(scratch, f"libmany-{TAG}.so", 2 * COUNT)
    ledger = open_ledger(Rule(TAG, kind=KINDS), config=Config(**{"strategy": strategy, **FORCED, **OFTEN}))

    ranges = hostile("fork", file, "3000", "20")

    honest_load(ledger)
    children = [int(one) for one in Path(f"/proc/{ranges.pid}/task/{ranges.pid}/children").read_text().split()]
    assert len(children) == 20
    for pid in (ranges.pid, *children):
        ledger.wait_load(pid, file.stat().st_ino)


def test_a_slow_reader_beside_forks_of_many_ranges_has_a_bounded_queue_and_misses_no_process_in_the_end(
    hostile: Any, scratch: Path, wait_until: Any, deadline: Any
) -> None:
    file, count = sparse(scratch, f"libmany-{TAG}.so", 2 * MAX_FILE_RANGES), 200
    watcher = Watcher(Rule(TAG, kind=KINDS), config=Config(**{"queue_bytes": QUEUE_BYTES, **FORCED}))
    reader = watcher.subscribe(events=("load",))
    with watcher:
        ranges = hostile("fork", file, str(MAX_FILE_RANGES - 1), str(count))
        pids = {
            ranges.pid,
            *map(int, Path(f"/proc/{ranges.pid}/task/{ranges.pid}/children").read_text().split()),
        }
        assert len(pids) == count + 1
        wait_until(lambda: {one.process.pid for one in watcher.snapshot()} >= pids, 20, "every child in the map")

        assert reader.waiting_bytes < 2 * QUEUE_BYTES
        assert reader.lost > count // 2
        seen: set[int] = set()
        is_repaired = False
        while not (is_repaired and seen >= pids):
            event = reader.get(deadline(10))
            assert event is not None
            is_repaired |= event.event == "repaired"
            if isinstance(event, Load):
                seen.add(event.process.pid)
        assert [one for one in watcher.audit().differences if one.pid in pids] == []


def test_a_deleted_file_whose_mappings_stand_side_by_side_is_opened_by_one_of_them(
    open_ledger: Callable[..., Ledger], start: Callable[[], Mapper], library: Callable[..., Path]
) -> None:
    mapper, file = start(), library(f"libside-{TAG}.so")
    inode = file.stat().st_ino
    at, _ = mapper.map(file)
    mapper.protect(at, 4096, "rwx")
    file.unlink()

    ledger = open_ledger(Rule(TAG, kind=KINDS), config=Config(**FORCED))

    load = ledger.wait_load(mapper.pid, inode)
    assert (len(load.ranges), load.range_count) == (1, None)
    assert load.library.deleted
    assert load.library.build_id is not None
