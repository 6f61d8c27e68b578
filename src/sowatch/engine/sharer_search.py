"""`SharerSearch`: when untracked sharers of an mm are searched, and which processes have to be scanned then.

A process that nobody tracks may hold an address space of which something is wanted; who reads ``/proc/PID/maps`` looks
the same for a moment, a scan of ours included. So most searches find nobody, and they must not cost others anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Final

from sowatch.engine.table import MappingTable
from sowatch.linux.proc import Miss, ProcFs
from sowatch.linux.shared_mm import find_sharers
from sowatch.model.identity import ProcessId
from sowatch.sources.base import EventSource
from sowatch.sources.unread import ScanTimeout

__all__ = ["SHARERS_REST", "SharerSearch"]

#: After a search, or the full scan in its place, wait so many times the CPU time it took.
SHARERS_REST: Final = 20
#: The record of an exec comes so long after the address space is another one, at the most.
EXEC_S: Final = 2.0
#: More processes than this are not searched for one by one.
MANY_SHARING: Final = 16


class SharerSearch:
    """What has to be searched for; for the engine's thread. Times are seconds of CLOCK_MONOTONIC.

    Args:
        source: for its threads.
        table: knows sharers.
        proc: where the pids are from.

    Attributes:
        needs_full_scan: whatever the reason.
        at: no search before this.
    """

    def __init__(self, source: EventSource, table: MappingTable, proc: ProcFs) -> None:
        self._source = source
        self._table = table
        self._proc = proc
        self._sharing: dict[int, int] = {}
        #: What was compared last, and when: an exec may have been under way.
        self._searched: set[int] = set()
        self._searched_s = 0.0
        self._compared = 0
        self.needs_full_scan = False
        self.at = 0.0

    def ask(self, processes: Mapping[int, int], executed: Collection[int] = ()) -> None:
        """These processes, by tgid and start_ns, may have an untracked sharer.

        Args:
            processes: those.
            executed: these have another address space by now; who shares the one that they had is not known any more.
        """
        self._sharing.update(processes)
        if executed and not self.needs_full_scan:
            was_searched = time.monotonic() < self._searched_s + EXEC_S
            self.needs_full_scan = any(
                pid in self._sharing or (was_searched and pid in self._searched) for pid in executed
            )

    @property
    def is_asked(self) -> bool:
        """Whether there is one to be made, be it later."""
        return self.needs_full_scan or bool(self._sharing)

    @property
    def is_resting(self) -> bool:
        """Whether one is put off, so that searches do not take all the CPU time."""
        return self.is_asked and time.monotonic() < self.at

    def is_due(self, now: float) -> bool:
        """Whether one is to be made at that time."""
        return self.is_asked and now >= self.at

    def take(self, meanwhile: Callable[[], object], *, can_find: bool) -> set[int] | None:
        """The processes that have to be scanned, together; None: all of them.

        Args:
            meanwhile: called again and again during a long search.
            can_find: the pids are those of our pid namespace.
        """
        sharing, self._sharing = self._sharing, {}
        is_full, self.needs_full_scan = self.needs_full_scan, False
        self._searched, self._searched_s = set(sharing), time.monotonic()
        if is_full or not can_find or len(sharing) > MANY_SHARING:
            return None
        known = [(ProcessId(*one), self._table.sharers_of(one[0])) for one in sharing.items()]
        try:
            return self._source.unread.run(
                0, lambda: self._find(known), progress=lambda: self._compared, meanwhile=meanwhile
            )
        except ScanTimeout:
            self._source.unread.forget(0)
            return None

    def _find(self, sharing: Iterable[tuple[ProcessId, Iterable[int]]]) -> set[int] | None:
        """On a helper thread: kcmp may wait for an exec that is under way."""
        due: set[int] = set()
        pids = self._proc.pids()
        for process, known in sharing:
            stat = self._proc.stat(process.pid)
            if isinstance(stat, Miss) or not process.same_tick(ProcessId(process.pid, stat.start_ns)):
                return None  # it has ended; what it did are its sharers' mappings, too, and nobody knows who those are
            found = find_sharers(self._proc, process.pid, self._counted(pids))
            if found is None:
                return None
            if found.difference(known):
                due |= {process.pid, *found}
        return due

    def _counted(self, pids: Iterable[int]) -> Iterator[int]:
        for pid in pids:
            self._compared += 1
            yield pid
