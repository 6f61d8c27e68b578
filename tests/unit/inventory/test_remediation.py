"""How long a replaced file went on running: by its times on disk, to the last of several processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sowatch.inventory import remediation
from sowatch.inventory.remediation import Remediations
from sowatch.inventory.stale_watch import StaleChange, StaleWatch
from sowatch.inventory.staleness import FRESH, StaleAnswer, Staleness
from sowatch.linux.proc import ProcFs
from sowatch.model.events import Library, Process
from sowatch.model.identity import FileId
from sowatch.model.stats import Mapped
from support.programs import Mapper

S = 10**9
REPLACED = StaleAnswer(Staleness.REPLACED)


def one(pid: int, inode: int = 7, path: str = "/usr/lib/libssl.so.3") -> Mapped:
    return Mapped(Process(pid, 1), Library(path, FileId(8, 1, inode), build_id="ab"), "all", ())


def stale(*pids: int, inode: int = 7) -> list[StaleChange]:
    return [StaleChange(one(pid, inode), REPLACED) for pid in pids]


def gone(*pids: int, inode: int = 7) -> list[StaleChange]:
    return [StaleChange(one(pid, inode), REPLACED, "unmapped") for pid in pids]


def test_a_file_runs_until_its_last_process_has_let_go_of_it() -> None:
    found = Remediations()
    found.add(stale(1, 2, 3), 100 * S, is_first=False, replaced_ns=lambda *_: 90 * S)
    found.add(gone(2), 150 * S, is_first=False)
    (still,) = found.all()
    assert (still.processes, still.left, still.until_ns, still.seconds, found.oldest_ns()) == (3, 2, None, None, 90 * S)
    found.add(gone(1, 3), 190 * S, is_first=False)
    (over,) = found.all()
    assert (over.processes, over.left, over.seconds, over.is_since_known) == (3, 0, 100.0, True)
    assert (found.take_finished(), found.take_finished(), found.oldest_ns()) == ([over], [], None)


def test_what_ran_before_the_agent_counts_only_if_the_disk_shows_since_when() -> None:
    found = Remediations()
    found.add(stale(1), 100 * S, is_first=True)
    found.add(gone(1), 150 * S, is_first=False)
    (one_,) = found.all()
    assert (one_.is_since_known, found.take_finished()) == (False, [])
    found.add(stale(1, inode=8), 200 * S, is_first=True, replaced_ns=lambda *_: 40 * S)
    found.add(gone(1, inode=8), 240 * S, is_first=False)
    assert [finished.seconds for finished in found.take_finished()] == [200.0]


def test_a_time_to_come_is_not_believed() -> None:
    found = Remediations()
    found.add(stale(1), 100 * S, is_first=False, replaced_ns=lambda *_: 10**6 * S)
    assert found.oldest_ns() == 100 * S


def test_two_files_that_had_one_name_are_two() -> None:
    found = Remediations()
    found.add([*stale(1, inode=7), *stale(1, inode=8)], 100 * S, is_first=False)
    found.add(gone(1, inode=7), 150 * S, is_first=False)
    assert [(each.left, each.until_ns) for each in found.all()] == [(1, None), (0, 150 * S)]


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remediation, "MAX_OPEN", 3)
    found = Remediations()
    for inode in range(5):
        found.add(stale(1, inode=inode), 100 * S, is_first=False)
    assert (len(found.all()), found.left_out) == (3, 2)
    for inode in range(5):
        found.add(gone(1, inode=inode), 150 * S, is_first=False)
    for number in range(1_000):
        found.add([*stale(1, inode=number), *gone(1, inode=number)], 200 * S, is_first=False)
    assert len(found.all()) == remediation.KEPT


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 3), st.integers(1, 2)), max_size=30))
def test_whoever_comes_and_goes_the_count_is_that_of_a_set(steps: list[tuple[bool, int, int]]) -> None:
    found, expected = Remediations(), {1: set[int](), 2: set[int]()}
    for is_stale, pid, inode in steps:
        found.add(stale(pid, inode=inode) if is_stale else gone(pid, inode=inode), S, is_first=False)
        (expected[inode].add if is_stale else expected[inode].discard)(pid)
    left = sorted(each.left for each in found.all() if each.until_ns is None)
    assert left == sorted(len(pids) for pids in expected.values() if pids)


# ---- real files -------------------------------------------------------------------------------


class Map:
    def __init__(self) -> None:
        self.mapped: list[Mapped] = []

    def snapshot(self, *, with_ranges: bool = True) -> Sequence[Mapped]:
        return list(self.mapped)


def mapped(pid: int, path: Path) -> Mapped:
    rows = ProcFs().executable_maps(pid)
    assert isinstance(rows, list)
    [row] = [row for row in rows if row.path == os.fsencode(path)]
    stats = ProcFs().stat(pid)
    assert stats
    library = Library(os.fsdecode(row.path), FileId(row.major, row.minor, row.inode))
    return Mapped(Process(pid, stats.start_ns), library, "all", ((row.start, row.end),), "mmap", time.time_ns())


@pytest.mark.parametrize("how", ["replaced", "deleted"])
def test_the_begin_is_the_moment_of_the_upgrade_and_not_of_the_comparison(
    programs: Mapping[str, Path], make_library: Callable[..., Path], tmp_path: Path, how: str
) -> None:
    library = make_library("libours.so")
    watched = Map()
    with Mapper(programs["mapper"], tmp_path) as running:
        running.map(library)
        watched.mapped = [mapped(running.pid, library)]
        new = make_library("libours.so.new")
        before_ns = time.time_ns()
        if how == "replaced":
            new.rename(library)
        else:
            library.unlink()
        shown_ns = library.stat().st_ctime_ns if how == "replaced" else library.parent.stat().st_mtime_ns
        # The first comparison, which comes later than the upgrade.
        with StaleWatch(watched) as watch:
            watch.compare()
            (still,) = watch.remediations.all()
            assert (still.since_ns, still.is_since_known, str(still.staleness)) == (shown_ns, True, how)
            # File systems have coarse clocks.
            assert abs(still.since_ns - before_ns) < S
            watched.mapped.clear()
            watch.compare()
            (over,) = watch.remediations.take_finished()
            assert over.seconds == (over.until_ns - shown_ns) / S  # type: ignore[operator]


def test_a_place_that_cannot_be_seen_has_no_time(tmp_path: Path) -> None:
    from sowatch.inventory.staleness import Disk

    with Disk() as disk:
        assert disk.replaced_ns(os.getpid(), "/no/such/directory/file") is None
        assert disk.replaced_ns(1 << 22, str(tmp_path)) is None
        assert FRESH.stale is None
