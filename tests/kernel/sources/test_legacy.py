"""What kernels from 5.10 to 5.16 run, forced on this one: it tells the same, but for what its limits say.

`tools/matrix` runs the ordinary tests with it under 5.10, where it is all that there is.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import sowatch.bpf
from sowatch.bpf.records import FLAG_IMAGE, FLAG_NEEDS_RESCAN, MapRecord, RecordType, path_of
from sowatch.model.config import Config
from sowatch.sources.base import Report
from sowatch.sources.core import PROCESS_HEAD
from sowatch.sources.legacy import FIRST_ACTIVITY, OLD_OBJECT, PROCESS_TAIL
from sowatch.sources.legacy import OldKernelSource as Old
from support import bpfsys
from support.kernel import (
    IN_OWN_MOUNTS,
    Tap,
    executable_ranges,
    id_by_stat,
    id_of,
    kinds_of,
    only,
    pages,
    scan_of,
    spans,
    with_prelude,
)
from support.programs import Mapper

PAGE = 4096
PROGRAMS = Path(sowatch.bpf.__file__).parent / "programs"
MAP, RANGE, NEEDS_RESCAN = RecordType.MAP, RecordType.RANGE, RecordType.NEEDS_RESCAN
#: enum bpf_func_id of Linux 5.10: the last one is redirect_peer.
LAST_HELPER = 155

Start = Callable[..., Mapper]
NewLibrary = Callable[..., Path]


@pytest.fixture(scope="module")
def old_tap(programs: Any, long_scratch: Path, deadline: Any) -> Iterator[Tap]:
    error = bpfsys.why_no_bpf()
    if error is not None:
        pytest.skip(f"bpf(2) cannot create a map: {error.strerror}")
    with Tap(programs["mapper"], long_scratch, deadline(10), kind=Old) as tap:
        yield tap


@pytest.fixture
def tap(old_tap: Tap) -> Tap:
    old_tap.reset()
    return old_tap


# ---- what the object asks of a kernel -------------------------------------------------------------


def disassembled(*options: str) -> str:
    return subprocess.run(
        ["llvm-objdump", "-d", *options, PROGRAMS / OLD_OBJECT], check=True, capture_output=True, text=True
    ).stdout


def test_it_calls_no_helper_that_5_10_does_not_have() -> None:
    # Of a call of a helper the source register is 0, of one of our own functions 1.
    called = {int(number) for number in re.findall(r"85 00 00 00 (?:[0-9a-f]{2}\s){4}call (\d+)", disassembled())}
    assert len(called) > 10
    assert max(called) <= LAST_HELPER


def test_its_atomic_operations_are_additions_that_give_no_value() -> None:
    lines = [line.split("\t")[-1] for line in disassembled("--no-show-raw-insn").splitlines()]
    atomic = [line for line in lines if re.search("lock|atomic|xchg", line)]
    assert atomic
    assert [
        one for one in atomic if not re.fullmatch(r"lock \*\(u(32|64) \*\)\(r\d+ [+-] \d+\) \+= [rw]\d+", one)
    ] == []


def test_it_hands_no_function_to_a_helper() -> None:
    reported = disassembled("-r")
    assert "R_BPF_64_32" in reported  # our own functions are called
    named = set(re.findall(r"R_BPF_64_64\s+(\S+)", reported))
    assert "processes" in named
    assert not {name for name in named if name.startswith((".text", "step_up", "take_vma"))}


def test_a_process_entry_is_read_as_it_is_written() -> None:
    source = Old(Config())
    try:
        size = source._processes.value_bytes
    finally:
        source.close()
    assert PROCESS_TAIL.size == 4 + 512 + 4 + 4 + 512
    assert size == 100 + PROCESS_TAIL.size
    assert FIRST_ACTIVITY.size == 76
    assert PROCESS_HEAD.size == 40


# ---- readings -------------------------------------------------------------------------------------


def test_a_record_and_a_reading_agree_on_every_field_of_a_mapping(tap: Tap, start: Start, library: NewLibrary) -> None:
    mapper, new = start(), library()
    mapper.map(new, "offset", PAGE)
    tap.flush()
    live = tap.maps(mapper.pid, new)[-1]
    (row,) = [row for row in scan_of(tap, mapper.pid).maps if path_of(row.text) == str(new)]
    names = ("tgid", "start_ns", "exec_id", "key", "start", "end", "offset_bytes", "comm", "mode", "text", "flags")
    assert {name: getattr(live, name) for name in names} == {name: getattr(row, name) for name in names}


def test_a_file_below_an_overlay_is_the_same_in_a_record_and_in_a_reading(
    tap: Tap, start: Start, scratch: Path, template: Path, programs: Any
) -> None:
    for name in ("lower", "upper", "work", "merged"):
        (scratch / name).mkdir()
    low = scratch / "lower/liblow.so"
    low.write_bytes(template.read_bytes())
    options = ",".join(f"{name}dir={scratch}/{name}" for name in ("lower", "upper", "work"))
    mount = f"mount -t overlay overlay -o {options} {scratch}/merged"
    mapper = start(with_prelude(scratch, programs["mapper"], mount, launcher=IN_OWN_MOUNTS))
    mapper.map(scratch / "merged/liblow.so")
    tap.flush()
    live = tap.maps(mapper.pid, scratch / "merged/liblow.so")[-1]
    rows = [row for row in scan_of(tap, mapper.pid).maps if path_of(row.text).endswith("liblow.so")]
    assert [row.key for row in rows] == [live.key]
    assert id_of(live)[:3] == id_by_stat(low)[:3]


@pytest.mark.parametrize("name", ["some name", "a/b"])
def test_memory_files_and_deleted_ones_are_read_as_they_are(
    tap: Tap, start: Start, library: NewLibrary, name: str
) -> None:
    mapper, new = start(), library()
    mapper.map(new)
    new.unlink()
    mapper.emit("memfd", name, os.fspath("/bin/true"))
    tap.flush()
    reported = {(path_of(r.text), r.key) for r in tap.maps(mapper.pid) if not r.flags & FLAG_IMAGE}
    read = {(path_of(row.text), row.key) for row in scan_of(tap, mapper.pid).maps}
    assert f"/memfd:{name}" in {path for path, _ in read}
    assert {path for path, _ in read} >= {str(new)}
    assert {one for one in read if one[0].startswith("/memfd:")} <= reported


def test_what_mprotect_makes_executable_a_reading_shows(tap: Tap, start: Start, library: NewLibrary) -> None:
    mapper, new = start(), library()
    at, length = mapper.map(new, "noexec")
    assert kinds_of(tap.during(lambda: mapper.protect(at, length, "rx"), mapper.pid)) == [NEEDS_RESCAN]
    rows = [row for row in scan_of(tap, mapper.pid).maps if path_of(row.text) == str(new)]
    assert {(row.start, row.end) for row in rows} == executable_ranges(mapper.pid, new.stat().st_ino)
    reported = tap.during(lambda: mapper.protect(at, length, "r"), mapper.pid)
    assert spans(reported) == [(RANGE, at, at + pages(length))]


def test_images_are_the_executable_and_a_doubt_and_a_reading_shows_both(tap: Tap, start: Start, programs: Any) -> None:
    tap.source.reports.set(Report.IMAGES)
    mapper = start()
    tap.flush()
    images = [r for r in tap.maps(mapper.pid) if r.flags & FLAG_IMAGE]
    assert [path_of(image.text) for image in images] == [str(programs["mapper"])]
    assert NEEDS_RESCAN in kinds_of([r for r in tap.records if r.tgid == mapper.pid])
    tap.source.reports.set(Report.IMAGES | Report.RANGES)
    scan = tap.source.scan_process(mapper.pid)
    assert scan
    read = [row for row in scan.maps if row.flags & FLAG_IMAGE]
    assert len(read) == 2
    assert images[0].key in {row.key for row in read}


# ---- who is followed ------------------------------------------------------------------------------


def test_a_settled_process_is_silent_until_it_maps_a_wanted_file(tap: Tap, start: Start, library: NewLibrary) -> None:
    first = start()
    tap.flush()
    tap.source.answer({record.key: record.place for record in tap.maps(first.pid)}, is_wanted=False)
    late, unwanted = start(), library("libunwanted.so")
    at, length = late.map(unwanted)
    tap.source.answer(tap.places_of(late.pid, unwanted), is_wanted=False)
    record = tap.maps(late.pid)[-1]
    assert isinstance(record, MapRecord)
    assert not tap.source.untrack(late.pid, record.start_ns, record.activity - 1)
    assert tap.source.untrack(late.pid, record.start_ns, record.activity)
    tracked = tap.source.tracked(late.pid)
    assert tracked
    assert tracked.activity == 0
    assert tap.during(lambda: late.unmap(at, length), late.pid) == []
    assert only([r for r in tap.during(lambda: late.map(library()), late.pid) if r.type == MAP]).flags == 1


def test_a_range_that_a_threaded_process_mapped_is_never_overlooked(
    tap: Tap, start: Start, library: NewLibrary
) -> None:
    mapper = start()
    mapper.emit("thread", "idle", "-")
    at, length = mapper.map(library())
    tracked = tap.source.tracked(mapper.pid)
    assert tracked
    assert tracked.range_count > 32
    scan_of(tap, mapper.pid)
    reported = tap.during(lambda: mapper.unmap(at, length), mapper.pid)
    assert [(r.type, r.flags & FLAG_NEEDS_RESCAN) for r in reported] == [(NEEDS_RESCAN, FLAG_NEEDS_RESCAN)]
