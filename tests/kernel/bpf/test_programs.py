"""Each hook gives its record, and so does each way in which processes come and go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sowatch.bpf.records import (
    FLAG_ASK,
    FLAG_DELETED,
    FLAG_IMAGE,
    FLAG_MPROTECT,
    FLAG_NEEDS_RESCAN,
    FLAG_SHARED_VM,
    MapRecord,
    ProcessRecord,
    RecordType,
    path_of,
)
from sowatch.sources.base import Report
from support.kernel import Tap, executable_ranges, id_by_stat, id_of, kinds_of, only, pages, scan_of, spans
from support.programs import Mapper, Refused
from support.stepped import Trick

PAGE = 4096
MAP, RANGE, NEEDS_RESCAN, FORK, EXEC, EXIT, INTRO = (
    RecordType.MAP,
    RecordType.RANGE,
    RecordType.NEEDS_RESCAN,
    RecordType.FORK,
    RecordType.EXEC,
    RecordType.EXIT,
    RecordType.INTRO,
)

Start = Callable[..., Mapper]
NewLibrary = Callable[..., Path]


# ---- each hook ----------------------------------------------------------------------------------


def test_a_file_mapped_executable_is_told_with_its_range_path_and_identity(
    tap: Tap, start: Start, library: NewLibrary
) -> None:
    mapper, new = start(), library("libnew.so")
    begun_ns = tap.source.scan_process(mapper.pid).begin_ns  # type: ignore[union-attr]
    got: list[tuple[int, int]] = []
    record = only(tap.during(lambda: got.append(mapper.map(new)), mapper.pid))
    at, length = got[0]
    assert isinstance(record, MapRecord)
    assert (record.start, record.end) == (at, at + pages(length))
    assert path_of(record.text) == str(new)
    assert id_of(record)[:3] == id_by_stat(new)[:3]
    assert record.comm.rstrip(b"\0") == b"mapper"
    assert record.flags == FLAG_ASK
    assert record.t_ns > begun_ns
    assert record.tid == record.tgid == mapper.pid


def test_a_file_that_is_mapped_but_not_executable_is_not_told(tap: Tap, start: Start, library: NewLibrary) -> None:
    mapper, new = start(), library()
    assert tap.during(lambda: (mapper.map(new, "noexec"), mapper.map(new, "write")), mapper.pid) == []


def test_executable_memory_without_a_file_is_not_told(tap: Tap, start: Start) -> None:
    mapper = start()
    assert tap.during(lambda: mapper.emit("anon", 8192, "exec"), mapper.pid) == []


def test_a_failed_mapping_is_not_told(tap: Tap, start: Start, library: NewLibrary) -> None:
    mapper, new = start(), library()

    def map_beyond_the_end() -> None:
        with pytest.raises(Refused):
            mapper.map(new, "exec", "at", "7ffffffff000")

    assert tap.during(map_beyond_the_end, mapper.pid) == []


def test_munmap_of_a_told_range_is_told(tap: Tap, start: Start, library: NewLibrary) -> None:
    mapper = start()
    at, length = mapper.map(library())
    assert spans(tap.during(lambda: mapper.unmap(at, length), mapper.pid)) == [(RANGE, at, at + pages(length))]


def test_munmap_of_a_part_tells_that_part(tap: Tap, start: Start, library: NewLibrary) -> None:
    mapper = start()
    at, _ = mapper.map(library(), "len", 4 * PAGE)
    reported = tap.during(lambda: mapper.unmap(at + PAGE, PAGE), mapper.pid)
    assert spans(reported) == [(RANGE, at + PAGE, at + 2 * PAGE)]


def test_anonymous_memory_over_a_told_range_takes_it_away(tap: Tap, start: Start, library: NewLibrary) -> None:
    mapper = start()
    at, length = mapper.map(library())
    reported = tap.during(lambda: mapper.emit("anon", PAGE, "at", f"{at:x}"), mapper.pid)
    assert spans(reported) == [(RANGE, at, at + PAGE)]
    assert length > PAGE


def test_a_file_over_a_told_range_takes_it_away_and_then_comes(tap: Tap, start: Start, library: NewLibrary) -> None:
    mapper = start()
    at, length = mapper.map(library("liba.so"))
    end = at + pages(length)
    reported = tap.during(lambda: mapper.map(library("libb.so"), "at", f"{at:x}"), mapper.pid)
    assert spans(reported) == [(RANGE, at, end), (MAP, at, end)]


@pytest.mark.parametrize("call", ["protect", "pkeyprotect"])
def test_a_file_made_executable_later_is_told_and_made_harmless_again_too(
    tap: Tap, start: Start, library: NewLibrary, call: str
) -> None:
    mapper, new = start(), library()
    at, length = mapper.map(new, "noexec")
    end = at + pages(length)
    record = only(tap.during(lambda: mapper.emit(call, f"{at:x}", length, "rx"), mapper.pid))
    assert (record.type, record.start, record.end, record.flags) == (MAP, at, end, FLAG_ASK | FLAG_MPROTECT)
    assert path_of(record.text) == str(new)
    reported = tap.during(lambda: mapper.emit(call, f"{at:x}", length, "r"), mapper.pid)
    assert spans(reported) == [(RANGE, at, end)]


def test_a_part_made_executable_is_told_with_just_that_part(tap: Tap, start: Start, library: NewLibrary) -> None:
    mapper = start()
    at, _ = mapper.map(library(), "noexec", "len", 4 * PAGE)
    reported = tap.during(lambda: mapper.protect(at + PAGE, PAGE, "rx"), mapper.pid)
    assert spans(reported) == [(MAP, at + PAGE, at + 2 * PAGE)]


def test_executable_anonymous_memory_made_so_by_mprotect_is_not_told(tap: Tap, start: Start) -> None:
    mapper = start()
    at = int(mapper.emit("anon", PAGE)[0], 16)
    assert tap.during(lambda: mapper.protect(at, PAGE, "rwx"), mapper.pid) == []


def test_a_move_makes_the_process_dirty_and_a_reading_shows_where_to(
    tap: Tap, start: Start, library: NewLibrary
) -> None:
    mapper, new = start(), library()
    at, length = mapper.map(new)
    got: list[list[str]] = []
    reported = tap.during(lambda: got.append(mapper.emit("remap", f"{at:x}", length, length + (1 << 20))), mapper.pid)
    assert kinds_of(reported) == [NEEDS_RESCAN]
    moved = int(got[0][0], 16)
    assert moved != at
    rows = [row for row in scan_of(tap, mapper.pid).maps if path_of(row.text) == str(new)]
    assert {(row.start, row.end) for row in rows} == executable_ranges(mapper.pid, new.stat().st_ino)
    assert rows[0].start == moved


def test_a_move_outside_what_is_known_is_not_told(tap: Tap, start: Start, library: NewLibrary) -> None:
    mapper = start()
    mapper.map(library())
    at = int(mapper.emit("anon", 4 * PAGE)[0], 16)
    assert tap.during(lambda: mapper.emit("remap", f"{at:x}", 4 * PAGE, 1 << 20), mapper.pid) == []


def test_executable_shared_memory_makes_the_process_dirty_and_a_reading_shows_it(tap: Tap, start: Start) -> None:
    mapper = start()
    assert kinds_of(tap.during(lambda: mapper.emit("shm", PAGE), mapper.pid)) == [NEEDS_RESCAN]
    (row,) = [row for row in scan_of(tap, mapper.pid).maps if path_of(row.text).startswith("/SYSV")]
    assert row.flags & FLAG_DELETED


def test_shared_memory_that_is_detached_makes_the_process_dirty(tap: Tap, trick: Callable[..., Trick]) -> None:
    shm = trick("shmdt")
    scan_of(tap, shm.pid)
    assert kinds_of(tap.during(shm.go_on, shm.pid)) == [NEEDS_RESCAN]


# ---- processes ----------------------------------------------------------------------------------


def test_a_fork_of_a_followed_process_is_told_with_its_parent(tap: Tap, start: Start, closing: Any) -> None:
    parent = start()
    children: list[Mapper] = []
    tap.flush()
    before = len(tap.records)
    children.append(closing.enter_context(parent.fork()))
    record = tap.wait_for(lambda r: r.type == FORK and r.tgid == children[0].pid, "the fork", since=before)
    assert isinstance(record, ProcessRecord)
    assert (record.parent_tgid, record.ppid) == (parent.pid, parent.pid)
    assert record.parent_start_ns == tap.maps(parent.pid)[0].start_ns
    assert record.start_ns > record.parent_start_ns
    assert record.flags == 0
    assert record.comm.rstrip(b"\0") == b"mapper"


def test_a_child_is_followed_from_its_fork_on(tap: Tap, start: Start, library: NewLibrary, closing: Any) -> None:
    parent = start()
    at, length = parent.map(library())
    child = closing.enter_context(parent.fork())
    reported = tap.during(lambda: child.unmap(at, length), child.pid)
    assert spans(reported) == [(RANGE, at, at + pages(length))]


def test_a_fork_of_a_threaded_process_is_a_claim(tap: Tap, start: Start, closing: Any) -> None:
    parent = start()
    parent.emit("thread", "idle", "-")
    child = closing.enter_context(parent.fork())
    tap.flush()
    (record,) = [r for r in tap.records if r.type == FORK and r.tgid == child.pid]
    assert record.flags == FLAG_NEEDS_RESCAN


def test_a_child_that_shares_the_address_space_is_told_as_such(tap: Tap, start: Start, closing: Any) -> None:
    parent = start()
    child = closing.enter_context(parent.fork(how="clonevm"))
    tap.flush()
    (record,) = [r for r in tap.records if r.type == FORK and r.tgid == child.pid]
    assert record.flags == FLAG_SHARED_VM


@pytest.mark.parametrize("how", ["vfork", "spawn"])
def test_a_child_on_its_way_to_exec_is_told_with_fork_exec_and_exit(tap: Tap, start: Start, how: str) -> None:
    parent = start()
    pid = int(parent.emit(how, "/bin/true")[0])
    parent.emit("wait", pid)
    tap.flush()
    reported = [r for r in tap.records if r.tgid == pid]
    assert [r.type for r in reported if r.type in (FORK, EXEC, EXIT)] == [FORK, EXEC, EXIT]
    assert reported[0].flags & FLAG_SHARED_VM
    assert {r.start_ns for r in reported} == {reported[0].start_ns}


@pytest.mark.parametrize("how", ["exec", "execthread"])
def test_exec_is_told_and_the_process_stays_the_same(tap: Tap, start: Start, how: str) -> None:
    mapper = start()
    reported = tap.during(lambda: mapper.exec(how=how), mapper.pid)
    assert [r.type for r in reported if r.type in (FORK, EXEC, EXIT)] == [EXEC]
    (execed,) = [r for r in reported if r.type == EXEC]
    maps = tap.maps(mapper.pid)
    assert {r.start_ns for r in [execed, *maps]} == {maps[0].start_ns}
    assert maps[-1].exec_id > maps[0].exec_id


def test_after_exec_the_new_program_is_introduced_before_its_first_mapping(tap: Tap, start: Start) -> None:
    mapper = start()
    reported = tap.during(mapper.exec, mapper.pid)
    assert kinds_of(reported)[:3] == [EXEC, INTRO, MAP]


def test_the_exit_is_told_once_when_the_last_thread_is_gone_whichever_that_is(
    tap: Tap, start: Start, library: NewLibrary
) -> None:
    mapper = start()
    reported = tap.during(lambda: mapper.emit("leaderexit"), mapper.pid)
    assert EXIT not in kinds_of(reported)
    record = tap.during(lambda: mapper.map(library()), mapper.pid)[-1]
    assert (record.type, record.tgid) == (MAP, mapper.pid)
    assert record.tid != mapper.pid
    assert kinds_of(tap.during(mapper.exit, mapper.pid)).count(EXIT) == 1


def test_a_thread_that_comes_and_goes_is_not_told(tap: Tap, start: Start) -> None:
    mapper = start()
    scan_of(tap, mapper.pid)
    reported = tap.during(lambda: (mapper.emit("thread", "idle", "-"), mapper.emit("thread", "stop")), mapper.pid)
    assert not {FORK, EXIT, EXEC, INTRO} & set(kinds_of(reported))


def test_images_are_told_at_exec_if_asked_for(tap: Tap, start: Start, programs: Any) -> None:
    tap.source.reports.set(Report.IMAGES)
    mapper = start()
    tap.flush()
    images = [r for r in tap.maps(mapper.pid) if r.flags & FLAG_IMAGE]
    assert [path_of(image.text) for image in images[:1]] == [str(programs["mapper"])]
    assert len(images) == 2
    for image in images:
        inode = id_of(image).inode
        assert (image.start, image.end) in executable_ranges(mapper.pid, inode), path_of(image.text)


def test_every_process_is_told_if_asked_for(tap: Tap, spawn: Any) -> None:
    tap.source.reports.set(Report.PROCESSES)
    process = spawn(["/bin/true"])
    process.wait()
    tap.flush()
    reported = [r for r in tap.records if r.tgid == process.pid and r.type in (FORK, EXEC, EXIT)]
    assert kinds_of(reported)[0] == FORK
    assert kinds_of(reported)[-2:] == [EXEC, EXIT]
    (execed,) = [r for r in reported if r.type == EXEC]
    assert isinstance(execed, ProcessRecord)
    assert path_of(execed.path) == str(Path("/bin/true").resolve())
