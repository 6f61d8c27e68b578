"""`ProcReader`: what a process has mapped, read from ``/proc`` in the form the kernel's iterator gives it.

For strategies, and kernels, that have no iterator. Names nothing but what ``/proc`` shows: the generation of an inode
is 0, and on overlayfs (6.8 and newer) and btrfs the device is the one that stat shows.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from sowatch.bpf.records import (
    FLAG_DELETED,
    FLAG_IMAGE,
    FLAG_MANY,
    MAX_FILE_RANGES,
    MapRecord,
    ProcessRecord,
    RecordType,
    text_of,
)
from sowatch.linux.mapped_rows import leaves_open
from sowatch.linux.proc import Miss, ProcFs
from sowatch.linux.proc_parse import MapRow, Stat, seen_path
from sowatch.model.identity import FileId
from sowatch.sources.scan_rows import MapRows, ProcessScan, RowPool

__all__ = ["FileName", "Listed", "Look", "ProcReader", "file_id_in", "listed", "resolve_new", "with_unlisted"]

#: What is tracked: the value itself means nothing, only that it is not 0.
_TRACKED: Final = 1


#: What distinguishes views of the file system (root inode, device and mount namespace), and the root's path.
View = tuple[int, int, bytes]


class FileName(NamedTuple):
    """What sources that find files in ``/proc`` file verdicts under: a file by one name in one view."""

    file_id: FileId
    path: bytes
    is_deleted: bool
    view: Hashable

    @property
    def in_any_view(self) -> tuple[FileId, bytes, bool]:
        """The file and its name without the view."""
        return self.file_id, self.path, self.is_deleted


class Look(NamedTuple):
    """One read of a process: its stat, its executable mappings of files, and when."""

    stat: Stat
    rows: list[MapRow]
    begin_ns: int
    end_ns: int


class Listed(NamedTuple):
    """A row that is listed, up to ``end``; ``unlisted`` of its file stand between it and that, None if none can."""

    row: MapRow
    end: int
    unlisted: int | None = None


def listed(rows: Sequence[MapRow]) -> list[Listed]:
    """The rows of one process without those that are too many of one file.

    Of a file with more than `MAX_FILE_RANGES` the first two are left, and the second stands for all after it.
    """
    if len(rows) <= MAX_FILE_RANGES:
        return [Listed(row, row.end) for row in rows]
    files: dict[MapRow, list[MapRow]] = {}
    for row in rows:
        files.setdefault(row._replace(start=0, end=0, perms="", offset_bytes=0), []).append(row)
    found: list[Listed] = []
    for ours in files.values():
        if len(ours) <= MAX_FILE_RANGES:
            found += [Listed(row, row.end) for row in ours]
        else:
            found += [Listed(ours[0], ours[0].end), Listed(ours[1], max(row.end for row in ours), len(ours) - 2)]
    found.sort(key=lambda one: one.row.start)
    return found


def resolve_new(proc: ProcFs, pid: int, rows: Sequence[MapRow], known: Mapping[MapRow, MapRow]) -> dict[MapRow, MapRow]:
    """What rows of a process are whose text leaves something open; see `ProcFs.resolve`.

    Args:
        proc: the host's.
        pid: of the process.
        rows: as maps shows them now.
        known: what this gave before for the same program. To resolve a row on btrfs opens a file.
    """
    left_open = [row for row in rows if leaves_open(row)]
    new = [row for row in left_open if row not in known]
    found = dict(zip(new, proc.resolve(pid, new), strict=True))
    # The subvolume of a file that has lost its name may not be shown to everybody.
    subvolumes = {(row.start, row.major, row.minor, row.inode): known[row].subvolume for row in known} if new else {}
    for row, one in found.items():
        if not one.subvolume:
            known_one = subvolumes.get((row.start, row.major, row.minor, row.inode), 0)
            found[row] = one._replace(subvolume=known_one)
    return {row: found.get(row) or known[row] for row in left_open}


def with_unlisted(record: MapRecord, one: Listed) -> MapRecord:
    """The record of a row that is listed."""
    if one.unlisted is None:
        return record
    return record._replace(flags=record.flags | FLAG_MANY, end=one.end, offset_bytes=one.unlisted)


class ProcReader:
    """Reads processes below one proc root. Holds nothing open; any thread may use it."""

    def __init__(self, proc: ProcFs) -> None:
        self.proc = proc
        #: Of the full scan that goes on.
        self.pool: RowPool | None = None

    def look(self, pid: int) -> Look | None:
        """The mappings of a process; None if it is gone, a kernel thread or not ours to see."""
        begin_ns = time.monotonic_ns()
        first = self.proc.stat(pid)
        if isinstance(first, Miss) or first.is_kernel_thread:
            return None
        rows = self.proc.executable_maps(pid)
        last = self.proc.stat(pid)
        if isinstance(rows, Miss) or isinstance(last, Miss) or last.start_ticks != first.start_ticks:
            return None
        if not rows and isinstance(self.proc.live_thread(pid), Miss):
            return None
        return Look(last, rows, begin_ns, time.monotonic_ns())

    def read(self, pid: int) -> ProcessScan | None:
        """The scan of one process, as `sowatch.sources.core.EventSource.scan_process` gives it."""
        look = self.look(pid)
        return None if look is None else self.scan_of(look)

    def scan_of(self, look: Look) -> ProcessScan:
        """The same from a read that was made already."""
        pid, start_ns = look.stat.pid, look.stat.start_ns
        scan = ProcessScan(pid, start_ns, look.begin_ns, look.end_ns, maps=MapRows(pool=self.pool), activity=_TRACKED)
        scan.exec_id = int(look.stat.has_executed)
        scan.is_compat = bool(self.proc.is_32bit(pid))
        if look.rows:
            scan.intro = self.introduce(look.stat, look.rows, RecordType.INTRO, look.end_ns)
            view = self.view_of(pid)
            rows = listed(self.proc.resolve(pid, look.rows))
            images = self.images(pid, [one.row for one in rows])
            for one in rows:
                flags = FLAG_IMAGE if one.row in images else 0
                record = self.map_record(look.stat, view, one.row, t_ns=look.end_ns, flags=flags)
                scan.maps.append(with_unlisted(record, one))
        return scan

    def view_of(self, pid: int) -> View:
        """Its view of the file system; all zero if it is gone."""
        base = self.proc.root_dir(pid)
        if isinstance(base, Miss):
            return (0, 0, b"/")
        try:
            root = os.stat(base)
            namespace = os.stat(base.removesuffix("root") + "ns/mnt")
            path = os.readlink(base.encode())
        except OSError:
            return (0, 0, b"/")
        return (root.st_ino, (root.st_dev << 32 ^ namespace.st_ino) & (1 << 64) - 1, path)

    def images(self, pid: int, rows: list[MapRow]) -> set[MapRow]:
        """The rows that exec has mapped, by what the process shows: of the main executable and of the interpreter."""
        exe = self.proc.exe(pid)
        raw = None if isinstance(exe, Miss) else exe.raw
        base = self.proc.interpreter_base(pid)
        return {row for row in rows if row.raw == raw or (base and row.start - row.offset_bytes == base)}

    def map_record(
        self, of: Stat, view: tuple[int, int, bytes], row: MapRow, *, t_ns: int, flags: int = 0
    ) -> MapRecord:
        """A row, resolved, as the record of an executable mapping."""
        flags |= FLAG_DELETED if row.is_deleted else 0
        path = seen_path(row.path, view[2])
        key = FileName(file_id_in(row), path, False, view[:2])
        text = text_of(path, is_deleted=row.is_deleted)
        return MapRecord(
            **_head(of, RecordType.MAP, flags, t_ns),
            key=key,
            start=row.start,
            end=row.end,
            offset_bytes=row.offset_bytes,
            changed_ns=0,  # maps does not show it
            place=0,
            comm=of.comm,
            # Devices and FIFOs can be mapped too, but only their inode would show it. What has no path is no file.
            mode=stat.S_IFREG if path.startswith(b"/") else 0,
            path_bytes=len(text),
            text=text,
            file_id=key.file_id,
            view=key.view,
        )

    def introduce(self, of: Stat, rows: Sequence[MapRow], kind: int, t_ns: int) -> ProcessRecord:
        """Who a process is. What is gone by now, or not ours to see, is left empty.

        Args:
            of: its stat.
            rows: its mappings, to find the main executable among them.
            kind: FORK, EXEC or INTRO.
            t_ns: the time of the record.
        """
        pid = of.pid
        process = self.proc.process(pid)
        exe = process.exe if process is not None else None
        path = text_of(os.fsencode(exe)) if exe else b""
        cgroup = process.cgroup if process is not None else None
        cgroup_text = text_of(os.fsencode(cgroup)) if cgroup else b""
        return ProcessRecord(
            **_head(of, kind, 0, t_ns),
            parent_start_ns=0,
            parent_tgid=0,
            ppid=of.ppid,
            uid=process.uid if process is not None else None,  # type: ignore[arg-type]
            ns_pid=process.ns_pid if process is not None else None,  # type: ignore[arg-type]
            exe=self._exe_id(pid, rows),
            interpreter_base=0,
            root=None,
            comm=of.comm,
            cgroup_bytes=len(cgroup_text),
            path_bytes=len(path),
            cgroup=cgroup_text,
            path=path,
        )

    def _exe_id(self, pid: int, rows: Sequence[MapRow]) -> FileId | None:
        """The main executable, as its own row shows it."""
        exe = self.proc.exe(pid) if rows else Miss.ABSENT
        if isinstance(exe, Miss):
            return None
        own = next(([row] for row in rows if row.raw == exe.raw), [])
        return next((file_id_in(row) for row in self.proc.resolve(pid, own)), None)


def file_id_in(row: MapRow) -> FileId:
    """The file that a row, resolved, shows; its generation is not shown."""
    return FileId(row.major, row.minor, row.inode, subvolume=row.subvolume)


def _head(of: Stat, kind: int, flags: int, t_ns: int) -> dict[str, Any]:
    """The fields of struct record."""
    return {
        "size": 0,
        "type": kind,
        "flags": flags,
        "tgid": of.pid,
        "tid": of.pid,
        "start_ns": of.start_ns,
        "t_ns": t_ns,
        # How often is not shown; but a child that has executed nothing may have its parent's address space.
        "exec_id": int(of.has_executed),
        "activity": _TRACKED,
    }
