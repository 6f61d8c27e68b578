"""How long processes have run, by their own clocks."""

from __future__ import annotations

import os
import time

from sowatch.linux.proc import ProcFs

__all__ = ["CpuClocks"]


class CpuClocks:
    """How long processes have run, by their own clocks: one system call each, for any process, without any right.

    Args:
        proc: None can be read where it shows another pid namespace than ours.
    """

    def __init__(self, proc: ProcFs) -> None:
        self._is_ours = _is_our_namespace(proc)

    def read_ns(self, pid: int) -> int | None:
        """CPU time of all threads that the process ever had; None if it cannot be determined.

        A thread that runs right now is counted up to its last tick. So of two polls that read this *before*
        the mappings, the second finds another value if anything happened after the first.
        """
        if not self._is_ours:
            return None
        try:
            # MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED) of include/linux/posix-timers_types.h
            return time.clock_gettime_ns(~pid << 3 | 2)
        except OSError:
            return None


def _is_our_namespace(proc: ProcFs) -> bool:
    """Whether the pids of a proc file system are those that our system calls take."""
    try:
        with open(f"{proc.root}/self/status", "rb") as file:
            line = next((line for line in file if line.startswith(b"NStgid:")), b"")
    except OSError:
        return False
    # From the namespace of the proc file system down to ours.
    return line.split()[1:] == [b"%d" % os.getpid()]
