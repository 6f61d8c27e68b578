"""Strategy ``procfs``: the mapping table from polls of ``/proc``, without BPF and without any privilege.

`ProcfsSource` reports what changed as the records that the kernel side would have sent, so everything above it is the
same. docs/decisions/0006-polling.md has the reasons and the guarantee. A process cannot change its
mappings without running, so its CPU clock shows that it need not be read. `compare` is the pure part.
"""

from __future__ import annotations

import logging
import os
import stat as file_types
import time
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from sowatch.bpf.record_log import RecordLog
from sowatch.bpf.records import (
    FLAG_ASK,
    FLAG_DELETED,
    FLAG_IMAGE,
    FLAG_MANY,
    FLAG_NEEDS_RESCAN,
    MapRecord,
    ProcessRecord,
    RangeRecord,
    Record,
    RecordType,
    text_of,
    who_is,
)
from sowatch.linux.cpu_clock import CpuClocks
from sowatch.linux.hidepid import hides_processes
from sowatch.linux.pid_namespaces import why_not_whole_host
from sowatch.linux.proc import MapsState, Miss, ProcFs, ProcReadError
from sowatch.linux.proc_parse import MapRow, Stat, seen_path
from sowatch.model.config import Config
from sowatch.model.errors import LoadAttempt
from sowatch.model.identity import FileId
from sowatch.model.literals import Hooks, Strategy
from sowatch.model.stats import Losses
from sowatch.sources.base import ProcessScan, TrackedEntry, Verdicts
from sowatch.sources.named_verdicts import NamedVerdicts
from sowatch.sources.poll_reads import PollReads, Reading, Target
from sowatch.sources.poll_timer import PollTimer
from sowatch.sources.proc_scan import FileName, file_id_in, listed, resolve_new
from sowatch.sources.scan_rows import MapRows, RowPool
from sowatch.sources.unread import PatientProcFs, ScanTimeout, UnreadProcesses

__all__ = ["File", "ProcfsSource", "Row", "compare"]

LOG = logging.getLogger("sowatch")

#: A process that did not run is scanned anyway after so many polls: another that shares its mm
#: (CLONE_VM without CLONE_THREAD) may have changed it.
REREAD_LOOKS: Final = 60
#: Names of files kept; some 300 bytes each.
MAX_FILES: Final = 65_536


class File(NamedTuple):
    """A file under one name in one view: what a verdict is about.

    ``text`` is the path as records have it. ``since_ns`` is when it was found after no process had it
    mapped, which is when its inode may have become another file's. Records have it below 0 for a change
    time: maps shows none, and an overlay's file is compared with what is one.
    """

    key: FileName
    text: bytes
    mode: int
    flags: int
    since_ns: int


class Row(NamedTuple):
    """One executable mapping of a file."""

    start: int
    end: int
    offset_bytes: int
    file: File
    #: As `sowatch.sources.proc_scan.Listed` has it: not None if this row stands for more than itself.
    unlisted: int | None = None

    @property
    def what(self) -> tuple[int, int, FileId, int | None]:
        """Equal for two rows that are one mapping; its name may have changed."""
        return self.start, self.end, self.file.key.file_id, self.unlisted


def _is_wide(rows: Iterable[Row]) -> bool:
    """Whether one of them stands for more than itself: then it overlaps others, and does not show the gaps."""
    return any(row.unlisted is not None for row in rows)


def compare(before: Sequence[Row], after: Sequence[Row]) -> tuple[list[Row], list[tuple[int, int]]]:
    """What turns one set of mappings into the other; both by address, no two overlapping.

    Returns:
        The rows that are new, and the ranges that are unmapped. To be reported in this order, so that a
        file that only moved is not unloaded in between.
    """
    known = {row.what for row in before}
    ends = [row.end for row in after]
    gone = []
    for row in before:
        at = row.start
        for number in range(bisect_right(ends, at), len(after)):
            other = after[number]
            if other.start >= row.end:
                break
            if other.start > at:
                gone.append((at, other.start))
            at = other.end
        if at < row.end:
            gone.append((at, row.end))
    return [row for row in after if row.what not in known], gone


#: The root directory of a process, and what is equal for two that see the same paths.
_View = tuple[bytes, Hashable]


@dataclass(slots=True)
class _Process:
    """A process as the last poll found it, and what was reported of it."""

    pid: int
    stat: Stat
    rows: Sequence[Row]
    seen_ns: int
    cpu_ns: int | None
    #: We may not read it.
    is_denied: bool = False
    #: How its maps were; None: they are to be parsed anew.
    maps: MapsState | None = None
    #: Its view of the file system.
    view: _View = (b"/", None)
    #: See `resolve_new`.
    resolved: Mapping[MapRow, MapRow] = field(default_factory=dict)
    #: Its introduction record; None while nothing is reported of it.
    intro: ProcessRecord | None = None
    #: How often mappings of it were reported; see `EventSource.untrack`.
    activity: int = 0

    @property
    def has_ended(self) -> bool:
        return self.stat.is_dead and self.stat.threads < 2

    def is_same_program(self, stat: Stat) -> bool:
        return self.stat.start_ticks == stat.start_ticks and self.stat.image == stat.image

    def is_image(self, row: Row) -> bool:
        """Whether exec mapped it: the program itself or its interpreter."""
        intro = self.intro
        return intro is not None and (
            row.file.key.file_id == intro.exe or row.start - row.offset_bytes == intro.interpreter_base
        )


class ProcfsSource:
    """Polls every process that may be read, once in ``poll_interval_s``.

    A poll finds what every process has mapped at that moment; what came and went since the last poll is not
    seen. Opening reads nothing.

    Args:
        config: ``proc_root``, ``poll_interval_s``, ``poll_cpu_percent``, ``max_verdicts``.

    Raises:
        ProcRootError: there is no proc file system.
        SowatchError: there is no descriptor left.
    """

    strategy: Strategy = "procfs"
    guarantee: str = "sampled"
    hooks: Hooks | None = None
    reports: None = None  # every poll finds everything
    record_limit: None = None  # a poll costs the same, however much has happened
    answer_clock: None = None  # a poll shows each path as it is

    def __init__(self, config: Config) -> None:
        self.attempts: tuple[LoadAttempt, ...] = (LoadAttempt("procfs", True, None),)
        self.unread = UnreadProcesses()
        self._proc = self._patient = PatientProcFs(config.proc_root, self.unread)
        self._clocks = CpuClocks(self._proc)
        self._reads = PollReads(ProcFs(config.proc_root), self._clocks, self.unread)
        self._max_verdicts = config.max_verdicts
        self._processes: dict[int, _Process] = {}
        self._files: dict[tuple[MapRow, bytes, Hashable], File] = {}
        self._since_ns: dict[tuple[FileId, bytes, bool], int] = {}
        self._verdicts: dict[Hashable, bool] = {}
        #: `scan_all` adds how many processes may not be read.
        self.limits: tuple[str, ...] = ()
        self._is_hidden = hides_processes(self._proc)
        #: Processes of which not even the stat may be read (hidepid=1).
        self._unseen = 0
        self._looks = 0
        self._has_begun = False
        self._left: list[Record] = []  # found by a full scan that failed, and not found again
        self.polls = PollTimer(config, f"polling {config.proc_root}", lambda: self.unread.cpu_s)
        self._elsewhere = why_not_whole_host(self._proc)
        self._note_limits()
        self.unread.start()

    def fileno(self) -> int:
        return self.polls.fileno()

    def drain(self) -> list[Record]:
        if not self.polls.is_due() or not self._has_begun:
            return []
        with self.polls.look():
            records, self._left = self._left, []
            try:
                self._poll_all(records)
            except ProcReadError as error:
                # What was found until then is not found again; the next poll finds the rest.
                LOG.warning("a poll of %s failed and is repeated: %s", self._proc.root, error)
            return records

    def scan_all(self, meanwhile: Callable[[], None] | None = None) -> tuple[list[ProcessScan], RecordLog]:
        del meanwhile  # what changed is found by the scan itself
        is_first, self._has_begun = not self._has_begun, True
        with self.polls.look(counts=False):
            self._poll_all(self._left, is_full=True)
            records, self._left = self._left, []
            pool, scans = RowPool(), []
            for one in list(self._processes.values()):
                with suppress(ScanTimeout):  # it is read when it hangs no more
                    scans.append(self._scan_one(one, pool) if one.rows else None)
        self._note_limits()
        # What the first poll found new is in the scans.
        return [one for one in scans if one is not None], RecordLog(() if is_first else [records])

    def scan_process(self, pid: int, meanwhile: Callable[[], None] = lambda: None) -> ProcessScan | None:
        del meanwhile  # a drain may read processes itself, so it cannot come within a scan
        known = self._processes.get(pid)
        readings = self._reads.read([Target(pid, None if known is None else known.stat)])
        if pid not in readings:
            raise ScanTimeout(pid)
        found = self._process(pid, known, readings[pid])
        if found is None or not found.rows:
            return None
        if known is not None and known.is_same_program(found.stat):
            self._keep_old_names(known, found)
            found.intro, found.activity = self._renewed(found, known.intro), known.activity
        self._processes[pid] = found
        return self._scan_one(found)

    def answer(self, places: Mapping[Hashable, int], *, is_wanted: bool) -> None:
        if len(self._verdicts) > self._max_verdicts:
            self._verdicts.clear()  # what is not known is reported again, and answered again
        self._verdicts.update(dict.fromkeys(places, is_wanted))

    def untrack(self, pid: int, start_ns: int, activity: int) -> bool:
        process = self._processes.get(pid)
        if process is not None and process.stat.start_ns == start_ns:
            if process.activity != activity:
                return False
            process.intro = None
        return True

    def new_epoch(self) -> None:
        self._verdicts.clear()

    def losses(self) -> Losses:
        return Losses()  # what is between two polls cannot be counted

    def tracked(self, pid: int) -> TrackedEntry | None:
        process = self._processes.get(pid)
        if process is None or process.intro is None:
            return None
        ranges = tuple((row.start, row.end) for row in process.rows)
        return TrackedEntry(process.stat.start_ns, len(ranges), False, True, False, process.activity, ranges)

    def open_verdicts(self) -> Verdicts:
        return NamedVerdicts(self._verdicts)

    def close(self) -> None:
        self._patient.close()
        self.polls.close()

    def _note_limits(self) -> None:
        denied = sum(process.is_denied for process in self._processes.values()) + self._unseen
        interval_s = self.polls.interval_s
        self.limits = (
            f"polls every {interval_s:.3g} s: what comes and goes in between is not seen, nor in which order",
            *([f"processes that this user may not read: {denied}"] if denied else []),
            *(["processes of other users are hidden: /proc is mounted with hidepid"] if self._is_hidden else []),
            "files are distinguished by device, inode and subvolume as /proc shows them, without generation",
            *([f"{self._elsewhere}: processes outside it are not seen"] if self._elsewhere else []),
        )

    # ---- polling ------------------------------------------------------------------------------

    def _poll_all(self, records: list[Record], *, is_full: bool = False) -> None:
        """Scans each process that may have changed.

        Args:
            records: gets those of what did; if it raises, those of what was found until then.
            is_full: parses the maps of each of them, even if they are what they were.
        """
        self._looks += 1
        pids = self._proc.pids()
        self._unseen = 0
        for pid in self._processes.keys() - set(pids):
            self._emit_end(self._processes.pop(pid), RecordType.EXIT, records)
        new: list[_Process] = []
        targets = self._targets(pids)
        readings = self._reads.read(one._replace(maps=None) if is_full else one for one in targets)
        for pid, _, _ in targets:
            known, reading = self._processes.get(pid), readings.get(pid)
            try:
                if known is not None and reading is not None and self._is_unchanged(known, reading):
                    continue
                found = self._process(pid, known, reading)
            except ScanTimeout:
                found = None  # as it was, until it can be read
            if found is None:
                self._unseen += known is None and self._proc.stat(pid) is Miss.DENIED
                if known is not None:
                    known.cpu_ns = known.maps = None
            elif known is not None and known.stat.start_ticks == found.stat.start_ticks:
                with self._reporting(found, records):
                    self._report_change(known, found, records)
            else:
                if known is not None:
                    self._emit_end(self._processes.pop(pid), RecordType.EXIT, records)
                new.append(found)
        # Parents first, as they are by now.
        for process in sorted(new, key=lambda one: (one.stat.start_ticks, one.pid)):
            self._processes[process.pid] = process
            with self._reporting(process, records):
                self._report_new(process, self._processes.get(process.stat.ppid), records)
        if any(isinstance(record, RangeRecord) for record in records):
            self._forget_files()

    def _targets(self, pids: Iterable[int]) -> list[Target]:
        """The processes that may have changed since they were read."""
        processes, looks, read_ns = self._processes, self._looks, self._clocks.read_ns
        targets = []
        for pid in pids:
            known = processes.get(pid)
            if known is None:
                targets.append(Target(pid))
            elif known.cpu_ns is None or read_ns(pid) != known.cpu_ns:
                if not self._is_same_kernel_thread(known):
                    targets.append(Target(pid, known.stat, known.maps))
            elif (pid + looks) % REREAD_LOOKS == 0 and not known.stat.is_kernel_thread:
                targets.append(Target(pid, known.stat, known.maps))
        return targets

    def _is_same_kernel_thread(self, known: _Process) -> bool:
        """Whether it is one still, which has no mappings whatever it does."""
        if not known.stat.is_kernel_thread:
            return False
        cpu_ns, stat = self._clocks.read_ns(known.pid), self._proc.stat(known.pid)
        if not stat or not stat.is_kernel_thread or stat.start_ticks != known.stat.start_ticks:
            return False
        known.cpu_ns = cpu_ns
        return True

    def _is_unchanged(self, known: _Process, reading: Reading) -> bool:
        """Whether it has mapped what it had, and sees it under the same names."""
        if reading.rows is not None or self._view_of(known.stat) != known.view:
            return False
        known.cpu_ns, known.seen_ns = reading.cpu_ns, time.monotonic_ns()
        return True

    def _process(self, pid: int, known: _Process | None, reading: Reading | None) -> _Process | None:
        """The process as it is now; None if it has ended, or every read of it met an exec, or it hangs."""
        if reading is not None and reading.rows is None:  # it is in another view
            reading = self._reads.read([Target(pid, reading.stat)]).get(pid)
        if reading is None:
            return None
        stat, rows = reading.stat, reading.rows
        found = _Process(pid, stat, (), time.monotonic_ns(), reading.cpu_ns, is_denied=rows is Miss.DENIED)
        if isinstance(rows, list) and rows:
            if not stat.image and not self._proc.is_image_hidden(pid):
                return None  # within exec, where some of the new program is mapped
            earlier = known.resolved if known is not None and known.is_same_program(stat) else {}
            found.resolved = resolve_new(self._proc, pid, rows, earlier)
            found.view = self._view_of(stat)
            found.rows = self._rows(found.view, [found.resolved.get(row, row) for row in rows])
            found.maps = reading.maps
        return found

    def _base(self, stat: Stat) -> bytes:
        """The directory of a thread of the process that still has its mm."""
        tid = self._proc.live_thread(stat.pid) if stat.is_dead else stat.pid
        return f"{self._proc.root}/{tid}".encode()

    def _view_of(self, stat: Stat) -> _View:
        base = self._base(stat)
        try:
            root = os.readlink(base + b"/root")
            return root, (os.readlink(base + b"/ns/mnt"), root)
        except OSError:
            return b"/", base  # no other process's

    def _rows(self, view: _View, rows: Sequence[MapRow]) -> list[Row]:
        return [
            Row(one.row.start, one.end, one.row.offset_bytes, self._file(one.row, *view), one.unlisted)
            for one in listed(rows)
        ]

    def _file(self, row: MapRow, root: bytes, view: Hashable) -> File:
        name = row._replace(start=0, end=0, perms="", offset_bytes=0)
        file = self._files.get((name, root, view))
        if file is None:
            if len(self._files) >= MAX_FILES:
                self._files.clear()
            file = file_of(row, root, view)
            since_ns = self._since_ns.setdefault(file.key.in_any_view, time.time_ns())
            file = self._files[name, root, view] = file._replace(since_ns=since_ns)
        return file

    def _forget_files(self) -> None:
        """Drops files that no process has mapped any more."""
        used = {row.file.key.in_any_view for process in self._processes.values() for row in process.rows}
        if used != self._since_ns.keys():
            self._since_ns = {name: since_ns for name, since_ns in self._since_ns.items() if name in used}
            self._files = {which: file for which, file in self._files.items() if file.key.in_any_view in used}

    # ---- records ------------------------------------------------------------------------------

    def _report_new(self, process: _Process, parent: _Process | None, records: list[Record]) -> None:
        """Reports a fork if it has all that its parent has and runs the same program; the rest as mapped since."""
        rows: Sequence[Row] = process.rows
        if parent is not None and parent.intro is not None and parent.stat.image == process.stat.image:
            # Rows that stand for more than themselves do not show what is unmapped.
            is_wide = _is_wide(parent.rows) or _is_wide(process.rows)
            more, gone = compare(parent.rows, process.rows) if not is_wide else ([], [])
            is_alike = {row.what for row in parent.rows} == {row.what for row in process.rows} if is_wide else not gone
            if is_alike and (intro := self._introduction(process, RecordType.FORK, parent)):
                self._keep_old_names(parent, process)
                process.intro, process.activity = intro, 1
                records.append(intro)
                rows = more
        self._emit_maps(process, rows, records)

    def _report_change(self, known: _Process, found: _Process, records: list[Record]) -> None:
        self._processes[known.pid] = found
        if not known.is_same_program(found.stat) or found.is_denied:
            # A process that may not be read any more has, as a rule, executed a set-user-ID program.
            self._emit_end(known, RecordType.EXIT if found.has_ended else RecordType.EXEC, records)
            self._emit_maps(found, found.rows, records)
            return
        self._keep_old_names(known, found)
        found.intro, found.activity = known.intro, known.activity
        if _is_wide(known.rows) or _is_wide(found.rows):
            if {row.what for row in known.rows} != {row.what for row in found.rows}:
                if found.intro is not None:
                    self._emit_needs_rescan(found, records)
                else:
                    self._emit_maps(found, found.rows, records)
            return
        added, gone = compare(known.rows, found.rows)
        names = {row.what: row.file.key for row in known.rows}
        added += [row for row in found.rows if names.get(row.what, row.file.key) != row.file.key]
        if (added or gone) and (intro := self._renewed(found, found.intro)) is not found.intro:
            found.intro = intro
            records += [intro] if intro else []
        self._emit_maps(found, added, records)
        if found.intro is not None:
            for start, end in gone:
                records.append(self._range_record(found, RecordType.RANGE, start, end))

    @contextmanager
    def _reporting(self, process: _Process, records: list[Record]) -> Iterator[None]:
        """Has the next poll, or a rescan, find what could not be reported. A process that hangs ends no poll."""
        try:
            yield
        except (ScanTimeout, ProcReadError) as error:
            self._forget_rows(process)
            if process.intro is not None:
                self._emit_needs_rescan(process, records)
            if isinstance(error, ProcReadError):
                raise

    def _forget_rows(self, process: _Process) -> None:
        process.cpu_ns, process.maps, process.rows = None, None, ()

    def _keep_old_names(self, before: _Process, process: _Process) -> None:
        """Rows of a process that were there before have the name they had, unless its verdict is ignored."""
        known = {row.what: row for row in before.rows if self._verdicts.get(row.file.key) is not False}
        rows = [known.get(row.what, row) for row in process.rows]
        if any(row.file is not shown.file for row, shown in zip(rows, process.rows, strict=True)):
            process.maps = None  # once that name is ignored, the maps have another one
        process.rows = rows

    def _renewed(self, process: _Process, intro: ProcessRecord | None) -> ProcessRecord | None:
        """The introduction record, or a new one if the process is not what it names any more."""
        fresh = self._introduction(process, RecordType.INTRO, None) if intro else None
        return fresh if fresh and intro and who_is(fresh) != who_is(intro) else intro

    def _emit_needs_rescan(self, process: _Process, records: list[Record]) -> None:
        """Asks for a rescan, which shows what has changed."""
        records.append(self._range_record(process, RecordType.NEEDS_RESCAN, 0, 0)._replace(flags=FLAG_NEEDS_RESCAN))

    def _emit_maps(self, process: _Process, rows: Sequence[Row], records: list[Record]) -> None:
        wanted = [row for row in rows if self._verdicts.get(row.file.key) is not False]
        if not wanted:
            return
        if process.intro is None:
            process.intro = self._introduction(process, RecordType.INTRO, None)
            if process.intro is None:
                self._forget_rows(process)  # it has ended, or the next poll finds it
                return
            records.append(process.intro)
        process.activity += 1
        if _is_wide(rows):
            self._emit_needs_rescan(process, records)
        else:
            records += [self._map_record(process, row) for row in wanted]

    def _emit_end(self, process: _Process, kind: int, records: list[Record]) -> None:
        if process.intro is not None:
            records.append(self._range_record(process, kind, 0, 0)._replace(t_ns=time.monotonic_ns()))

    def _scan_one(self, process: _Process, pool: RowPool | None = None) -> ProcessScan | None:
        """The process as the last poll found it."""
        rows = [row for row in process.rows if self._verdicts.get(row.file.key) is not False]
        if rows and process.intro is None:
            process.intro = self._introduction(process, RecordType.INTRO, None)
            if process.intro is None:
                self._forget_rows(process)
                return None
            process.activity += 1
        now_ns, maps = time.monotonic_ns(), MapRows((self._map_record(process, row) for row in rows), pool)
        return ProcessScan(process.pid, process.stat.start_ns, now_ns, now_ns, process.intro, maps, process.activity)

    def _map_record(self, process: _Process, row: Row) -> MapRecord:
        file = row.file
        flags = file.flags | (FLAG_IMAGE if process.is_image(row) else 0)
        if file.key not in self._verdicts:
            flags |= FLAG_ASK
        offset_bytes = row.offset_bytes
        if row.unlisted is not None:
            flags, offset_bytes = flags | FLAG_MANY, row.unlisted
        return MapRecord(
            0, RecordType.MAP, flags, process.pid, process.pid, process.stat.start_ns, process.seen_ns, 0,
            process.activity, file.key, row.start, row.end, offset_bytes, -file.since_ns, 0, process.stat.comm,
            file.mode, len(file.text), file.text, file.key.file_id, file.key.view,
        )  # fmt: skip

    def _range_record(self, process: _Process, kind: int, start: int, end: int) -> RangeRecord:
        return RangeRecord(
            0, kind, 0, process.pid, process.pid, process.stat.start_ns, process.seen_ns, 0, 0, start, end
        )

    def _introduction(self, process: _Process, kind: int, parent: _Process | None) -> ProcessRecord | None:
        """Its introduction record, read now; None if it has ended or executed a program since the poll."""
        pid, stat = process.pid, process.stat
        status, cgroup = self._proc.status(pid), self._proc.cgroup(pid)
        base = self._base(stat)
        # A process that has ended is found below. What cannot be read of one that has not is left open: a path longer
        # than a page, say, is no reason to leave its mappings out.
        exe, root = self._proc.exe(pid), _link(base + b"/root") or b"/"
        interpreter_base = self._proc.interpreter_base(pid)
        now = self._reads.stat_now(pid)
        if not status or now is None or not process.is_same_program(now):
            return None
        seen = seen_path(os.fsencode(exe.path), root) if exe else b""
        path = text_of(seen) if seen else b""
        # Not by the address of its code in stat, which any process may write. The name of a memfd is one component.
        texts = (path, text_of(seen, is_deleted=True)) if seen else ()
        identity = next((row.file.key.file_id for row in process.rows if row.file.text in texts), None)
        group = b"" if isinstance(cgroup, Miss) else text_of(os.fsencode(cgroup))
        return ProcessRecord(
            0, kind, 0, pid, pid, stat.start_ns, process.seen_ns, 0, 1,
            0 if parent is None else parent.stat.start_ns, 0 if parent is None else parent.pid, stat.ppid,
            status.uid, status.ns_pid or pid, identity, interpreter_base, None, stat.comm,
            len(group), len(path), group, path,
        )  # fmt: skip


def _link(path: bytes) -> bytes | None:
    """The target of a link of ``/proc``; None if it cannot be read."""
    try:
        return os.readlink(path)
    except OSError:
        return None


def file_of(row: MapRow, root: bytes, view: Hashable) -> File:
    """The file of a row of maps, in a process whose root directory and view of the file system these are."""
    path = seen_path(row.path, root)
    return File(
        key=FileName(file_id_in(row), path, row.is_deleted, view),
        text=text_of(path, is_deleted=row.is_deleted),
        # maps does not show it. What has no path (anon_inode:) is not regular; a device is taken for a file.
        mode=file_types.S_IFREG if path.startswith(b"/") else 0,
        flags=FLAG_DELETED if row.is_deleted else 0,
        since_ns=0,
    )
