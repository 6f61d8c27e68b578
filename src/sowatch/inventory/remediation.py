"""How long a file that was replaced went on running: from the replacement to the last process that let go of it.

Fed by a `StaleWatch`, bounded. A time is that of the disk where the disk still shows it, else when it was noticed.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from sowatch.inventory.stale_history import Change
from sowatch.inventory.staleness import StaleAnswer, Staleness
from sowatch.model.identity import FileId, ProcessId
from sowatch.model.stats import Mapped

__all__ = ["KEPT", "MAX_OPEN", "Remediation", "Remediations"]

#: Those that are over and kept, the last ones.
KEPT: Final = 200
#: Files that still run and are followed; of those beyond nothing is known.
MAX_OPEN: Final = 2_000


class Remediation(Struct, frozen=True):
    """One file that has no longer its name, and who went on with it.

    Attributes:
        path: as one of the processes sees it.
        build_id: of the file that went on running.
        staleness: ``replaced``, ``deleted`` or ``modified``.
        since_ns: when that was, by the wall clock, in ns since the epoch.
        is_since_known: the disk shows it; else it was noticed then, and may have been before.
        processes: how many had it mapped, from then on.
        left: how many of them still have it.
        until_ns: when the last one was noticed to have let go of it; None: it goes on.
    """

    path: str
    build_id: str | None
    staleness: Staleness
    since_ns: int
    is_since_known: bool
    processes: int
    left: int
    until_ns: int | None = None

    @property
    def seconds(self) -> float | None:
        """From the replacement to the last process; None: it goes on."""
        return None if self.until_ns is None else max(0, self.until_ns - self.since_ns) / 1e9


class Remediations:
    """Files that were replaced while somebody had them mapped. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[tuple[FileId, str], tuple[Remediation, set[ProcessId]]] = {}
        self._over: deque[Remediation] = deque(maxlen=KEPT)
        self._finished: deque[Remediation] = deque(maxlen=KEPT)
        #: Files that were too many to be followed.
        self.left_out = 0

    def add(
        self,
        changes: Iterable[Change],
        now_ns: int,
        *,
        is_first: bool,
        replaced_ns: Callable[[Mapped, StaleAnswer], int | None] = lambda *_: None,
    ) -> None:
        """Takes what a comparison found.

        Args:
            changes: of it.
            now_ns: when that was.
            is_first: it was the first one: what it found may have been stale for long.
            replaced_ns: asked once for each file, when it was replaced as the disk shows it.
        """
        with self._lock:
            for change in changes:
                self._add(change, now_ns, is_first, replaced_ns)

    def all(self) -> list[Remediation]:
        """Those that go on, the oldest first, and then those that are over, the last ones first."""
        with self._lock:
            going_on = sorted((one for one, _ in self._open.values()), key=lambda one: one.since_ns)
            return [*going_on, *reversed(self._over)]

    def take_finished(self) -> list[Remediation]:
        """Those that are over since this was called the last time; of which the begin is not known, none."""
        with self._lock:
            found = [one for one in self._finished if one.is_since_known]
            self._finished.clear()
        return found

    def oldest_ns(self) -> int | None:
        """Since when the file runs that is stale for the longest time; None: no file is."""
        with self._lock:
            return min((one.since_ns for one, _ in self._open.values()), default=None)

    def _add(
        self,
        change: Change,
        now_ns: int,
        is_first: bool,
        replaced_ns: Callable[[Mapped, StaleAnswer], int | None],
    ) -> None:
        mapped, answer = change.mapped, change.answer
        process, library = mapped.process, mapped.library
        key = library.id, library.path
        known = self._open.get(key)
        if change.cause is not None:
            if known is None or process.id not in known[1]:
                return
            one, processes = known
            processes.discard(process.id)
            one = replace(one, left=len(processes), until_ns=None if processes else now_ns)
            if processes:
                self._open[key] = one, processes
                return
            del self._open[key]
            self._over.append(one)
            self._finished.append(one)
        elif answer.stale is not None and known is not None:
            one, processes = known
            count = one.processes + (process.id not in processes)
            processes.add(process.id)
            self._open[key] = replace(one, staleness=answer.stale, processes=count, left=len(processes)), processes
        elif answer.stale is not None:
            if len(self._open) >= MAX_OPEN:
                self.left_out += 1
                return
            shown_ns = replaced_ns(mapped, answer)
            is_shown = shown_ns is not None and shown_ns <= now_ns
            since_ns = shown_ns if shown_ns is not None and is_shown else now_ns
            one = Remediation(
                library.path, library.build_id, answer.stale, since_ns, is_shown or not is_first, processes=1, left=1
            )
            self._open[key] = one, {process.id}
