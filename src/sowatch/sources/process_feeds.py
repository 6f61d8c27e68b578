"""Exec, fork and exit of every process, for the `ProcessMonitor`: from the kernel, or from polls of ``/proc``.

`KernelProcessFeed` loads three of the programs that `BpfSource` loads, with maps of the smallest size; a watch beside
it does not notice. `PolledProcessFeed` needs no right.
"""

from __future__ import annotations

import logging
import time
from typing import NamedTuple

from sowatch.bpf.binding import PROGRAMS, BpfObject
from sowatch.bpf.hooks import PROCESS_HOOKS
from sowatch.bpf.records import ProcessRecord, Record, RecordType, parse, path_of, paths_of
from sowatch.linux.capabilities import missing_capabilities
from sowatch.linux.cgroups import choose_cgroup
from sowatch.linux.containers import container_id
from sowatch.linux.cpu_clock import CpuClocks
from sowatch.linux.pid_namespaces import why_not_whole_host
from sowatch.linux.proc import ProcFs, ProcReadError
from sowatch.linux.proc_parse import Stat
from sowatch.model.config import Config
from sowatch.model.errors import NotPermitted, PidNamespaceError, SowatchError
from sowatch.model.events import Process
from sowatch.model.identity import ProcessId
from sowatch.model.process_events import ProcessEvent
from sowatch.sources.base import Report
from sowatch.sources.core import read_losses
from sowatch.sources.legacy import OLD_OBJECT, READERS
from sowatch.sources.poll_timer import PollTimer

__all__ = ["KernelProcessFeed", "PolledProcessFeed"]

LOG = logging.getLogger("sowatch")


class KernelProcessFeed:
    """What the scheduler's tracepoints say. Can be opened again after `close`.

    Args:
        config: ``ring_bytes`` sizes the ring.
    """

    def __init__(self, config: Config | None = None) -> None:
        self._config = config or Config()
        self._object: BpfObject | None = None
        self._ring_fd = -1

    def open(self) -> None:
        """Loads and attaches.

        Raises:
            NotPermitted: a capability is missing.
            PidNamespaceError: ``/proc`` would be read by other numbers than the kernel's.
            SowatchError: the kernel refused.
        """
        reason = why_not_whole_host(ProcFs(self._config.proc_root))
        if reason is not None:
            raise PidNamespaceError(reason)
        # What these three need the oldest kernel has.
        bpf = BpfObject(str(PROGRAMS / OLD_OBJECT))
        try:
            for name in (*READERS, "untrack"):
                bpf.skip(name)
            bpf.set_max_entries("ring", self._config.ring_bytes)
            for name in ("processes", "verdicts", "pending_calls"):
                bpf.set_max_entries(name, 1)
            bpf.load()
            bpf.variable(".bss", "report").value = int(Report.PROCESSES)
            self._ring_fd = bpf.open_ring("ring")
            for hook in PROCESS_HOOKS:
                bpf.attach(hook)
        except SowatchError as error:
            bpf.close()
            missing = missing_capabilities()
            if missing:
                raise NotPermitted(
                    "cannot load BPF programs", f"missing {' and '.join(missing)}", "Run it as root."
                ) from error
            raise
        self._object = bpf

    def fileno(self) -> int:
        """A descriptor that polls readable while there is something to drain."""
        return self._ring_fd

    def drain(self) -> list[ProcessEvent]:
        """What happened since the last call, in order."""
        return [] if self._object is None else [self._event(record) for record in parse(self._object.drain())]

    def lost(self) -> int:
        """How many events the kernel could not send since `open`."""
        return 0 if self._object is None else sum(read_losses(self._object))

    def close(self) -> None:
        """Detaches everything. Safe to call again."""
        bpf, self._object = self._object, None
        if bpf is not None:
            bpf.close()

    def _event(self, record: Record) -> ProcessEvent:
        if isinstance(record, ProcessRecord):
            cgroup = choose_cgroup(paths_of(record.cgroup))
            process = Process(
                pid=record.tgid,
                start_ns=record.start_ns,
                ns_pid=record.ns_pid,
                ppid=record.ppid,
                comm=record.comm.rstrip(b"\0").decode("utf-8", "surrogateescape"),
                exe=path_of(record.path) or None,
                uid=record.uid,
                container=container_id(cgroup),
                cgroup=cgroup,
            )
            is_fork = record.type == RecordType.FORK
            parent = ProcessId(record.parent_tgid, record.parent_start_ns) if is_fork else None
            return ProcessEvent("fork" if is_fork else "exec", process, parent, record.t_ns)
        # Who it was the monitor knows.
        return ProcessEvent("exit", Process(pid=record.tgid, start_ns=record.start_ns), None, record.t_ns)


class _Seen(NamedTuple):
    """A process at the last poll that was needed."""

    stat: Stat
    process: Process
    cpu_ns: int | None


class PolledProcessFeed:
    """What polls of ``/proc`` show, every ``poll_interval_s``. Can be opened again after `close`.

    Processes that come and go between two polls are not seen; of several execs in between only the
    last is reported, and none of processes that this user may not read. ``t_ns`` is the time of the poll.

    Args:
        config: ``proc_root``, ``poll_interval_s``, ``poll_cpu_percent``.
    """

    def __init__(self, config: Config | None = None) -> None:
        self._config = config or Config()
        self._timer: PollTimer | None = None
        self._known: dict[int, _Seen] = {}

    def open(self) -> None:
        """Polls for the first time; what is there is not reported.

        Raises:
            ProcRootError: there is no proc file system.
            SowatchError: there is no descriptor left.
        """
        self._proc = ProcFs(self._config.proc_root)
        self._clocks = CpuClocks(self._proc)
        self._timer = PollTimer(self._config, f"polling the processes in {self._proc.root}")
        try:
            with self._timer.look(counts=False):
                self._look()
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """A descriptor that polls readable when it is time for a poll."""
        return -1 if self._timer is None else self._timer.fileno()

    def drain(self) -> list[ProcessEvent]:
        """Polls if it is due: exits, then per process fork and exec, parents first."""
        if self._timer is None or not self._timer.is_due():
            return []
        with self._timer.look():
            try:
                return self._look()
            except ProcReadError as error:
                LOG.warning("a poll of %s failed and is repeated: %s", self._proc.root, error)
                return []

    def lost(self) -> int:
        """0: what happens between two polls cannot be counted."""
        return 0

    def close(self) -> None:
        """Safe to call again."""
        timer, self._timer = self._timer, None
        self._known.clear()
        if timer is not None:
            timer.close()

    def _look(self) -> list[ProcessEvent]:
        found: dict[int, _Seen] = {}
        exits, news = [], []
        for pid in self._proc.pids():
            known = self._known.get(pid)
            cpu_ns = self._clocks.read_ns(pid)
            if known is not None and cpu_ns is not None and cpu_ns == known.cpu_ns:
                found[pid] = known
                continue
            stat = self._proc.stat(pid)
            if not stat or (stat.is_dead and stat.threads < 2):
                continue
            is_same = known is not None and stat.start_ticks == known.stat.start_ticks
            # A dead leader shows no image, and one that became unreadable hides it: no sign of an exec.
            if known is not None and is_same and (not stat.image or stat.image == known.stat.image):
                found[pid] = known._replace(cpu_ns=cpu_ns)
                continue
            process = self._proc.process(pid, container_of=container_id)
            if process is not None and process.start_ns == stat.start_ns:
                found[pid] = _Seen(stat, process, cpu_ns)
                news.append(found[pid])
        now_ns = time.monotonic_ns()
        before, self._known = self._known, found
        for pid, one in before.items():
            if pid not in found or found[pid].stat.start_ticks != one.stat.start_ticks:
                exits.append(ProcessEvent("exit", one.process, None, now_ns))
        reported = list(exits)
        for one in sorted(news, key=lambda one: (one.stat.start_ticks, one.process.pid)):
            reported += self._news_of(one, before.get(one.process.pid), now_ns)
        return reported

    def _news_of(self, one: _Seen, before: _Seen | None, now_ns: int) -> list[ProcessEvent]:
        is_new = before is None or before.stat.start_ticks != one.stat.start_ticks
        parent = self._known.get(one.stat.ppid)
        events = []
        if is_new:
            parent_id = None if parent is None else parent.process.id
            events.append(ProcessEvent("fork", one.process, parent_id, now_ns))
        had = (parent if is_new else before) or one
        if one.stat.image and one.stat.image != had.stat.image:
            events.append(ProcessEvent("exec", one.process, None, now_ns))
        return events
