"""What a test could leave behind: fds, threads, children, BPF objects, pins. Seen, compared, told."""

from __future__ import annotations

import gc
import os
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

from support import bpfsys

BPFFS = Path("/sys/fs/bpf")


@dataclass(frozen=True)
class Holdings:
    """What this process has at one moment, and which BPF objects the host has."""

    fds: frozenset[tuple[str, str]]
    threads: frozenset[tuple[str, str]]
    children: frozenset[tuple[str, str]]
    bpf: frozenset[tuple[str, int]]
    pins: frozenset[str]


def take() -> Holdings:
    """Looks once."""
    return Holdings(
        fds=frozenset(_fds()),
        threads=frozenset(_threads()),
        children=frozenset(_children()),
        bpf=frozenset(bpfsys.all_ids()),
        pins=frozenset(_pins()),
    )


def take_steady() -> Holdings:
    """What two looks agree on: a thread of a longer-lived watcher may have an fd for an instant.

    One that is just reading about a process may still do so at the second look, so that is left out.
    """
    first = take()
    second = take()
    return replace(
        second,
        fds=frozenset(fd for fd in first.fds & second.fds if not re.match(r"/proc/\d+/", fd[1])),
        threads=first.threads & second.threads,
        children=first.children & second.children,
    )


def differences(before: Holdings, after: Holdings) -> list[str]:
    """One line for each thing that came and stayed, or that the test closed without owning it."""
    told = [f"fd {fd} -> {target} was left open" for fd, target in sorted(after.fds - before.fds)]
    told += [f"fd {fd} -> {target} was closed, but was not the test's" for fd, target in sorted(before.fds - after.fds)]
    told += [f"thread {tid} ({name}) still runs" for tid, name in sorted(after.threads - before.threads)]
    told += [f"child {pid} ({what}) was not reaped" for pid, what in sorted(after.children - before.children)]
    told += [f"{path} is pinned" for path in sorted(after.pins - before.pins)]
    told += [f"{kind} {number} is still loaded" for kind, number in sorted(after.bpf - before.bpf)]
    return told


def settle(before: Holdings, timeout_s: float) -> list[str]:
    """What is left after garbage collection and up to ``timeout_s`` for the kernel to free things.

    The kernel frees BPF objects after an RCU grace period, so the first look after a close may
    still show them. Objects that other processes of the host loaded meanwhile do not count.
    """
    end = time.monotonic() + timeout_s
    gc.collect()
    while True:
        after = take()
        left = differences(before, after)
        if left and after.bpf - before.bpf:
            left = differences(before, replace(after, bpf=after.bpf - _held_by_others()))
        if not left or time.monotonic() >= end:
            return left
        time.sleep(0.02)


def _fds() -> set[tuple[str, str]]:
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.add((fd, os.readlink(f"/proc/self/fd/{fd}")))
        except OSError:
            continue  # the fd of the listing itself
    return found


def _threads() -> set[tuple[str, str]]:
    found = set()
    for tid in os.listdir("/proc/self/task"):
        try:
            found.add((tid, Path(f"/proc/self/task/{tid}/comm").read_text(encoding="utf-8", errors="replace").strip()))
        except OSError:
            continue
    return found


def _children() -> set[tuple[str, str]]:
    return {(pid, _what(pid)) for pid in _child_pids(os.getpid())}


def _child_pids(parent: int) -> list[str]:
    try:
        tasks = os.listdir(f"/proc/{parent}/task")
    except OSError:
        return []
    pids: list[str] = []
    for tid in tasks:
        try:
            pids += Path(f"/proc/{parent}/task/{tid}/children").read_text(encoding="ascii").split()
        except FileNotFoundError:
            # Without CONFIG_PROC_CHILDREN every process has to be asked for its parent.
            return [pid for pid in os.listdir("/proc") if pid.isdigit() and _parent_of(pid) == str(parent)]
        except OSError:
            continue
    return pids


def _parent_of(pid: str) -> str | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    return stat.rpartition(b")")[2].split()[1].decode()


def _what(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return "gone"


def _pins() -> set[str]:
    found: set[str] = set()
    for directory, directories, files in os.walk(BPFFS):
        found.update(os.path.join(directory, name) for name in [*directories, *files])
    return found


def _held_by_others() -> set[tuple[str, int]]:
    """BPF objects of processes that are neither this one nor descend from it."""
    ours = {str(os.getpid())}
    waiting = [os.getpid()]
    while waiting:
        children = set(_child_pids(waiting.pop())) - ours
        ours |= children
        waiting += [int(pid) for pid in children]
    found: set[tuple[str, int]] = set()
    for pid in os.listdir("/proc"):
        if pid.isdigit() and pid not in ours:
            found |= bpfsys.held_ids(pid)
    return found
