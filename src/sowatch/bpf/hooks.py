"""The two sets of hooks on the system calls that change mappings, and none.

A set chooses its programs of an object before that is loaded, and attaches them afterwards.
docs/decisions/0009-trampolines.md says why there are two.
"""

from __future__ import annotations

import os
from typing import ClassVar, Final, Protocol

from sowatch.bpf.binding import BpfObject, Tracefs
from sowatch.model.errors import BpfError
from sowatch.model.literals import Hooks

__all__ = ["HOOK_SETS", "PROCESS_HOOKS", "HookSet", "NoHooks", "Syscalls", "Trampolines"]

CALLS: Final = ("mmap", "munmap", "mprotect", "pkey_mprotect", "mremap", "shmat", "shmdt")
#: Calls that a kernel may have been built without (ARCH_HAS_PKEYS, SYSVIPC).
OPTIONAL_CALLS: Final = ("pkey_mprotect", "shmat", "shmdt")
#: What the kernel calls the function of a system call (asm/syscall_wrapper.h), by `uname -m`.
FUNCTION_PREFIX: Final = {"x86_64": "__x64_sys_", "aarch64": "__arm64_sys_"}
#: Calls of a 64-bit kernel that come by another way, on x86: 32-bit ones (compat.bpf.h), by the functions of theirs.
COMPAT_FUNCTIONS: Final = {
    "mmap2": "__ia32_sys_mmap_pgoff",
    "mmap": "__ia32_compat_sys_ia32_mmap",
    "munmap": "__ia32_sys_munmap",
    "mprotect": "__ia32_sys_mprotect",
    "pkey_mprotect": "__ia32_sys_pkey_mprotect",
    "mremap": "__ia32_sys_mremap",
    "ipc": "__ia32_compat_sys_ipc",
    "shmat": "__ia32_compat_sys_shmat",
    "shmdt": "__ia32_sys_shmdt",
}
#: In kernels that were built with x32.
X32_FUNCTION: Final = "__x64_compat_sys_execve"
HAS_COMPAT_HOOKS: Final = os.uname().machine == "x86_64"
ENOENT: Final = 2


class HookSet(Protocol):
    """Hooks of one kind.

    Args:
        bpf: an object that is not loaded yet; programs of this set are chosen in it.

    Raises:
        BpfError: this kernel lacks what the set needs.
    """

    name: ClassVar[Hooks | None]

    def __init__(self, bpf: BpfObject) -> None: ...

    def attach(self) -> None:
        """Attaches all of them, exits first: an entry noted without its exit hook would wait for ever."""


#: Programs on what the scheduler does with processes; every set but `NoHooks` has them.
PROCESS_HOOKS: Final = ("process_forks", "process_execs", "process_exits")


class NoHooks(HookSet):
    """None at all, for one scan: the programs of the hooks are not even loaded."""

    name = None

    def __init__(self, bpf: BpfObject) -> None:
        for program in PROCESS_HOOKS:
            bpf.skip(program)

    def attach(self) -> None:
        """Nothing to attach."""


class Trampolines(HookSet):
    """fentry and fexit on the functions of the system calls: other calls pay nothing."""

    name = "trampoline"

    def __init__(self, bpf: BpfObject) -> None:
        self._bpf = bpf
        self._calls: list[str] = []
        prefix = FUNCTION_PREFIX.get(os.uname().machine, "")
        for call in CALLS:
            if bpf.has_function(prefix + call):
                self._calls.append(call)
                bpf.want(f"fentry_{call}")
                bpf.want(f"fexit_{call}")
            elif call not in OPTIONAL_CALLS:
                raise BpfError(f"finding the function {prefix}{call}", ENOENT, "")
        #: None of them on a kernel that was built without 32-bit calls.
        self._compat_calls = [
            call for call, function in COMPAT_FUNCTIONS.items() if HAS_COMPAT_HOOKS and bpf.has_function(function)
        ]
        for call in self._compat_calls:
            bpf.want(f"fexit_compat_{call}")

    def attach(self) -> None:
        _attach_process_hooks(self._bpf)
        for call in self._compat_calls:
            self._bpf.attach(f"fexit_compat_{call}")
        for side in ("fexit", "fentry"):
            for call in self._calls:
                self._bpf.attach(f"{side}_{call}")


class Syscalls(HookSet):
    """Syscall tracepoints: every system call of the host pays some nanoseconds."""

    name = "syscall"

    def __init__(self, bpf: BpfObject) -> None:
        self._bpf = bpf
        self._hooks: list[tuple[str, int]] = []
        bpf.want("tp_leave")
        with Tracefs() as tracefs:
            self._compat = _want_compat_program(bpf, tracefs) if HAS_COMPAT_HOOKS else None
            for side in ("exit", "enter"):
                for call in CALLS:
                    program = "tp_leave" if side == "exit" else f"tp_{call.removeprefix('pkey_')}"
                    bpf.want(program)
                    tracepoint = tracefs.tracepoint_id("syscalls", f"sys_{side}_{call}")
                    if tracepoint is not None:
                        self._hooks.append((program, tracepoint))
                    elif call not in OPTIONAL_CALLS:
                        raise BpfError(f"finding tracepoint syscalls/sys_{side}_{call}", ENOENT, "")

    def attach(self) -> None:
        _attach_process_hooks(self._bpf)
        if self._compat:
            self._bpf.variable(".bss", "has_x32").value = int(self._bpf.has_function(X32_FUNCTION))
            self._bpf.attach(self._compat)
        for program, tracepoint in self._hooks:
            self._bpf.attach_tracepoint(program, tracepoint)


def _attach_process_hooks(bpf: BpfObject) -> None:
    for program in PROCESS_HOOKS:
        bpf.attach(program)


def _want_compat_program(bpf: BpfObject, tracefs: Tracefs) -> str:
    """Chooses what sees compat calls, which no syscall tracepoint does.

    From 6.14 on the tracepoints of the lock of the mappings cost nobody anything who does not take it. Before, they
    put together the path of a cgroup first, at every page fault; then the end of all system calls is the lesser evil.
    """
    if tracefs.field_offset("mmap_lock", "mmap_lock_released", "memcg_id") is not None:
        try:
            bpf.want("tp_lock")
        except BpfError as error:
            if error.errno != ENOENT:  # the object for old kernels has no such program
                raise
        else:
            return "tp_lock"
    bpf.want("tp_compat")
    return "tp_compat"


#: Best first.
HOOK_SETS: Final[tuple[type[HookSet], ...]] = (Trampolines, Syscalls)
