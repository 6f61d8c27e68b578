"""`BpfSource`: records and scans as CO-RE programs in the kernel make them, strategies ``core`` and ``runtime``."""

from __future__ import annotations

import copy
import logging
import os
import struct
import time
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from errno import E2BIG, EPERM
from types import TracebackType
from typing import Final, Self

from sowatch.bpf.binding import PROGRAMS, BpfMap, BpfObject, Variable, probe
from sowatch.bpf.hooks import HOOK_SETS, HookSet, NoHooks, Trampolines
from sowatch.bpf.record_log import Drained, RecordLog
from sowatch.bpf.records import (
    Record,
    RecordType,
    file_and_view_of,
)
from sowatch.linux.proc import ProcFs
from sowatch.model.config import NO_GUARD, Config
from sowatch.model.errors import BpfError, LoadAttempt
from sowatch.model.literals import ONE_SCAN, Hooks, Strategy
from sowatch.model.stats import Losses
from sowatch.sources.base import ProcessScan, Report, TrackedEntry, Verdict, Verdicts
from sowatch.sources.iterator_scan import IteratorScan
from sowatch.sources.scan_rows import Grouping, RowPool, group, in_slices
from sowatch.sources.unread import ScanTimeout, UnreadProcesses

__all__ = ["BpfSource", "KernelSetting", "limit_waiting", "read_losses"]


LOG = logging.getLogger("sowatch")

#: enum counter.
LOST: Final = range(5)
#: enum verdict, and the value of the map `verdicts`.
VERDICT_MATCH: Final = 1
VERDICT_IGNORE: Final = 2
VERDICT_VALUE: Final = struct.Struct("=IIQ")
#: struct file_key, 64 bytes: inode number, then the rest; the epoch is the last of it.
FILE_KEY: Final = struct.Struct("=Q52sI")
#: How struct process begins, 40 bytes: start_ns, min_start, max_end, range_count, needs_rescan,
#: introduced, shares_vm; and how it ends, 516 bytes: activity, then MAX_RANGES pairs of start and end. What
#: lies between is for the programs only.
PROCESS_HEAD: Final = struct.Struct("=QQQIIII")
PROCESS_TAIL: Final = struct.Struct("=I64Q")

#: So many records of one process may wait to be read, or an eighth of them while more than this share of the ring is
#: full. A start that loads 1,000 libraries sends up to 4,000.
MAX_WAITING: Final = 4_096
BUSY_SHARE: Final = 16
#: What a full scan has read is parsed once it is so much, rather than at its end.
MAX_UNPARSED_BYTES: Final = 4 << 20
READER: Final = "read_mappings"
#: The same programs twice: with typed loads (6.2+), and with probe reads (5.17+).
OBJECTS: Final = ("watch.bpf.o", "watch_probe.bpf.o")


class KernelSetting:
    """A variable of loaded programs, as a `sowatch.sources.base.Setting`."""

    def __init__(self, variable: Variable) -> None:
        self._variable = variable

    def set(self, value: int) -> None:
        """Programs that run from now on see it."""
        self._variable.value = int(value)


class KernelClock:
    """The seconds by which the programs expire verdicts: 1 at the beginning."""

    def __init__(self, variable: Variable) -> None:
        self._variable = variable
        self._began_s = time.monotonic()
        variable.value = 1

    @property
    def now_s(self) -> int:
        """As the last `tick` set it."""
        return self._variable.value

    def tick(self) -> None:
        """Sets the programs' clock to the seconds since the beginning."""
        self._variable.value = 1 + int(time.monotonic() - self._began_s)


class BpfSource:
    """Strategies ``core`` and ``runtime``: CO-RE programs on the syscall tracepoints and the scheduler's.

    Opening loads and attaches everything; if any step fails, nothing stays attached.

    Args:
        config: sizes of maps and ring.
        strategy: what it is called.
        objects: paths of `OBJECTS`, if they were compiled here.
        has_hooks: without, it is for one scan: what changes later is not seen.

    Raises:
        LibbpfMissing: no libbpf.
        BpfError: the kernel refused; the log says what.
    """

    guarantee: str = "exact"
    polls: None = None  # the ring has everything as it happens
    _reader: str = READER

    def __init__(
        self, config: Config, *, strategy: Strategy = "core", objects: Sequence[str] = (), has_hooks: bool = True
    ) -> None:
        self.strategy = strategy
        self.hooks: Hooks | None = None
        self.limits: tuple[str, ...] = ("32-bit processes are watched by reads",)
        self.attempts: tuple[LoadAttempt, ...] = (LoadAttempt(strategy, True, None),)
        self._ttl_s = config.ignore_ttl_s
        self._can_iterate_one = True
        self._has_given_up = False
        self._proc = ProcFs(config.proc_root)
        self.unread = UnreadProcesses()
        if has_hooks:
            builds = self._builds(config, objects or self._shipped())
        else:
            self.guarantee, self.limits = ONE_SCAN, ()
            builds = [(program, NoHooks) for program in objects or self._shipped()]
        for program, hook_set in builds:
            try:
                self._open(program, hook_set, config)
            except BpfError as error:
                may_not = error.errno == EPERM and hook_set is not Trampolines
                if may_not or (program, hook_set) == builds[-1]:
                    raise
                LOG.debug("%s with hooks %s: %s", program, hook_set.name, error)
            else:
                break
        self.unread.start()

    def _shipped(self) -> Sequence[str]:
        return [str(PROGRAMS / name) for name in OBJECTS]

    def _builds(self, config: Config, objects: Sequence[str]) -> list[tuple[str, type[HookSet]]]:
        """Objects and hooks to try, best first: what the one cannot for want of a newer kernel, the next may."""
        sets = [one for one in HOOK_SETS if config.hooks in ("auto", one.name)]
        if config.hooks == "auto" and not probe("trampoline"):
            sets.remove(Trampolines)
        return [(program, one) for one in sets for program in objects]

    def _open(self, program: str, hook_set: type[HookSet], config: Config) -> None:
        self._object = BpfObject(program, btf_path=config.btf_path)
        try:
            self._load(hook_set(self._object), config)
        except BaseException:
            self._object.close()
            raise
        self.hooks = hook_set.name

    def _load(self, hooks: HookSet, config: Config) -> None:
        bpf = self._object
        bpf.set_max_entries("ring", config.ring_bytes)
        bpf.set_max_entries("processes", config.max_processes)
        bpf.set_max_entries("verdicts", config.max_verdicts)
        bpf.set_max_entries("pending_calls", config.max_pending)
        bpf.load()
        self._report = bpf.variable(".bss", "report")
        self._epoch = bpf.variable(".bss", "rules_epoch")
        self.answer_clock = KernelClock(bpf.variable(".bss", "now_s"))
        self.reports = KernelSetting(self._report)
        self._run = bpf.variable(".bss", "scan_run")
        self._verdicts = bpf.map("verdicts")
        self._processes = bpf.map("processes")
        self._ring_fd = bpf.open_ring("ring")
        self.record_limit = KernelSetting(bpf.variable(".bss", "max_records_s"))
        self.record_limit.set(config.max_records_s)
        limit_waiting(bpf, config)
        hooks.attach()
        bpf.trim()

    def fileno(self) -> int:
        return self._ring_fd

    def drain(self) -> list[Record]:
        return Drained(self._object.drain())

    def scan_all(self, meanwhile: Callable[[], None] | None = None) -> tuple[list[ProcessScan], RecordLog]:
        drained = RecordLog()
        take = meanwhile or (lambda: drained.extend(self.drain()))
        grouping = Grouping()

        def drain(scan: IteratorScan) -> None:
            take()
            if scan.unparsed_bytes > MAX_UNPARSED_BYTES:
                grouping.add(scan.rows())

        if not self._can_iterate_one and 0 in self.unread:
            raise ScanTimeout(0)
        if not self.unread:
            scan = IteratorScan(self._open_session, (0,))
            try:
                self._run_scan(scan, meanwhile=lambda: drain(scan))
                grouping.add(scan.rows())
                return grouping.scans(), drained
            except ScanTimeout as timeout:
                # Its rows stop where nobody knows. What it has cleared and introduced is read again.
                if timeout.is_refused or not self._can_iterate_one:
                    raise
                self.unread.forget(0)
        return self._read_each(take), drained

    def _read_each(self, drain: Callable[[], None]) -> list[ProcessScan]:
        """Process by process, but those that hang: the iterator over all would stop at the first of them."""
        report = self._report.value
        scans: list[ProcessScan] = []
        pool = RowPool()
        targets: Sequence[int] = [pid for pid in self._proc.pids() if not self.unread.hangs(pid)]
        self._report.value = report | Report.INTROS
        try:
            while targets:
                run = IteratorScan(self._open_session, targets)
                hung, targets = -1, ()
                try:
                    self._run_scan(run, meanwhile=drain)
                except ScanTimeout as timeout:
                    if timeout.is_refused:
                        raise
                    hung = timeout.pid
                    targets = [pid for pid in run.left_after() if not self.unread.hangs(pid)]
                for scan in group(run.rows(but=hung), pool):
                    scan.begin_ns = min(scan.begin_ns, run.begun_ns.get(scan.tgid, scan.begin_ns))
                    scans.append(scan)
        finally:
            self._report.value = report
        return scans

    def scan_process(self, pid: int, meanwhile: Callable[[], None] = lambda: None) -> ProcessScan | None:
        if self.unread.hangs(pid):
            raise ScanTimeout(pid)
        report = self._report.value
        # What an earlier scan of it may have introduced was not taken if that one was given up.
        self._report.value = report | Report.SCANS | (Report.INTROS if self._has_given_up else 0)
        begin_ns = time.monotonic_ns()
        try:
            rows = self._rows_of(pid, meanwhile)
        finally:
            self._report.value = report
        scans = group(rows)
        if not scans:
            return None
        (scan,) = scans
        scan.begin_ns = min(begin_ns, scan.begin_ns)
        return scan

    def _rows_of(self, pid: int, meanwhile: Callable[[], None]) -> list[Record]:
        if self._can_iterate_one:
            scan = IteratorScan(self._open_session, (pid,))
            try:
                self._run_scan(scan, meanwhile=meanwhile)
                return list(in_slices(scan.rows(), meanwhile))
            except BpfError as error:
                if error.errno != E2BIG:
                    raise
                self._can_iterate_one = False  # before 6.1 an iterator goes over all processes
        scan = IteratorScan(self._open_session, (0,))
        self._run_scan(scan, meanwhile=meanwhile)
        return [row for row in scan.rows() if row.tgid == pid or row.type == RecordType.FILE]

    def _run_scan(self, scan: IteratorScan, *, meanwhile: Callable[[], None] | None = None) -> None:
        """Runs a scan on a helper thread.

        Raises:
            ScanTimeout: it hangs. The thread is left behind, and whatever its sessions do later is void.
        """
        try:
            self.unread.run(lambda: scan.current, scan, progress=lambda: scan.progress, meanwhile=meanwhile)
        except ScanTimeout:
            scan.is_given_up = self._has_given_up = True
            self._raise_fence()
            raise

    def _raise_fence(self) -> None:
        """A newer session: one that hangs must not clear a mark when it goes on, for nobody takes its rows."""
        if not self._can_iterate_one:
            return
        report = self._report.value
        self._report.value = report | Report.FENCE
        fence = IteratorScan(self._open_session, (os.getpid(),))
        try:
            self.unread.run(0, fence)
        except ScanTimeout:
            fence.is_given_up = True  # every thread is taken: the next session that begins does it
            self.unread.forget(0)
        finally:
            self._report.value = report

    def _open_session(self, pid: int) -> int:
        self._run.value += 1
        return self._object.iterate(self._reader, pid)

    def answer(self, places: Mapping[Hashable, int], *, is_wanted: bool) -> None:
        expires_s = self.answer_clock.now_s + max(1, round(self._ttl_s))
        verdict = VERDICT_MATCH if is_wanted else VERDICT_IGNORE
        values = [VERDICT_VALUE.pack(verdict, expires_s, place) for place in places.values()]
        self._verdicts.update_many(list(places), values)  # type: ignore[arg-type]

    def untrack(self, pid: int, start_ns: int, activity: int) -> bool:
        return self._object.run("untrack", pid, start_ns, activity) == 1

    def new_epoch(self) -> None:
        self._epoch.value += 1

    def losses(self) -> Losses:
        return read_losses(self._object)

    def tracked(self, pid: int) -> TrackedEntry | None:
        value = self._processes.lookup(struct.pack("=I", pid))
        if value is None:
            return None
        start_ns, _, _, count, needs_rescan, introduced, shares_vm = PROCESS_HEAD.unpack_from(value)
        activity, *ends = PROCESS_TAIL.unpack_from(value, len(value) - PROCESS_TAIL.size)
        ranges = tuple(zip(ends[: 2 * count : 2], ends[1 : 2 * count : 2], strict=True))
        return TrackedEntry(start_ns, count, bool(needs_rescan), bool(introduced), bool(shares_vm), activity, ranges)

    def open_verdicts(self) -> Verdicts:
        return KernelVerdicts(self._verdicts, self._epoch.value, self.answer_clock.now_s)

    def close(self) -> None:
        self.unread.close()
        self._object.close()


class KernelVerdicts:
    """`Verdicts` of a loaded object, through a descriptor of their own, so that closing the source does no harm.

    Args:
        table: the map ``verdicts``.
        epoch: answers of others are void.
        now_s: the time by which they grow old.
    """

    def __init__(self, table: BpfMap, epoch: int, now_s: int) -> None:
        self._table = copy.copy(table)
        self._table.fd = os.dup(table.fd)
        self._epoch = epoch
        self._now_s = now_s

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def look_up(self, key: Hashable) -> Verdict | None:
        assert isinstance(key, bytes)
        if self._table.fd < 0 or FILE_KEY.unpack(key)[2] != self._epoch:
            return None
        value = self._table.lookup(key)
        if value is None:
            return None
        verdict, expires_s, _ = VERDICT_VALUE.unpack(value)
        if verdict == VERDICT_MATCH:
            return Verdict(*file_and_view_of(key), True, None)
        # The comparison of look_up_verdict() in identity.bpf.h.
        seconds_left = expires_s - self._now_s
        return Verdict(*file_and_view_of(key), False, seconds_left) if seconds_left > 0 else None

    def of_inodes(self, inodes: Collection[int]) -> list[Verdict]:
        if self._table.fd < 0:
            return []
        wanted = {inode.to_bytes(8, "little") for inode in inodes}
        # A key that is moved about while it is read may come twice.
        keys = dict.fromkeys(key for key in self._table.all_keys() if key[:8] in wanted)
        return [found for key in keys if (found := self.look_up(key)) is not None]

    def close(self) -> None:
        fd, self._table.fd = self._table.fd, -1
        if fd >= 0:
            os.close(fd)


def limit_waiting(bpf: BpfObject, config: Config) -> None:
    """Bounds what one process may have waiting in the ring of a loaded object, unless there is no guard at all."""
    bpf.variable(".bss", "busy_bytes").value = config.ring_bytes // BUSY_SHARE
    bpf.variable(".bss", "max_waiting").value = 0 if config.max_records_s == NO_GUARD else MAX_WAITING


def read_losses(bpf: BpfObject) -> Losses:
    """What a loaded ``watch.bpf.o`` has lost: its own counters, and the kernel's."""
    counted = (bpf.per_cpu_sum("counters", number) for number in LOST)
    return Losses(*counted)._replace(skipped=bpf.skipped_runs())
