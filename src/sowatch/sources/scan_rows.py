"""`ProcessScan`: what a scan found of one process; `MapRows`: its rows, packed until they are merged.

A `MapRecord` is about 1,000 bytes, a packed row 32, and a full scan holds the rows of all processes until they are
merged with the records that came meanwhile. How many mappings there are is decided by any user of the host. The
kernel's iterator sends rows packed; those that are read from ``/proc`` are packed in a large scan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Mapping as ReadOnly
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from sowatch.bpf.records import (
    FLAG_AGAIN,
    FLAG_COMPAT,
    FLAG_SHARED_VM,
    ROW,
    MapRecord,
    ProcessRecord,
    Record,
    RecordType,
    RowsRecord,
    ScanRecord,
)

__all__ = ["MAX_PLAIN_ROWS", "Grouping", "MapRows", "ProcessScan", "Row", "RowPool", "group", "in_slices"]

#: So many rows of one scan that did not come packed are kept as they are, because that is faster: some 10 MB.
MAX_PLAIN_ROWS: Final = 10_000
#: The number of the first file of each session of the iterator.
FIRST_FILE: Final = 1
#: So many rows of a scan, or records, are worked on in some 10 ms.
SLICE: Final = 256

R = TypeVar("R")

#: One mapping, as `MapRows.rows` gives it: a record that says which file it is, all flags, t_ns, start, end, and
#: offset_bytes.
Row = tuple[MapRecord, int, int, int, int, int]


class RowPool:
    """What the packed rows of one scan share: each file once, however many processes have it mapped.

    Attributes:
        plain: rows of the scan that were not packed.
        files: what says which file a row is of, by the number that the row has.
    """

    __slots__ = ("_numbers", "files", "limit", "plain")

    def __init__(self, limit: int = MAX_PLAIN_ROWS) -> None:
        self.limit = limit
        self.plain = 0
        self.files: dict[int, MapRecord] = {}
        self._numbers: dict[tuple[Any, ...], int] = {}

    def number(self, row: MapRecord) -> int:
        """The number of its file."""
        file = (row.key, row.changed_ns, row.place, row.mode, row.text)
        number = self._numbers.get(file)
        if number is None:
            number = self._numbers[file] = len(self._numbers)
            self.files[number] = row._replace(flags=0)
        return number


class _Block:
    """Packed rows of one process that agree in all but file, flags and range."""

    __slots__ = ("files", "head", "rows")

    def __init__(self, head: tuple[Any, ...], files: ReadOnly[int, MapRecord], rows: bytes) -> None:
        #: tgid, tid, start_ns, t_ns, exec_id, activity, comm.
        self.head = head
        self.files = files
        self.rows = rows


class MapRows:
    """Rows of one process, in order. Each iteration over packed ones makes them anew.

    Args:
        rows: the first ones.
        pool: of the scan; its own if None.
    """

    __slots__ = ("_blocks", "_plain", "_pool")

    def __init__(self, rows: Iterable[MapRecord] = (), pool: RowPool | None = None) -> None:
        self._pool = pool or RowPool()
        self._plain: list[MapRecord] = []
        self._blocks: list[_Block] = []
        for row in rows:
            self.append(row)

    def append(self, row: MapRecord) -> None:
        """Adds one more."""
        pool = self._pool
        if pool.plain < pool.limit and not self._blocks:
            pool.plain += 1
            self._plain.append(row)
            return
        head = (row.tgid, row.tid, row.start_ns, row.t_ns, row.exec_id, row.activity, row.comm)
        packed = ROW.pack(row.start, row.end, row.offset_bytes, pool.number(row), row.flags)
        if self._blocks and self._blocks[-1].head == head:
            self._blocks[-1].rows += packed
        else:
            self._blocks.append(_Block(head, pool.files, packed))

    def take(self, record: RowsRecord, files: ReadOnly[int, MapRecord]) -> None:
        """Adds those that one record has.

        Args:
            record: of this process.
            files: that the rows name by their numbers. Must have the same for those for ever.
        """
        head = (record.tgid, record.tid, record.start_ns, record.t_ns, record.exec_id, record.activity, record.comm)
        self._blocks.append(_Block(head, files, record.rows))

    def __len__(self) -> int:
        return len(self._plain) + sum(len(block.rows) for block in self._blocks) // ROW.size

    def first(self) -> MapRecord:
        """The first one.

        Raises:
            StopIteration: there is none.
        """
        return next(iter(self))

    @property
    def comm(self) -> bytes:
        """What the process is called, by the newest of its rows; empty without any."""
        return self._blocks[-1].head[-1] if self._blocks else self._plain[0].comm if self._plain else b""

    def rows(self) -> Iterator[Row]:
        """What distinguishes each row from others: all that the mapping table asks for."""
        for row in self._plain:
            yield row, row.flags, row.t_ns, row.start, row.end, row.offset_bytes
        for block in self._blocks:
            files, t_ns = block.files, block.head[3]
            for start, end, offset_bytes, number, flags in ROW.iter_unpack(block.rows):
                file = files[number]
                yield file, flags | file.flags, t_ns, start, end, offset_bytes

    def __iter__(self) -> Iterator[MapRecord]:
        yield from self._plain
        comm = self.comm
        for block in self._blocks:
            tgid, tid, start_ns, t_ns, exec_id, activity, _ = block.head
            for start, end, offset_bytes, number, flags in ROW.iter_unpack(block.rows):
                file = block.files[number]
                yield file._replace(
                    type=RecordType.MAP,
                    flags=flags | file.flags,
                    tgid=tgid,
                    tid=tid,
                    start_ns=start_ns,
                    t_ns=t_ns,
                    exec_id=exec_id,
                    activity=activity,
                    start=start,
                    end=end,
                    offset_bytes=offset_bytes,
                    comm=comm,
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
        #: What the rows of the session name, by number.
        self._files: dict[int, MapRecord] = {}

    def scans(self) -> list[ProcessScan]:
        """One of each process so far."""
        return list(self._found.values())

    def add(self, rows: Iterable[Record]) -> None:
        """Takes rows."""
        found, pool = self._found, self._pool
        for row in rows:
            if row.type == RecordType.FILE:
                if row.start == FIRST_FILE:  # type: ignore[union-attr]
                    self._files = {}  # of the next session; earlier rows go on with theirs
                self._files[row.start] = row  # type: ignore[union-attr,assignment]
                continue
            scan = found.get(row.tgid)
            if scan is None:
                maps = MapRows(pool=pool)
                scan = found[row.tgid] = ProcessScan(row.tgid, row.start_ns, row.t_ns, row.t_ns, maps=maps)
            scan.end_ns = max(scan.end_ns, row.t_ns)
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
            if row.type == RecordType.ROWS:
                scan.maps.take(row, self._files)  # type: ignore[arg-type]
            elif row.type == RecordType.MAP:
                scan.maps.append(row)  # type: ignore[arg-type]
            elif row.type == RecordType.INTRO:
                scan.intro = row  # type: ignore[assignment]
