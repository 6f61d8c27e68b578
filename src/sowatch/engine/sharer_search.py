"""`SharerSearch`: when untracked sharers of an mm are searched, and which processes have to be scanned then.

A process that nobody tracks may hold an address space of which something is wanted; who reads ``/proc/PID/maps`` looks
the same for a moment, a scan of ours included. So most searches find nobody, and they must not cost others anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Final

from sowatch.engine.table import MappingTable
from sowatch.linux.descriptors import is_lack_of_resources
from sowatch.linux.proc import Miss, ProcFs, ProcReadError
from sowatch.linux.shared_mm import find_sharers
from sowatch.model.identity import ProcessId
from sowatch.sources.base import EventSource
from sowatch.sources.unread import ScanTimeout

__all__ = ["SHARERS_REST", "SharerSearch"]

#: After a search, or the full scan in its place, wait so many times the CPU time it took.
SHARERS_REST: Final = 20
#: More processes than this are not searched for one by one.
MANY_SHARING: Final = 16
#: So many are remembered to have been searched for; beyond it a full scan makes up for all.
MANY_SEARCHED: Final = 4096
#: A process that forks sharers faster than they are found in so many listings, or scans, causes a full scan.
MOST_ROUNDS: Final = 4

#: No process.
NOBODY: Final[Mapping[int, int]] = MappingProxyType({})


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
        #: What was compared since the last full scan: an exec may have been under way, or is reported late.
        self._searched: dict[int, int] = {}
        self._compared = 0
        self.needs_full_scan = False
        self.at = 0.0

    def ask(self, processes: Mapping[int, int], executed: Mapping[int, int] = NOBODY) -> None:
        """These processes, by tgid and start_ns, may have an untracked sharer.

        Args:
            processes: those.
            executed: these, by the same, have another address space by now; who shares the one
                that they had is not known any more.
        """
        self._sharing.update(processes)
        for one in executed.items():
            self.needs_full_scan |= _has(self._sharing, one) or _has(self._searched, one)

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

    def rounds(self, meanwhile: Callable[[], object], *, can_find: bool) -> Iterator[set[int] | None]:
        """The processes that have to be scanned, together; None: all of them. The caller scans before it goes on.

        Who is scanned is tracked: its forks are reported from then on. Those before are found by one more search.

        Args:
            meanwhile: called again and again during a long search.
            can_find: the pids are those of our pid namespace.
        """
        sharing, self._sharing = self._sharing, {}
        self._searched |= sharing
        is_many = len(sharing) > MANY_SHARING or len(self._searched) > MANY_SEARCHED
        if can_find and not is_many and not self.needs_full_scan:
            scanned: set[int] = set()
            for _ in range(MOST_ROUNDS):
                due = self._find_patiently(sharing, meanwhile)
                if due is None:
                    break
                if due <= scanned:
                    return
                scanned |= due
                yield due
                sharing = {pid: start_ns for pid, start_ns in sharing.items() if pid in due}
        self.needs_full_scan = False
        self._searched = {}
        yield None

    def _find_patiently(self, sharing: Mapping[int, int], meanwhile: Callable[[], object]) -> set[int] | None:
        known = [(ProcessId(*one), self._table.sharers_of(one[0])) for one in sharing.items()]
        try:
            return self._source.unread.run(
                0, lambda: self._find(known), progress=lambda: self._compared, meanwhile=meanwhile
            )
        except ScanTimeout:
            self._source.unread.forget(0)
            return None
        except ProcReadError as error:
            if not is_lack_of_resources(error):
                raise
            return None

    def _find(self, sharing: Iterable[tuple[ProcessId, Iterable[int]]]) -> set[int] | None:
        """On a helper thread: kcmp may wait for an exec that is under way."""
        due: set[int] = set()
        pids = self._proc.pids()
        for process, known in sharing:
            stat = self._proc.stat(process.pid)
            if isinstance(stat, Miss) or not process.same_tick(ProcessId(process.pid, stat.start_ns)):
                return None  # it has ended; what it did are its sharers' mappings, too, and nobody knows who those are
            found = self._sharers_of(process.pid, pids)
            if found is None:
                return None
            if found.difference(known):
                due |= {process.pid, *found}
        return due

    def _sharers_of(self, pid: int, pids: Iterable[int]) -> set[int] | None:
        """Those among ``pids``, and who was forked since these were listed; None: that cannot be determined."""
        found = find_sharers(self._proc, pid, self._counted(pids))
        compared = set(pids)
        for _ in range(MOST_ROUNDS):
            new = set(self._proc.pids()) - compared
            more = find_sharers(self._proc, pid, self._counted(new))
            if found is None or more is None:
                return None
            if not more:
                return found
            found |= more
            compared |= new
        return None

    def _counted(self, pids: Iterable[int]) -> Iterator[int]:
        for pid in pids:
            self._compared += 1
            yield pid


def _has(processes: Mapping[int, int], one: tuple[int, int]) -> bool:
    pid, start_ns = one
    return pid in processes and ProcessId(pid, processes[pid]).same_tick(ProcessId(pid, start_ns))
