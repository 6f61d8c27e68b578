"""What the BPF programs send, as tuples. The layout is ``programs/records.h``'s; a test compares them.

Integers are unsigned; times are in ns; ``text`` is a path as NUL-ended components from the leaf up.
"""

from __future__ import annotations

import struct
from collections.abc import Hashable
from functools import lru_cache
from typing import Final, NamedTuple

from sowatch.model.identity import FileId

__all__ = [
    "FLAG_AGAIN",
    "FLAG_ASK",
    "FLAG_COMPAT",
    "FLAG_DELETED",
    "FLAG_IMAGE",
    "FLAG_MANY",
    "FLAG_MPROTECT",
    "FLAG_NEEDS_RESCAN",
    "FLAG_PARTIAL",
    "FLAG_SHARED_VM",
    "FLAG_THROTTLED",
    "MAX_FILE_RANGES",
    "ROW",
    "MapRecord",
    "ProcessRecord",
    "RangeRecord",
    "Record",
    "RecordType",
    "RowsRecord",
    "ScanRecord",
    "SeenRecord",
    "file_and_view_of",
    "file_id_of",
    "key_of_file",
    "parse",
    "parse_answer",
    "parse_seen",
    "path_of",
    "paths_of",
    "root_numbers",
    "shown_as",
    "text_of",
    "who_is",
]


class RecordType:
    """enum record_type."""

    MAP: Final = 1
    RANGE: Final = 2
    NEEDS_RESCAN: Final = 3
    FORK: Final = 4
    EXEC: Final = 5
    EXIT: Final = 6
    INTRO: Final = 7
    SCAN: Final = 8
    FILE: Final = 9
    ROWS: Final = 10


# enum record_flag
FLAG_ASK: Final = 1 << 0
FLAG_NEEDS_RESCAN: Final = 1 << 1
FLAG_DELETED: Final = 1 << 2
FLAG_PARTIAL: Final = 1 << 3
FLAG_SHARED_VM: Final = 1 << 4
FLAG_MPROTECT: Final = 1 << 5
FLAG_IMAGE: Final = 1 << 6
FLAG_COMPAT: Final = 1 << 7
FLAG_AGAIN: Final = 1 << 8
FLAG_THROTTLED: Final = 1 << 9
FLAG_MANY: Final = 1 << 10

#: MAX_FILE_RANGES: so many ranges of one file in one process are listed, and kept.
MAX_FILE_RANGES: Final = 256

#: struct record, 40 bytes.
HEAD: Final = struct.Struct("=IHHIIQQII")
#: struct range_record, 56 bytes.
RANGE: Final = struct.Struct("=IHHIIQQIIQQ")
#: struct map_record, 168 bytes, then path_bytes of text.
MAP: Final = struct.Struct("=IHHIIQQII64sQQQQQ16sII")
#: struct process_record, 168 bytes, then cgroup_bytes and path_bytes of text.
PROCESS: Final = struct.Struct("=IHHIIQQIIQIIII24sQ16s32x16sII")
#: struct rows_record, 64 bytes, then count times struct row, 32 bytes.
ROWS: Final = struct.Struct("=IHHIIQQII16sII")
ROW: Final = struct.Struct("=QQQII")
#: struct file_id, 24 bytes, at the start of struct file_key.
FILE_ID: Final = struct.Struct("=QQII")
#: Which fields of MAP and PROCESS are the struct file_key and the struct file_id.
KEY: Final = 9
EXE: Final = 14
#: Bytes 40 to 56 of struct file_key: root_dentry and root_mnt.
ROOT: Final = slice(40, 56)
ROOT_NUMBERS: Final = struct.Struct("=QQ")
NO_FILE: Final = bytes(FILE_ID.size)
#: Where the answer of ``look_up_file`` stands in reader_scratch: a struct map_record.
ANSWER_OFFSET: Final = 56


class RangeRecord(NamedTuple):
    """struct record or struct range_record: a range, needs-rescan, exit or scan record."""

    size: int
    type: int
    flags: int
    tgid: int
    tid: int
    start_ns: int
    t_ns: int
    exec_id: int
    activity: int = 0
    start: int = 0
    end: int = 0


class ScanRecord(RangeRecord):
    """RECORD_SCAN: one process is scanned."""

    __slots__ = ()

    @property
    def mm(self) -> int:
        """The number of its address space."""
        return self.start


class SeenRecord(RangeRecord):
    """What ``prebuilt.bpf.c`` sends: struct range_record with an enum seen_type."""

    __slots__ = ()

    @property
    def child_tgid(self) -> int:
        """Of SEEN_FORK."""
        return self.start

    @property
    def clone_flags(self) -> int:
        """Of SEEN_FORK."""
        return self.end

    @property
    def is_group_dead(self) -> bool:
        """Of SEEN_EXIT: the kernel says that this was the last thread, as it can from 6.16 on."""
        return bool(self.start)


class MapRecord(NamedTuple):
    """One executable mapping of a file: struct map_record, and what is decoded of it.

    ``key`` is what the source files a verdict under, and means nothing to anybody else; ``file_id`` is the file,
    and ``view`` stands for the root and mount namespace that ``text`` is the path in: two equal ones see the same
    paths. ``place`` stands for every component of the path; 0 if it is not known.
    """

    size: int
    type: int
    flags: int
    tgid: int
    tid: int
    start_ns: int
    t_ns: int
    exec_id: int
    activity: int
    key: Hashable
    start: int
    end: int
    offset_bytes: int
    changed_ns: int
    place: int
    comm: bytes
    mode: int
    path_bytes: int
    text: bytes
    file_id: FileId
    view: Hashable


class ProcessRecord(NamedTuple):
    """struct process_record: fork, exec and intro. ``exe`` is None of one that ends, ``root`` is its view."""

    size: int
    type: int
    flags: int
    tgid: int
    tid: int
    start_ns: int
    t_ns: int
    exec_id: int
    activity: int
    parent_start_ns: int
    parent_tgid: int
    ppid: int
    uid: int
    ns_pid: int
    exe: FileId | None
    interpreter_base: int
    root: Hashable
    comm: bytes
    cgroup_bytes: int
    path_bytes: int
    cgroup: bytes
    path: bytes


class RowsRecord(NamedTuple):
    """struct rows_record: mappings of one process that a scan has met. ``rows`` are each a `ROW`.

    The last two fields of a row are the number of a `RecordType.FILE` that came before, which is a `MapRecord` with
    its number as ``start``, and flags, beside those of that.
    """

    size: int
    type: int
    flags: int
    tgid: int
    tid: int
    start_ns: int
    t_ns: int
    exec_id: int
    activity: int
    comm: bytes
    row_count: int
    reserved: int
    rows: bytes


Record = RangeRecord | MapRecord | ProcessRecord | RowsRecord


def who_is(record: ProcessRecord) -> tuple[object, ...]:
    """What may change of a process that goes on running its program: whose it is, where, and its name."""
    return record.uid, record.ppid, record.cgroup, record.comm.rstrip(b"\0")


_SIZE_AND_TYPE: Final = struct.Struct("=IH")
#: `_make` without counting the fields, which the layouts do: this is the hottest path.
_new: Final = tuple.__new__

#: Files, paths and cgroups that are kept parsed: some 300 bytes each, so that many processes share one object.
MAX_CACHED: Final = 2_048


def parse(data: bytes) -> list[Record]:
    """The records that stand one behind the other in ``data``, which holds whole ones only."""
    found: list[Record] = []
    at = 0
    end = len(data)
    while at < end:
        size, kind = _SIZE_AND_TYPE.unpack_from(data, at)
        if kind in (RecordType.MAP, RecordType.FILE):
            found.append(_map_record(data, at))
        elif kind == RecordType.ROWS:
            fields = ROWS.unpack_from(data, at)
            found.append(_new(RowsRecord, (*fields, data[at + ROWS.size : at + size])))
        elif kind in (RecordType.FORK, RecordType.EXEC, RecordType.INTRO):
            fields = PROCESS.unpack_from(data, at)
            text = at + PROCESS.size
            middle = text + fields[-2]
            exe = None if fields[EXE] == NO_FILE else file_id_of(fields[EXE])
            texts = data[text:middle], data[middle : middle + fields[-1]]
            found.append(_new(ProcessRecord, (*fields[:EXE], exe, *fields[EXE + 1 :], *texts)))
        elif size < RANGE.size:
            found.append(RangeRecord(*HEAD.unpack_from(data, at)))
        else:
            found.append(_new(ScanRecord if kind == RecordType.SCAN else RangeRecord, RANGE.unpack_from(data, at)))
        at += size
    return found


def _map_record(data: bytes, at: int) -> MapRecord:
    fields = MAP.unpack_from(data, at)
    text = at + MAP.size
    return _new(MapRecord, (*fields, data[text : text + fields[-1]], *file_and_view_of(fields[KEY])))


def parse_seen(data: bytes) -> list[SeenRecord]:
    """The same of what ``prebuilt.bpf.c`` has sent."""
    return [SeenRecord._make(record) for record in parse(data) if isinstance(record, RangeRecord)]


def parse_answer(value: bytes) -> tuple[MapRecord, tuple[tuple[int, int], ...]]:
    """What ``look_up_file`` has left in reader_scratch.

    Returns:
        The record, which lacks whose and where it is; and by which (major << 20 | minor, inode) maps may show
        the file: by that of its own, or by the one of overlayfs, which stands where a range would.
    """
    record = _map_record(value, ANSWER_OFFSET)
    return record._replace(type=RecordType.MAP), (shown_as(record.file_id), (record.start, record.end))


def shown_as(file_id: FileId) -> tuple[int, int]:
    """The kernel's dev_t, and the inode."""
    return file_id.major << 20 | file_id.minor, file_id.inode


def key_of_file(key: bytes, file_id: FileId) -> bytes:
    """The struct file_key of another file by the same name in the same view."""
    dev, inode = shown_as(file_id)
    return FILE_ID.pack(inode, file_id.subvolume, dev, file_id.generation) + key[FILE_ID.size :]


def root_numbers(view: Hashable) -> tuple[int, int]:
    """root_dentry and root_mnt, which the kernel's view is."""
    assert isinstance(view, bytes)
    dentry, mnt = ROOT_NUMBERS.unpack(view)
    return dentry, mnt


@lru_cache(MAX_CACHED)
def file_and_view_of(key: bytes) -> tuple[FileId, bytes]:
    """What a struct file_key says of the file and of the view of the file system."""
    return file_id_of(key), key[ROOT]


@lru_cache(MAX_CACHED)
def file_id_of(key: bytes) -> FileId:
    """The FileId in a struct file_key or struct file_id. The kernel's dev_t is major << 20 | minor."""
    inode, subvolume, dev, generation = FILE_ID.unpack_from(key)
    return FileId(dev >> 20, dev & 0xFFFFF, inode, generation, subvolume)


@lru_cache(MAX_CACHED)
def path_of(text: bytes) -> str:
    """The path whose components, from the leaf up, are in ``text``."""
    parts = text.split(b"\0")
    parts.reverse()
    return b"/".join(parts).decode("utf-8", "surrogateescape")


@lru_cache(MAX_CACHED)
def paths_of(text: bytes) -> tuple[str, ...]:
    """The paths of a process's cgroups in ``text``: that of version 2, then those of other hierarchies that differ.

    An empty component begins the next path. The root is ``/``.
    """
    groups: list[list[bytes]] = [[]]
    for part in text.removesuffix(b"\0").split(b"\0") if text else ():
        if part:
            groups[-1].append(part)
        else:
            groups.append([])
    return tuple("/" + b"/".join(reversed(group)).decode("utf-8", "surrogateescape") for group in groups)


def text_of(path: bytes, *, is_deleted: bool = False) -> bytes:
    """A path as ``text``, as the programs would write it: what `path_of` reads.

    Args:
        path: as ``/proc`` shows it.
        is_deleted: it has no name any more. The kernel's own names may hold slashes, and are one component.
    """
    if is_deleted and (path.startswith((b"/memfd:", b"/SYSV")) or path == b"/dev/zero"):
        return path[1:] + b"\0"
    return b"\0".join(reversed(path.split(b"/"))) if path != b"/" else b""
