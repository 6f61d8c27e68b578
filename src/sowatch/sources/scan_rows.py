"""`ProcessScan`: what a scan found of one process; `MapRows`: its rows, packed in a large scan until they are merged.

A `MapRecord` is about 1,000 bytes, and a full scan holds the rows of all processes until they are merged with the
records that came meanwhile. How many mappings there are is decided by any user of the host.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from sowatch.bpf.records import (
    FLAG_AGAIN,
    FLAG_COMPAT,
    FLAG_SHARED_VM,
    MapRecord,
    ProcessRecord,
    Record,
    RecordType,
    ScanRecord,
)

__all__ = ["MAX_PLAIN_ROWS", "Grouping", "MapRows", "ProcessScan", "RowPool", "group", "in_slices"]

#: So many rows of one scan are kept as they are, because that is faster: some 10 MB.
MAX_PLAIN_ROWS: Final = 10_000
#: So many rows of a scan, or records, are worked on in some 10 ms.
SLICE: Final = 256

R = TypeVar("R")

#: Numbers of a packed row: flags, t_ns, activity, start, end, offset_bytes.
_NUMBERS: Final = 6


class RowPool:
    """What the packed rows of one scan share: each file once, however many processes have it mapped.

    Attributes:
        plain: rows of the scan that were not packed.
        files: how a packed row begins, and what it says of its file, by itself.
    """

    __slots__ = ("files", "limit", "plain")

    def __init__(self, limit: int = MAX_PLAIN_ROWS) -> None:
        self.limit = limit
        self.plain = 0
        self.files: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def shared(self, file: tuple[Any, ...]) -> tuple[Any, ...]:
        """The same of a row that came before, if there is one."""
        return self.files.setdefault(file, file)


class MapRows:
    """Rows of one process, in order. Each iteration over packed ones makes them anew.

    Args:
        rows: the first ones.
        pool: of the scan; its own if None.
    """

    __slots__ = ("_files", "_head", "_numbers", "_plain", "_pool")

    def __init__(self, rows: Iterable[MapRecord] = (), pool: RowPool | None = None) -> None:
        self._pool = pool or RowPool()
        self._plain: list[MapRecord] = []
        #: Of the packed ones: tgid, tid, start_ns, exec_id and comm; the file of each; the numbers of each.
        self._head: tuple[Any, ...] = ()
        self._files: list[tuple[Any, ...]] = []
        self._numbers: array[int] = array("Q")
        for row in rows:
            self.append(row)

    def append(self, row: MapRecord) -> None:
        """Adds one more."""
        pool = self._pool
        if pool.plain < pool.limit and not self._files:
            pool.plain += 1
            self._plain.append(row)
            return
        size, kind, flags, tgid, tid, start_ns, t_ns, exec_id, activity, key, start, end, offset, *rest = row
        changed_ns, place, comm, mode, path_bytes, text, file_id, view = rest
        head = (tgid, tid, start_ns, exec_id, comm)
        if head != self._head:
            if self._files:  # it has renamed itself while it was scanned: what it is called now holds
                head = (*self._head[:4], comm)
            self._head = head
        self._files.append(pool.shared((size, kind, key, changed_ns, place, mode, path_bytes, text, file_id, view)))
        self._numbers.extend((flags, t_ns, activity, start, end, offset))

    def __len__(self) -> int:
        return len(self._plain) + len(self._files)

    def first(self) -> MapRecord:
        """The first one.

        Raises:
            StopIteration: there is none.
        """
        return next(iter(self))

    def __iter__(self) -> Iterator[MapRecord]:
        yield from self._plain
        if not self._files:
            return
        tgid, tid, start_ns, exec_id, comm = self._head
        numbers = iter(self._numbers)
        columns = zip(*[numbers] * _NUMBERS, strict=True)
        for file, (flags, t_ns, activity, start, end, offset) in zip(self._files, columns, strict=True):
            size, kind, key, changed_ns, place, mode, path_bytes, text, file_id, view = file
            yield MapRecord(
                size,
                kind,
                flags,
                tgid,
                tid,
                start_ns,
                t_ns,
                exec_id,
                activity,
                key,
                start,
                end,
                offset,
                changed_ns,
                place,
                comm,
                mode,
                path_bytes,
                text,
                file_id,
                view,
            )

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, (MapRows, list)) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"MapRows({list(self)!r})"


@dataclass(slots=True)
class ProcessScan:
    """What one process really has mapped, read from the kernel between ``begin_ns`` and ``end_ns``.

    ``maps`` has one record for each executable mapping of a file that is not ignored. Times are
    CLOCK_MONOTONIC.
    """

    tgid: int
    start_ns: int
    begin_ns: int
    end_ns: int
    intro: ProcessRecord | None = None
    maps: MapRows = field(default_factory=MapRows)
    #: Its activity generation when it was scanned; see `EventSource.untrack`.
    activity: int = 0
    #: A 32-bit process, whose calls are not seen.
    is_compat: bool = False
    #: It was within exec, so nothing could be read; to be read again.
    is_void: bool = False
    #: How often the process has executed a program; None: not known.
    exec_id: int | None = None
    #: Processes with equal numbers share their address space; 0: not known.
    space: int = 0
    #: An untracked process may share it.
    has_untracked_sharers: bool = False


def in_slices(rows: Iterable[R], between: Callable[[], None]) -> Iterator[R]:
    """The same rows; after each `SLICE` of them something else is done."""
    for number, row in enumerate(rows, 1):
        if number % SLICE == 0:
            between()
        yield row


def group(rows: Iterable[Record], pool: RowPool | None = None) -> list[ProcessScan]:
    """Sorts what the iterator wrote into one ProcessScan a process; ``pool`` is that of the whole scan."""
    grouping = Grouping(pool)
    grouping.add(rows)
    return grouping.scans()


class Grouping:
    """The same, where the rows come in batches."""

    def __init__(self, pool: RowPool | None = None) -> None:
        self._pool = pool or RowPool()
        self._found: dict[int, ProcessScan] = {}

    def scans(self) -> list[ProcessScan]:
        """One of each process so far."""
        return list(self._found.values())

    def add(self, rows: Iterable[Record]) -> None:
        """Takes rows."""
        found, pool = self._found, self._pool
        for row in rows:
            scan = found.get(row.tgid)
            if scan is None:
                maps = MapRows(pool=pool)
                scan = found[row.tgid] = ProcessScan(row.tgid, row.start_ns, row.t_ns, row.t_ns, maps=maps)
            scan.end_ns = row.t_ns
            scan.exec_id = row.exec_id
            # An intro has them even while somebody else may be about to map something.
            if row.type != RecordType.INTRO:
                scan.activity = max(scan.activity, row.activity)
            if row.flags & FLAG_COMPAT:
                scan.is_compat = True
            if row.flags & FLAG_AGAIN:
                scan.is_void = True
            if row.type == RecordType.SCAN:
                assert isinstance(row, ScanRecord)
                scan.space = row.mm
                scan.has_untracked_sharers = bool(row.flags & FLAG_SHARED_VM)
            if row.type == RecordType.MAP:
                scan.maps.append(row)  # type: ignore[arg-type]
            elif row.type == RecordType.INTRO:
                scan.intro = row  # type: ignore[assignment]
