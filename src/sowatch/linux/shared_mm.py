"""`shares_mm`: whether two processes share their address space, asked without a lock of it."""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Final

__all__ = ["shares_mm"]

#: kcmp(2), Linux 3.5; it may be left out of a kernel (CONFIG_KCMP).
_NUMBERS: Final = {"x86_64": 312, "aarch64": 272, "riscv64": 272, "loongarch64": 272}
_KCMP_VM: Final = 1


def shares_mm(pid: int, other: int) -> bool:
    """Whether both have one address space (CLONE_VM); False if it cannot be determined.

    Needs the right to trace both, and takes none of the locks that a reader of ``/proc/PID/maps`` waits for.
    """
    number = _NUMBERS.get(os.uname().machine)
    return number is not None and _libc().syscall(number, pid, other, _KCMP_VM, 0, 0) == 0


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    libc.syscall.argtypes = (ctypes.c_long, *[ctypes.c_long] * 5)
    return libc
