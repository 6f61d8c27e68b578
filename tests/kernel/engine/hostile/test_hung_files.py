"""File systems that do not answer, more of them than anybody has threads for: files elsewhere are read all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sowatch import Rule
from support.hangs import Hang
from support.kernel import TAG, Ledger
from support.programs import Mapper

pytestmark = pytest.mark.alone

COUNT = 24


def build_ids(ledger: Ledger, pid: int) -> list[str | None]:
    return [one.library.build_id for one in ledger.watcher.snapshot() if one.process.pid == pid]


def test_files_elsewhere_are_read_while_many_file_systems_hang_and_theirs_when_that_is_over(
    hang: Callable[..., Hang],
    make_library: Any,
    scratch: Path,
    start: Callable[..., Mapper],
    open_ledger: Any,
    wait_until: Any,
) -> None:
    made = make_library("libhung.so", exports=("ours_open",))
    ledger = open_ledger(Rule(None, name="ours", exports=("ours_open",)))
    hung = hang("files", made, COUNT)
    honest = make_library(f"libhonest{TAG}.so", exports=("ours_open", "ours_too"))
    scratch.parent.chmod(0o755)
    mapper = start()
    mapper.map(honest)
    wait_until(lambda: any(build_ids(ledger, mapper.pid)), 10, "the file elsewhere is read")
    assert build_ids(ledger, hung.pids[0]) == []
    hung.free()
    wait_until(lambda: len(build_ids(ledger, hung.pids[0])) == COUNT, 20, "every file that hung is read")
    assert all(build_ids(ledger, hung.pids[0]))


def test_a_file_that_a_hung_process_has_mapped_too_is_read_for_the_others(
    hang: Callable[..., Hang],
    library: Callable[..., Path],
    make_library: Any,
    start: Callable[..., Mapper],
    open_ledger: Any,
    wait_until: Any,
) -> None:
    held = library(f"libheld{TAG}.so")
    hung = hang("lock", held)
    hung.hang()
    ledger = open_ledger(Rule(TAG))
    mapper = start()
    mapper.map(held)
    other = start()
    other.map(library(f"libelse{TAG}.so"))
    wait_until(lambda: any(build_ids(ledger, mapper.pid)), 10, "the file that both have")
    wait_until(lambda: any(build_ids(ledger, other.pid)), 10, "a file on the same device")


def test_loads_of_another_process_are_reported_while_files_do_not_answer_and_each_process_keeps_its_order(
    hang: Callable[..., Hang],
    library: Callable[..., Path],
    start: Callable[..., Mapper],
    open_ledger: Any,
) -> None:
    known = library(f"libhonest{TAG}.so")
    ledger = open_ledger(Rule(rf"{TAG}|/m/\d+/lib\.so$", name="ours"))
    mapper = start()
    mapper.unmap(*mapper.map(known))
    ledger.wait_for(lambda: len(ledger.of(mapper.pid)) == 2, "the file is known")
    hung = hang("files", known, 8)
    for _ in range(5):
        mapper.unmap(*mapper.map(known))
    ledger.wait_for(lambda: len(ledger.of(mapper.pid)) == 12, "the loads of another process")
    # They are given up after two seconds, and are reported without what they say of themselves.
    assert ledger.of(hung.pids[0]) == []
    assert [one.event for one in ledger.of(mapper.pid)] == ["load", "unload"] * 6
    ledger.wait_for(lambda: len(ledger.of(hung.pids[0])) == 8, "the loads of files that do not answer")
    times = [one.t_ns for one in ledger.of(hung.pids[0])]
    assert times == sorted(times)
    assert [one.library.build_id for one in ledger.of(hung.pids[0])] == [None] * 8
