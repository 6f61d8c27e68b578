"""`RescanSchedule`: when each process that needs a rescan is scanned; `RepairSchedule`: when a loss is repaired."""

from __future__ import annotations

import time
from collections.abc import Collection, Container, Iterable, Mapping
from math import inf
from typing import Final

from sowatch.engine.effects import Causes

__all__ = ["RepairSchedule", "RescanSchedule"]

#: A process that needs a rescan again at once is read at most this often in the long run.
SLOWEST_REREAD_S: Final = 0.25
#: So many processes are scanned in a turn until a full scan may take their place.
FEW: Final = 16
#: A child that a flood forks has ended before it is scanned, if that waits so long.
FORKED_S: Final = 0.01
#: A scan that took longer than this is followed by a rest of so many times that, up to the third.
SHORT_SCAN_S: Final = 0.005
SCAN_REST: Final = 20
LONGEST_REST_S: Final = 5.0
#: A process whose next scan is further off than this is not scanned twice for one question.
FAR_S: Final = 0.1
#: A 32-bit process is read this long after its exec, then after twice that, up to the second.
FIRST_COMPAT_S: Final = 0.002
SLOWEST_COMPAT_S: Final = 1.0
#: A repair during which more was lost is repeated after this, then after twice that, up to the second.
FIRST_REPAIR_S: Final = 0.1
SLOWEST_REPAIR_S: Final = 5.0


class RepairSchedule:
    """When losses are repaired: at once, or more and more rarely if more is lost during each repair.

    Attributes:
        at: when the next repair is due, in seconds of CLOCK_MONOTONIC; None: no loss asks for one.
    """

    def __init__(self) -> None:
        self.at: float | None = None
        self._wait_s = FIRST_REPAIR_S

    @property
    def is_due(self) -> bool:
        """Whether one is to be made now."""
        return self.at is not None and time.monotonic() >= self.at

    def ask(self) -> None:
        """Something was lost."""
        if self.at is None:
            self.at = time.monotonic()

    def end(self, *, is_repaired: bool) -> None:
        """A repair was made; it was in vain if more was lost meanwhile."""
        self.at = None if is_repaired else time.monotonic() + self._wait_s
        self._wait_s = FIRST_REPAIR_S if is_repaired else min(SLOWEST_REPAIR_S, 2 * self._wait_s)


class RescanSchedule:
    """When each process that needs a rescan is scanned: at once, or more and more rarely if it needs one all the time.

    Times are seconds of CLOCK_MONOTONIC.

    Args:
        held: processes that must not be read now, though they need a rescan.
    """

    def __init__(self, held: Container[int] = ()) -> None:
        #: When processes that wait for a scan get it.
        self.due: dict[int, float] = {}
        #: Of 32-bit processes: when the next scan is, and how long after it the one that follows.
        self._compat: dict[int, tuple[float, float]] = {}
        #: When processes were read last, and how long they have to wait from then on.
        self._pace: dict[int, tuple[float, float]] = {}
        #: No full scan takes the place of many single ones before this.
        self.few_until = 0.0
        self.held = held

    @property
    def next_at(self) -> float:
        """When the next scan is due; infinite without any."""
        if not self.due and not self._compat:
            return inf
        return min(min(self.due.values(), default=inf), min((when for when, _ in self._compat.values()), default=inf))

    def expedite(self, pids: Iterable[int], since: float = inf) -> bool:
        """Whatever their pace, it is their turn now; whether it is anybody's.

        But not of those that have been scanned since that time and whose next scan is far: they change all the time,
        or their scans take long, and a caller that waits for one more waits in vain.
        """
        self.due = {}
        for pid in pids:
            if pid not in self.held:
                last, interval = self._pace.get(pid, (0.0, 0.0))
                self.due[pid] = last + interval if last >= since and interval > FAR_S else 0.0
        return 0.0 in self.due.values()

    def take(self, needs_rescan: Mapping[int, Causes], now: float) -> dict[int, Causes]:
        """Those of ``needs_rescan`` whose turn it is: they are scanned now.

        Until `few_until` no more than `FEW`, those that wait longest.
        """
        for pid in needs_rescan:
            if pid not in self.due and pid not in self.held:
                last, interval = self._pace.get(pid, (0.0, 0.0))
                self.due[pid] = max(now + (FORKED_S if needs_rescan[pid].load == "fork" else 0), last + interval)
        turn = {}
        for pid, when in list(self.due.items()):
            causes = needs_rescan.get(pid)
            if causes is None or pid in self.held:
                del self.due[pid]  # it has gone meanwhile, or hangs
            elif when <= now:
                turn[pid] = causes
        if now < self.few_until:
            turn = {pid: turn[pid] for pid in sorted(turn, key=self.due.__getitem__)[:FEW]}
        for pid in turn:
            del self.due[pid]
            last, interval = self._pace.get(pid, (0.0, 0.0))
            is_busy = now - last < 2 * interval + 0.002
            self._pace[pid] = (now, min(SLOWEST_REREAD_S, max(0.001, 2 * interval)) if is_busy else 0.0)
        return turn

    def slow_down(self, pid: int) -> None:
        """Its records were dropped, being too many: it is scanned at most as often as one that changes all the time."""
        last, interval = self._pace.get(pid, (0.0, 0.0))
        self._pace[pid] = (last, max(interval, SLOWEST_REREAD_S))
        if pid in self.due:
            self.due[pid] = max(self.due[pid], last + SLOWEST_REREAD_S)

    def rest(self, pid: int, seconds: float) -> None:
        """A scan of it has taken so long: the next one waits for many times that.

        So others do not pay for what a process with many mappings makes its scans cost.
        """
        if seconds >= SHORT_SCAN_S:
            last, interval = self._pace.get(pid, (0.0, 0.0))
            self._pace[pid] = (last, max(interval, min(LONGEST_REST_S, SCAN_REST * seconds)))

    def put_off(self, pid: int, seconds: float) -> None:
        """A scan of it has failed: the next one waits for so long."""
        last, interval = self._pace.get(pid, (0.0, 0.0))
        self._pace[pid] = (last, max(interval, seconds))

    def take_compat(self, compat: Collection[int], now: float) -> list[int]:
        """Those 32-bit processes whose turn it is: when they start, then less and less often."""
        self._compat = {pid: due for pid, due in self._compat.items() if pid in compat}
        turn = []
        for pid in compat:
            when, interval = self._compat.get(pid, (now, FIRST_COMPAT_S))
            if when <= now:
                turn.append(pid)
                self._compat[pid] = (now + interval, min(SLOWEST_COMPAT_S, 2 * interval))
        return turn

    def forget(self, before: float) -> None:
        """The pace of processes that were not read since."""
        self._pace = {pid: pace for pid, pace in self._pace.items() if pace[0] > before}
