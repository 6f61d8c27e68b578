"""Each hook gives its record, verdicts are honoured, followed processes only, counters count."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sowatch import sources
from sowatch.bpf.records import (
    FLAG_ASK,
    FLAG_DELETED,
    FLAG_DIRTY,
    FLAG_IMAGE,
    FLAG_MPROTECT,
    FLAG_SHARED_VM,
    MapRecord,
    ProcessRecord,
    RangeRecord,
    Record,
    RecordType,
    path_of,
)
from sowatch.sources import Reading, Report
from support.kernel import Stall, Tap, Trick, executable_ranges, id_by_stat, id_of, kinds_of
from support.programs import Mapper, Refused

PAGE = 4096
MAP, RANGE, DIRTY, FORK, EXEC, EXIT, INTRO = (
    RecordType.MAP,
    RecordType.RANGE,
    RecordType.DIRTY,
    RecordType.FORK,
    RecordType.EXEC,
    RecordType.EXIT,
    RecordType.INTRO,
)

Start = Callable[..., Mapper]
NewLibrary = Callable[..., Path]


def pages(length: int) -> int:
    return (length + PAGE - 1) // PAGE * PAGE


def only(records: list[Record]) -> Any:
    assert len(records) == 1, records
    return records[0]


def spans(records: list[Record]) -> list[tuple[int, int, int]]:
    return [(r.type, r.start, r.end) for r in records if isinstance(r, RangeRecord | MapRecord)]


def reading_of(tap: Tap, pid: int) -> Reading:
    tap.source.set_report(Report.RANGES)
    reading = tap.source.read_process(pid)
    tap.source.set_report(Report.NOTHING)
    assert reading is not None
    return reading


# ---- each hook ----------------------------------------------------------------------------------


def test_a_file_mapped_executable_is_told_with_its_range_path_and_identity(
    tap: Tap, start: Start, library: NewLibrary
) -> None:
    mapper, new = start(), library("libnew.so")
    begun_ns = tap.source.read_process(mapper.pid).begin_ns  # type: ignore[union-attr]
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
    assert tap.during(lambda: mapper.tell("anon", 8192, "exec"), mapper.pid) == []


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
    told = tap.during(lambda: mapper.unmap(at + PAGE, PAGE), mapper.pid)
    assert spans(told) == [(RANGE, at + PAGE, at + 2 * PAGE)]


def test_anonymous_memory_over_a_told_range_takes_it_away(tap: Tap, start: Start, library: NewLibrary) -> None:
    mapper = start()
    at, length = mapper.map(library())
    told = tap.during(lambda: mapper.tell("anon", PAGE, "at", f"{at:x}"), mapper.pid)
    assert spans(told) == [(RANGE, at, at + PAGE)]
    assert length > PAGE


def test_a_file_over_a_told_range_takes_it_away_and_then_comes(tap: Tap, start: Start, library: NewLibrary) -> None:
    mapper = start()
    at, length = mapper.map(library("liba.so"))
    end = at + pages(length)
    told = tap.during(lambda: mapper.map(library("libb.so"), "at", f"{at:x}"), mapper.pid)
    assert spans(told) == [(RANGE, at, end), (MAP, at, end)]


@pytest.mark.parametrize("call", ["protect", "pkeyprotect"])
def test_a_file_made_executable_later_is_told_and_made_harmless_again_too(
    tap: Tap, start: Start, library: NewLibrary, call: str
) -> None:
    mapper, new = start(), library()
    at, length = mapper.map(new, "noexec")
    end = at + pages(length)
    record = only(tap.during(lambda: mapper.tell(call, f"{at:x}", length, "rx"), mapper.pid))
    assert (record.type, record.start, record.end, record.flags) == (MAP, at, end, FLAG_ASK | FLAG_MPROTECT)
    assert path_of(record.text) == str(new)
    told = tap.during(lambda: mapper.tell(call, f"{at:x}", length, "r"), mapper.pid)
    assert spans(told) == [(RANGE, at, end)]


def test_a_part_made_executable_is_told_with_just_that_part(tap: Tap, start: Start, library: NewLibrary) -> None:
    mapper = start()
    at, _ = mapper.map(library(), "noexec", "len", 4 * PAGE)
    told = tap.during(lambda: mapper.protect(at + PAGE, PAGE, "rx"), mapper.pid)
    assert spans(told) == [(MAP, at + PAGE, at + 2 * PAGE)]


def test_executable_anonymous_memory_made_so_by_mprotect_is_not_told(tap: Tap, start: Start) -> None:
    mapper = start()
    at = int(mapper.tell("anon", PAGE)[0], 16)
    assert tap.during(lambda: mapper.protect(at, PAGE, "rwx"), mapper.pid) == []


def test_a_move_makes_the_process_dirty_and_a_reading_shows_where_to(
    tap: Tap, start: Start, library: NewLibrary
) -> None:
    mapper, new = start(), library()
    at, length = mapper.map(new)
    got: list[list[str]] = []
    told = tap.during(lambda: got.append(mapper.tell("remap", f"{at:x}", length, length + (1 << 20))), mapper.pid)
    assert kinds_of(told) == [DIRTY]
    moved = int(got[0][0], 16)
    assert moved != at
    rows = [row for row in reading_of(tap, mapper.pid).maps if path_of(row.text) == str(new)]
    assert {(row.start, row.end) for row in rows} == executable_ranges(mapper.pid, new.stat().st_ino)
    assert rows[0].start == moved


def test_a_move_outside_what_is_known_is_not_told(tap: Tap, start: Start, library: NewLibrary) -> None:
    mapper = start()
    mapper.map(library())
    at = int(mapper.tell("anon", 4 * PAGE)[0], 16)
    assert tap.during(lambda: mapper.tell("remap", f"{at:x}", 4 * PAGE, 1 << 20), mapper.pid) == []


def test_executable_shared_memory_makes_the_process_dirty_and_a_reading_shows_it(tap: Tap, start: Start) -> None:
    mapper = start()
    assert kinds_of(tap.during(lambda: mapper.tell("shm", PAGE), mapper.pid)) == [DIRTY]
    (row,) = [row for row in reading_of(tap, mapper.pid).maps if path_of(row.text).startswith("/SYSV")]
    assert row.flags & FLAG_DELETED


def test_shared_memory_that_is_detached_makes_the_process_dirty(tap: Tap, trick: Callable[..., Trick]) -> None:
    shm = trick("shmdt")
    reading_of(tap, shm.pid)
    assert kinds_of(tap.during(shm.go_on, shm.pid)) == [DIRTY]


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
    told = tap.during(lambda: child.unmap(at, length), child.pid)
    assert spans(told) == [(RANGE, at, at + pages(length))]


def test_a_fork_of_a_threaded_process_is_a_claim(tap: Tap, start: Start, closing: Any) -> None:
    parent = start()
    parent.tell("thread", "idle", "-")
    child = closing.enter_context(parent.fork())
    tap.flush()
    (record,) = [r for r in tap.records if r.type == FORK and r.tgid == child.pid]
    assert record.flags == FLAG_DIRTY


def test_a_child_that_shares_the_address_space_is_told_as_such(tap: Tap, start: Start, closing: Any) -> None:
    parent = start()
    child = closing.enter_context(parent.fork(how="clonevm"))
    tap.flush()
    (record,) = [r for r in tap.records if r.type == FORK and r.tgid == child.pid]
    assert record.flags == FLAG_SHARED_VM


@pytest.mark.parametrize("how", ["vfork", "spawn"])
def test_a_child_on_its_way_to_exec_is_told_with_fork_exec_and_exit(tap: Tap, start: Start, how: str) -> None:
    parent = start()
    pid = int(parent.tell(how, "/bin/true")[0])
    parent.tell("wait", pid)
    tap.flush()
    told = [r for r in tap.records if r.tgid == pid]
    assert [r.type for r in told if r.type in (FORK, EXEC, EXIT)] == [FORK, EXEC, EXIT]
    assert told[0].flags & FLAG_SHARED_VM
    assert {r.start_ns for r in told} == {told[0].start_ns}


@pytest.mark.parametrize("how", ["exec", "execthread"])
def test_exec_is_told_and_the_process_stays_the_same(tap: Tap, start: Start, how: str) -> None:
    mapper = start()
    told = tap.during(lambda: mapper.exec(how=how), mapper.pid)
    assert [r.type for r in told if r.type in (FORK, EXEC, EXIT)] == [EXEC]
    (execed,) = [r for r in told if r.type == EXEC]
    maps = tap.maps(mapper.pid)
    assert {r.start_ns for r in [execed, *maps]} == {maps[0].start_ns}
    assert maps[-1].exec_id > maps[0].exec_id


def test_after_exec_the_new_program_is_introduced_before_its_first_mapping(tap: Tap, start: Start) -> None:
    mapper = start()
    told = tap.during(mapper.exec, mapper.pid)
    assert kinds_of(told)[:3] == [EXEC, INTRO, MAP]


def test_the_exit_is_told_once_when_the_last_thread_is_gone_whichever_that_is(
    tap: Tap, start: Start, library: NewLibrary
) -> None:
    mapper = start()
    told = tap.during(lambda: mapper.tell("leaderexit"), mapper.pid)
    assert EXIT not in kinds_of(told)
    record = tap.during(lambda: mapper.map(library()), mapper.pid)[-1]
    assert (record.type, record.tgid) == (MAP, mapper.pid)
    assert record.tid != mapper.pid
    assert kinds_of(tap.during(mapper.exit, mapper.pid)).count(EXIT) == 1


def test_a_thread_that_comes_and_goes_is_not_told(tap: Tap, start: Start) -> None:
    mapper = start()
    reading_of(tap, mapper.pid)
    told = tap.during(lambda: (mapper.tell("thread", "idle", "-"), mapper.tell("thread", "stop")), mapper.pid)
    assert not {FORK, EXIT, EXEC, INTRO} & set(kinds_of(told))


def test_images_are_told_at_exec_if_asked_for(tap: Tap, start: Start, programs: Any) -> None:
    tap.source.set_report(Report.IMAGES)
    mapper = start()
    tap.flush()
    images = [r for r in tap.maps(mapper.pid) if r.flags & FLAG_IMAGE]
    assert [path_of(image.text) for image in images[:1]] == [str(programs["mapper"])]
    assert len(images) == 2
    for image in images:
        inode = id_of(image).inode
        assert (image.start, image.end) in executable_ranges(mapper.pid, inode), path_of(image.text)


def test_every_process_is_told_if_asked_for(tap: Tap, spawn: Any) -> None:
    tap.source.set_report(Report.PROCESSES)
    process = spawn(["/bin/true"])
    process.wait()
    tap.flush()
    told = [r for r in tap.records if r.tgid == process.pid and r.type in (FORK, EXEC, EXIT)]
    assert kinds_of(told)[0] == FORK
    assert kinds_of(told)[-2:] == [EXEC, EXIT]
    (execed,) = [r for r in told if r.type == EXEC]
    assert isinstance(execed, ProcessRecord)
    assert path_of(execed.path) == str(Path("/bin/true").resolve())


# ---- verdicts -----------------------------------------------------------------------------------


def test_an_ignored_file_is_dropped_in_the_kernel_and_counted(tap: Tap, start: Start, library: NewLibrary) -> None:
    mapper, new = start(), library()
    mapper.map(new)
    tap.source.answer([tap.key_of(mapper.pid, new)], is_wanted=False)
    before = tap.source.mappings_ignored()
    assert tap.during(lambda: mapper.map(new), mapper.pid) == []
    assert tap.source.mappings_ignored() > before


def test_a_matched_file_is_told_with_its_path_and_without_a_question(
    tap: Tap, start: Start, library: NewLibrary
) -> None:
    mapper, new = start(), library()
    mapper.map(new)
    tap.source.answer([tap.key_of(mapper.pid, new)], is_wanted=True)
    record = only(tap.during(lambda: mapper.map(new), mapper.pid))
    assert record.flags == 0
    assert path_of(record.text) == str(new)


def test_an_ignored_file_over_a_told_range_still_takes_it_away(tap: Tap, start: Start, library: NewLibrary) -> None:
    mapper, ignored = start(), library("libignored.so")
    mapper.map(ignored)
    tap.source.answer([tap.key_of(mapper.pid, ignored)], is_wanted=False)
    at, length = mapper.map(library("libwanted.so"))
    told = tap.during(lambda: mapper.map(ignored, "at", f"{at:x}"), mapper.pid)
    assert spans(told) == [(RANGE, at, at + pages(length))]


def test_an_ignored_file_is_ignored_in_readings_too(tap: Tap, start: Start, library: NewLibrary) -> None:
    mapper, ignored, wanted = start(), library("libignored.so"), library("libwanted.so")
    mapper.map(ignored)
    mapper.map(wanted)
    tap.source.answer([tap.key_of(mapper.pid, ignored)], is_wanted=False)
    tap.source.answer([tap.key_of(mapper.pid, wanted)], is_wanted=True)
    rows = {path_of(row.text): row.flags for row in reading_of(tap, mapper.pid).maps}
    assert str(ignored) not in rows
    assert rows[str(wanted)] == 0


def test_an_ignored_file_is_asked_about_again_when_the_answer_is_old(
    open_tap: Callable[..., Tap], start: Start, library: NewLibrary, wait_until: Any
) -> None:
    tap = open_tap(ignore_ttl_s=1)
    mapper, ignored, wanted = start(), library("libignored.so"), library("libwanted.so")
    for path, is_wanted in ((ignored, False), (wanted, True)):
        mapper.map(path)
        tap.source.answer([tap.key_of(mapper.pid, path)], is_wanted=is_wanted)
    assert tap.during(lambda: mapper.map(ignored), mapper.pid) == []

    def is_asked_again() -> list[Record]:
        tap.source.tick()
        return tap.during(lambda: mapper.map(ignored), mapper.pid)

    record = only(wait_until(is_asked_again, 10, "the answer growing old"))
    assert record.flags == FLAG_ASK
    assert only(tap.during(lambda: mapper.map(wanted), mapper.pid)).flags == 0


def test_a_new_epoch_makes_every_answer_void(tap: Tap, start: Start, library: NewLibrary) -> None:
    mapper, ignored, wanted = start(), library("libignored.so"), library("libwanted.so")
    for path, is_wanted in ((ignored, False), (wanted, True)):
        mapper.map(path)
        tap.source.answer([tap.key_of(mapper.pid, path)], is_wanted=is_wanted)
    old = tap.key_of(mapper.pid, ignored)
    tap.source.new_epoch()
    told = tap.during(lambda: (mapper.map(ignored), mapper.map(wanted)), mapper.pid)
    assert [(r.type, r.flags) for r in told] == [(MAP, FLAG_ASK), (MAP, FLAG_ASK)]
    # An answer that was under way when the rules changed is filed under the old epoch.
    tap.source.answer([old], is_wanted=False)
    assert only(tap.during(lambda: mapper.map(ignored), mapper.pid)).flags == FLAG_ASK


def test_a_renamed_file_is_another_name_to_decide_on(tap: Tap, start: Start, library: NewLibrary) -> None:
    mapper, new = start(), library("libold.so")
    mapper.map(new)
    tap.source.answer([tap.key_of(mapper.pid, new)], is_wanted=False)
    renamed = new.rename(new.with_name("librenamed.so"))
    record = only(tap.during(lambda: mapper.map(renamed), mapper.pid))
    assert record.flags == FLAG_ASK
    assert path_of(record.text) == str(renamed)


def test_a_hard_link_is_another_name_to_decide_on(tap: Tap, start: Start, library: NewLibrary) -> None:
    mapper, new = start(), library("libone.so")
    mapper.map(new)
    tap.source.answer([tap.key_of(mapper.pid, new)], is_wanted=False)
    link = new.with_name("libtwo.so")
    link.hardlink_to(new)
    record = only(tap.during(lambda: mapper.map(link), mapper.pid))
    assert path_of(record.text) == str(link)
    assert id_of(record) == id_of(tap.maps(mapper.pid, new)[0])


# ---- who is followed ----------------------------------------------------------------------------


def ignore_what_it_has(tap: Tap, mapper: Mapper) -> None:
    """Answers no to everything that a running mapper brought with it."""
    tap.flush()
    keys = [record.key for record in tap.maps(mapper.pid)]
    assert keys
    tap.source.answer(keys, is_wanted=False)


def test_a_process_that_maps_only_ignored_files_is_never_mentioned(
    tap: Tap, start: Start, library: NewLibrary, closing: Any
) -> None:
    ignore_what_it_has(tap, start())
    quiet = start()
    assert tap.during(lambda: (quiet.tell("anon", PAGE, "exec"), quiet.map("/bin/true", "noexec")), quiet.pid) == []
    assert tap.maps(quiet.pid) == []
    child = closing.enter_context(quiet.fork())
    assert tap.during(child.exit, child.pid) == []
    assert tap.during(quiet.exit, quiet.pid) == []


def test_a_process_is_followed_from_its_first_wanted_file_on(
    tap: Tap, start: Start, library: NewLibrary, closing: Any
) -> None:
    ignore_what_it_has(tap, start())
    late = start()
    told = tap.during(lambda: late.map(library()), late.pid)
    assert kinds_of(told) == [INTRO, MAP]
    child = closing.enter_context(late.fork())
    tap.wait_for(lambda r: r.type == FORK and r.tgid == child.pid, "the fork")
    assert kinds_of(tap.during(late.exit, late.pid)) == [EXIT]


def test_a_process_of_which_nothing_is_wanted_can_be_settled_and_is_silent_from_then_on(
    tap: Tap, start: Start, library: NewLibrary
) -> None:
    ignore_what_it_has(tap, start())
    late, unwanted = start(), library("libunwanted.so")
    at, length = late.map(unwanted)
    key = tap.key_of(late.pid, unwanted)
    tap.source.answer([key], is_wanted=False)
    record = tap.maps(late.pid)[-1]
    assert tap.source.settle(late.pid, record.start_ns, record.touches)
    assert tap.during(lambda: late.unmap(at, length), late.pid) == []
    assert kinds_of(tap.during(lambda: late.map(library("libwanted.so")), late.pid)) == [INTRO, MAP]
    assert kinds_of(tap.during(late.exit, late.pid)) == [EXIT]


def test_a_process_that_has_mapped_since_is_not_settled(tap: Tap, start: Start, library: NewLibrary) -> None:
    ignore_what_it_has(tap, start())
    late = start()
    late.map(library("liba.so"))
    tap.flush()
    record = tap.maps(late.pid)[-1]
    at, length = late.map(library("libb.so"))
    assert not tap.source.settle(late.pid, record.start_ns, record.touches)
    assert spans(tap.during(lambda: late.unmap(at, length), late.pid)) == [(RANGE, at, at + pages(length))]


# ---- the range filter ---------------------------------------------------------------------------


def test_munmap_outside_the_known_ranges_sends_nothing(tap: Tap, start: Start, library: NewLibrary) -> None:
    mapper = start()
    mapper.map(library())
    at, length = (int(word, 16 if i == 0 else 10) for i, word in enumerate(mapper.tell("anon", 64 * PAGE)))
    assert tap.during(lambda: mapper.unmap(at, length), mapper.pid) == []


def test_a_followed_process_whose_threads_unmap_other_memory_all_the_time_sends_nothing(
    tap: Tap, start: Start, library: NewLibrary
) -> None:
    mapper = start()
    mapper.map(library())
    for _ in range(2):
        mapper.tell("thread", "anon", "-")
    reading_of(tap, mapper.pid)

    def wait_a_little() -> None:
        for _ in range(3000):
            mapper.tell("anon", PAGE)

    assert tap.during(wait_a_little, mapper.pid) == []
    assert int(mapper.tell("thread", "stop")[0]) > 1000


def test_all_of_more_ranges_than_the_filter_has_room_for_are_still_told(
    tap: Tap, start: Start, library: NewLibrary
) -> None:
    mapper, new = start(), library()
    mapped = [mapper.map(new, "len", PAGE) for _ in range(40)]
    told = tap.during(lambda: [mapper.unmap(*one) for one in mapped], mapper.pid)
    assert spans(told) == [(RANGE, at, at + PAGE) for at, _ in mapped]


def test_a_reading_makes_room_in_the_range_filter(tap: Tap, start: Start, library: NewLibrary) -> None:
    mapper, new = start(), library()
    # A hole between two mappings of ours that stay: in the bounds of all ranges, but in none.
    low = int(mapper.tell("anon", 8 * PAGE)[0], 16)
    mapper.map(new, "len", PAGE, "at", f"{low:x}")
    mapper.map(new, "len", PAGE, "at", f"{low + 7 * PAGE:x}")
    for mapped in [mapper.map(new, "len", PAGE) for _ in range(40)]:
        mapper.unmap(*mapped)
    assert tap.during(lambda: mapper.unmap(low + 3 * PAGE, PAGE), mapper.pid) != []
    reading_of(tap, mapper.pid)
    assert tap.during(lambda: mapper.unmap(low + 4 * PAGE, PAGE), mapper.pid) == []
    told = tap.during(lambda: mapper.unmap(low, PAGE), mapper.pid)
    assert spans(told) == [(RANGE, low, low + PAGE)]


# ---- facts, claims, the dirty bit ---------------------------------------------------------------


def test_one_record_of_a_threaded_process_carries_the_dirty_flag_until_a_reading_clears_it(
    tap: Tap, start: Start, library: NewLibrary
) -> None:
    mapper, new = start(), library()
    mapper.tell("thread", "idle", "-")
    reading_of(tap, mapper.pid)

    def flags_of_a_load() -> int:
        record = only([r for r in tap.during(lambda: mapper.map(new), mapper.pid) if r.type == MAP])
        return int(record.flags & FLAG_DIRTY)

    assert [flags_of_a_load() for _ in range(3)] == [FLAG_DIRTY, 0, 0]
    reading_of(tap, mapper.pid)
    assert [flags_of_a_load() for _ in range(2)] == [FLAG_DIRTY, 0]


def test_munmap_in_a_threaded_process_is_a_question_not_a_fact(tap: Tap, start: Start, library: NewLibrary) -> None:
    mapper = start()
    at, length = mapper.map(library())
    mapper.tell("thread", "idle", "-")
    reading_of(tap, mapper.pid)
    assert kinds_of(tap.during(lambda: mapper.unmap(at, length), mapper.pid)) == [DIRTY]


def test_a_process_whose_child_shares_its_memory_is_told_of_the_childs_munmap(
    tap: Tap, start: Start, library: NewLibrary, closing: Any
) -> None:
    parent = start()
    child = closing.enter_context(parent.fork(how="clonevm"))
    at, length = parent.map(library())
    reading_of(tap, parent.pid)
    reading_of(tap, child.pid)
    assert DIRTY in kinds_of(tap.during(lambda: child.unmap(at, length), parent.pid, child.pid))


def test_a_threaded_process_that_once_spawned_a_child_is_not_dirty_for_ever(
    tap: Tap, start: Start, library: NewLibrary
) -> None:
    mapper = start()
    mapper.map(library())
    mapper.tell("thread", "idle", "-")
    mapper.tell("wait", mapper.tell("spawn", "/bin/true")[0])
    reading_of(tap, mapper.pid)
    at, length = (int(word, 16 if i == 0 else 10) for i, word in enumerate(mapper.tell("anon", 64 * PAGE)))
    assert tap.during(lambda: mapper.unmap(at, length), mapper.pid) == []


# ---- counters -----------------------------------------------------------------------------------


def test_records_that_do_not_fit_into_the_ring_are_counted(
    open_tap: Callable[..., Tap], start: Start, library: NewLibrary
) -> None:
    tap = open_tap(ring_bytes=4096)
    mapper, new = start(), library()
    before = tap.source.losses()
    for _ in range(100):
        mapper.map(new)
    assert tap.source.losses().ring > before.ring
    assert tap.source.losses()._replace(ring=0) == before._replace(ring=0)


def test_records_sent_are_counted(tap: Tap, start: Start, library: NewLibrary) -> None:
    mapper, new = start(), library()
    before = tap.source.records_sent()
    for _ in range(10):
        mapper.map(new)
    assert tap.source.records_sent() >= before + 10


def test_processes_that_do_not_fit_into_the_map_are_counted(open_tap: Callable[..., Tap], start: Start) -> None:
    tap = open_tap(max_processes=1)
    before = tap.source.losses().processes
    start()
    start()
    assert tap.source.losses().processes > before


def test_calls_that_do_not_fit_into_the_map_of_calls_are_counted(
    open_tap: Callable[..., Tap],
    start: Start,
    library: NewLibrary,
    stall: Callable[..., Stall],
    deadline: Any,
) -> None:
    tap = open_tap(max_pending=1)
    held = stall("unmap", library("liba.so"), library("libb.so"))
    mapper = start()
    held.hold(deadline(5))  # its call is under way now and stays so
    before = tap.source.losses().pending
    mapper.map(library("libc.so"))
    assert tap.source.losses().pending > before
    held.release()


def test_a_process_map_of_which_all_is_used_has_room_again_after_an_exit(
    open_tap: Callable[..., Tap], start: Start, library: NewLibrary
) -> None:
    tap = open_tap(max_processes=256)
    for _ in range(300):
        start().exit()
    before = tap.source.losses().processes
    mapper = start()
    mapper.map(library())
    assert tap.source.losses().processes == before


# ---- readings -----------------------------------------------------------------------------------


def test_a_reading_gives_every_executable_mapping_with_its_offset(tap: Tap, start: Start, library: NewLibrary) -> None:
    mapper, new = start(), library()
    mapper.map(new)
    mapper.map(new, "offset", PAGE)
    mapper.map(new, "noexec")
    rows = [row for row in reading_of(tap, mapper.pid).maps if path_of(row.text) == str(new)]
    assert {(row.start, row.end) for row in rows} == executable_ranges(mapper.pid, new.stat().st_ino)
    assert sorted(row.offset_bytes for row in rows) == [0, PAGE]


def test_a_record_and_a_reading_agree_on_every_field_of_a_mapping(tap: Tap, start: Start, library: NewLibrary) -> None:
    mapper, new = start(), library()
    mapper.map(new, "offset", PAGE)
    tap.flush()
    live = tap.maps(mapper.pid, new)[-1]
    (row,) = [row for row in reading_of(tap, mapper.pid).maps if path_of(row.text) == str(new)]
    names = ("tgid", "start_ns", "exec_id", "key", "start", "end", "offset_bytes", "comm", "mode", "text", "flags")
    assert {name: getattr(live, name) for name in names} == {name: getattr(row, name) for name in names}


def test_a_reading_of_a_process_that_is_gone_is_none(tap: Tap, start: Start) -> None:
    mapper = start()
    mapper.exit()
    assert tap.source.read_process(mapper.pid) is None


def test_a_reading_of_a_process_whose_leader_is_dead_shows_its_mappings_once(
    tap: Tap, start: Start, library: NewLibrary
) -> None:
    mapper, new = start(), library()
    mapper.map(new)
    for _ in range(8):
        mapper.tell("thread", "idle", "-")
    mapper.tell("leaderexit")
    tap.flush()
    for readings in ([reading_of(tap, mapper.pid)], tap.source.read_all()[0]):
        (reading,) = [one for one in readings if one.tgid == mapper.pid]
        assert [path_of(row.text) for row in reading.maps].count(str(new)) == 1
        assert reading.start_ns == tap.maps(mapper.pid)[0].start_ns


def test_a_reading_of_all_shows_every_living_process_that_maps_a_file(tap: Tap, start: Start) -> None:
    mappers = [start() for _ in range(5)]
    found = {reading.tgid: len(reading.maps) for reading in tap.source.read_all()[0]}
    assert all(found[mapper.pid] >= 1 for mapper in mappers)


def test_a_process_met_by_a_reading_is_followed_from_then_on(
    start: Start, open_tap: Callable[..., Tap], library: NewLibrary
) -> None:
    mapper = start()
    at, length = mapper.map(library())
    tap = open_tap()
    tap.source.read_all()
    told = tap.during(lambda: mapper.unmap(at, length), mapper.pid)
    assert spans(told) == [(RANGE, at, at + pages(length))]
    assert kinds_of(tap.during(mapper.exit, mapper.pid)) == [EXIT]


@pytest.mark.parametrize("program", sources.OBJECTS)
def test_every_build_of_the_programs_tells_the_same(
    open_tap: Callable[..., Tap],
    start: Start,
    library: NewLibrary,
    monkeypatch: pytest.MonkeyPatch,
    program: str,
) -> None:
    """The one that the running kernel does not need, too: it is for those that refuse the other."""
    monkeypatch.setattr(sources, "OBJECTS", (program,))
    tap = open_tap()
    mapper, new, other = start(), library(), library("libother.so")
    at, length = mapper.map(new)
    mapper.tell("memfd", "some name", new)
    mapper.map(other, "at", f"{at:x}")
    mapper.protect(at, length, "r")
    mapper.protect(at, length, "rx")
    with mapper.fork() as child:
        child.exec()
    mapper.tell("thread", "idle", "-")
    mapper.map(new)
    tap.flush()
    told = [
        (r.type, path_of(r.text) if isinstance(r, MapRecord) else "", r.flags & FLAG_DIRTY)
        for r in tap.records
        if r.tgid == mapper.pid and r.type != INTRO
    ]
    assert told[1:] == [
        (MAP, str(new), 0),
        (MAP, "/memfd:some name", 0),
        (RANGE, "", 0),
        (MAP, str(other), 0),
        (RANGE, "", 0),
        (MAP, str(other), 0),
        (MAP, str(new), FLAG_DIRTY),
    ]
    assert [r.type for r in tap.records if r.tgid == child.pid][:3] == [FORK, EXEC, INTRO]
    assert {id_of(r)[:3] for r in tap.maps(mapper.pid, new)} == {id_by_stat(new)[:3]}
    assert {path_of(row.text) for row in reading_of(tap, mapper.pid).maps} >= {str(new), str(other)}


def test_a_verdict_has_the_size_that_the_kernel_expects(tap: Tap) -> None:
    tap.source.answer([bytes(64)], is_wanted=True)
    assert tap.source._verdicts.lookup(bytes(64), struct.calcsize("=II")) is not None
