"""Events carry what is true of a process when they happen: a daemon drops its privileges and is moved, without exec."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sowatch import Config, Rule
from sowatch.model.events import LibraryEvent
from support.forced import FORCED
from support.kernel import TAG, Ledger
from support.scenarios import OFTEN, STRATEGIES

NOBODY = 65534
CONTAINER = "0123456789abcdef" * 4
#: Does what it is told, a line at a time: maps a file, unmaps it, becomes nobody, forks a child that goes on.
ACTOR = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
places = {}
for line in sys.stdin:
    words = line.split()
    if words[0] == "map":
        fd = os.open(words[1], os.O_RDONLY)
        places[words[1]] = libc.mmap(None, 4096, 5, 2, fd, 0)
        os.close(fd)
    elif words[0] == "unmap":
        libc.munmap(places.pop(words[1]), 4096)
    elif words[0] == "drop":
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
    elif words[0] == "name":
        libc.prctl(15, words[1].encode(), 0, 0, 0)
    elif words[0] == "fork":
        if os.fork():
            os.wait()
            os._exit(0)
    elif words[0] == "exit":
        os._exit(0)
    print(os.getpid(), flush=True)
"""


class Actor:
    """A process that runs `ACTOR`."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.pid = process.pid

    def emit(self, *words: object) -> int:
        """Has it do something; the pid of the one that did it, 0 if that one ended."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(" ".join(map(str, words)).encode() + b"\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline() or b"0")


@pytest.fixture
def actor(spawn: Any, library: Callable[..., Path]) -> Actor:
    library().parent.chmod(0o755)
    pipe = subprocess.PIPE
    return Actor(spawn(["/usr/bin/python3", "-I", "-c", ACTOR], stdin=pipe, stdout=pipe, bufsize=0))


@pytest.fixture(params=STRATEGIES)
def ours(request: pytest.FixtureRequest, open_ledger: Callable[..., Ledger]) -> Ledger:
    """A Ledger of the tests' own files."""
    return open_ledger(Rule(rf"{TAG}\.so$"), config=Config(**{"strategy": request.param, **FORCED, **OFTEN}))


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A cgroup that has the name of a container, in a hierarchy of which one process has one path in all."""
    roots = [Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")]
    root = next((one for one in roots if (one / "cgroup.procs").exists()), None)
    if root is None:
        pytest.skip("no cgroup file system is mounted")
    made = root / f"sow-{os.getpid()}" / f"docker-{CONTAINER}.scope"
    made.mkdir(parents=True)
    yield made
    made.rmdir()
    made.parent.rmdir()


def uids_of_unloads(ledger: Ledger, pid: int) -> list[int | None]:
    """Of whom the unloads of a process were told."""
    found = [one.process for one in ledger.events if isinstance(one, LibraryEvent) and one.event == "unload"]
    return [one.uid for one in found if one is not None and one.pid == pid]


def test_events_after_a_change_of_user_name_and_cgroup_carry_the_new_ones(
    ours: Ledger, actor: Actor, library: Callable[..., Path], cgroup: Path
) -> None:
    first, second = library(f"libfirst{TAG}.so"), library(f"libsecond{TAG}.so")
    actor.emit("map", first)
    before = ours.wait_load(actor.pid, first.stat().st_ino).process
    assert before is not None
    assert (before.uid, before.container) == (os.getuid(), None)

    (cgroup / "cgroup.procs").write_text(str(actor.pid))
    actor.emit("name", "other")
    actor.emit("drop")
    actor.emit("map", second)

    try:
        now = ours.wait_load(actor.pid, second.stat().st_ino).process
        assert now is not None
        assert (now.uid, now.container, now.comm) == (NOBODY, CONTAINER, "other")
        assert now.cgroup is not None
        assert now.cgroup.endswith(f"/docker-{CONTAINER}.scope")
        assert (now.pid, now.start_ns, now.exe) == (before.pid, before.start_ns, before.exe)
    finally:
        actor.emit("exit")
        actor._process.wait()


def test_an_unload_after_a_change_of_user_carries_the_new_one(
    ours: Ledger, actor: Actor, library: Callable[..., Path]
) -> None:
    file = library(f"libfirst{TAG}.so")
    actor.emit("map", file)
    ours.wait_load(actor.pid, file.stat().st_ino)

    actor.emit("drop")
    actor.emit("unmap", file)

    ours.wait_unload(actor.pid, file.stat().st_ino)
    assert uids_of_unloads(ours, actor.pid) == [NOBODY]


def test_a_child_of_one_that_changed_its_user_has_the_new_one(
    ours: Ledger, actor: Actor, library: Callable[..., Path]
) -> None:
    file = library(f"libfirst{TAG}.so")
    actor.emit("map", file)
    ours.wait_load(actor.pid, file.stat().st_ino)

    actor.emit("drop")
    child = actor.emit("fork")

    now = ours.wait_load(child, file.stat().st_ino).process
    assert now is not None
    assert (now.uid, now.ppid) == (NOBODY, actor.pid)
    actor.emit("exit")


def test_the_end_of_one_that_changed_its_user_carries_the_new_one(
    ours: Ledger, actor: Actor, library: Callable[..., Path]
) -> None:
    file = library(f"libfirst{TAG}.so")
    actor.emit("map", file)
    ours.wait_load(actor.pid, file.stat().st_ino)

    actor.emit("drop")
    actor.emit("exit")

    ours.wait_unload(actor.pid, file.stat().st_ino)
    # Where it is read in /proc it is not there any more: told as it was when it was read last, which may be after it.
    known = {NOBODY} if ours.ready.strategy in ("core", "runtime") else {NOBODY, os.getuid()}
    (uid,) = uids_of_unloads(ours, actor.pid)
    assert uid in known
