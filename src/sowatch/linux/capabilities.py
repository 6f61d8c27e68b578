"""Capabilities: which the agent needs, and how it gives the others up.

By capset(2) and prctl(2) through ctypes: both are in every libc, and the packages for it bring a C extension each for
these four calls.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from sowatch.model.errors import SowatchError

__all__ = ["NEEDED", "SYS_ADMIN", "drop_privileges", "effective_capabilities", "missing_capabilities", "without"]

T = TypeVar("T")

#: By bit number (include/uapi/linux/capability.h), with what it is for. docs/operations.md lists them, too.
NEEDED: Final = {
    "CAP_DAC_READ_SEARCH": (2, "files and directories that only their owner may read, tracefs among them"),
    "CAP_SYS_PTRACE": (19, "/proc/PID/maps, root and exe of processes of other users"),
    "CAP_PERFMON": (38, "tracing programs"),
    "CAP_BPF": (39, "BPF programs and maps"),
    "CAP_CHECKPOINT_RESTORE": (40, "/proc/PID/map_files, by which a mapped file is opened"),
}

#: What BPF strategies need. CAP_SYS_ADMIN implies both (bpf(2), perf_event_open(2)); it is needed itself to open
#: tracefs where it is not mounted.
_FOR_BPF: Final = ("CAP_PERFMON", "CAP_BPF")
#: By bit number. Perf-event uprobes need it on some kernels, see `sowatch.uprobes.features`.
SYS_ADMIN: Final = 21

_PR_CAPBSET_READ: Final = 23
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
_CAPABILITY_VERSION_3: Final = 0x20080522
_SETPCAP: Final = 8


class _Header(ctypes.Structure):
    """struct __user_cap_header_struct; pid 0 is the calling thread."""

    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    """struct __user_cap_data_struct; two of them make 64 bits."""

    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def effective_capabilities() -> int:
    """The mask of the calling thread."""
    with open("/proc/thread-self/status", "rb") as status:
        return next(int(line.split()[1], 16) for line in status if line.startswith(b"CapEff:"))


def missing_capabilities() -> tuple[str, ...]:
    """What BPF strategies need of capabilities, and the calling thread has not."""
    effective = effective_capabilities()
    if effective >> SYS_ADMIN & 1:
        return ()
    return tuple(name for name in _FOR_BPF if not effective >> NEEDED[name][0] & 1)


def drop_privileges(*, also_keep: int = 0) -> int:
    """Keeps of the calling thread's capabilities only those `NEEDED`, and forbids to gain others.

    Threads that are started later inherit that; those that run already keep what they have, so this
    comes before any other is started.

    Args:
        also_keep: a mask of others that are kept if they are there.

    Returns:
        The mask that is left.

    Raises:
        SowatchError: the kernel refused.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    left = effective_capabilities() & (sum(1 << bit for bit, _ in NEEDED.values()) | also_keep)
    if effective_capabilities() >> _SETPCAP & 1:
        bit = 0
        while libc.prctl(_PR_CAPBSET_READ, bit, 0, 0, 0) >= 0:
            if not left >> bit & 1:
                _check(libc.prctl(_PR_CAPBSET_DROP, bit, 0, 0, 0), "PR_CAPBSET_DROP")
            bit += 1
    _check(libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0), "PR_CAP_AMBIENT_CLEAR_ALL")
    _check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    _set(libc, left)
    # Cleared by the change of capabilities, it would make /proc/self root's; we read that ourselves.
    _check(libc.prctl(4, 1, 0, 0, 0), "PR_SET_DUMPABLE")
    return left


def without(mask: int, job: Callable[[], T]) -> T:
    """What a job gives or raises that runs without these capabilities, on a thread of its own, which ends with it.

    Raises:
        SowatchError: the kernel refused.
    """

    def run() -> T:
        _set(ctypes.CDLL(None, use_errno=True), effective_capabilities() & ~mask)
        return job()

    with ThreadPoolExecutor(1, "sowatch-without") as pool:
        return pool.submit(run).result()


def _set(libc: ctypes.CDLL, mask: int) -> None:
    halves = (_Data * 2)(*(_Data(half, half, 0) for half in (mask & 0xFFFFFFFF, mask >> 32)))
    _check(libc.capset(ctypes.byref(_Header(_CAPABILITY_VERSION_3, 0)), halves), "capset")


def _check(result: int, call: str) -> None:
    if result < 0:
        reason = os.strerror(ctypes.get_errno())
        raise SowatchError(
            f"cannot give up privileges: {call}: {reason}. Set drop_privileges = false to keep them, and report it."
        )
