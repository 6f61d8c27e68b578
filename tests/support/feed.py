"""A process feed that tests fill by hand, on a real descriptor: the seam where the kernel is otherwise."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import Any

from sowatch.linux.containers import container_id
from sowatch.linux.proc import ProcFs
from sowatch.model.events import Process
from sowatch.model.identity import TICK_NS, ProcessId
from sowatch.model.literals import ProcessKind
from sowatch.model.process_events import ProcessEvent

#: No process has these pids (pid_max is at most 2**22), so only the feed can speak of them.
NOWHERE = 2**22 + 1
MARK = 2**22 + 2


def ghost(pid: int = NOWHERE, start_ticks: int = 5, **facts: Any) -> Process:
    return Process(pid=pid, start_ns=start_ticks * TICK_NS, **facts)


class PipeFeed:
    """What is sent is drained in this order. Everything may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: list[ProcessEvent] = []
        self._lost = 0
        self._read_fd = self._write_fd = -1
        self.opened = 0
        self.closed = 0
        #: Raised, once each, by the next `open` and the next `drain`.
        self.open_errors: list[Exception] = []
        self.drain_errors: list[Exception] = []
        #: Sent by `open` itself: the kernel is faster than we are.
        self.sent_at_open: list[ProcessEvent] = []

    @property
    def is_open(self) -> bool:
        return self.opened > self.closed

    def open(self) -> None:
        with self._lock:
            if self.open_errors:
                raise self.open_errors.pop(0)
            assert not self.is_open
            self._read_fd, self._write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            self._lost = 0
            self.opened += 1
        self.send(*self.sent_at_open)

    def fileno(self) -> int:
        assert self.is_open
        return self._read_fd

    def drain(self) -> list[ProcessEvent]:
        with self._lock:
            assert self.is_open
            if self.drain_errors:
                raise self.drain_errors.pop(0)
            # Nothing to read: only the losses are looked after.
            with contextlib.suppress(BlockingIOError):
                os.read(self._read_fd, 65536)
            events, self._events = self._events, []
            return events

    def lost(self) -> int:
        assert self.is_open
        return self._lost

    def close(self) -> None:
        with self._lock:
            assert self.is_open
            self.closed += 1
            os.close(self._read_fd)
            if self._write_fd >= 0:
                os.close(self._write_fd)

    def send(self, *events: ProcessEvent) -> None:
        """The kernel has these to tell."""
        with self._lock:
            self._events += events
            self._wake()

    def lose(self, count: int = 1) -> None:
        """The kernel could not tell so many."""
        with self._lock:
            self._lost += count
            self._wake()

    def wake(self) -> None:
        """Something to drain, or so it seems."""
        with self._lock:
            self._wake()

    def _wake(self) -> None:
        if self.is_open:
            os.write(self._write_fd, b"x")

    def hang_up(self) -> None:
        """The descriptor breaks, as it does when a driver goes away."""
        with self._lock:
            os.close(self._write_fd)
            self._write_fd = -1


def event(
    kind: ProcessKind, process: Process | int, *, t_ns: int | None = None, parent: ProcessId | None = None
) -> ProcessEvent:
    """An event as the kernel would send it now; a pid stands for the process as ``/proc`` shows it."""
    if isinstance(process, int):
        process = described(process)
    return ProcessEvent(kind, process, parent, time.monotonic_ns() if t_ns is None else t_ns)


def described(pid: int) -> Process:
    found = ProcFs().process(pid, container_of=container_id)
    assert found is not None, f"process {pid} is gone"
    return found


class Inbox:
    """Subscribes to all three kinds and keeps what comes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: list[ProcessEvent] = []

    def __call__(self, one: ProcessEvent) -> None:
        with self._lock:
            self._events.append(one)

    def subscribe(self, monitor: Any) -> Inbox:
        for on in (monitor.on_exec, monitor.on_fork, monitor.on_exit):
            on(self)
        return self

    def of(self, pid: int) -> list[tuple[str, str]]:
        """(kind, cause) of everything about one pid."""
        return [(one.kind, one.cause) for one in self.all(pid)]

    def all(self, pid: int | None = None) -> list[ProcessEvent]:
        with self._lock:
            return [one for one in self._events if pid is None or one.process.pid == pid]
