"""How many processes an answer is about, and how many could not be read: what leaves some out has to say so."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Final, NamedTuple

from msgspec import UNSET

from sowatch.linux.disk_calls import DiskCalls, HangingCalls
from sowatch.linux.hidepid import hides_processes
from sowatch.linux.liveness import running_stat
from sowatch.linux.proc import Miss, ProcFs, ProcReadError
from sowatch.model import wire
from sowatch.model.events import Process
from sowatch.model.lines import process_line

__all__ = ["Coverage", "coverage_line", "coverage_of", "coverage_of_answers"]

_TIMEOUT_S: Final = 0.5
_LEAST_TIMEOUT_S: Final = 0.05
#: A process that does not answer may not be read.
_NOT_IN_TIME: Final[bool | None] = False


class Coverage(NamedTuple):
    """What could be read. Kernel threads and what has ended do not count; ``is_hidden``: there may be more.

    ``unreadable_pids`` are those of the unreadable processes, where it was determined who they are.
    """

    read: int
    unreadable: int
    is_hidden: bool
    unreadable_pids: tuple[int, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether every process could be read."""
        return not self.unreadable and not self.is_hidden

    def __str__(self) -> str:
        parts = []
        if self.unreadable:
            parts.append(f"{self.unreadable} process{'es' * (self.unreadable != 1)} could not be read")
        if self.is_hidden:
            parts.append("/proc hides processes of other users (hidepid), nobody knows how many")
        return "; ".join(parts) or "every process could be read"


#: Strategies that find files in /proc, and so only those of processes that it may be asked about.
_READ_FROM_PROC: Final = ("prebuilt", "procfs")


def coverage_line(coverage: Coverage, seq: int, unreadable: Iterable[Process] | None = None) -> wire.Coverage:
    """The last line of a list that leaves processes out; with who they are if that is given."""
    readable = wire.Readable(coverage.read, coverage.unreadable, coverage.is_hidden)
    processes = UNSET if unreadable is None else [process_line(one) for one in unreadable]
    return wire.Coverage(wire.SCHEMA, "coverage", seq, readable, readable, processes)


def coverage_of_answers(
    proc: ProcFs,
    strategy: str,
    found: Collection[int],
    closed: Collection[int],
    pids: Collection[int] = (),
    is_wanted: Callable[[int], bool] = lambda _: True,
    hanging: HangingCalls | None = None,
) -> Coverage:
    """How many of the processes that were asked for could be read, for the sake of what they have mapped.

    Args:
        proc: the host's.
        strategy: by which the mappings were found.
        found: processes of which mappings are known.
        closed: those that could not be read for more, such as whether their files are stale.
        pids: only these were asked for; empty: all.
        is_wanted: asked of those that cannot be read, whether they count.
        hanging: what does not answer, from one call to the next.
    """
    if strategy not in _READ_FROM_PROC:
        # The kernel side read all but those that hang. Whether their files are stale takes a read of the process.
        return Coverage(len({*found} - {*closed}), len(closed), is_hidden=False, unreadable_pids=tuple(closed))
    return coverage_of(proc, pids, is_wanted, hanging)


def coverage_of(
    proc: ProcFs,
    pids: Collection[int] = (),
    is_wanted: Callable[[int], bool] = lambda _: True,
    hanging: HangingCalls | None = None,
) -> Coverage:
    """Counts the processes whose mappings this user may read, and those it may not.

    Args:
        proc: the host's.
        pids: only these; default: all.
        is_wanted: asked of those that cannot be read, whether they count.
        hanging: what does not answer, from one call to the next.
    """
    calls = DiskCalls("sowatch-coverage", hanging)
    read, unreadable = 0, []
    try:
        for pid in pids or proc.pids():
            try:
                timeout_s = max(_LEAST_TIMEOUT_S, _TIMEOUT_S / (1 + calls.hanging))
                may_read = calls.run(partial(_may_read, proc, pid), _NOT_IN_TIME, timeout_s, place=("maps", pid))
            except ProcReadError:
                may_read = False
            if may_read:
                read += 1
            elif may_read is not None and is_wanted(pid):
                unreadable.append(pid)
    finally:
        calls.close()
    return Coverage(read, len(unreadable), hides_processes(proc), tuple(unreadable))


def _may_read(proc: ProcFs, pid: int) -> bool | None:
    """None for what has no mappings."""
    stat = running_stat(proc, pid)
    if isinstance(stat, Miss):
        return False if stat is Miss.DENIED else None
    if stat.is_kernel_thread:
        return None
    found = proc.live_thread(pid)
    return True if not isinstance(found, Miss) else False if found is Miss.DENIED else None
