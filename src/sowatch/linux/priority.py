"""The scheduling priority of one thread: a nice value is each thread's own on Linux (`setpriority(2)`)."""

from __future__ import annotations

import os
import resource
import threading
from contextlib import suppress
from typing import Final

__all__ = ["add_nice", "allow_nice"]

#: A limit of RLIMIT_NICE allows nice values down to this less the limit (`setrlimit(2)`).
_CEILING: Final = 20


def add_nice(nice: int) -> None:
    """Adds to the nice value of the calling thread; nothing changes where the kernel refuses it.

    To lower a nice value takes CAP_SYS_NICE, or a limit that allows it. Threads that it starts later inherit it.
    """
    own = threading.get_native_id()
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, own, os.getpriority(os.PRIO_PROCESS, own) + nice)


def allow_nice(nice: int) -> None:
    """Lets threads that have no CAP_SYS_NICE lower their nice value by so much later; takes CAP_SYS_RESOURCE.

    For the whole process and its later children; nothing changes where the kernel refuses it.
    """
    wanted = _CEILING - (os.getpriority(os.PRIO_PROCESS, 0) + nice)
    soft, hard = resource.getrlimit(resource.RLIMIT_NICE)
    raised = [one if one == resource.RLIM_INFINITY else max(one, wanted) for one in (soft, hard)]
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NICE, (raised[0], raised[1]))
