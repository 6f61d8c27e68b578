"""Verdicts are honoured, followed processes only are told of, claims make dirty, counters count, readings read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sowatch.bpf.records import FLAG_ASK, FLAG_NEEDS_RESCAN, FLAG_SHARED_VM, MapRecord, Record, RecordType, path_of
from sowatch.sources import core as sources
from support.kernel import Tap, executable_ranges, id_by_stat, id_of, kinds_of, only, pages, scan_of, spans
from support.programs import Mapper
from support.stepped import Stall

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


# ---- verdicts -----------------------------------------------------------------------------------


def test_an_ignored_file_is_dropped_in_the_kernel(tap: Tap, start: Start, library: NewLibrary) -> None:
    mapper, new = start(), library()
    mapper.map(new)
    tap.source.answer(tap.places_of(mapper.pid, new), is_wanted=False)
    assert tap.during(lambda: mapper.map(new), mapper.pid) == []


def test_a_matched_file_is_told_with_its_path_and_without_a_question(
    tap: Tap, start: Start, library: NewLibrary
) -> None:
    mapper, new = start(), library()
    mapper.map(new)
    tap.source.answer(tap.places_of(mapper.pid, new), is_wanted=True)
    record = only(tap.during(lambda: mapper.map(new), mapper.pid))
    assert record.flags == 0
    assert path_of(record.text) == str(new)


def test_an_ignored_file_over_a_told_range_still_takes_it_away(tap: Tap, start: Start, library: NewLibrary) -> None:
    mapper, ignored = start(), library("libignored.so")
    mapper.map(ignored)
    tap.source.answer(tap.places_of(mapper.pid, ignored), is_wanted=False)
    at, length = mapper.map(library("libwanted.so"))
    reported = tap.during(lambda: mapper.map(ignored, "at", f"{at:x}"), mapper.pid)
    assert spans(reported) == [(RANGE, at, at + pages(length))]


def test_an_ignored_file_is_ignored_in_readings_too(tap: Tap, start: Start, library: NewLibrary) -> None:
    mapper, ignored, wanted = start(), library("libignored.so"), library("libwanted.so")
    mapper.map(ignored)
    mapper.map(wanted)
    tap.source.answer(tap.places_of(mapper.pid, ignored), is_wanted=False)
    tap.source.answer(tap.places_of(mapper.pid, wanted), is_wanted=True)
    rows = {path_of(row.text): row.flags for row in scan_of(tap, mapper.pid).maps}
    assert str(ignored) not in rows
    assert rows[str(wanted)] == 0


def test_an_ignored_file_is_asked_about_again_when_the_answer_is_old(
    open_tap: Callable[..., Tap], start: Start, library: NewLibrary, wait_until: Any
) -> None:
    tap = open_tap(ignore_ttl_s=1)
    mapper, ignored, wanted = start(), library("libignored.so"), library("libwanted.so")
    for path, is_wanted in ((ignored, False), (wanted, True)):
        mapper.map(path)
        tap.source.answer(tap.places_of(mapper.pid, path), is_wanted=is_wanted)
    assert tap.during(lambda: mapper.map(ignored), mapper.pid) == []

    def is_asked_again() -> list[Record]:
        tap.source.answer_clock.tick()
        return tap.during(lambda: mapper.map(ignored), mapper.pid)

    record = only(wait_until(is_asked_again, 10, "the answer growing old"))
    assert record.flags == FLAG_ASK
    assert only(tap.during(lambda: mapper.map(wanted), mapper.pid)).flags == 0


def test_a_new_epoch_makes_every_answer_void(tap: Tap, start: Start, library: NewLibrary) -> None:
    mapper, ignored, wanted = start(), library("libignored.so"), library("libwanted.so")
    for path, is_wanted in ((ignored, False), (wanted, True)):
        mapper.map(path)
        tap.source.answer(tap.places_of(mapper.pid, path), is_wanted=is_wanted)
    old = tap.places_of(mapper.pid, ignored)
    tap.source.new_epoch()
    reported = tap.during(lambda: (mapper.map(ignored), mapper.map(wanted)), mapper.pid)
    assert [(r.type, r.flags) for r in reported] == [(MAP, FLAG_ASK), (MAP, FLAG_ASK)]
    # An answer that was under way when the rules changed is filed under the old epoch.
    tap.source.answer(old, is_wanted=False)
    assert only(tap.during(lambda: mapper.map(ignored), mapper.pid)).flags == FLAG_ASK


def test_a_renamed_file_is_another_name_to_decide_on(tap: Tap, start: Start, library: NewLibrary) -> None:
    mapper, new = start(), library("libold.so")
    mapper.map(new)
    tap.source.answer(tap.places_of(mapper.pid, new), is_wanted=False)
    renamed = new.rename(new.with_name("librenamed.so"))
    record = only(tap.during(lambda: mapper.map(renamed), mapper.pid))
    assert record.flags == FLAG_ASK
    assert path_of(record.text) == str(renamed)


def test_a_hard_link_is_another_name_to_decide_on(tap: Tap, start: Start, library: NewLibrary) -> None:
    mapper, new = start(), library("libone.so")
    mapper.map(new)
    tap.source.answer(tap.places_of(mapper.pid, new), is_wanted=False)
    link = new.with_name("libtwo.so")
    link.hardlink_to(new)
    record = only(tap.during(lambda: mapper.map(link), mapper.pid))
    assert path_of(record.text) == str(link)
    assert id_of(record) == id_of(tap.maps(mapper.pid, new)[0])


# ---- who is followed ----------------------------------------------------------------------------


def ignore_what_it_has(tap: Tap, mapper: Mapper) -> None:
    """Answers no to everything that a running mapper brought with it."""
    tap.flush()
    places = {record.key: record.place for record in tap.maps(mapper.pid)}
    assert places
    tap.source.answer(places, is_wanted=False)


def test_a_process_that_maps_only_ignored_files_is_never_mentioned(
    tap: Tap, start: Start, library: NewLibrary, closing: Any
) -> None:
    ignore_what_it_has(tap, start())
    quiet = start()
    assert tap.during(lambda: (quiet.emit("anon", PAGE, "exec"), quiet.map("/bin/true", "noexec")), quiet.pid) == []
    assert tap.maps(quiet.pid) == []
    child = closing.enter_context(quiet.fork())
    assert tap.during(child.exit, child.pid) == []
    assert tap.during(quiet.exit, quiet.pid) == []


def test_a_process_is_followed_from_its_first_wanted_file_on(
    tap: Tap, start: Start, library: NewLibrary, closing: Any
) -> None:
    ignore_what_it_has(tap, start())
    late = start()
    reported = tap.during(lambda: late.map(library()), late.pid)
    assert kinds_of(reported) == [INTRO, MAP]
    child = closing.enter_context(late.fork())
    tap.wait_for(lambda r: r.type == FORK and r.tgid == child.pid, "the fork")
    assert kinds_of(tap.during(late.exit, late.pid)) == [EXIT]


def test_a_process_of_which_nothing_is_wanted_can_be_settled_and_is_silent_from_then_on(
    tap: Tap, start: Start, library: NewLibrary
) -> None:
    ignore_what_it_has(tap, start())
    late, unwanted = start(), library("libunwanted.so")
    at, length = late.map(unwanted)
    tap.source.answer(tap.places_of(late.pid, unwanted), is_wanted=False)
    record = tap.maps(late.pid)[-1]
    assert tap.source.untrack(late.pid, record.start_ns, record.activity)
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
    assert not tap.source.untrack(late.pid, record.start_ns, record.activity)
    assert spans(tap.during(lambda: late.unmap(at, length), late.pid)) == [(RANGE, at, at + pages(length))]


def test_an_answer_about_the_program_before_an_exec_does_not_settle_the_one_after_it(
    tap: Tap, start: Start, library: NewLibrary
) -> None:
    ignore_what_it_has(tap, start())
    late = start()
    late.map(library("liba.so"))
    tap.flush()
    record = tap.maps(late.pid)[-1]
    late.exec()
    at, length = late.map(library("libb.so"))
    assert not tap.source.untrack(late.pid, record.start_ns, record.activity)
    assert spans(tap.during(lambda: late.unmap(at, length), late.pid)) == [(RANGE, at, at + pages(length))]


# ---- the range filter ---------------------------------------------------------------------------


def test_munmap_outside_the_known_ranges_sends_nothing(tap: Tap, start: Start, library: NewLibrary) -> None:
    mapper = start()
    mapper.map(library())
    at, length = (int(word, 16 if i == 0 else 10) for i, word in enumerate(mapper.emit("anon", 64 * PAGE)))
    assert tap.during(lambda: mapper.unmap(at, length), mapper.pid) == []


def test_a_followed_process_whose_threads_unmap_other_memory_all_the_time_sends_next_to_nothing(
    tap: Tap, start: Start, library: NewLibrary
) -> None:
    mapper = start()
    mapper.map(library())
    for _ in range(2):
        mapper.emit("thread", "anon", "-")
    scan_of(tap, mapper.pid)

    def wait_a_little() -> None:
        for _ in range(3000):
            mapper.emit("anon", PAGE)

    # Whoever reads /proc/PID/maps meanwhile, as other tools of this machine do, holds the address space for that
    # moment as another process would: a call of that moment is told, for a reading to decide.
    reported = tap.during(wait_a_little, mapper.pid)
    unmapped = int(mapper.emit("thread", "stop")[0])
    assert unmapped > 1000
    assert {record.type for record in reported} <= {RANGE, NEEDS_RESCAN}
    assert len(reported) < unmapped / 20


def test_all_of_more_ranges_than_the_filter_has_room_for_are_still_told(
    tap: Tap, start: Start, library: NewLibrary
) -> None:
    mapper, new = start(), library()
    mapped = [mapper.map(new, "len", PAGE) for _ in range(40)]
    reported = tap.during(lambda: [mapper.unmap(*one) for one in mapped], mapper.pid)
    assert spans(reported) == [(RANGE, at, at + PAGE) for at, _ in mapped]


def test_a_reading_makes_room_in_the_range_filter(tap: Tap, start: Start, library: NewLibrary) -> None:
    mapper, new = start(), library()
    # A hole between two mappings of ours that stay: in the bounds of all ranges, but in none.
    low = int(mapper.emit("anon", 8 * PAGE)[0], 16)
    mapper.map(new, "len", PAGE, "at", f"{low:x}")
    mapper.map(new, "len", PAGE, "at", f"{low + 7 * PAGE:x}")
    for mapped in [mapper.map(new, "len", PAGE) for _ in range(40)]:
        mapper.unmap(*mapped)
    assert tap.during(lambda: mapper.unmap(low + 3 * PAGE, PAGE), mapper.pid) != []
    scan_of(tap, mapper.pid)
    assert tap.during(lambda: mapper.unmap(low + 4 * PAGE, PAGE), mapper.pid) == []
    reported = tap.during(lambda: mapper.unmap(low, PAGE), mapper.pid)
    assert spans(reported) == [(RANGE, low, low + PAGE)]


# ---- facts, claims, the dirty bit ---------------------------------------------------------------


def test_one_record_of_a_threaded_process_carries_the_dirty_flag_until_a_reading_clears_it(
    tap: Tap, start: Start, library: NewLibrary
) -> None:
    mapper, new = start(), library()
    mapper.emit("thread", "idle", "-")
    scan_of(tap, mapper.pid)

    def flags_of_a_load() -> int:
        record = only([r for r in tap.during(lambda: mapper.map(new), mapper.pid) if r.type == MAP])
        return int(record.flags & FLAG_NEEDS_RESCAN)

    assert [flags_of_a_load() for _ in range(3)] == [FLAG_NEEDS_RESCAN, 0, 0]
    scan_of(tap, mapper.pid)
    assert [flags_of_a_load() for _ in range(2)] == [FLAG_NEEDS_RESCAN, 0]


def test_munmap_in_a_threaded_process_is_a_question_not_a_fact(tap: Tap, start: Start, library: NewLibrary) -> None:
    mapper = start()
    at, length = mapper.map(library())
    mapper.emit("thread", "idle", "-")
    scan_of(tap, mapper.pid)
    assert kinds_of(tap.during(lambda: mapper.unmap(at, length), mapper.pid)) == [NEEDS_RESCAN]


def test_munmap_while_somebody_reads_the_process_is_told_and_a_question_too(
    tap: Tap, start: Start, library: NewLibrary, pin: Any
) -> None:
    mapper, new = start(), library()
    at, length = mapper.map(new)
    tap.flush()
    pin(mapper.pid, at)
    (first, *_) = reported = tap.during(lambda: mapper.unmap(at, length), mapper.pid)
    assert spans(reported) == [(RANGE, at, at + pages(length))]
    assert first.flags & FLAG_NEEDS_RESCAN
    at, length = mapper.map(new)
    assert spans(tap.during(lambda: mapper.unmap(at, length), mapper.pid)) == [(RANGE, at, at + pages(length))]


def test_a_process_whose_child_shares_its_memory_is_told_of_the_childs_munmap(
    tap: Tap, start: Start, library: NewLibrary, closing: Any
) -> None:
    parent = start()
    child = closing.enter_context(parent.fork(how="clonevm"))
    at, length = parent.map(library())
    scan_of(tap, parent.pid)
    scan_of(tap, child.pid)
    reported = tap.during(lambda: child.unmap(at, length), parent.pid, child.pid)
    assert any(record.flags & FLAG_NEEDS_RESCAN for record in reported)


def test_a_process_that_is_tracked_anew_says_again_that_it_shares_its_memory(
    tap: Tap, start: Start, library: NewLibrary, closing: Any
) -> None:
    ignore_what_it_has(tap, start())
    late, unwanted = start(), library("libunwanted.so")
    late.map(unwanted)
    tap.source.answer(tap.places_of(late.pid, unwanted), is_wanted=False)
    record = tap.maps(late.pid)[-1]
    closing.enter_context(late.fork(how="clonevm"))
    tap.wait_for(lambda r: r.type == FORK and r.parent_tgid == late.pid, "the fork, which says so")
    assert tap.source.untrack(late.pid, record.start_ns, record.activity)
    reported = tap.during(lambda: late.map(library("libwanted.so")), late.pid)
    assert any(record.flags & FLAG_SHARED_VM for record in reported)


def test_a_threaded_process_that_once_spawned_a_child_is_not_dirty_for_ever(
    tap: Tap, start: Start, library: NewLibrary
) -> None:
    mapper = start()
    mapper.map(library())
    mapper.emit("thread", "idle", "-")
    mapper.emit("wait", mapper.emit("spawn", "/bin/true")[0])
    scan_of(tap, mapper.pid)
    at, length = (int(word, 16 if i == 0 else 10) for i, word in enumerate(mapper.emit("anon", 64 * PAGE)))
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
    rows = [row for row in scan_of(tap, mapper.pid).maps if path_of(row.text) == str(new)]
    assert {(row.start, row.end) for row in rows} == executable_ranges(mapper.pid, new.stat().st_ino)
    assert sorted(row.offset_bytes for row in rows) == [0, PAGE]


def test_a_record_and_a_reading_agree_on_every_field_of_a_mapping(tap: Tap, start: Start, library: NewLibrary) -> None:
    mapper, new = start(), library()
    mapper.map(new, "offset", PAGE)
    tap.flush()
    live = tap.maps(mapper.pid, new)[-1]
    (row,) = [row for row in scan_of(tap, mapper.pid).maps if path_of(row.text) == str(new)]
    names = ("tgid", "start_ns", "exec_id", "key", "start", "end", "offset_bytes", "comm", "mode", "text", "flags")
    assert {name: getattr(live, name) for name in names} == {name: getattr(row, name) for name in names}


def test_a_reading_of_a_process_that_is_gone_is_none(tap: Tap, start: Start) -> None:
    mapper = start()
    mapper.exit()
    assert tap.source.scan_process(mapper.pid) is None


def test_a_reading_of_a_process_whose_leader_is_dead_shows_its_mappings_once(
    tap: Tap, start: Start, library: NewLibrary
) -> None:
    mapper, new = start(), library()
    mapper.map(new)
    for _ in range(8):
        mapper.emit("thread", "idle", "-")
    mapper.emit("leaderexit")
    tap.flush()
    for scans in ([scan_of(tap, mapper.pid)], tap.source.scan_all()[0]):
        (scan,) = [one for one in scans if one.tgid == mapper.pid]
        assert [path_of(row.text) for row in scan.maps].count(str(new)) == 1
        assert scan.start_ns == tap.maps(mapper.pid)[0].start_ns


def test_a_reading_of_all_shows_every_living_process_that_maps_a_file(tap: Tap, start: Start) -> None:
    mappers = [start() for _ in range(5)]
    found = {scan.tgid: len(scan.maps) for scan in tap.source.scan_all()[0]}
    assert all(found[mapper.pid] >= 1 for mapper in mappers)


def test_a_process_met_by_a_reading_is_followed_from_then_on(
    start: Start, open_tap: Callable[..., Tap], library: NewLibrary
) -> None:
    mapper = start()
    at, length = mapper.map(library())
    tap = open_tap()
    tap.source.scan_all()
    reported = tap.during(lambda: mapper.unmap(at, length), mapper.pid)
    assert spans(reported) == [(RANGE, at, at + pages(length))]
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
    mapper.emit("memfd", "some name", new)
    mapper.map(other, "at", f"{at:x}")
    mapper.protect(at, length, "r")
    mapper.protect(at, length, "rx")
    with mapper.fork() as child:
        child.exec()
    mapper.emit("thread", "idle", "-")
    mapper.map(new)
    tap.flush()
    reported = [
        (r.type, path_of(r.text) if isinstance(r, MapRecord) else "", r.flags & FLAG_NEEDS_RESCAN)
        for r in tap.records
        if r.tgid == mapper.pid and r.type != INTRO
    ]
    assert reported[1:] == [
        (MAP, str(new), 0),
        (MAP, "/memfd:some name", 0),
        (RANGE, "", 0),
        (MAP, str(other), 0),
        (RANGE, "", 0),
        (MAP, str(other), 0),
        (MAP, str(new), FLAG_NEEDS_RESCAN),
    ]
    assert [r.type for r in tap.records if r.tgid == child.pid][:3] == [FORK, EXEC, INTRO]
    assert {id_of(r)[:3] for r in tap.maps(mapper.pid, new)} == {id_by_stat(new)[:3]}
    assert {path_of(row.text) for row in scan_of(tap, mapper.pid).maps} >= {str(new), str(other)}


def test_a_verdict_has_the_size_that_the_kernel_expects(tap: Tap) -> None:
    tap.source.answer({bytes(64): 0}, is_wanted=True)
    assert tap.source._verdicts.lookup(bytes(64)) is not None
