"""`PrebuiltSource`: strategy ``prebuilt``. The kernel says where and when, ``/proc`` says which file.

The programs know no kernel type, so they load on every kernel from 5.8 on, without BTF and without a compiler.

What each record of ``prebuilt.bpf.c`` becomes: a mapping becomes the files that are there when it is
drained, which is at once; if there is none any more it is counted as ``unresolved``, a loss like any
other, and the process is read. All times and orders are the kernel's.
"""

from __future__ import annotations

import struct
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from errno import ENOENT, EXDEV
from typing import Final

from sowatch.bpf.binding import PROGRAMS, BpfObject, Tracefs
from sowatch.bpf.hooks import HAS_COMPAT_HOOKS, OPTIONAL_CALLS
from sowatch.bpf.record_log import RecordLog
from sowatch.bpf.records import (
    FLAG_COMPAT,
    FLAG_IMAGE,
    FLAG_NEEDS_RESCAN,
    FLAG_SHARED_VM,
    FLAG_THROTTLED,
    MAX_FILE_RANGES,
    ProcessRecord,
    RangeRecord,
    Record,
    RecordType,
    SeenRecord,
    parse_seen,
    who_is,
)
from sowatch.linux.descriptors import is_lack_of_resources
from sowatch.linux.pid_namespaces import own_pid
from sowatch.linux.proc import Miss, ProcReadError
from sowatch.linux.proc_parse import MapRow
from sowatch.model.config import Config
from sowatch.model.errors import BpfError, LoadAttempt
from sowatch.model.literals import Hooks, Strategy
from sowatch.model.stats import Losses
from sowatch.sources.base import ProcessScan, Report, TrackedEntry
from sowatch.sources.core import LOST, KernelSetting, limit_waiting
from sowatch.sources.named_verdicts import NamedVerdicts
from sowatch.sources.proc_scan import Look, ProcReader
from sowatch.sources.scan_rows import MapRows, RowPool
from sowatch.sources.unread import PatientProcFs, ScanTimeout, UnreadProcesses

__all__ = ["PrebuiltSource"]

#: enum seen_type of prebuilt.bpf.c; any other asks for a scan.
SEEN_MAP: Final = 16
SEEN_RANGE: Final = 17
SEEN_FORK: Final = 19
SEEN_EXEC: Final = 20
SEEN_EXIT: Final = 21
SEEN_COMPAT: Final = 22
UNKNOWN_FLAGS: Final = (1 << 64) - 1
CLONE_VM: Final = 0x100
#: struct seen: min_start, max_end, range_count, shares_mm, then pairs of start and end; 536 bytes.
SEEN: Final = struct.Struct("=QQIIQHHIQ64Q")
#: Programs and the syscall tracepoints they go on. Exits first: an entry noted without its exit hook
#: would wait for ever.
SYSCALL_HOOKS: Final = (
    ("leave", "exit", ("mmap", "munmap", "mprotect", "mremap", "pkey_mprotect", "shmat", "shmdt")),
    ("enter_mmap", "enter", ("mmap",)),
    ("enter_munmap", "enter", ("munmap",)),
    ("enter_mprotect", "enter", ("mprotect", "pkey_mprotect")),
    ("enter_mremap", "enter", ("mremap",)),
    ("enter_shmat", "enter", ("shmat",)),
    ("enter_shmdt", "enter", ("shmdt",)),
)
#: On the end of every system call, as compat calls have no tracepoint of their own.
COMPAT_PROGRAM: Final = "leave_compat"
#: Further programs, on calls that not every architecture has.
CLONE_HOOKS: Final = ("clone", "clone3", "fork", "vfork")
#: Which of the two programs fits, by where the kernel puts the child's pid.
FORK_PROGRAMS: Final = {44: "process_forks_44", 20: "process_forks_20"}
#: Likewise, by where the kernel puts whether this was the last thread; None: nowhere, before 6.16.
EXIT_PROGRAMS: Final = {None: "process_exits", 32: "process_exits_32"}
#: The ring is drained after so many processes of a full scan.
DRAIN_EVERY: Final = 64
MAX_IGNORED: Final = 65_536


class _Known:
    """A process that records were about: its start, and its introduction record."""

    __slots__ = ("intro", "renewed", "start_ns")

    def __init__(self, start_ns: int) -> None:
        self.start_ns = start_ns
        #: None: this source has not introduced it, so the mapping table does not have it.
        self.intro: ProcessRecord | None = None
        #: The number of the drain in which the introduction was last checked.
        self.renewed = 0


class PrebuiltSource:
    """See the module. Opening loads and attaches everything; if any step fails, nothing stays attached.

    Args:
        config: sizes of maps and ring; ``proc_root`` must be of the host's pid namespace.

    Raises:
        LibbpfMissing: no libbpf.
        BpfError: the kernel refused, or ``proc_root`` numbers processes otherwise than the kernel (EXDEV).
    """

    strategy: Strategy = "prebuilt"
    guarantee: str = "exact events, files found in /proc"
    hooks: Hooks | None = "syscall"
    polls: None = None
    record_limit: None = None
    answer_clock: None = None  # a file under another path has another key

    def __init__(self, config: Config) -> None:
        self.limits: tuple[str, ...] = (
            "a mapping that ends before it is looked up in /proc is counted as lost",
            "files are distinguished as /proc shows them, by btrfs subvolume, and without the inode's generation",
            "32-bit processes are watched by reads",
            "what shmat or mmap make executable by personality READ_IMPLIES_EXEC is found by scans only",
        )
        self.attempts: tuple[LoadAttempt, ...] = (LoadAttempt("prebuilt", True, None),)
        self.unread = UnreadProcesses()
        self._proc = PatientProcFs(config.proc_root, self.unread)
        self._reader = ProcReader(self._proc)
        self._known: dict[int, _Known] = {}
        self._ignored: dict[Hashable, None] = {}
        self._unresolved = self._unread = 0
        self._drains = 0
        self._object = BpfObject(str(PROGRAMS / "prebuilt.bpf.o"))
        try:
            self._load(config)
        except BaseException:
            self._object.close()
            raise
        self.unread.start()

    def _load(self, config: Config) -> None:
        bpf = self._object
        bpf.set_max_entries("ring", config.ring_bytes)
        bpf.set_max_entries("processes", config.max_processes)
        bpf.set_max_entries("pending_calls", config.max_pending)
        with Tracefs() as tracefs:
            hooks = list(_find_hooks(tracefs))
        for program in (*FORK_PROGRAMS.values(), *EXIT_PROGRAMS.values()):
            if program not in [name for name, _ in hooks]:
                bpf.skip(program)
        if HAS_COMPAT_HOOKS:
            bpf.want(COMPAT_PROGRAM)
        bpf.load()
        self._report = bpf.variable(".bss", "report")
        self.reports = KernelSetting(self._report)
        limit_waiting(bpf, config)
        self._processes = bpf.map("processes")
        self._ring_fd = bpf.open_ring("ring")
        self._check_numbers()
        if HAS_COMPAT_HOOKS:
            bpf.attach(COMPAT_PROGRAM)
        for program, tracepoint in hooks:
            bpf.attach_tracepoint(program, tracepoint)

    def _check_numbers(self) -> None:
        if own_pid(self._reader.proc) != self._object.run("own_tgid", 0):
            raise BpfError(f"matching {self._reader.proc.root}, which is not of the host's pid namespace,", EXDEV, "")

    def fileno(self) -> int:
        return self._ring_fd

    # ---- records ------------------------------------------------------------------------------

    def drain(self) -> list[Record]:
        seen = parse_seen(self._object.drain())
        if not seen:
            return []
        self._drains += 1
        # The last exec of each process: what it had mapped before cannot be looked up.
        renewed = {one.tgid: place for place, one in enumerate(seen) if one.type == SEEN_EXEC}
        looks: dict[int, Look | None] = {}

        def look_at(pid: int) -> Look | None:
            if pid not in looks:
                looks[pid] = self._reader.look(pid)
            return looks[pid]

        records: list[Record] = []
        for place, one in enumerate(seen):
            try:
                records += self._records_of(one, look_at if renewed.get(one.tgid, -1) < place else _see_nothing)
            except ScanTimeout:
                records += self._needs_rescan(one)
            except ProcReadError as error:
                if not is_lack_of_resources(error):
                    raise
                self._unread += 1
        return records

    def _records_of(self, seen: SeenRecord, look_at: Callable[[int], Look | None]) -> Iterable[Record]:
        """What one of them becomes. ``look_at`` sees nothing if the process has executed another program since."""
        if seen.type == SEEN_MAP:
            return self._on_map(seen, look_at)
        if seen.type == SEEN_COMPAT:
            return () if look_at is _see_nothing else self._on_map(seen, look_at, is_sure=False)
        if seen.type == SEEN_FORK:
            return self._on_fork(seen)
        if seen.type == SEEN_EXEC:
            return self._on_exec(seen)
        return self._on_exit(seen) if seen.type == SEEN_EXIT else self._on_range(seen)

    def _needs_rescan(self, seen: SeenRecord, flags: int = 0) -> Iterator[Record]:
        """It cannot be read now; what it has mapped is found when it can."""
        about = self._reader.proc.stat(seen.tgid)
        if not isinstance(about, Miss):
            yield self._small(RecordType.NEEDS_RESCAN, seen, flags=FLAG_NEEDS_RESCAN | flags, start_ns=about.start_ns)

    def _on_map(
        self, seen: SeenRecord, look_at: Callable[[int], Look | None], *, is_sure: bool = True
    ) -> Iterator[Record]:
        look = look_at(seen.tgid)
        if look is None:
            self._unresolved += is_sure  # it is gone, or another program by now
            return
        known = self._known.get(seen.tgid)
        if known is None or known.start_ns != look.stat.start_ns:
            known = self._known[seen.tgid] = _Known(look.stat.start_ns)
        # By address, as maps is; of many the records would be more than a scan has.
        first = bisect_right(look.rows, seen.start, key=_end_of)
        rows = look.rows[first : bisect_left(look.rows, seen.end, first, key=_start_of)]
        if len(rows) > MAX_FILE_RANGES:
            yield self._small(RecordType.NEEDS_RESCAN, seen, flags=FLAG_NEEDS_RESCAN)
            return
        if not rows:
            self._unresolved += is_sure
            yield self._small(RecordType.NEEDS_RESCAN, seen, flags=FLAG_NEEDS_RESCAN)
            return
        view = self._reader.view_of(seen.tgid)
        for row in self._reader.proc.resolve(seen.tgid, rows):
            record = self._reader.map_record(look.stat, view, row, t_ns=seen.t_ns, flags=seen.flags)
            if record.key not in self._ignored:
                if known.intro is None:
                    known.intro = self._reader.introduce(look.stat, look.rows, RecordType.INTRO, seen.t_ns)
                    yield known.intro
                else:
                    yield from self._renew(known, look, seen.t_ns)
                yield record
            elif known.intro is not None:
                yield self._small(RecordType.RANGE, seen, row.start, row.end)

    def _renew(self, known: _Known, look: Look, t_ns: int) -> Iterator[Record]:
        """Introduces a process again if it is not what was reported any more. Checked once in each drain."""
        if known.intro is None or known.renewed == self._drains:
            return
        known.renewed = self._drains
        fresh = self._reader.introduce(look.stat, (), RecordType.INTRO, t_ns)
        has_gone = fresh.uid is None
        if not has_gone and who_is(fresh) != who_is(known.intro):
            known.intro = fresh._replace(exe=known.intro.exe)
            yield known.intro

    def _on_range(self, seen: SeenRecord) -> Iterator[Record]:
        if seen.flags & FLAG_THROTTLED:
            yield from self._needs_rescan(seen, FLAG_THROTTLED)  # nothing of it may have come before
            return
        known = self._known.get(seen.tgid)
        if known is None or (known.intro is None and not self._report.value & Report.RANGES):
            return
        if seen.type == SEEN_RANGE:
            stat = self._reader.proc.stat(seen.tgid) if known.renewed != self._drains else Miss.ABSENT
            if not isinstance(stat, Miss) and stat.start_ns == known.start_ns:
                yield from self._renew(known, Look(stat, [], 0, 0), seen.t_ns)
            yield self._small(RecordType.RANGE, seen, seen.start, seen.end)
        else:
            yield self._small(RecordType.NEEDS_RESCAN, seen, flags=FLAG_NEEDS_RESCAN)

    def _on_fork(self, seen: SeenRecord) -> Iterator[Record]:
        pid, flags = seen.child_tgid, seen.clone_flags
        parent = self._known.get(seen.tgid)
        is_reported = parent is not None and parent.intro is not None
        self._known.pop(pid, None)
        if not is_reported and not self._report.value & Report.PROCESSES:
            return
        stat = self._reader.proc.stat(pid)
        if flags == UNKNOWN_FLAGS:
            status = self._reader.proc.status(pid)
            if isinstance(status, Miss) or status.tgid != pid:
                return  # a thread, or ended before it could be read
        shares_mm = bool(flags & CLONE_VM and flags != UNKNOWN_FLAGS)
        # If the child has ended already its start is now: no other source will name it.
        child = self._known[pid] = _Known(seen.t_ns if isinstance(stat, Miss) else stat.start_ns)
        if parent is None or parent.intro is None:
            if isinstance(stat, Miss):
                return
            intro = self._reader.introduce(stat, (), RecordType.FORK, seen.t_ns)
        else:
            # In a pid namespace of its own the child's number there is not known.
            ns_pid = pid if parent.intro.ns_pid == seen.tgid else None
            intro = parent.intro._replace(ns_pid=ns_pid)  # type: ignore[arg-type]
            if not isinstance(stat, Miss):
                now = self._reader.introduce(stat, (), RecordType.FORK, seen.t_ns)
                if now.uid is not None:
                    intro = intro._replace(
                        uid=now.uid, comm=now.comm, cgroup=now.cgroup, cgroup_bytes=now.cgroup_bytes, ns_pid=now.ns_pid
                    )
        intro = intro._replace(
            type=RecordType.FORK,
            flags=seen.flags | (FLAG_SHARED_VM if shares_mm else self._doubt_of_copy(seen.tgid, pid)),
            tgid=pid,
            tid=pid,
            start_ns=child.start_ns,
            t_ns=seen.t_ns,
            exec_id=0,
            parent_tgid=seen.tgid,
            parent_start_ns=parent.start_ns if parent is not None else 0,
            ppid=seen.tgid,
            path_bytes=0,
            path=b"",
        )
        child.intro = intro
        yield intro

    def _doubt_of_copy(self, parent: int, child: int) -> int:
        """FLAG_NEEDS_RESCAN where fork may have left out a mapping (MADV_DONTFORK): they do not have as many pages."""
        pages = self._reader.proc.mapped_pages(parent), self._reader.proc.mapped_pages(child)
        return FLAG_NEEDS_RESCAN if pages[0] and pages[1] and pages[0] != pages[1] else 0

    def _on_exec(self, seen: SeenRecord) -> Iterator[Record]:
        known = self._known.pop(seen.tgid, None)
        if known is not None:
            yield self._small(RecordType.EXEC, seen, start_ns=known.start_ns)
        is_compat = self._reader.proc.is_32bit(seen.tgid)
        wants_images = self._report.value & Report.IMAGES
        if not is_compat and not wants_images:
            return
        look = self._reader.look(seen.tgid)
        if look is None:
            return
        known = self._known[seen.tgid] = _Known(look.stat.start_ns)
        if is_compat:
            yield self._small(RecordType.NEEDS_RESCAN, seen, flags=FLAG_NEEDS_RESCAN | FLAG_COMPAT)
        if wants_images:
            known.intro = self._reader.introduce(look.stat, look.rows, RecordType.INTRO, seen.t_ns)
            yield known.intro
            view = self._reader.view_of(seen.tgid)
            for row in self._reader.proc.resolve(seen.tgid, list(self._reader.images(seen.tgid, look.rows))):
                record = self._reader.map_record(look.stat, view, row, t_ns=seen.t_ns, flags=FLAG_IMAGE)
                if record.key not in self._ignored:
                    self._object.run("cover", seen.tgid, row.start, row.end, 0)
                    yield record

    def _on_exit(self, seen: SeenRecord) -> Iterator[Record]:
        # Before 6.16 each thread has left its mm by then, so at the record of the last one none is left.
        if not seen.is_group_dead and not isinstance(self._reader.proc.live_thread(seen.tgid), Miss):
            return
        self._processes.delete(struct.pack("=I", seen.tgid))
        known = self._known.pop(seen.tgid, None)
        if known is not None:
            yield self._small(RecordType.EXIT, seen, start_ns=known.start_ns)

    def _small(
        self, kind: int, seen: SeenRecord, start: int = 0, end: int = 0, *, flags: int = 0, start_ns: int | None = None
    ) -> RangeRecord:
        begun = self._known[seen.tgid].start_ns if start_ns is None else start_ns
        return RangeRecord(0, kind, flags, seen.tgid, seen.tid, begun, seen.t_ns, 0, 0, start, end)

    # ---- scans --------------------------------------------------------------------------------

    def scan_all(self, meanwhile: Callable[[], None] | None = None) -> tuple[list[ProcessScan], RecordLog]:
        scans: list[ProcessScan] = []
        drained = RecordLog()
        take = meanwhile or (lambda: drained.extend(self.drain()))
        self._reader.pool = RowPool()
        try:
            for place, pid in enumerate(self._reader.proc.pids()):
                try:
                    scan = self.scan_process(pid)
                except ScanTimeout as timeout:
                    if timeout.is_refused:
                        raise
                    continue
                if scan is not None:
                    scans.append(scan)
                if place % DRAIN_EVERY == 0:
                    take()
        finally:
            self._reader.pool = None
        return scans, drained

    def scan_process(self, pid: int, meanwhile: Callable[[], None] = lambda: None) -> ProcessScan | None:
        del meanwhile  # a drain may read processes itself, so it cannot come within a scan
        look = self._reader.look(pid)
        if look is None:
            return None
        scan = self._reader.scan_of(look)
        known = self._known.get(pid)
        if known is None or known.start_ns != scan.start_ns:
            known = self._known[pid] = _Known(scan.start_ns)
        known.intro = scan.intro or known.intro
        is_shared = look.stat.threads > 1
        wanted = [one for one in scan.maps if one.key not in self._ignored]
        # During a scan every range is reported (Report.RANGES), so nothing before this `cover` was missed.
        for one in wanted:
            self._object.run("cover", pid, one.start, one.end, is_shared)
        if is_shared and not wanted:
            self._object.run("cover", pid, 0, 0, True)
        scan.maps = MapRows(wanted, self._reader.pool)
        return scan

    # ---- answers ------------------------------------------------------------------------------

    def answer(self, places: Mapping[Hashable, int], *, is_wanted: bool) -> None:
        for key in places:
            if is_wanted:
                self._ignored.pop(key, None)
                continue
            if len(self._ignored) >= MAX_IGNORED:
                del self._ignored[next(iter(self._ignored))]
            self._ignored[key] = None

    def untrack(self, pid: int, start_ns: int, activity: int) -> bool:  # noqa: ARG002 - nobody else counts
        """The mapping table forgets it. Nothing is in flight: records and verdicts pass through one thread."""
        known = self._known.get(pid)
        if known is not None and known.start_ns == start_ns:
            known.intro = None
        return True

    def new_epoch(self) -> None:
        self._ignored.clear()

    def losses(self) -> Losses:
        ring, processes, pending, _, throttled = (self._object.per_cpu_sum("counters", number) for number in LOST)
        return Losses(
            ring=ring,
            processes=processes,
            pending=pending,
            throttled=throttled,
            skipped=self._object.skipped_runs(),
            unresolved=self._unresolved,
            unread=self._unread,
        )

    def tracked(self, pid: int) -> TrackedEntry | None:
        known = self._known.get(pid)
        value = self._processes.lookup(struct.pack("=I", pid))
        if known is None or value is None:
            return None
        _, _, count, _, _, _, _, _, _, *ends = SEEN.unpack(value)
        ranges = tuple(zip(ends[: 2 * count : 2], ends[1 : 2 * count : 2], strict=True))
        is_reported = known.intro is not None
        return TrackedEntry(known.start_ns, count, False, is_reported, count > len(ends) // 2, int(is_reported), ranges)

    def open_verdicts(self) -> NamedVerdicts:
        return NamedVerdicts(dict.fromkeys(self._ignored, False))

    def close(self) -> None:
        self._proc.close()
        self._object.close()


def _start_of(row: MapRow) -> int:
    return row.start


def _end_of(row: MapRow) -> int:
    return row.end


def _see_nothing(_: int) -> None:
    return None


def _find_hooks(tracefs: Tracefs) -> Iterator[tuple[str, int]]:
    """Each program with the id of its tracepoint, exits first, as in `SYSCALL_HOOKS`.

    Raises:
        BpfError: the kernel has no such tracepoint, or it has another layout than both we know.
    """
    for program, side, calls in SYSCALL_HOOKS:
        for call in calls:
            found = tracefs.tracepoint_id("syscalls", f"sys_{side}_{call}")
            if found is not None:
                yield program, found
            elif call not in OPTIONAL_CALLS:
                raise BpfError(f"finding tracepoint syscalls/sys_{side}_{call}", ENOENT, "")
    for call in CLONE_HOOKS:
        found = tracefs.tracepoint_id("syscalls", f"sys_enter_{call}")
        if found is not None:
            yield f"enter_{call}", found
    offset = tracefs.field_offset("sched", "sched_process_fork", "child_pid")
    if offset not in FORK_PROGRAMS:
        raise BpfError(f"reading the layout of tracepoint sched/sched_process_fork (child_pid at {offset})", ENOENT, "")
    last = tracefs.field_offset("sched", "sched_process_exit", "group_dead")
    if last not in EXIT_PROGRAMS:
        raise BpfError(f"reading the layout of tracepoint sched/sched_process_exit (group_dead at {last})", ENOENT, "")
    for program, name in (
        (FORK_PROGRAMS[offset], "sched_process_fork"),
        ("process_execs", "sched_process_exec"),
        (EXIT_PROGRAMS[last], "sched_process_exit"),
    ):
        found = tracefs.tracepoint_id("sched", name)
        if found is None:
            raise BpfError(f"finding tracepoint sched/{name}", ENOENT, "")
        yield program, found
