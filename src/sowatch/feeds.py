"""`KernelProcessFeed`: exec, fork and exit of every process, for the `ProcessMonitor`.

May import ``bpf``, ``sources`` and ``processes``. It loads three of the programs that `BpfSource`
loads, with maps of the smallest size; a watch beside it does not notice.
"""

from __future__ import annotations

from importlib.resources import files

from sowatch.bpf.binding import BpfObject
from sowatch.bpf.records import ProcessRecord, Record, RecordType, parse, path_of
from sowatch.config import Config
from sowatch.errors import NotPermitted, SowatchError
from sowatch.events import Process
from sowatch.identity import ProcessId
from sowatch.ladder import missing_capabilities
from sowatch.processes import ProcessEvent, ProcessMonitor, container_id
from sowatch.sources import OBJECTS, PROCESS_HOOKS, READER, Report, read_losses

__all__ = ["KernelProcessFeed", "process_monitor"]


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
            SowatchError: the kernel refused.
        """
        # Probe reads cost nothing that matters here, and load on every kernel.
        bpf = BpfObject(str(files("sowatch.bpf") / "programs" / OBJECTS[-1]))
        try:
            bpf.skip(READER)
            bpf.skip("settle")
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
            cgroup = path_of(record.cgroup) if record.cgroup else "/"
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


def process_monitor(config: Config | None = None) -> ProcessMonitor:
    """The one `ProcessMonitor` of this Python process, started; each call needs one ``stop``.

    Raises:
        NotPermitted: this user may not load BPF programs.

    >>> monitor = process_monitor()  # doctest: +SKIP
    >>> unsubscribe = monitor.on_exec(lambda event: print(event.process.pid, event.process.exe))  # doctest: +SKIP
    """
    return ProcessMonitor.shared(lambda: KernelProcessFeed(config), config=config)
