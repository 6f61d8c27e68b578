"""A watcher whose events a test writes down, in the place of the real one behind the commands.

It keeps the promises a command leans on: `Ready` comes from ``start``, `Stopped` once from ``stop``, and what was
sent before either can still be read.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from msgspec import Struct

from sowatch.model.errors import LoadAttempt
from sowatch.model.events import (
    Activate,
    Deactivate,
    Event,
    Http,
    Library,
    LibraryEvent,
    Load,
    Process,
    Ready,
    Renewed,
    Stale,
    Stopped,
    Unload,
)
from sowatch.model.identity import FileId
from sowatch.model.literals import Staleness

__all__ = ["HTTP", "PROCESS", "READY", "RENEWED", "SSL", "STALE", "Entry", "ScriptedWatcher", "event"]

TIME_NS = 1_700_000_000_123_456_789

PROCESS = Process(
    pid=1234,
    start_ns=5_000_000_000,
    ns_pid=7,
    ppid=1,
    comm="nginx",
    exe="/usr/sbin/nginx",
    uid=33,
    container="3f2a9c8b1d0e4455",
    cgroup="/system.slice/nginx.service",
)
SSL = Library(
    path="/usr/lib/libssl.so.3",
    id=FileId(254, 0, 99, 7),
    host_path="/proc/1234/map_files/1000-2000",
    build_id="00ff" * 10,
    soname="libssl.so.3",
)
STALE = Stale("ssl", SSL, PROCESS, Staleness.REPLACED, None, TIME_NS)
RENEWED = Renewed("ssl", SSL, PROCESS, "unmapped", TIME_NS)
HTTP = Http(
    time_ns=TIME_NS,
    process=PROCESS,
    library=SSL,
    side="server",
    protocol="HTTP/1.1",
    method="GET",
    authority="shop.example",
    path="/users/7",
    status=200,
    grpc_status=None,
    request_bytes=0,
    response_bytes=10,
    ttfb_ns=1_500_000,
    duration_ns=2_000_001,
    is_complete=True,
    peer=("127.0.0.1", 40000),
    local_port=443,
)
READY = Ready(
    time_ns=TIME_NS,
    host="box",
    boot_id="5d2a",
    strategy="core",
    guarantee="exact",
    hooks="syscall",
    limits=("32-bit processes are watched by reads",),
    attempts=(LoadAttempt("core", ok=True, error=None),),
    processes=212,
    mappings=5120,
    seconds=0.03,
)


def event(kind: str = "load", cause: str | None = "mmap", **changes: Any) -> LibraryEvent:
    """A load of libssl by nginx, or another event with as much of it as such events have, with changes."""
    facts: dict[str, Any] = {
        "rule": "all",
        "library": SSL,
        "process": PROCESS,
        "cause": cause if kind in ("load", "unload") else None,
        "t_ns": 42,
        "time_ns": TIME_NS,
        "ranges": ((0x1000, 0x2000),) if kind == "load" else (),
    }
    made = {one.event: one for one in (Load, Unload, Activate, Deactivate)}[kind]
    return made(**{name: value for name, value in (facts | changes).items() if name in made.__struct_fields__})


class Entry(Struct, frozen=True):
    """One entry of a snapshot."""

    process: Process = PROCESS
    library: Library = SSL
    rule: str = "all"
    ranges: tuple[tuple[int, int], ...] = ((0x1000, 0x2000),)
    range_count: int | None = None
    cause: str | None = "snapshot"
    time_ns: int = TIME_NS


@dataclass
class Stats:
    processes: int = 212
    libraries: int = 48
    events: int = 0
    loads: int = 0
    unloads: int = 0
    lost_kernel: int = 0
    lost_queue: int = 0


class Subscription:
    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.is_closed = False

    def get(self, timeout_s: float) -> Event | None:
        try:
            return self.queue.get(timeout=timeout_s) if timeout_s else self.queue.get_nowait()
        except queue.Empty:
            return None

    def close(self) -> None:
        self.is_closed = True


@dataclass
class ScriptedWatcher:
    """Sends ``before``, `Ready` and ``after`` when started, and `Stopped` when stopped.

    With ``start_error``, ``start`` raises that instead. ``says_stopped=False`` is one whose end
    nobody announces.
    """

    before: Sequence[Event] = ()
    after: Sequence[Event] = ()
    entries: Sequence[Entry] = ()
    ready: Ready = READY
    start_error: BaseException | None = None
    says_stopped: bool = True
    stats: Stats = field(default_factory=Stats)

    def __post_init__(self) -> None:
        self.subscription = Subscription()
        self.asked_for: Collection[str] = ()
        self.selection: Any = None
        self.is_started = threading.Event()
        self.is_stopped = threading.Event()
        self.stops = 0
        self._lock = threading.Lock()

    def open(self, selection: Any) -> ScriptedWatcher:
        """Takes the place of `sowatch.cli._options.open_watcher`."""
        self.selection = selection
        return self

    def subscribe(self, *, events: Collection[str], control: bool = True) -> Subscription:
        self.asked_for = events
        return self.subscription

    def start(self) -> Ready:
        if self.start_error is not None:
            raise self.start_error
        self.send(*self.before, self.ready, *self.after)
        self.is_started.set()
        return self.ready

    def send(self, *events: Event) -> None:
        for one in events:
            self.subscription.queue.put(one)

    def stop(self) -> None:
        with self._lock:
            self.stops += 1
            if self.stops == 1:
                if self.says_stopped and self.is_started.is_set():
                    self.send(Stopped(TIME_NS, loads=1, unloads=0, lost=0))
                self.is_stopped.set()

    def wait(self, timeout_s: float | None = None) -> bool:
        return self.is_stopped.wait(timeout_s)

    def snapshot(self) -> Sequence[Entry]:
        return self.entries
