"""`PollReads`: the processes of one poll of ``/proc``, read on a helper thread that may be left behind.

One call of the helper reads many processes: to hand each over by itself takes as long as to read it. Of a process whose
maps are what they were, nothing is parsed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Final, NamedTuple

from sowatch.linux.cpu_clock import CpuClocks
from sowatch.linux.proc import MapsState, Miss, ProcFs
from sowatch.linux.proc_parse import MapRow, Stat
from sowatch.sources.unread import ScanTimeout, UnreadProcesses

__all__ = ["PollReads", "Reading", "Target"]

#: Reads of one process that executes programs all the while; then it is left for the next poll.
TRIES: Final = 3


class Target(NamedTuple):
    """A process that is to be read, and what is known of it: its stat, and how its maps were; None: nothing."""

    pid: int
    stat: Stat | None = None
    maps: MapsState | None = None


class Reading(NamedTuple):
    """A process as it was read. ``rows`` are None if its maps are what they were; then ``stat`` is the known one."""

    cpu_ns: int | None
    stat: Stat
    rows: list[MapRow] | Miss | None
    maps: MapsState | None


class PollReads:
    """Reads processes below one proc root, with the deadline of an `UnreadProcesses`.

    Args:
        proc: whose readers wait for as long as it takes.
        clocks: of the processes.
        unread: knows which processes hang.
    """

    def __init__(self, proc: ProcFs, clocks: CpuClocks, unread: UnreadProcesses) -> None:
        self.proc = proc
        self.clocks = clocks
        self._unread = unread

    def read(self, targets: Iterable[Target]) -> dict[int, Reading | None]:
        """What was found, by pid; None of one that has ended, or met an exec each time. Who hangs is left out."""
        found: dict[int, Reading | None] = {}
        left = [one for one in targets if not self._unread.hangs(one.pid)]
        while left:
            batch = _Batch(self, left)
            try:
                self._unread.run(lambda: batch.current, batch, progress=lambda: batch.progress)  # noqa: B023
            except ScanTimeout as timeout:
                batch.is_given_up = True
                found.update(list(batch.found.items()))
                if timeout.is_refused:
                    break
                left = [one for one in batch.left() if not self._unread.hangs(one.pid)]
            else:
                found.update(batch.found)
                break
        return found

    def read_one(self, target: Target, batch: _Batch) -> Reading | None:
        """On the helper thread."""
        before = target.stat
        for _ in range(TRIES):
            cpu_ns = self.clocks.read_ns(target.pid)
            before = before or self.stat(target.pid)
            rows: list[MapRow] | Miss | None = Miss.GONE
            maps = None
            if before is not None and before.is_kernel_thread:
                rows = []
            elif before is not None:
                known = target.maps if before is target.stat else None
                rows, maps = self.proc.new_executable_maps(target.pid, known, _digest, batch.get_on)
                if rows is None:
                    return Reading(cpu_ns, before, None, maps)
            after = self.stat(target.pid)
            if after is None:
                return None
            if before and (before.start_ticks, before.image) == (after.start_ticks, after.image):
                return Reading(cpu_ns, after, rows, maps)
            before = after
        return None

    def stat_now(self, pid: int) -> Stat | None:
        """The same as `stat`, for any thread.

        Raises:
            ScanTimeout: a process without its leader hangs.
        """
        leader = self.proc.stat(pid)
        if leader and leader.is_dead:
            return self._unread.run_unless_hung(pid, lambda: self.stat(pid))
        return leader or None

    def stat(self, pid: int) -> Stat | None:
        """The stat of a process that has not ended; with the image that a live thread shows if the leader is dead.

        For the helper thread, as it may hang.
        """
        leader = self.proc.stat(pid)
        if not leader:
            return None
        if not leader.is_dead:
            return leader
        if leader.threads < 2:
            return leader._replace(image=())
        tid = self.proc.live_thread(pid)
        thread = self.proc.stat(tid) if isinstance(tid, int) else Miss.GONE
        return leader._replace(image=thread.image) if thread else None


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()


class _Batch:
    """A call for `UnreadProcesses.run`: reads targets. After it was given up nobody takes what it finds."""

    def __init__(self, reads: PollReads, targets: Sequence[Target]) -> None:
        self._reads = reads
        self._targets = targets
        self._at = 0
        self.found: dict[int, Reading | None] = {}
        self.progress = 0
        self.is_given_up = False

    def __call__(self) -> None:
        for at, target in enumerate(self._targets):
            if self.is_given_up:
                return
            self._at = at
            self.progress += 1
            self.found[target.pid] = self._reads.read_one(target, self)

    def get_on(self) -> None:
        """It does not hang."""
        self.progress += 1

    @property
    def current(self) -> int:
        """The process that is read."""
        return self._targets[self._at].pid

    def left(self) -> Sequence[Target]:
        """The targets after the current one."""
        return self._targets[self._at + 1 :]
