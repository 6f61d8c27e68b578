"""A scan of very many rows takes little memory until it is merged, and forgets nothing of what it found."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Iterable
from errno import EAGAIN, EINTR, EIO

import pytest

from sowatch.bpf.records import FLAG_ASK, FLAG_MANY, FLAG_NEEDS_RESCAN, MapRecord, Record, parse
from sowatch.engine.address_space import AddressSpace, MappedFile, Scanned
from sowatch.model.errors import BpfError
from sowatch.model.rules import Rule, RuleSet
from sowatch.sources.iterator_scan import IteratorScan
from sowatch.sources.scan_rows import MAX_PLAIN_ROWS, Grouping, MapRows, RowPool, group
from support.records import PAGE, File, Proc, to_bytes

FILES = [File(f"/usr/lib/{'deep/' * 10}lib{n}.so", n + 1, place=n) for n in range(5)]
RULES = RuleSet([Rule("lib")])
P = Proc()


def rows_of(pid: int, count: int) -> list[MapRecord]:
    """Rows of files by turns, of which nothing but the process is the same."""
    proc = Proc(pid, activity=pid)
    rows = [
        proc.map(FILES[n % 5], 2 * n * PAGE, t=n, flags=FLAG_MANY * (n % 3 == 0) | FLAG_NEEDS_RESCAN * (n % 2))
        for n in range(count)
    ]
    return [row._replace(offset_bytes=n * PAGE, activity=n) for n, row in enumerate(rows)]


def test_packed_rows_are_those_that_were_added_in_their_order():
    rows = rows_of(10, 50)
    rows[7] = rows[7]._replace(end=0xFFFFFFFFFF601000, start=0xFFFFFFFFFF600000)
    for limit in (0, 1, 20, 50, 1000):
        packed = MapRows(rows, RowPool(limit))
        assert list(packed) == rows
        assert list(packed) == rows, "each iteration gives them all"
        assert len(packed) == 50
        assert packed.first() == rows[0]
        assert packed == MapRows(rows)
    assert not MapRows()
    assert MapRows(rows[:3]) != MapRows(rows[:4])


def test_the_first_rows_of_a_scan_are_kept_as_they_are_whichever_process_has_them():
    pool = RowPool()
    kept = rows_of(1, 100)
    scans = [MapRows(kept, pool) for _ in range(MAX_PLAIN_ROWS // 100 + 1)]
    assert pool.plain == MAX_PLAIN_ROWS
    assert scans[0].first() is kept[0]
    assert scans[-1].first() is not kept[0]
    assert scans[-1] == scans[0]
    assert len(pool.files) == len(FILES)


def test_a_process_that_renames_itself_within_a_large_scan_has_its_newer_name():
    old, new = Proc(10, comm=b"old").map(FILES[0]), Proc(10, comm=b"new").map(FILES[1], 8 * PAGE)
    assert {row.comm.rstrip(b"\0") for row in MapRows([old, new], RowPool(0))} == {b"new"}


def test_batches_make_the_same_readings_as_the_whole():
    rows: list[Record] = []
    for pid in range(1, 6):
        rows += [Proc(pid).visit(t=pid, space=pid), Proc(pid).intro(t=pid), *rows_of(pid, 7)]
    for limit in (0, 10_000):
        grouping = Grouping(RowPool(limit))
        for at in range(0, len(rows), 4):
            grouping.add(rows[at : at + 4])
        assert grouping.scans() == group(rows)


def scan_of(chunks: Iterable[bytes]) -> IteratorScan:
    """A scan whose session gives these chunks, through a pipe that keeps them apart."""
    chunks = list(chunks)

    def session(_: int) -> int:
        reader, writer = os.pipe2(os.O_DIRECT | os.O_CLOEXEC)
        for chunk in chunks:
            os.write(writer, chunk)
        os.close(writer)
        return reader

    return IteratorScan(session, (0,))


def test_what_an_iterator_wrote_is_given_once_and_not_kept():
    rows = [Proc(10).map(file) for file in FILES]
    scan = scan_of(to_bytes(row) for row in rows)
    scan()
    assert scan.unparsed_bytes == sum(len(to_bytes(row)) for row in rows)
    given = scan.rows()
    assert next(given) == rows[0]
    assert scan.unparsed_bytes == sum(len(to_bytes(row)) for row in rows[1:])
    assert list(given) == rows[1:]
    assert (list(scan.rows()), scan.unparsed_bytes) == ([], 0)


def session_of(processes: int, count: int) -> list[bytes]:
    """What a session of the iterator writes of processes that have the same files mapped, a chunk a process."""
    chunks = []
    for pid in range(1, processes + 1):
        proc = Proc(pid)
        described = [proc.file(n, file) for n, file in enumerate(FILES, 1)] if pid == 1 else []
        rows = [(1 + n % 5, FLAG_MANY * (n % 3 == 0), 2 * n * PAGE, (2 * n + 1) * PAGE) for n in range(count)]
        batches = [proc.rows(*rows[at : at + 64], t=at) for at in range(0, count, 64)]
        chunks.append(b"".join(to_bytes(record) for record in (proc.visit(), *described, *batches)))
    return chunks


def test_the_rows_of_a_session_are_of_the_files_that_it_has_described():
    grouping = Grouping()
    for chunk in session_of(3, 100):
        grouping.add(parse(chunk))
    for pid, scan in enumerate(grouping.scans(), 1):
        expected = [
            Proc(pid).map(FILES[n % 5], 2 * n * PAGE, t=n // 64 * 64, flags=FLAG_MANY * (n % 3 == 0))
            for n in range(100)
        ]
        assert (scan.end_ns, len(scan.maps), scan.maps.comm) == (64, 100, expected[0].comm)
        assert scan.maps == expected
        assert [row[1:] for row in scan.maps.rows()] == [
            (row.flags, row.t_ns, row.start, row.end, row.offset_bytes) for row in expected
        ]


def test_what_is_so_of_a_file_is_so_of_each_row_of_it():
    gone = File("/usr/lib/gone.so", 7, is_deleted=True)
    (scan,) = group([P.visit(), P.file(1, gone), P.rows((1, FLAG_ASK, PAGE, 2 * PAGE))])
    assert scan.maps == [P.map(gone, flags=FLAG_ASK)]


def test_the_next_session_numbers_its_files_anew():
    rows = [P.file(1, FILES[0]), P.rows((1, 0, PAGE, 2 * PAGE))]
    again = [Proc(11).file(1, FILES[1]), Proc(11).rows((1, 0, PAGE, 2 * PAGE))]
    first, second = group([*rows, *again])
    assert (first.maps, second.maps) == ([P.map(FILES[0])], [Proc(11).map(FILES[1])])


def session_that_raises(errors: list[int], monkeypatch: pytest.MonkeyPatch) -> IteratorScan:
    """A scan with one row, of which the first reads fail with these errors; the scan is given up after the last."""
    chunk = to_bytes(Proc(10).map(FILES[0]))
    scan = scan_of([chunk])
    real_read = os.read

    def read(fd: int, size: int) -> bytes:
        if errors:
            errno = errors.pop(0)
            raise OSError(errno, os.strerror(errno))
        return real_read(fd, size)

    monkeypatch.setattr(os, "read", read)
    return scan


def test_an_iterator_that_passed_very_many_objects_without_a_row_is_read_on(monkeypatch: pytest.MonkeyPatch):
    errors = [EAGAIN, EINTR, EAGAIN]
    scan = session_that_raises(errors, monkeypatch)
    scan()
    assert (errors, list(scan.rows())) == ([], [Proc(10).map(FILES[0])])
    assert scan.progress == 5, "each is progress, as is the session and the row"


def test_an_iterator_that_was_given_up_is_not_read_on(monkeypatch: pytest.MonkeyPatch):
    errors = [EAGAIN, EAGAIN]
    scan = session_that_raises(errors, monkeypatch)
    read = os.read

    def read_and_give_up(fd: int, size: int) -> bytes:
        scan.is_given_up = True
        return read(fd, size)

    monkeypatch.setattr(os, "read", read_and_give_up)
    scan()
    assert (errors, list(scan.rows())) == ([EAGAIN], [])


def test_an_iterator_that_cannot_be_read_is_an_error(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(BpfError):
        session_that_raises([EIO], monkeypatch)()


def test_a_scan_of_very_many_rows_takes_little():
    processes, count = 200, 256
    chunks = session_of(processes, count)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        grouping = Grouping()
        for chunk in chunks:
            scan = IteratorScan(lambda _: -1, (0,))
            scan._chunks.append((0, chunk))
            grouping.add(scan.rows())
        assert sum(len(one.maps) for one in grouping.scans()) == processes * count
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert taken < 50 * processes * count


def test_a_scan_that_finds_nothing_new_leaves_the_ranges_shared_with_those_of_a_fork():
    names = [MappedFile(Proc().map(file), RULES) for file in FILES]
    parent = AddressSpace()
    for number in range(200):
        parent.add(names[number % 5], 2 * number * PAGE, (2 * number + 1) * PAGE, is_image=False)
    child = parent.copy()
    ranges = parent.mappings()[FILES[0].id].ranges

    def found(count: int) -> dict[object, Scanned]:
        made: dict[object, Scanned] = {}
        for number in range(count):
            row = Proc().map(FILES[number % 5], 2 * number * PAGE)
            one = made.setdefault(FILES[number % 5].id, Scanned(names[number % 5], row.flags, row.t_ns))
            one.add(row.flags, row.start, row.end, row.offset_bytes)
        return made

    assert child.replace(found(200)) == ([], [])
    assert child.mappings()[FILES[0].id].ranges is ranges
    child.replace(found(195))
    assert child.mappings()[FILES[0].id].ranges == ranges[:-1]
    assert parent.mappings()[FILES[0].id].ranges is ranges
