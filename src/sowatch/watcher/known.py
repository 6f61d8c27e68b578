"""Which processes were reported to the subscribers, and what is left to report.

Not safe for several threads: the monitor calls it with its lock held.

The set holds what was *reported*, not what is: an event that could not be handed on leaves it as it
was, so the comparison with ``/proc`` finds it again. Everything here is keyed by pid, since one
pid names one process at a time, and compared by `ProcessId` at tick precision.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Container, Iterable
from typing import Final, NamedTuple

from msgspec.structs import replace

from sowatch.linux.containers import container_id
from sowatch.linux.liveness import running_stat
from sowatch.linux.proc import Miss, ProcFs
from sowatch.model.events import Process
from sowatch.model.identity import TICK_NS, ProcessId
from sowatch.model.process_events import ProcessEvent

__all__ = ["Differences", "KnownProcesses", "Seen", "describe", "look"]

#: Exits remembered so that none is reported twice: a repair may find one whose event is still to come, and
#: where the kernel does not say which thread is the last one, two may both look like it.
_REMEMBERED_EXITS: Final = 8_192


class Seen(NamedTuple):
    """A process as a scan of ``/proc`` found it.

    ``image`` is where the last exec put code and stack: inherited by fork and, the addresses being
    random, different after every exec. Empty where it may not be seen, and of kernel threads.
    """

    id: ProcessId
    ppid: int
    is_kernel_thread: bool
    image: tuple[bytes, ...]
    t_ns: int


def look(proc: ProcFs) -> dict[int, Seen]:
    """Every process that is not a zombie and not ending.

    Raises:
        ProcRootError: the proc root is none any more.
        ProcReadError: it could not be read, and not because of a process.
    """
    found = {}
    for pid in proc.pids():
        # Taken first: what happened before it is in what is read after it.
        t_ns = time.monotonic_ns()
        stat = running_stat(proc, pid)
        if not isinstance(stat, Miss):
            found[pid] = Seen(ProcessId(pid, stat.start_ns), stat.ppid, stat.is_kernel_thread, stat.image, t_ns)
    return found


class _Known:
    """A process as the subscribers know it.

    ``image`` is the one of the last scan, of the parent's where nobody read the child yet: an
    exec that the feed reported makes the next scan differ too. ``fact_ns`` is the time of the latest
    news. An exec from before ``reported_ns``, the baseline, is reported by its scan.
    """

    __slots__ = (
        "fact_ns",
        "image",
        "is_exec_unreported",
        "is_fork_reported",
        "is_kernel_thread",
        "process",
        "reported_ns",
    )

    def __init__(self, process: Process, image: tuple[bytes, ...], *, is_kernel_thread: bool = False) -> None:
        self.process = process
        self.image = image
        self.is_kernel_thread = is_kernel_thread
        self.is_fork_reported = False
        self.is_exec_unreported = False
        self.reported_ns = 0
        self.fact_ns = 0


class Differences(NamedTuple):
    """What a scan of ``/proc`` shows that was not reported."""

    exits: list[ProcessEvent]
    new: list[Seen]
    changed: list[Seen]


class KnownProcesses:
    """See the module."""

    __slots__ = ("_gone", "_known")

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}
        self._gone: OrderedDict[tuple[int, int], None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def news(self, event: ProcessEvent) -> list[ProcessEvent]:
        """What to report because of an event from the feed, in this order. Changes nothing."""
        known = self._known.get(event.process.pid)
        if known is None:
            return self._news_of_untracked_sharer(event)
        if not known.process.id.same_tick(event.process.id):
            if event.process.start_ns < known.process.start_ns:
                return []  # of an earlier process with this pid, whose exit was reported when this one was found
            return [_exit(known, event.t_ns), *self._news_of_untracked_sharer(event)]
        if event.kind == "fork":
            return [] if known.is_fork_reported else [event]
        if event.kind == "exec":
            return [] if event.t_ns < known.reported_ns else [event]
        return [replace(event, process=_completed(event.process, known.process))]

    def _news_of_untracked_sharer(self, event: ProcessEvent) -> list[ProcessEvent]:
        if _tick(event.process.id) in self._gone:
            return []
        if event.kind == "exec":  # its fork was lost
            return [replace(event, kind="fork", cause="repair"), event]
        return [event]

    def reported(self, event: ProcessEvent, seen: Seen | None = None) -> None:
        """The event was handed on; ``seen`` if it came from a scan of ``/proc``."""
        pid = event.process.pid
        known = self._known.get(pid)
        if event.kind == "exit":
            self._known.pop(pid, None)
            self._remember_exit(event)
            return
        if known is None or not known.process.id.same_tick(event.process.id):
            parent = self._known.get(event.parent.pid) if event.parent else None
            image = parent.image if parent is not None and event.kind == "fork" else ()
            known = self._known[pid] = _Known(event.process, image)
        if event.kind == "fork":
            known.is_fork_reported = True
        else:
            known.process = _completed(event.process, known.process, but=("comm", "exe"))
            known.is_exec_unreported = False
        known.fact_ns = event.t_ns
        if seen is not None:
            known.image = seen.image
            known.is_kernel_thread = seen.is_kernel_thread

    def untold(self, event: ProcessEvent) -> None:
        """The event could not be handed on: the next comparison has to find it."""
        known = self._known.get(event.process.pid)
        if known is not None and event.kind == "exec" and known.process.id.same_tick(event.process.id):
            known.is_exec_unreported = True

    def add(self, process: Process, seen: Seen, *, is_reported: bool) -> bool:
        """Takes note of a process that was there before; not if the feed reported it already."""
        if process.pid in self._known or _tick(process.id) in self._gone:
            return False
        known = self._known[process.pid] = _Known(process, seen.image, is_kernel_thread=seen.is_kernel_thread)
        known.fact_ns = seen.t_ns
        known.reported_ns = seen.t_ns if is_reported else 0
        return True

    def scan(self, pids: Container[int] | None = None) -> list[ProcessEvent]:
        """Those that run a program, or the ones in ``pids`` only, as events for who does not know them."""
        now_ns = time.monotonic_ns()
        return [
            ProcessEvent("exec", known.process, self.parent_of(known.process.ppid), now_ns, "scan")
            for pid, known in self._known.items()
            if not known.is_kernel_thread and (pids is None or pid in pids)
        ]

    def parent_of(self, ppid: int | None) -> ProcessId | None:
        """The identity behind a parent's pid."""
        parent = self._known.get(ppid) if ppid else None
        return None if parent is None else parent.process.id

    def compare(self, looked: dict[int, Seen], began_ns: int) -> Differences:
        """What is to be reported so that the subscribers know what ``looked`` shows.

        Args:
            looked: what a scan that began at ``began_ns`` found. What the feed reported of that time
                must have been reported; newer events stand.
            began_ns: CLOCK_MONOTONIC.

        Returns:
            Parents come before children.
        """
        exits, changed = [], []
        for pid, known in self._known.items():
            seen = looked.get(pid)
            if seen is None or not seen.id.same_tick(known.process.id):
                if known.fact_ns < began_ns:
                    exits.append(_exit(known, began_ns))
            elif seen.is_kernel_thread:
                continue
            elif known.is_exec_unreported or (known.image != seen.image and known.fact_ns < seen.t_ns):
                changed.append(seen)
        new = sorted((seen for seen in looked.values() if self._is_new(seen)), key=lambda seen: seen.id.start_ns)
        return Differences(exits, new, changed)

    def _is_new(self, seen: Seen) -> bool:
        known = self._known.get(seen.id.pid)
        # The known one may be newer than the scan: then the one that was seen is gone already.
        if known is not None and _tick(known.process.id) >= _tick(seen.id):
            return False
        return _tick(seen.id) not in self._gone

    def _remember_exit(self, event: ProcessEvent) -> None:
        key = _tick(event.process.id)
        self._gone[key] = None
        self._gone.move_to_end(key)
        if len(self._gone) > _REMEMBERED_EXITS:
            self._gone.popitem(last=False)


def describe(proc: ProcFs, seen: Seen) -> Process | None:
    """The whole record of a process that a scan found; None if it is gone, or another one by now."""
    process = proc.process(seen.id.pid, container_of=container_id)
    return process if process is not None and process.id.same_tick(seen.id) else None


def _exit(known: _Known, t_ns: int) -> ProcessEvent:
    return ProcessEvent("exit", known.process, None, t_ns, "repair")


def _completed(process: Process, earlier: Process, *, but: Iterable[str] = ()) -> Process:
    """The record, with what it does not say taken from an earlier one of the same process."""
    missing = {
        name: value
        for name in Process.__struct_fields__
        if name not in but and getattr(process, name) is None and (value := getattr(earlier, name)) is not None
    }
    return replace(process, **missing) if missing else process


def _tick(process: ProcessId) -> tuple[int, int]:
    return process.pid, process.start_ns // TICK_NS
