"""What a test could leave behind: fds, threads, children, BPF objects, pins. Seen, compared, told."""

from __future__ import annotations

import gc
import os
import re
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final
from weakref import WeakKeyDictionary

from support import bpfsys

#: (kind, id) of a BPF program, map or link.
BpfObject = tuple[str, int]

#: Which thread started a thread; see `note_starters`.
_starters: Final[WeakKeyDictionary[threading.Thread, threading.Thread]] = WeakKeyDictionary()


def note_starters() -> None:
    """From now on it is kept which thread starts a thread, as Python does not.

    A watcher that several tests share adds threads to its pools when reads take long, from threads of its own: those
    are no leak of the test that happens to run.
    """
    start = threading.Thread.start
    if getattr(start, "notes_starter", False):
        return

    def start_and_note(thread: threading.Thread) -> None:
        _starters[thread] = threading.current_thread()
        start(thread)

    start_and_note.notes_starter = True  # type: ignore[attr-defined]
    threading.Thread.start = start_and_note  # type: ignore[method-assign]


@dataclass(frozen=True)
class Holdings:
    """What this process has at one moment, and which BPF objects the host has."""

    fds: frozenset[tuple[str, str]]
    threads: frozenset[tuple[str, str]]
    children: frozenset[tuple[str, str]]
    bpf: frozenset[BpfObject]


def take() -> Holdings:
    """Looks once."""
    return Holdings(
        fds=frozenset(_fds()),
        threads=frozenset(_threads()),
        children=frozenset(_children()),
        bpf=frozenset(bpfsys.all_ids()),
    )


def rest(timeout_s: float) -> None:
    """Collects garbage, and waits up to ``timeout_s`` until no descriptors and threads end any more.

    What nobody looked after may have left objects in reference cycles, which close descriptors once they are collected:
    in the next test that is looked after, and it would be taken for their closer. Threads of gRPC end a moment later.
    """
    end = time.monotonic() + timeout_s
    gc.collect()
    last = None
    while (now := (_fds(), _threads())) != last and time.monotonic() < end:
        last = now
        time.sleep(0.05)


#: Of a scan: of /proc, of a process in it, or by an iterator of the kernel.
_LOOK = re.compile(r"/proc(/\d+/|$)|anon_inode:\[?bpf_iter")


def take_steady() -> Holdings:
    """What two looks agree on: a thread of a longer-lived watcher may have an fd for an instant.

    One that is just reading about a process, from /proc or by an iterator of the kernel, may still do so at the second
    look, so that is left out.
    """
    first = take()
    second = take()
    return replace(
        second,
        fds=frozenset(fd for fd in first.fds & second.fds if not _LOOK.match(fd[1])),
        threads=first.threads & second.threads,
        children=first.children & second.children,
    )


def differences(before: Holdings, after: Holdings) -> list[str]:
    """One line for each thing that came and stayed, or that the test closed without owning it."""
    reported = [f"fd {fd} -> {target} was left open" for fd, target in sorted(after.fds - before.fds)]
    reported += [
        f"fd {fd} -> {target} was closed, but was not the test's" for fd, target in sorted(before.fds - after.fds)
    ]
    reported += [
        f"thread {tid} ({name}) still runs{_known_as(tid)}"
        for tid, name in sorted(after.threads - before.threads)
        if not _is_of_earlier_thread(tid, before)
    ]
    reported += [f"child {pid} ({what}) was not reaped" for pid, what in sorted(after.children - before.children)]
    reported += [f"{kind} {number} is still loaded" for kind, number in sorted(after.bpf - before.bpf)]
    return reported


def settle(before: Holdings, timeout_s: float) -> list[str]:
    """What is left after garbage collection and up to ``timeout_s`` for the kernel to free things.

    Other watchers of the host load and free BPF objects all the time. One that came since ``before`` counts
    while this process or a descendant holds it, or while no process does: then it is pinned or attached to
    something, by whoever ended. One that another process was once seen to hold is that process's. The kernel
    frees objects after an RCU grace period, so those that the others just closed are held by nobody for a moment.
    """
    end = time.monotonic() + timeout_s
    gc.collect()
    nobodys: frozenset[BpfObject] | None = None
    while True:
        after = take()
        new = after.bpf - before.bpf
        if new:
            ours, others = _held()
            # Narrowed with each look: what appears after the test is over was not made by it.
            nobodys = (new if nobodys is None else nobodys & new) - others - ours
            new &= ours | nobodys
        left = differences(before, replace(after, bpf=new))
        if not left or time.monotonic() >= end:
            return left + [f"{path} pins {kind} {number}" for path, (kind, number) in _pins(nobodys or frozenset())]
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


def _thread_of(tid: str) -> threading.Thread | None:
    return next((one for one in threading.enumerate() if str(one.native_id) == tid), None)


def _known_as(tid: str) -> str:
    thread = _thread_of(tid)
    return f": {thread.name}" if thread else ""


def _is_of_earlier_thread(tid: str, before: Holdings) -> bool:
    """Whether it was started by a thread that ran before the test; the main thread, which runs it, does not count."""
    earlier = {tid for tid, _ in before.threads} - {str(os.getpid())}
    thread = _thread_of(tid)
    while thread is not None:
        thread = _starters.get(thread)
        if thread is not None and str(thread.native_id) in earlier:
            return True
    return False


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


def _pins(objects: frozenset[BpfObject]) -> list[tuple[str, BpfObject]]:
    """Where objects are pinned, of those given."""
    if not objects:
        return []
    return [
        (os.path.join(directory, name), found)
        for root in bpfsys.mounted_bpffs()
        for directory, _, files in os.walk(root)
        for name in files
        for found in bpfsys.pinned_ids(os.path.join(directory, name)) & objects
    ]


def _held() -> tuple[frozenset[BpfObject], frozenset[BpfObject]]:
    """BPF objects that this process and its descendants hold, and those that all other processes do."""
    family = {str(os.getpid())}
    waiting = [os.getpid()]
    while waiting:
        children = set(_child_pids(waiting.pop())) - family
        family |= children
        waiting += [int(pid) for pid in children]
    ours: set[BpfObject] = set()
    others: set[BpfObject] = set()
    for pid in os.listdir("/proc"):
        if pid.isdigit():
            (ours if pid in family else others).update(bpfsys.held_ids(pid))
    return frozenset(ours), frozenset(others)
