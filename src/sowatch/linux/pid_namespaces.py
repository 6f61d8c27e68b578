"""In which pid namespace are we, and by whose numbers does a proc file system show processes?

The kernel side counts in the initial pid namespace, and its iterators scan the processes of the caller's namespace
only. A proc file system shows the processes of the namespace that it was mounted in, by that namespace's numbers. Where
these are not one namespace, numbers of two would be mixed: a process would be taken for another.
"""

from __future__ import annotations

import os
from typing import Final

from sowatch.linux.proc import ProcFs
from sowatch.linux.proc_parse import Stat

__all__ = ["is_initial", "own_pid", "shows_whole_host", "why_not_whole_host"]

#: PROC_PID_INIT_INO of include/linux/proc_ns.h: the inode of the initial pid namespace.
_INITIAL_INODE: Final = 0xEFFFFFFC
#: kthreadd; kernel threads live in the initial pid namespace only.
_KTHREADD: Final = 2


def own_pid(proc: ProcFs) -> int | None:
    """Our process's id as ``proc`` counts; ``None`` if it does not show us."""
    try:
        return int(os.readlink(f"{proc.root}/self"))
    except (OSError, ValueError):
        return None


def is_initial(proc: ProcFs) -> bool | None:
    """Whether this very process is in the initial pid namespace; ``None`` if that cannot be determined."""
    for root in (proc.root, "/proc"):
        try:
            return os.stat(f"{root}/self/ns/pid").st_ino == _INITIAL_INODE
        except OSError:
            continue
    return None


def shows_whole_host(proc: ProcFs) -> bool | None:
    """Whether ``proc`` is of the initial pid namespace; ``None`` if that cannot be determined."""
    initial = is_initial(proc)
    if own_pid(proc) is None:
        # It is not of our namespace, nor of one around it. The initial one is around all others.
        return None if initial is None else False
    if initial is None or initial:
        return initial
    kthreadd = proc.stat(_KTHREADD)
    return isinstance(kthreadd, Stat) and kthreadd.is_kernel_thread


def why_not_whole_host(proc: ProcFs, *, needs_own: bool = False) -> str | None:
    """What is wrong, as a clause; ``None`` if nothing is, or that cannot be determined.

    Args:
        proc: where processes are looked up.
        needs_own: this process has to be in the initial pid namespace as well.
    """
    if shows_whole_host(proc) is False:
        return f"{proc.root} shows another pid namespace than the host's"
    if needs_own and is_initial(proc) is False:
        return "this process is not in the host's pid namespace"
    return None
