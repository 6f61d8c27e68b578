"""`UnreadProcesses`: processes whose mappings cannot be read, because the call that reads them hangs.

A page fault that a file system does not answer may hold the lock of an address space (mmap_lock), and a reader
of the mappings waits behind it, for ever if need be: a dead network file system does this, and any user can
with a FUSE file system of their own. So whatever takes that lock runs here, on a helper thread with a deadline.
A thread that hangs is left behind with its process, until the kernel lets it return; the process is then read again.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Final, TypeVar

from sowatch.linux.mapped_rows import is_program_of, resolve_rows
from sowatch.linux.proc import Miss, ProcFs
from sowatch.linux.proc_parse import MapRow
from sowatch.linux.shared_mm import shares_mm
from sowatch.linux.timeout_worker import MAX_ABANDONED, CallTimeout, TimeoutWorker

__all__ = ["SCAN_TIMEOUT_S", "PatientProcFs", "ScanTimeout", "UnreadProcesses"]

T = TypeVar("T")

#: A scan that has not got on for so long hangs; the more hang already, the sooner the next is given up.
SCAN_TIMEOUT_S: Final = 0.25
LEAST_TIMEOUT_S: Final = 0.05
#: File systems that hang while a name is searched for.
MAX_NAMES_ABANDONED: Final = 8


class ScanTimeout(Exception):
    """The mappings of process ``pid`` cannot be read now; 0: nobody knows of which.

    ``is_refused``: it was not tried, as too many calls hang.
    """

    def __init__(self, pid: int, *, is_refused: bool = False) -> None:
        super().__init__(f"the mappings of process {pid} cannot be read: the kernel does not answer")
        self.pid = pid
        self.is_refused = is_refused


class _Hang:
    """A call that was given up; ``is_over`` once it has returned."""

    __slots__ = ("is_over", "since_s")

    def __init__(self) -> None:
        self.since_s = time.monotonic()
        self.is_over = False


class UnreadProcesses:
    """Reads processes with a deadline, and knows which ones hang. One thread scans; any may read which are in it.

    Attributes:
        cpu_s: CPU seconds that scans took on helper threads.
    """

    def __init__(self, *, max_abandoned: int = MAX_ABANDONED) -> None:
        self._worker = TimeoutWorker("sowatch-scan", max_abandoned=max_abandoned)
        self._names: TimeoutWorker | None = None
        self._is_started = False
        self._hangs: dict[int, _Hang] = {}
        self.cpu_s = 0.0

    def start(self) -> None:
        """Starts the helper threads now rather than with the first scan."""
        self._is_started = True
        self._worker.start()
        if self._names is not None:
            self._names.start()

    def names(self) -> TimeoutWorker:
        """The worker that searches for names, made when first asked for; its thread lives as long as the others."""
        if self._names is None:
            self._names = TimeoutWorker("sowatch-names", max_abandoned=MAX_NAMES_ABANDONED)
            if self._is_started:
                self._names.start()
        return self._names

    def __contains__(self, pid: object) -> bool:
        return pid in self._hangs

    def __iter__(self) -> Iterator[int]:
        return iter(list(self._hangs))

    def __len__(self) -> int:
        return len(self._hangs)

    def since_s(self, pid: int) -> float | None:
        """CLOCK_MONOTONIC of when a process was given up; None if it can be read."""
        hang = self._hangs.get(pid)
        return None if hang is None else hang.since_s

    def hangs(self, pid: int) -> bool:
        """Whether a process must not be read: it hangs, or its address space is that of one that does."""
        if pid in self._hangs:
            return True
        for other, hang in list(self._hangs.items()):
            if not hang.is_over and shares_mm(pid, other):
                self._hangs[pid] = hang
                return True
        return False

    def run(
        self,
        pid: int | Callable[[], int],
        call: Callable[[], T],
        *,
        progress: Callable[[], int] | None = None,
        meanwhile: Callable[[], object] | None = None,
    ) -> T:
        """What the call returns or raises; it runs on a helper thread.

        Args:
            pid: who is read; called, if it hangs, where that changes.
            call: reads.
            progress: see `TimeoutWorker.run`.
            meanwhile: the same.

        Raises:
            ScanTimeout: it hangs, or too many do already.
        """

        def timed() -> T:
            begun_s = time.thread_time()
            try:
                return call()
            finally:
                self.cpu_s += time.thread_time() - begun_s

        hang = _Hang()

        def over() -> None:
            hang.is_over = True

        try:
            return self._worker.run(
                timed, self._timeout_s(), progress=progress, meanwhile=meanwhile, turn_s=0.02, on_return=over
            )
        except CallTimeout as timeout:
            who = pid if isinstance(pid, int) else pid()
            if not timeout.is_refused:
                self._hangs[who] = hang
            raise ScanTimeout(who, is_refused=timeout.is_refused) from timeout

    def run_unless_hung(self, pid: int, call: Callable[[], T]) -> T:
        """The same, but a process that hangs already is not tried."""
        if self.hangs(pid):
            raise ScanTimeout(pid)
        return self.run(pid, call)

    def _timeout_s(self) -> float:
        return max(LEAST_TIMEOUT_S, SCAN_TIMEOUT_S / (1 + self._worker.abandoned))

    def take_readable(self) -> list[int]:
        """Those that hang no more since the last call; they are to be read."""
        if not self._hangs:
            return []
        found = [pid for pid, hang in list(self._hangs.items()) if hang.is_over]
        for pid in found:
            del self._hangs[pid]
        return [pid for pid in found if pid]

    def forget(self, pid: int) -> None:
        """It is to be tried again at once, as another way may do."""
        self._hangs.pop(pid, None)

    def close(self) -> None:
        """Ends the threads that do not hang."""
        self._is_started = False
        self._worker.close()
        if self._names is not None:
            self._names.close()


class PatientProcFs(ProcFs):
    """A `ProcFs` that gives a process up whose mappings cannot be read.

    Args:
        root: where a proc file system is mounted.
        unread: knows which processes hang.
        raises: every reader that needs the lock of an address space raises `ScanTimeout`; else it gives
            `Miss.HUNG`.
    """

    __slots__ = ("_files", "_raises", "unread")

    def __init__(self, root: str | os.PathLike[str], unread: UnreadProcesses, *, raises: bool = True) -> None:
        self.unread = unread
        self._raises = raises
        self._files = unread.names()
        super().__init__(root)

    def start(self) -> None:
        """Starts the helper threads now rather than with the first call."""
        self.unread.start()

    def close(self) -> None:
        """Ends the threads that do not hang."""
        self.unread.close()

    def _maps(self, pid: int, pattern: re.Pattern[bytes]) -> list[MapRow] | Miss:
        return self._patiently(pid, lambda: ProcFs._maps(self, pid, pattern))  # noqa: SLF001 - ours

    def live_thread(self, pid: int) -> int | Miss:
        """See `ProcFs.live_thread`, which reads a byte of its mappings."""
        return self._patiently(pid, lambda: ProcFs.live_thread(self, pid))

    def _resolve(self, base: str, rows: list[MapRow]) -> None:
        found = list(rows)
        with suppress(CallTimeout):  # what was found until then stands
            self._files.run(lambda: resolve_rows(base, found), SCAN_TIMEOUT_S)
        rows[:] = found

    def _is_program_of(self, base: str, path: str) -> bool:
        try:
            return self._files.run(lambda: is_program_of(base, path), SCAN_TIMEOUT_S)
        except CallTimeout:
            return False

    def _patiently(self, pid: int, call: Callable[[], T | Miss]) -> T | Miss:
        try:
            return self.unread.run_unless_hung(pid, call)
        except ScanTimeout:
            if self._raises:
                raise
            return Miss.HUNG
