"""Who shares an address space: what ends meanwhile, and what may not be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from sowatch.linux import shared_mm
from sowatch.linux.proc import Miss
from sowatch.linux.proc_parse import Stat
from sowatch.linux.shared_mm import find_sharers

KTHREAD = 0x00200000
#: kthreadd, a kernel thread, the one that is asked about, its sharer, another process.
KTHREADD, KERNEL_THREAD, ONE, SHARER, OTHER = 2, 3, 10, 11, 12


class Kernel:
    """Processes with their address spaces, compared as kcmp(2) does: 0, that of one without any, equals itself."""

    def __init__(self) -> None:
        self.mms = {KTHREADD: 0, KERNEL_THREAD: 0, ONE: 1, SHARER: 1, OTHER: 2}
        self.starts = dict.fromkeys(self.mms, 5)
        self.denied: set[int] = set()

    def shares_mm(self, pid: int, other: int) -> bool:
        if not {pid, other} <= self.mms.keys() or {pid, other} & self.denied:
            return False
        return self.mms[pid] == self.mms[other]

    def stat(self, pid: int) -> Stat | Miss:
        if pid not in self.mms:
            return Miss.GONE
        flags = KTHREAD if pid in (KTHREADD, KERNEL_THREAD) else 0
        return Stat(pid, b"", "S" if self.mms[pid] or flags else "Z", 1, 1, 1, flags, 1, self.starts[pid])


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel()
    monkeypatch.setattr(shared_mm, "shares_mm", made.shares_mm)
    return made


def found(kernel: Kernel, pids: Iterable[int] | None = None) -> set[int] | None:
    proc: Any = kernel
    return find_sharers(proc, ONE, list(kernel.mms) if pids is None else pids)


def test_a_sharer_is_found_and_no_other(kernel: Kernel) -> None:
    assert found(kernel) == {SHARER}


def becomes_zombie(kernel: Kernel) -> None:
    kernel.mms[ONE] = 0


def ends(kernel: Kernel) -> None:
    del kernel.mms[ONE]


def has_its_pid_reused(kernel: Kernel) -> None:
    kernel.mms[ONE], kernel.starts[ONE] = 7, 6


@pytest.mark.parametrize("happens", [becomes_zombie, ends, has_its_pid_reused])
def test_who_shared_with_one_that_ends_meanwhile_cannot_be_determined(
    kernel: Kernel, happens: Callable[[Kernel], None]
) -> None:
    def pids() -> Iterator[int]:
        happens(kernel)
        yield from (KTHREADD, KERNEL_THREAD, SHARER, OTHER)

    assert found(kernel, pids()) is None


def test_without_the_right_to_trace_all_a_leader_that_has_ended_is_not_recognized_so_nothing_is_determined(
    kernel: Kernel,
) -> None:
    kernel.mms[SHARER] = 0  # only its other threads have the address space
    kernel.denied = {KTHREADD, KERNEL_THREAD}
    assert found(kernel) is None
