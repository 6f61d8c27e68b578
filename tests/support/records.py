"""Writers of the records and readings that the kernel side sends, as values and as bytes.

The bytes are put together by hand from ``programs/records.h``, not with the parser's own structs, so that the two
check each other.
"""

from __future__ import annotations

import dataclasses
import struct
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sowatch.bpf import records as wire
from sowatch.bpf.records import MapRecord, ProcessRecord, RangeRecord, Record, RecordType, RowsRecord, ScanRecord
from sowatch.model.identity import TICK_NS, FileId
from sowatch.sources.scan_rows import ProcessScan, group

__all__ = ["PAGE", "REGULAR", "File", "Proc", "key_of", "scan", "text_of", "to_bytes"]

R = TypeVar("R", MapRecord, ProcessRecord, RangeRecord, RowsRecord, ScanRecord)

PAGE = 0x1000
REGULAR = 0o100644
#: The view of the agent: root_dentry and root_mnt of every key, unless told otherwise.
ROOT = (0x7000, 0x7001)


def text_of(path: str) -> bytes:
    """The path as the kernel walks it: components from the leaf up, each ended by a NUL."""
    parts = path.encode("utf-8", "surrogateescape").split(b"/")
    return b"".join(part + b"\0" for part in reversed(parts) if part)


def key_of(
    inode: int,
    *,
    dev: tuple[int, int] = (254, 0),
    generation: int = 1,
    subvolume: int = 0,
    dentry: int = 0x5000,
    mnt: int = 0x6000,
    root: tuple[int, int] = ROOT,
    name_hash: int = 0xABCD,
    epoch: int = 0,
) -> bytes:
    """The bytes of a struct file_key."""
    file = struct.pack("=QQII", inode, subvolume, dev[0] << 20 | dev[1], generation)
    return file + struct.pack("=QQQQII", dentry, mnt, root[0], root[1], name_hash, epoch)


@dataclass(frozen=True)
class File:
    """A file under one name."""

    path: str = "/usr/lib/libssl.so.3"
    inode: int = 100
    mode: int = REGULAR
    is_deleted: bool = False
    is_partial: bool = False
    changed_ns: int = 1
    place: int = 1
    dentry: int = 0
    root: tuple[int, int] = ROOT
    #: Written as it is; for names that hold a slash, which only a memfd can.
    text: bytes | None = None

    @property
    def id(self) -> FileId:
        return FileId(254, 0, self.inode, 1)

    @property
    def key(self) -> bytes:
        return key_of(self.inode, dentry=self.dentry or self.inode << 8, root=self.root)

    def but(self, **changes: Any) -> File:
        """The same file with something changed."""
        return dataclasses.replace(self, **changes)


@dataclass
class Proc:
    """A process that records are written about. ``start_ticks`` tells it from others with its pid."""

    pid: int = 10
    start_ticks: int = 1
    comm: bytes = b"nginx"
    uid: int = 33
    ns_pid: int = 7
    ppid: int = 1
    cgroup: str = "/system.slice/nginx.service"
    exe: File = field(default_factory=lambda: File("/usr/sbin/nginx", 1))
    interpreter_base: int = 0
    exec_id: int = 1
    #: How many mappings made the kernel follow it, as its next records say.
    activity: int = 1

    @property
    def start_ns(self) -> int:
        # Not a whole tick: the kernel's word is finer than /proc's.
        return self.start_ticks * TICK_NS + 77

    def _head(self, kind: int, t_ns: int, flags: int) -> tuple[int, ...]:
        return (0, kind, flags, self.pid, self.pid, self.start_ns, t_ns, self.exec_id, self.activity)

    def map(self, file: File, start: int = PAGE, end: int | None = None, *, t: int = 0, flags: int = 0) -> MapRecord:
        """RECORD_MAP: ``file`` at [start, end); a page if no end is given."""
        end = start + PAGE if end is None else end
        text = text_of(file.path) if file.text is None else file.text
        flags |= wire.FLAG_DELETED * file.is_deleted | wire.FLAG_PARTIAL * file.is_partial
        head = self._head(RecordType.MAP, t, flags)
        where = file.key, start, end, 0, file.changed_ns, file.place
        named = len(text), text, file.id, file.key[wire.ROOT]
        return _sized(MapRecord(*head, *where, _comm(self.comm), file.mode, *named))

    def tentative(
        self, file: File, start: int = PAGE, end: int | None = None, *, t: int = 0, flags: int = 0
    ) -> MapRecord:
        """The same with FLAG_NEEDS_RESCAN: the one that turned the bit on."""
        return self.map(file, start, end, t=t, flags=flags | wire.FLAG_NEEDS_RESCAN)

    def file(self, number: int, file: File, *, t: int = 0) -> MapRecord:
        """RECORD_FILE: rows of this session name ``file`` by this number."""
        record = self.map(file, t=t)
        return record._replace(type=RecordType.FILE, activity=0, start=number, end=0, comm=bytes(16))

    def rows(self, *rows: tuple[int, int, int, int], t: int = 0) -> RowsRecord:
        """RECORD_ROWS: rows as (number of the file, flags, start, end)."""
        packed = b"".join(struct.pack("=QQQII", start, end, 0, file, flags) for file, flags, start, end in rows)
        return _sized(
            RowsRecord(*self._head(RecordType.ROWS, t, 0), _comm(self.comm), len(rows), 0, packed)  # type: ignore[arg-type]
        )

    def range(self, start: int, end: int, *, t: int = 0, flags: int = 0) -> RangeRecord:
        """RECORD_RANGE."""
        return _sized(RangeRecord(*self._head(RecordType.RANGE, t, flags), start, end))

    def needs_rescan(self, *, t: int = 0) -> RangeRecord:
        """RECORD_NEEDS_RESCAN."""
        return _sized(RangeRecord(*self._head(RecordType.NEEDS_RESCAN, t, wire.FLAG_NEEDS_RESCAN), 0, 0))

    def exit(self, *, t: int = 0) -> RangeRecord:
        """RECORD_EXIT."""
        return _sized(RangeRecord(*self._head(RecordType.EXIT, t, 0), 0, 0))

    def visit(self, *, t: int = 0, flags: int = 0, space: int = 0) -> ScanRecord:
        """RECORD_SCAN; ``space`` is the number of its address space."""
        return _sized(ScanRecord(*self._head(RecordType.SCAN, t, flags), space, 0))

    def intro(self, *, t: int = 0) -> ProcessRecord:
        """RECORD_INTRO."""
        return self._process(RecordType.INTRO, t, 0, None, with_exe=True)

    def exec(self, *, t: int = 0, with_exe: bool = False) -> ProcessRecord:
        """RECORD_EXEC, and raises the exec id of what this process writes from now on."""
        self.exec_id += 1
        return self._process(RecordType.EXEC, t, 0, None, with_exe=with_exe)

    def fork(self, child: Proc, *, t: int = 0, flags: int = 0, with_exe: bool = False) -> ProcessRecord:
        """RECORD_FORK, with this process as the parent."""
        child.exec_id = self.exec_id
        return child._process(RecordType.FORK, t, flags, self, with_exe=with_exe)

    def _process(self, kind: int, t_ns: int, flags: int, parent: Proc | None, *, with_exe: bool) -> ProcessRecord:
        cgroup = text_of(self.cgroup)
        path = text_of(self.exe.path) if with_exe else b""
        return _sized(
            ProcessRecord(
                *self._head(kind, t_ns, flags),
                parent.start_ns if parent else 0,
                parent.pid if parent else 0,
                parent.pid if parent else self.ppid,
                self.uid,
                self.ns_pid,
                self.exe.id,
                self.interpreter_base,
                struct.pack("=QQ", *self.exe.root),
                _comm(self.comm),
                len(cgroup),
                len(path),
                cgroup,
                path,
            )
        )


def scan(
    proc: Proc, begin: int, end: int, *rows: MapRecord, intro: bool = False, space: int = 0, flags: int = 0
) -> ProcessScan:
    """A ProcessScan of one process; its rows are records of `Proc.map`, ``flags`` those of the visit."""
    first: list[Record] = [proc.visit(t=begin, space=space, flags=flags)]
    if intro:
        first.append(proc.intro(t=begin))
    (found,) = group([*first, *rows])
    found.end_ns = end
    return found


def to_bytes(record: Record) -> bytes:
    """The record as it stands in the ring, ``size`` included."""
    head = struct.pack("=IHHIIQQII", *record[:9])
    if isinstance(record, MapRecord):
        body = struct.pack("=QQQQQ16sII", *record[10:18])
        data = head + bytes(record.key) + body + record.text  # type: ignore[arg-type]
    elif isinstance(record, ProcessRecord):
        data = head + struct.pack("=QIIII", *record[9:14])
        data += file_id_bytes(record.exe) + struct.pack("=Q", record.interpreter_base) + bytes(record.root) + bytes(32)  # type: ignore[arg-type]
        data += record.comm + struct.pack("=II", record.cgroup_bytes, record.path_bytes) + record.cgroup + record.path
    elif isinstance(record, RowsRecord):
        data = head + struct.pack("=16sII", record.comm, record.row_count, record.reserved) + record.rows
    else:
        data = head + struct.pack("=QQ", record.start, record.end)
    return data + bytes(-len(data) % 8)


def file_id_bytes(file_id: FileId | None) -> bytes:
    """A struct file_id; zeros for none."""
    one = file_id or FileId(0, 0, 0)
    return struct.pack("=QQII", one.inode, one.subvolume, one.major << 20 | one.minor, one.generation)


def _comm(comm: bytes) -> bytes:
    return comm.ljust(16, b"\0")


def _sized(record: R) -> R:
    return record._replace(size=len(to_bytes(record)))
