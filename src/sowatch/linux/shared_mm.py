"""Which processes share their address space, asked without the lock of it that a reader of its mappings takes."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from collections.abc import Iterable
from typing import Final

from sowatch.linux.descriptors import is_lack_of_resources
from sowatch.linux.proc import Miss, ProcFs, ProcReadError

__all__ = ["find_sharers", "shares_mm"]

#: kcmp(2), Linux 3.5; it may be left out of a kernel (CONFIG_KCMP).
_NUMBERS: Final = {"x86_64": 312, "aarch64": 272, "riscv64": 272, "loongarch64": 272}
_KCMP_VM: Final = 1
#: kthreadd, in the initial pid namespace: it has no address space, as a leader that has ended before its threads.
_WITHOUT_MM: Final = 2


def shares_mm(pid: int, other: int) -> bool:
    """Whether both have one address space (CLONE_VM); False if it cannot be determined.

    Needs the right to trace both, and takes none of the locks that a reader of ``/proc/PID/maps`` waits for.
    """
    number = _number()
    return number is not None and _libc().syscall(number, pid, other, _KCMP_VM, 0, 0) == 0


def find_sharers(proc: ProcFs, pid: int, pids: Iterable[int]) -> set[int] | None:
    """Which of these processes share the address space of one, itself left out; by kcmp(2), so some microseconds each.

    Args:
        proc: where the pids are from; of our own pid namespace.
        pid: the one; its first thread must be there.
        pids: the others.

    Returns:
        None if it cannot be determined: the kernel has no kcmp, or does not allow it for this one or for a process
        without address space, or it has ended.
    """
    own, reference = proc.stat(pid), proc.stat(_WITHOUT_MM)
    if isinstance(own, Miss) or own.is_dead or isinstance(reference, Miss) or not reference.is_kernel_thread:
        return None
    if not shares_mm(_WITHOUT_MM, _WITHOUT_MM):
        return None  # one of the same user may be compared nevertheless, but who has no address space is not known
    found = set()
    for other in pids:
        if other == pid:
            continue
        is_same = shares_mm(pid, other)
        if not is_same and shares_mm(_WITHOUT_MM, other):
            is_same = any(shares_mm(pid, tid) for tid in _threads(proc, other))
        if is_same:
            found.add(other)
    # The kernel grants the right to trace for an address space and its user namespace, which all sharers have in
    # common: if it is granted for this process, those for which it is not do not share. A process that has ended
    # meanwhile equals every process without an address space.
    if not shares_mm(pid, pid) or shares_mm(_WITHOUT_MM, pid):
        return None
    last = proc.stat(pid)
    return None if isinstance(last, Miss) or last.start_ticks != own.start_ticks else found


def _threads(proc: ProcFs, pid: int) -> list[int]:
    """Those of a process whose first thread has ended; none of a kernel thread."""
    stat = proc.stat(pid)
    if isinstance(stat, Miss) or stat.is_kernel_thread or stat.threads < 2:
        return []
    path = f"{proc.root}/{pid}/task"
    try:
        return [int(name) for name in os.listdir(path)]
    except OSError as error:
        if is_lack_of_resources(error):
            raise ProcReadError(path, error.errno or errno.EMFILE) from error
        return []  # it has ended


@functools.cache
def _number() -> int | None:
    return _NUMBERS.get(os.uname().machine)


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    libc.syscall.argtypes = (ctypes.c_long, *[ctypes.c_long] * 5)
    return libc
