"""Dead leaders, shared address spaces, moved mappings, and ways to map that are easy to overlook."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sowatch import Config, Rule
from sowatch.model.literals import KINDS
from support.kernel import TAG, Ledger, executable_inodes
from support.programs import Mapper
from support.stepped import Trick

PAGE = 4096
Start = Callable[..., Mapper]
NewLibrary = Callable[..., Path]

#: The library that ``library()`` makes in this run of the tests; another run has other names.
NEW = rf"/libnew{TAG}\.so$"


def inode(path: Path) -> int:
    return path.stat().st_ino


def sync(ledger: Ledger, mapper: Mapper, marker: Path) -> None:
    """Waits until all that this process did before has come through."""
    mapper.map(marker)
    ledger.wait_load(mapper.pid, inode(marker))


# ---- M11: the leader is dead ---------------------------------------------------------------------


def test_a_process_whose_leader_is_dead_is_in_the_snapshot_and_its_files_can_be_opened(
    open_ledger: Callable[..., Ledger], start: Start, library: NewLibrary
) -> None:
    mapper, new = start(), library()
    mapper.map(new)
    for _ in range(4):
        mapper.emit("thread", "idle", "-")
    (thread,) = mapper.emit("leaderexit")
    opened: list[int] = []
    rule = Rule(NEW, name="dead", on_activate=lambda file: opened.append(os.fstat(file.fileno()).st_ino))
    ledger = open_ledger(rule)
    load = ledger.wait_load(mapper.pid, inode(new))
    assert load.cause == "snapshot"
    ledger.wait_for(lambda: opened, "the file was not opened")
    assert opened == [inode(new)]
    assert ledger.inodes(mapper.pid) == executable_inodes(int(thread)) & {inode(new)}


def test_a_process_whose_leader_is_dead_is_followed_to_its_end(
    ledger: Ledger, start: Start, library: NewLibrary
) -> None:
    mapper, before, after = start(), library("libbefore.so"), library("libafter.so")
    mapper.map(before)
    (thread,) = mapper.emit("leaderexit")
    at, length = mapper.map(after)
    load = ledger.wait_load(mapper.pid, inode(after))
    assert load.process is not None
    assert load.process == ledger.wait_load(mapper.pid, inode(before)).process
    ledger.wait_equal(mapper.pid, via={mapper.pid: int(thread)})
    mapper.unmap(at, length)
    ledger.wait_unload(mapper.pid, inode(after))
    mapper.exit()
    ledger.wait_for(lambda: not ledger.inodes(mapper.pid), "the process was not forgotten")
    assert ledger.story(mapper.pid, inode(before)) == [("load", "mmap"), ("unload", "exit")]


# ---- M12: address spaces that several processes hold ---------------------------------------------


def test_a_child_that_shares_its_parents_memory_and_outlives_it_keeps_the_files(
    ledger: Ledger, start: Start, library: NewLibrary
) -> None:
    parent, new, later = start(), library(), library("liblater.so")
    parent.map(new)
    with parent.fork(how="clonevm") as child:
        ledger.wait_load(parent.pid, inode(new))
        parent.exit()
        ledger.wait_unload(parent.pid, inode(new))
        ledger.wait_load(child.pid, inode(new))
        ledger.wait_equal(child.pid)
        child.map(later)
        ledger.wait_load(child.pid, inode(later))
        child.exit()
    ledger.wait_for(lambda: not ledger.inodes(child.pid), "the child was not forgotten")
    assert ledger.story(child.pid, inode(new)) == [("load", "fork"), ("unload", "exit")]


def test_a_child_that_shares_its_parents_memory_gets_what_the_parent_has_if_it_stays(
    ledger: Ledger, start: Start, library: NewLibrary
) -> None:
    parent, new = start(), library()
    parent.map(new)
    with parent.fork(how="clonevm") as child:
        ledger.wait_load(child.pid, inode(new))
        at, length = child.map(library("libchild.so"))
        ledger.wait_load(parent.pid, inode(library("libchild.so")))
        child.unmap(at, length)
        ledger.wait_unload(parent.pid, inode(library("libchild.so")))
        ledger.wait_equal(parent.pid, child.pid)


@pytest.mark.parametrize("how", ["vfork", "spawn"])
def test_a_child_on_its_way_to_exec_is_not_said_to_have_its_parents_files(
    ledger: Ledger, start: Start, library: NewLibrary, how: str
) -> None:
    parent, new, marker = start(), library(), library("libmarker.so")
    parent.map(new)
    pids = []
    for _ in range(30):
        pid = int(parent.emit(how, "/bin/true")[0])
        parent.emit("wait", pid)
        pids.append(pid)
    sync(ledger, parent, marker)
    assert [ledger.story(pid, inode(new)) for pid in pids] == [[]] * 30
    assert all(not ledger.inodes(pid) for pid in pids)


def test_a_child_on_its_way_to_exec_is_not_said_to_have_its_parents_files_by_a_snapshot_either(
    open_ledger: Callable[..., Ledger], start: Start, library: NewLibrary
) -> None:
    parent, new = start(), library()
    parent.map(new)
    over = threading.Event()
    pids: list[int] = []

    def spawn_all_the_time() -> None:
        while not over.is_set():
            pids.append(int(parent.emit("spawn", "/bin/true")[0]))
            parent.emit("wait", pids[-1])

    thread = threading.Thread(target=spawn_all_the_time)
    thread.start()
    try:
        ledger = open_ledger(Rule(NEW))
    finally:
        over.set()
        thread.join()
    untrack_pid = start()
    untrack_pid.map(new)
    ledger.wait_load(untrack_pid.pid, inode(new))
    assert len(pids) > 10
    assert {pid: ledger.story(pid, inode(new)) for pid in pids if ledger.of(pid)} == {}


# ---- M17 ------------------------------------------------------------------------------------


def test_a_mapping_that_was_moved_is_unloaded_when_its_new_place_is_unmapped(
    ledger: Ledger, start: Start, library: NewLibrary
) -> None:
    mapper, new = start(), library()
    at, length = mapper.map(new)
    ledger.wait_load(mapper.pid, inode(new))
    moved = int(mapper.emit("remap", f"{at:x}", length, length + (1 << 20))[0], 16)
    assert moved != at
    ledger.wait_for(lambda: ledger.watcher.stats.rereads, "nobody looked where it went")
    sync(ledger, mapper, library("libmarker.so"))
    assert ledger.story(mapper.pid, inode(new)) == [("load", "mmap")]
    mapper.unmap(moved, length + (1 << 20))
    ledger.wait_unload(mapper.pid, inode(new))


# ---- ways to map that are easy to overlook -------------------------------------------------------


@pytest.mark.parametrize("way", ["implied", "implied-protect", "hole", "behind", "double"])
def test_a_file_that_becomes_executable_by_a_back_way_is_told(
    ledger: Ledger, trick: Callable[..., Trick], library: NewLibrary, way: str
) -> None:
    new = library()
    process = trick(way, new)
    assert inode(new) in executable_inodes(process.pid)
    ledger.wait_load(process.pid, inode(new))
    ledger.wait_equal(process.pid)


def test_a_wanted_file_is_told_that_one_mprotect_made_executable_together_with_an_ignored_one(
    open_ledger: Callable[..., Ledger], trick: Callable[..., Trick], start: Start, library: NewLibrary
) -> None:
    ignored, wanted, marker = (
        library("libignored.so"),
        library(f"libwanted{TAG}.so"),
        library(f"libwanted{TAG}-marker.so"),
    )
    ledger = open_ledger(Rule(f"/libwanted{TAG}", name="wanted"))
    mapper = start()
    mapper.map(ignored)
    sync(ledger, mapper, marker)
    process = trick("second", ignored, wanted)
    ledger.wait_load(process.pid, inode(wanted))


@pytest.mark.parametrize("way", ["shmdt", "shmdt-implied"])
def test_shared_memory_that_is_detached_is_unloaded(ledger: Ledger, trick: Callable[..., Trick], way: str) -> None:
    process = trick(way)
    (number,) = {int(line.split()[4]) for line in maps_of(process.pid) if b"/SYSV" in line}
    ledger.wait_load(process.pid, number)
    process.go_on()
    ledger.wait_unload(process.pid, number)


@pytest.mark.parametrize("strategy", ["core", "prebuilt", "procfs"])
def test_executable_memory_that_is_shared_with_children_is_the_file_that_the_kernel_makes_of_it(
    open_ledger: Callable[..., Ledger], spawn: Callable[..., subprocess.Popen[bytes]], strategy: str
) -> None:
    ledger = open_ledger(Rule("^/dev/zero$", name="shared", kind=KINDS), config=Config(strategy=strategy))
    child = spawn([sys.executable, "-c", SHARED], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout
    number = int(child.stdout.readline())
    load = ledger.wait_load(child.pid, number)
    assert (load.library.path, load.library.deleted, load.library.kind) == ("/dev/zero", True, "other")
    assert [one for one in ledger.watcher.audit().differences if one.pid == child.pid] == []
    child.kill()
    child.wait()
    ledger.wait_unload(child.pid, number)


#: Maps shared anonymous memory, executable, and says its inode number.
SHARED = """
import mmap, sys
memory = mmap.mmap(-1, 4096, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ | mmap.PROT_EXEC)
(number,) = (line.split()[4] for line in open("/proc/self/maps") if "/dev/zero" in line)
print(number, flush=True)
sys.stdin.read()
"""


def test_a_device_that_maps_another_file_than_its_own_is_told_as_what_it_maps(
    ledger: Ledger, trick: Callable[..., Trick], start: Start, library: NewLibrary
) -> None:
    process = trick("device")
    sync(ledger, start(), library("libmarker.so"))
    ledger.wait_equal(process.pid)
    assert (
        len({event.library.id for event in ledger.of(process.pid) if event.library.path.startswith("/dev/zero")}) == 1
    )


@pytest.fixture
def huge(scratch: Path) -> Iterator[Path]:
    """A file of hugetlbfs."""
    subprocess.run(["mount", "-t", "hugetlbfs", "none", scratch], check=True)
    made = scratch / "libhuge.so"
    made.touch()
    yield made
    subprocess.run(["umount", "-l", scratch], check=True)


def test_a_file_of_hugetlbfs_is_told_with_all_of_its_huge_page(
    open_ledger: Callable[..., Ledger], huge: Path, spawn: Callable[..., subprocess.Popen[bytes]]
) -> None:
    ledger = open_ledger(Rule(rf"^{huge}$", name="huge", kind=KINDS))
    # Nothing is touched, and nothing reserved: the test needs no huge page.
    child = spawn([sys.executable, "-c", HUGE, huge], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout
    assert child.stdout.readline() == b"ok\n"
    ((first, end),) = ledger.wait_load(child.pid, inode(huge)).ranges
    assert end - first >= 2 << 20
    assert ledger.watcher.audit().differences == ()
    child.kill()
    child.wait()


#: Maps one page's length of a file, executable, private and without a reservation.
HUGE = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
at = libc.mmap(None, 4096, 5, 0x4002, os.open(sys.argv[1], os.O_RDWR), 0)
print("error" if at in (None, 2**64 - 1) else "ok", flush=True)
sys.stdin.read()
"""


def maps_of(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/maps").read_bytes().splitlines()


def test_answers_of_a_process_that_swaps_files_under_its_descriptors_do_not_hide_them_from_others(
    open_ledger: Callable[..., Ledger], start: Start, library: NewLibrary
) -> None:
    """A path read from a file that was closed meanwhile must not be taken for the path of another."""
    wanted, unwanted = library(f"libwanted{TAG}.so"), library("libunused.so")
    unwanted.write_bytes(unwanted.read_bytes()[:-1] + b"\x01")
    ledger = open_ledger(Rule(rf"/libwanted{TAG}\.so$", name="wanted"))
    for _ in range(3):
        mapper = start()
        for _ in range(3):
            mapper.emit("thread", "anon", "-")
        mapper.emit("dup2race", wanted, unwanted, 500)
        mapper.emit("thread", "stop")
        honest = start()
        honest.map(wanted)
        ledger.wait_load(honest.pid, inode(wanted))
        assert ledger.story(honest.pid, inode(wanted)) == [("load", "mmap")]
