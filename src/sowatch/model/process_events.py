"""What the process monitor takes and gives: frozen records, and the seam to the kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

from msgspec import Struct

from sowatch.model.events import Process
from sowatch.model.identity import ProcessId
from sowatch.model.literals import ProcessCause, ProcessKind

__all__ = [
    "ProcessCallback",
    "ProcessEvent",
    "ProcessFeed",
    "ProcessMonitorStats",
    "Unsubscribe",
]


class ProcessEvent(Struct, frozen=True, gc=False):
    """A process came, changed its program, or ended.

    ``cause`` is ``event`` (the kernel reported it), ``scan`` (it was there when the monitor started or
    the subscriber came) or ``repair`` (it was found after a loss; for an exec this means that the
    program may have changed: read it again). ``t_ns`` is CLOCK_MONOTONIC, of the fact itself for an
    ``event``, else of the scan of ``/proc``. An exit is that of the last thread.
    """

    kind: ProcessKind
    process: Process
    parent: ProcessId | None
    t_ns: int
    cause: ProcessCause = "event"


ProcessCallback: TypeAlias = Callable[[ProcessEvent], object]
Unsubscribe: TypeAlias = Callable[[], None]


class ProcessFeed(Protocol):
    """Where the monitor's facts come from: the one thing here that knows the kernel.

    ``open`` and ``close`` alternate; it must be possible to open it again after a close. After
    ``open`` has returned, nothing that happens may be missing without a count in ``lost``. All
    other methods are called by one thread.
    """

    def open(self) -> None:
        """Begins to collect. Raises a `SowatchError` if it cannot, and then holds nothing."""

    def fileno(self) -> int:
        """A descriptor that polls readable while there is something to drain."""

    def drain(self) -> list[ProcessEvent]:
        """What has been collected, in the order it happened. Never waits.

        Forks and exits are of processes, not of threads.
        """

    def lost(self) -> int:
        """How many events could not be collected since ``open``; never falls while it is open."""

    def close(self) -> None:
        """Ends collecting and gives everything back."""


class ProcessMonitorStats(Struct, frozen=True, gc=False):
    """Counters since the monitor was made, and a gauge.

    Attributes:
        events: received from the feed; ``exec``, ``fork`` and ``exit`` are its parts.
        callbacks: calls of subscribers; ``callback_errors`` of them raised.
        lost_kernel: events the feed could not collect.
        lost_queue: events that found the queue full, or were still in it when `stop` ran out of time.
        repairs: scans of ``/proc`` that made a loss good.
        scan_failed: scans of ``/proc`` that failed; each is tried again.
        feed_errors: failures of an open feed; each time it is opened again and repaired.
        processes: known now.
    """

    events: int = 0
    exec: int = 0
    fork: int = 0
    exit: int = 0
    callbacks: int = 0
    callback_errors: int = 0
    lost_kernel: int = 0
    lost_queue: int = 0
    repairs: int = 0
    scan_failed: int = 0
    feed_errors: int = 0
    processes: int = 0
