"""Whether a process is still there."""

from __future__ import annotations

from typing import Final

from sowatch.linux.proc import Miss, ProcFs, ProcReadError
from sowatch.linux.proc_parse import Stat
from sowatch.model.identity import TICK_NS, ProcessId

__all__ = ["has_ended", "process_is_alive", "running_stat"]

#: Of a task in ``/proc/PID/stat``: a zombie, or one that is being reaped.
_ENDED_STATES: Final = ("Z", "X", "x")

#: ``task_struct.flags`` of a task past exit_signals(), which is before its sched_process_exit
#: (kernel/exit.c, do_exit). A reader that comes after that event finds the process gone.
_PF_EXITING: Final = 0x4


def has_ended(proc: ProcFs, process: ProcessId, *, is_lossy: bool) -> bool:
    """Whether a process has ended.

    Args:
        proc: where it is looked up.
        process: its pid and start.
        is_lossy: the record of its exit may be lost, so one that is about to end has ended, too.
    """
    stat = proc.stat(process.pid)
    if not stat or not process.same_tick(ProcessId(stat.pid, stat.start_ns)):
        return True
    return stat.threads < 2 and (stat.is_dead if is_lossy else stat.state in _ENDED_STATES)


def running_stat(proc: ProcFs, pid: int) -> Stat | Miss:
    """The stat of a process of which at least one thread is not on its way out.

    A zombie and a process in the middle of its exit are ``Miss.GONE``, although ``/proc`` lists
    them. A process whose leader left before the other threads is there.

    Raises:
        ProcReadError: ``/proc`` could not be read, and not because of the process.
    """
    stat = proc.stat(pid)
    if isinstance(stat, Miss) or not stat.flags & _PF_EXITING:
        return stat
    threads = proc.threads(pid) if stat.threads > 1 else Miss.GONE
    if isinstance(threads, Miss):
        return Miss.GONE
    for thread in threads:
        # Every thread has a directory below /proc, although only leaders are listed there.
        of_thread = proc.stat(thread)
        if not isinstance(of_thread, Miss) and not of_thread.flags & _PF_EXITING:
            return stat
    return Miss.GONE


def process_is_alive(process: ProcessId, proc: ProcFs) -> bool:
    """Whether that very process still runs; a later one with its pid does not count.

    Start times are compared at tick precision. Where ``/proc`` does not show that (no permission, no
    file descriptors left) the answer is yes.
    """
    try:
        stat = running_stat(proc, process.pid)
    except ProcReadError:
        return True
    if isinstance(stat, Miss):
        return stat is Miss.DENIED
    return stat.start_ticks == process.start_ns // TICK_NS
