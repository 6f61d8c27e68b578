"""Is the mapping table right? An independent scan of ``/proc``, compared with it.

Nothing here uses the kernel side: rows come from ``/proc/PID/maps``, so a fault of the programs, the records or the
mapping table shows as a difference.

Rows and mappings are compared by address and inode, never by path: ``/proc`` shows a path as the
reader sees it, and on overlayfs another device than the real one.
"""

from __future__ import annotations

import os
import stat
import time
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from itertools import accumulate
from typing import Final, Literal

from msgspec import Struct

from sowatch.engine.queries import Known, KnownFile, KnownProcess
from sowatch.linux.descriptors import close_fd
from sowatch.linux.disk_calls import DiskCalls, HangingCalls
from sowatch.linux.elf import read_facts
from sowatch.linux.elf_file import ElfError
from sowatch.linux.openat import reopen
from sowatch.linux.proc import Miss, ProcFs
from sowatch.linux.proc_parse import MapRow, seen_path
from sowatch.model import wire_explain, wire_reports
from sowatch.model.identity import FileId, ProcessId
from sowatch.model.rules import RuleSet
from sowatch.model.stats import Stats
from sowatch.model.wire import SCHEMA

__all__ = ["AuditReport", "Difference", "audit", "audit_line"]

#: A difference counts if it is still the same after being read this often, this far apart.
LOOKS: Final = 4
PAUSE_S: Final = 0.05
#: A file that cannot be read in this time is believed to be what its process says.
READ_TIMEOUT_S: Final = 1.0


class Difference(Struct, frozen=True):
    """Something that the mapping table and ``/proc`` do not agree on.

    ``missing``: mapped, and not in the table. ``extra``: in the table, and not mapped.
    """

    kind: Literal["missing", "extra"]
    pid: int
    path: str
    inode: int
    start: int
    end: int


class AuditReport(Struct, frozen=True):
    """``processes`` that were read, their wanted ``mappings``, and what differs.

    ``unreadable`` processes are there but may not be read by this user, or not by anybody now: those that do
    not answer are ``unread``.
    """

    processes: int
    mappings: int
    unreadable: int
    differences: tuple[Difference, ...]
    seconds: float
    unread: tuple[int, ...] = ()


def audit_line(report: AuditReport, stats: Stats) -> wire_reports.Audit:
    """The object of ``sowatch audit --json`` and of ``GET /audit``; ``stats`` of the watch that was compared."""
    return wire_reports.Audit(
        schema=SCHEMA,
        event="audit",
        processes=report.processes,
        mappings=report.mappings,
        unreadable=report.unreadable,
        unread=list(report.unread),
        seconds=round(report.seconds, 6),
        lost=stats.lost_kernel,
        repairs=stats.repairs,
        differences=[
            wire_explain.Difference(one.kind, one.path, one.inode, [f"{one.start:x}", f"{one.end:x}"], one.pid)
            for one in report.differences
        ],
        process_count=report.processes,
        mapping_count=report.mappings,
        unread_pids=list(report.unread),
        seq=1,
    )


def audit(
    query: Callable[[], Known],
    proc: ProcFs,
    rules: RuleSet,
    unread: Callable[[], Iterable[int]] = tuple,
    *,
    only: int | None = None,
    hanging: HangingCalls | None = None,
) -> AuditReport:
    """Compares all live processes.

    Args:
        query: returns the mapping table as it is now, with every record applied.
        proc: where to read.
        rules: which files the table should have.
        unread: returns the processes that the watch itself could not read.
        only: just this one.
        hanging: what does not answer, from one audit to the next.
    """
    begun = time.monotonic()
    images = _Images(proc, hanging)
    pids = proc.pids() if only is None else [only]
    differences: set[Difference] = set()
    hung: set[int] = set()
    processes = mappings = unreadable = 0
    known = query().processes
    for pid in pids:
        found = _compare(pid, known.get(pid), images, rules)
        if found is None:
            stat = proc.stat(pid)
            if stat and not (stat.is_kernel_thread or stat.is_dead):
                unreadable += 1
                if proc.live_thread(pid) is Miss.HUNG:
                    hung.add(pid)
            continue
        processes += 1
        mappings += len(_files(known.get(pid)))
        differences |= found
    differences |= {one for pid in known.keys() - set(pids) for one in _all_of(pid, _files(known[pid]))}
    for _ in range(LOOKS - 1):
        if not differences:
            break
        time.sleep(PAUSE_S)
        known = query().processes
        again: set[Difference] = set()
        for pid in {one.pid for one in differences}:
            found = _compare(pid, known.get(pid), images, rules)
            if found is None and not proc.stat(pid):
                found = set(_all_of(pid, _files(known.get(pid))))
            again |= found or set()
        differences &= again
    images.close()
    ordered = tuple(sorted(differences, key=lambda one: (one.pid, one.start, one.kind)))
    hung.update(unread())
    return AuditReport(
        processes, mappings, unreadable, ordered, time.monotonic() - begun, tuple(sorted(hung & set(pids)))
    )


def _files(process: KnownProcess | None) -> tuple[KnownFile, ...]:
    """What the table has announced of a process."""
    return process.files if process is not None and process.is_announced else ()


def _all_of(pid: int, files: Iterable[KnownFile]) -> Iterable[Difference]:
    for one in files:
        for start, end in one.ranges:
            yield Difference("extra", pid, one.name.path, one.name.file_id.inode, start, end)


def _compare(pid: int, known: KnownProcess | None, images: _Images, rules: RuleSet) -> set[Difference] | None:
    """What differs for one process; None if it cannot be read."""
    if known is not None and not known.is_announced:
        return set()
    proc = images.proc
    rows = proc.executable_maps(pid)
    stat = proc.stat(pid)
    if not isinstance(rows, list) or not stat or stat.is_kernel_thread or (stat.is_dead and stat.threads < 2):
        return None
    rows = proc.resolve(pid, rows)
    held = _files(known)
    if known is not None and not known.process.id.same_tick(ProcessId(pid, stat.start_ns)):
        return set(_all_of(pid, held))
    rows.sort(key=lambda row: row.start)
    ends = [row.end for row in rows]
    files = {(row.major, row.minor, row.inode, row.subvolume): row for row in rows}.values()
    found = {
        Difference("extra", pid, one.name.path, one.name.file_id.inode, start, end)
        for one in held
        if one.range_count is None or not any(_could_be(file, one.name.file_id) for file in files)
        for start, end in one.ranges
        if not _is_covered(start, end, one.name.file_id, rows, ends)
    }
    return found | _missing(pid, held, images, rules, rows)


def _missing(
    pid: int, held: Iterable[KnownFile], images: _Images, rules: RuleSet, rows: Collection[MapRow]
) -> set[Difference]:
    """Rows of wanted files that the table does not have."""
    found: set[Difference] = set()
    ours = sorted(span for one in held if one.range_count is None for span in one.ranges)
    starts = [start for start, _ in ours]
    reach = [0, *accumulate((end for _, end in ours), max)]  # reach[n]: how far the first n of ours go
    # Of a file with very many ranges the table has the first, and what spans the others.
    wide = [(one.name.file_id, one.ranges[0][0]) for one in held if one.range_count is not None]
    tentatives = root = None
    for row in rows:
        if row.end <= reach[bisect_right(starts, row.start)]:
            continue
        if any(low <= row.start and row.inode == file_id.inode and _could_be(row, file_id) for file_id, low in wide):
            continue
        if root is None:
            root = _root_of(pid, images.proc)
        # Rules match the path below the root of the process; maps shows ours.
        path = seen_path(row.path, root).decode("utf-8", "surrogateescape")
        if not rules.could_match(path):
            continue
        if tentatives is None:
            tentatives = images.tentatives(pid, rows)
        if row in tentatives and not rules.wants_images and images.can_be(pid, row, tentatives[row]):
            continue
        found.add(Difference("missing", pid, path, row.inode, row.start, row.end))
    return found


def _root_of(pid: int, proc: ProcFs) -> bytes:
    """The root directory of a process, seen from ours; ours if it cannot be determined."""
    link = proc.root_dir(pid)
    try:
        return os.readlink(link.encode()) if link else b"/"
    except OSError:
        return b"/"


def _is_covered(start: int, end: int, file_id: FileId, rows: Sequence[MapRow], ends: Sequence[int]) -> bool:
    """Whether rows of one file that could be this one cover the range without a gap; ``ends`` are those of rows."""
    at = start
    for number in range(bisect_right(ends, start), len(rows)):
        row = rows[number]
        if row.start > at or not _could_be(row, file_id):
            return False
        at = row.end
        if at >= end:
            return True
    return False


def _could_be(row: MapRow, file_id: FileId) -> bool:
    """On overlayfs the device differs, across layers the inode may too. A subvolume that is 0 may be unknown."""
    if row.subvolume and file_id.subvolume and row.subvolume != file_id.subvolume:
        return False
    return row.inode == file_id.inode or (row.major, row.minor) != (file_id.major, file_id.minor)


class _Images:
    """Which rows are the main executable's and the interpreter's, which exec maps: no record reports them.

    The process itself may say so of any file, so the file has to be one that the kernel can start a process with.
    """

    def __init__(self, proc: ProcFs, hanging: HangingCalls | None = None) -> None:
        self.proc = proc
        self._kinds: dict[tuple[int, int, int], frozenset[str] | None] = {}
        self._calls = DiskCalls("sowatch-audit", hanging)

    def close(self) -> None:
        """Ends its thread."""
        self._calls.close()

    def tentatives(self, pid: int, rows: Iterable[MapRow]) -> dict[MapRow, str]:
        """The rows that the process says are such, and which."""
        base = self.proc.interpreter_base(pid)
        link = self.proc.exe(pid)
        exe = link.raw if link else None
        found = {}
        for row in rows:
            if row.raw == exe:
                found[row] = "executable"
            elif base and row.start - row.offset_bytes == base:
                found[row] = "interpreter"
        return found

    def can_be(self, pid: int, row: MapRow, kind: str) -> bool:
        """Whether the file of a row can be of that kind; also if it cannot be read."""
        file = (row.major, row.minor, row.inode)
        if file not in self._kinds:
            read = partial(self._read, pid, row)
            self._kinds[file] = self._calls.run(read, None, READ_TIMEOUT_S, place=("image", pid, file))
        kinds = self._kinds[file]
        return kinds is None or kind in kinds

    def _read(self, pid: int, row: MapRow) -> frozenset[str] | None:
        directory = self.proc.map_files_dir(pid)
        if isinstance(directory, Miss):
            return None
        try:
            place = os.open(f"{directory}/{row.start:x}-{row.end:x}", os.O_PATH | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            if not stat.S_ISREG(os.fstat(place).st_mode):
                return None
            fd = reopen(place, os.O_RDONLY)
        except OSError:
            return None
        finally:
            close_fd(place)
        try:
            facts = read_facts(fd)
        except ElfError:
            return None
        finally:
            close_fd(fd)
        return facts.image_kinds if facts is not None and facts.is_elf else None
