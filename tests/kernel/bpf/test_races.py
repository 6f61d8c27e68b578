"""The interleavings that make a map wrong without any event lost, forced, and compared with ``/proc``.

Where the kernel lets a test hold a thread inside a system call (see ``tests/programs/stall.c``) the
interleaving is exact; the others are stirred for a while and compared once all is quiet.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sowatch import Rule
from sowatch.model.config import NO_GUARD, Config
from sowatch.model.literals import KINDS
from support import bpfsys
from support.forced import FORCED
from support.kernel import TAG, Ledger, executable_inodes, standing_still
from support.programs import Mapper
from support.stepped import Stall

pytestmark = pytest.mark.alone

PAGE = 4096
Start = Callable[..., Mapper]
NewLibrary = Callable[..., Path]

#: The library that ``library()`` makes in this run of the tests; another run has other names.
NEW = rf"/libnew{TAG}\.so$"


@pytest.fixture(scope="module")
def ours(programs: Any) -> Rule:
    """What these tests start and map, but for what every program has mapped."""
    return Rule(rf"^(/var/tmp/sow-|{programs.directory}/)", name="ours", kind=KINDS)


@pytest.fixture(scope="module")
def libc(programs: Any, long_scratch: Path) -> frozenset[int]:
    """Inodes of what every program has mapped."""
    with Mapper(programs["mapper"], long_scratch) as mapper:
        return frozenset(executable_inodes(mapper.pid) - {inode(programs["mapper"])})


@pytest.fixture(scope="module")
def long_ledger(schema: Any, deadline: Any, programs: Any, libc: frozenset[int]) -> Iterator[Ledger]:
    """What these tests start and map: a watch of everything, without its guard, drowns in a flood of somebody else.

    Nor does it watch the files of their storms, which would cost it records, of which the test that follows would hear.
    """
    error = bpfsys.why_no_bpf()
    if error is not None:
        pytest.skip(f"bpf(2) cannot create a map: {error.strerror}")
    quiet = Rule(rf"^(/var/tmp/sow-[^/]+/(?!libstorm)|{programs.directory}/)", name="quiet", kind=KINDS)
    config = Config(max_records_s=NO_GUARD)
    with Ledger(quiet, unwanted=libc, timeout_s=deadline(10), check=schema, config=config) as ledger:
        yield ledger
        ledger.stop()


def inode(path: Path) -> int:
    return path.stat().st_ino


def sync(ledger: Ledger, mapper: Mapper, marker: Path) -> None:
    """Waits until all that this process did before has come through."""
    mapper.map(marker)
    ledger.wait_load(mapper.pid, inode(marker))


# ---- one thing at a time: what a single thread does is told as it is -----------------------------


def test_what_one_thread_maps_and_unmaps_is_told_in_order(ledger: Ledger, start: Start, library: NewLibrary) -> None:
    mapper, new = start(), library()
    at, length = mapper.map(new)
    again, _ = mapper.map(new)
    mapper.unmap(at, length)
    mapper.unmap(again, length)
    at, length = mapper.map(new)
    mapper.exec()
    mapper.map(new)
    mapper.exit()
    ledger.wait_for(lambda: ledger.story(mapper.pid, inode(new))[-1:] == [("unload", "exit")], "no exit")
    assert ledger.story(mapper.pid, inode(new)) == [
        ("load", "mmap"),
        ("unload", "munmap"),
        ("load", "mmap"),
        ("unload", "exec"),
        ("load", "mmap"),
        ("unload", "exit"),
    ]


def test_a_library_stays_while_any_part_of_it_is_executable(ledger: Ledger, start: Start, library: NewLibrary) -> None:
    mapper, new, marker = start(), library(), library("libmarker.so")
    at, _ = mapper.map(new, "len", 4 * PAGE)
    mapper.unmap(at, PAGE)
    mapper.protect(at + 3 * PAGE, PAGE, "r")
    mapper.emit("anon", PAGE, "at", f"{at + PAGE:x}")
    sync(ledger, mapper, marker)
    assert ledger.story(mapper.pid, inode(new)) == [("load", "mmap")]
    ledger.wait_equal(mapper.pid)
    mapper.protect(at + 2 * PAGE, PAGE, "rw")
    ledger.wait_unload(mapper.pid, inode(new))
    assert ledger.story(mapper.pid, inode(new))[-1] == ("unload", "munmap")


def test_a_child_has_what_its_parent_had_and_each_goes_its_own_way(
    ledger: Ledger, start: Start, library: NewLibrary
) -> None:
    parent, new, other = start(), library(), library("libother.so")
    at, length = parent.map(new)
    with parent.fork() as child:
        parent.unmap(at, length)
        child.map(other)
        ledger.wait_load(child.pid, inode(other))
        ledger.wait_unload(parent.pid, inode(new))
        ledger.wait_equal(parent.pid, child.pid)
        assert ledger.story(child.pid, inode(new)) == [("load", "fork")]
        assert ledger.story(parent.pid, inode(other)) == []


# ---- M1: the file descriptor is replaced under mmap ----------------------------------------------


def test_a_descriptor_replaced_during_mmap_by_another_thread_hides_and_fakes_nothing_for_long(
    ledger: Ledger, start: Start, library: NewLibrary
) -> None:
    mapper, first, second = start(), library("liba.so"), library("libb.so")
    second.write_bytes(second.read_bytes()[:-1] + b"\x01")
    last, _, _, times_a, times_b = mapper.emit("dup2race", first, second, 3000)
    assert min(int(times_a), int(times_b)) > 0
    mapped, other = (first, second) if last == "a" else (second, first)
    sync(ledger, mapper, library("libmarker.so"))
    ledger.wait_load(mapper.pid, inode(mapped))
    ledger.wait_unload(mapper.pid, inode(other))
    ledger.wait_equal(mapper.pid)


def test_a_descriptor_replaced_while_others_hold_the_mappings_hides_and_fakes_nothing_for_long(
    ledger: Ledger, start: Start, library: NewLibrary
) -> None:
    mapper, first, second = start(), library("liba.so"), library("libb.so")
    second.write_bytes(second.read_bytes()[:-1] + b"\x01")
    for _ in range(3):
        mapper.emit("thread", "anon", "-")
    last, *_ = mapper.emit("dup2race", first, second, 2000)
    mapper.emit("thread", "stop")
    mapped, other = (first, second) if last == "a" else (second, first)
    sync(ledger, mapper, library("libmarker.so"))
    ledger.wait_load(mapper.pid, inode(mapped))
    ledger.wait_unload(mapper.pid, inode(other))
    ledger.wait_equal(mapper.pid)


# ---- M2: fork of a threaded process while it maps ------------------------------------------------


def test_children_of_a_process_whose_threads_map_and_unmap_have_what_proc_says(
    ledger: Ledger, start: Start, library: NewLibrary, closing: contextlib.ExitStack
) -> None:
    parent = start()
    for number in range(2):
        parent.emit("thread", "loop", library(f"libloop{number}.so"))
    children = [closing.enter_context(parent.fork()) for _ in range(40)]
    parent.emit("thread", "stop")
    ledger.wait_equal(parent.pid, *(child.pid for child in children))


@pytest.fixture
def fork_held(stall: Callable[..., Stall], library: NewLibrary, deadline: Any, ledger: Ledger) -> Iterator[Stall]:
    """A process in the middle of a fork: its mappings are copied, the child is not told of yet."""
    first = library("libfirst.so")
    held = stall("fork", first, library("libother.so"))
    ledger.wait_load(held.pid, inode(first))
    held.hold(deadline(5))
    yield held
    held.close()


def test_a_file_that_a_thread_maps_during_a_fork_is_not_the_childs(
    ledger: Ledger, fork_held: Stall, scratch: Path
) -> None:
    fork_held.second("map")
    child = fork_held.release()
    ledger.wait_load(fork_held.pid, inode(scratch / "libother.so"))
    ledger.wait_load(child, inode(scratch / "libfirst.so"))
    ledger.wait_equal(fork_held.pid, child)


def test_a_file_that_a_thread_unmaps_during_a_fork_is_still_the_childs(
    ledger: Ledger, fork_held: Stall, scratch: Path
) -> None:
    fork_held.second("drop")
    child = fork_held.release()
    ledger.wait_unload(fork_held.pid, inode(scratch / "libfirst.so"))
    ledger.wait_load(child, inode(scratch / "libfirst.so"))
    ledger.wait_equal(fork_held.pid, child)


def test_a_thread_that_maps_during_a_fork_and_leaves_before_its_end_gives_the_child_nothing(
    ledger: Ledger, fork_held: Stall, scratch: Path, wait_until: Any
) -> None:
    fork_held.second("map")
    fork_held.second("leave")
    wait_until(fork_held.is_single_user)
    ledger.wait_load(fork_held.pid, inode(scratch / "libother.so"))
    child = fork_held.release()
    ledger.wait_load(child, inode(scratch / "libfirst.so"))
    ledger.wait_equal(fork_held.pid, child)


# ---- M3: the same range is unmapped and mapped by two threads ------------------------------------


def test_threads_that_map_and_unmap_at_once_leave_the_map_as_proc_has_it(
    open_ledger: Callable[..., Ledger], start: Start, library: NewLibrary, ours: Rule, libc: frozenset[int]
) -> None:
    """As fast as they can, so on a busy machine something is lost; then the repair has to make it right."""
    ledger = open_ledger(ours, unwanted=libc)
    mapper = start()
    stays, marker = library("libstays.so"), library("libmarker.so")
    mapper.map(stays)
    for number in range(4):
        mapper.emit("thread", "loop", library(f"libstorm{number}.so"))
    mapper.emit("loop", library("libstorm.so"), 20000)
    rounds = int(mapper.emit("thread", "stop")[0])
    assert rounds > 1000
    sync(ledger, mapper, marker)
    ledger.wait_for(lambda: ledger.watcher.is_repaired, "the repair", 30)
    ledger.wait_equal(mapper.pid)
    assert ledger.story(mapper.pid, inode(stays))[-1][0] == "load"


@pytest.mark.parametrize("way", ["unmap", "fixed"])
def test_a_new_mapping_in_a_range_that_another_thread_is_still_giving_up_stays(
    ledger: Ledger, stall: Callable[..., Stall], library: NewLibrary, deadline: Any, way: str
) -> None:
    first, other = library("libfirst.so"), library("libother.so")
    held = stall(way, first, other)
    ledger.wait_load(held.pid, inode(first))
    held.hold(deadline(5))
    held.second("map")
    ledger.wait_load(held.pid, inode(other))
    ledger.wait_equal(held.pid)
    held.release()
    ledger.wait_equal(held.pid)
    assert ledger.story(held.pid, inode(other)) == [("load", "mmap")]


@pytest.mark.parametrize("way", ["unmap", "fixed"])
def test_a_new_mapping_stays_although_the_thread_that_made_it_left_before_the_other_call_returned(
    ledger: Ledger,
    stall: Callable[..., Stall],
    library: NewLibrary,
    start: Start,
    deadline: Any,
    wait_until: Any,
    way: str,
) -> None:
    first, other = library("libfirst.so"), library("libother.so")
    held = stall(way, first, other)
    ledger.wait_load(held.pid, inode(first))
    held.hold(deadline(5))
    held.second("map")
    held.second("leave")
    wait_until(held.is_single_user)
    ledger.wait_equal(held.pid)
    held.release()
    # What this process maps afterwards is told after whatever that call had to say.
    sync(ledger, start(), library("libmarker.so"))
    assert ledger.story(held.pid, inode(other)) == [("load", "mmap")]
    ledger.wait_equal(held.pid)


# ---- M4: a watch that starts in the middle of a storm --------------------------------------------


@contextlib.contextmanager
def storm(mappers: list[Mapper], libraries: list[Path]) -> Iterator[None]:
    """Each mapper maps, unmaps, forks, executes and ends children until the block is left."""
    over = threading.Event()

    def stir(number: int, mapper: Mapper) -> None:
        mine = libraries[number]
        while not over.is_set():
            at, length = mapper.map(mine)
            with mapper.fork() as child:
                child.map(libraries[-1])
                mapper.unmap(at, length)
                child.exec()
                child.map(mine)
            mapper.exec()
            mapper.emit("wait", mapper.emit("spawn", "/bin/true")[0])

    with ThreadPoolExecutor(len(mappers)) as workers:
        stirring = [workers.submit(stir, *pair) for pair in enumerate(mappers)]
        try:
            yield
        finally:
            over.set()
    for one in stirring:
        one.result()


def test_a_watch_that_starts_in_a_storm_knows_what_proc_says_once_it_is_over(
    open_ledger: Callable[..., Ledger], start: Start, library: NewLibrary
) -> None:
    mappers = [start() for _ in range(6)]
    libraries = [library(f"libstorm{number}.so") for number in range(7)]
    stays = library("libstays.so")
    for mapper in mappers[:3]:
        mapper.map(stays)
    for mapper in mappers[3:]:
        mapper.emit("thread", "idle", "-")
    quiet = start()
    quiet.map(stays)
    for _ in range(3):
        with storm(mappers, libraries):
            ledger = open_ledger(Rule(rf"{stays.parent}/", kind=KINDS, name="ours"))
        for mapper in mappers:
            mapper.map(stays)
        pids = {mapper.pid for mapper in [*mappers, quiet]}
        wanted = {inode(path) for path in [*libraries, stays]}

        def differences(ledger: Ledger = ledger, pids: set[int] = pids, wanted: set[int] = wanted) -> dict[int, Any]:
            return {
                pid: (ledger.inodes(pid), executable_inodes(pid) & wanted)
                for pid in pids
                if ledger.inodes(pid) != executable_inodes(pid) & wanted
            }

        ledger.wait_for(lambda: not differences(), lambda: f"(ours, proc's): {differences()}")
        others = {process.pid for process, files in ledger._held.items() if files} - pids
        assert not others, "processes that have ended are still held"
        ledger.stop()


def test_threads_that_map_while_the_watch_starts_leave_the_map_as_proc_has_it(
    open_ledger: Callable[..., Ledger], start: Start, library: NewLibrary
) -> None:
    mapper = start()
    for number in range(3):
        mapper.emit("thread", "loop", library(f"libstorm{number}.so"))
    ledger = open_ledger()
    mapper.emit("thread", "stop")
    sync(ledger, mapper, library("libmarker.so"))
    ledger.wait_equal(mapper.pid)


def test_what_was_mapped_before_the_watch_began_is_told_before_ready_and_what_came_after_it_is_told_later(
    open_ledger: Callable[..., Ledger], start: Start, library: NewLibrary
) -> None:
    mapper, before, after = start(), library("libbefore.so"), library("libafter.so")
    mapper.map(before)
    ledger = open_ledger()
    mapper.map(after)
    ledger.wait_load(mapper.pid, inode(after))
    names = [event.event for event in ledger.events]
    ready = names.index("ready")
    assert all(getattr(event, "cause", None) in ("snapshot", None) for event in ledger.events[:ready])
    assert ledger.events.index(ledger.wait_load(mapper.pid, inode(before))) < ready
    assert ledger.events.index(ledger.wait_load(mapper.pid, inode(after))) > ready
    assert "snapshot" not in {getattr(event, "cause", None) for event in ledger.events[ready:]}


def test_a_process_that_the_snapshot_met_and_that_then_ends_is_unloaded(
    open_ledger: Callable[..., Ledger], start: Start, library: NewLibrary
) -> None:
    mapper, new = start(), library()
    mapper.map(new)
    ledger = open_ledger()
    mapper.exit()
    ledger.wait_unload(mapper.pid, inode(new))
    assert ledger.story(mapper.pid, inode(new)) == [("load", "snapshot"), ("unload", "exit")]


# ---- M5: a process of which nothing was wanted so far --------------------------------------------


def test_a_wanted_file_is_told_right_after_unwanted_ones_and_so_is_the_exit(
    open_ledger: Callable[..., Ledger], start: Start, library: NewLibrary
) -> None:
    wanted = library(f"libwanted{TAG}.so")
    ledger = open_ledger(Rule(rf"/libwanted{TAG}\.so$", name="wanted"))
    for number in range(100):
        mapper = start()
        mapper.map(library(f"libunwanted{number}.so"))
        at, length = mapper.map(wanted)
        if number % 2:
            mapper.unmap(at, length)
            # Whoever looks at the process meanwhile makes this a claim, which takes a reading.
            ledger.wait_for(lambda pid=mapper.pid: len(ledger.of(pid)) == 2, f"round {number} was not told")
        mapper.exit()
        ledger.wait_for(lambda pid=mapper.pid: len(ledger.of(pid)) == 2, f"round {number} was not told")
        end = "munmap" if number % 2 else "exit"
        assert ledger.story(mapper.pid, inode(wanted)) == [("load", "mmap"), ("unload", end)]


def test_a_wanted_file_whose_mmap_has_not_returned_yet_is_followed_although_all_else_is_unwanted(
    open_ledger: Callable[..., Ledger],
    stall: Callable[..., Stall],
    start: Start,
    library: NewLibrary,
    deadline: Any,
    scratch: Path,
) -> None:
    wanted, unwanted, marker = library(f"libwanted{TAG}.so"), library("libunwanted.so"), library(f"libwanted{TAG}.so.1")
    ledger = open_ledger(Rule(rf"/libwanted{TAG}", name="wanted"))
    held = stall("file", wanted, unwanted)
    held.hold(deadline(5))
    held.second("map")
    mapper = start()
    for _ in range(3):
        # What is told of others comes after what the watch had to decide on this one.
        at, length = mapper.map(marker)
        ledger.wait_load(mapper.pid, inode(marker))
        mapper.unmap(at, length)
        ledger.wait_unload(mapper.pid, inode(marker))
    held.release()
    ledger.wait_load(held.pid, inode(wanted))
    held.second("drop")
    ledger.wait_unload(held.pid, inode(wanted))


def test_what_comes_and_goes_while_somebody_reads_the_process_is_told_each_time(
    ledger: Ledger, start: Start, library: NewLibrary, pin: Any
) -> None:
    mapper, new, first = start(), library(), library("libfirst.so")
    at, _ = mapper.map(first)
    ledger.wait_load(mapper.pid, inode(first))
    held = pin(mapper.pid, at)
    for _ in range(100):
        mapper.unmap(*mapper.map(new))
    held.kill()
    held.wait()
    sync(ledger, mapper, library("libmarker.so"))
    assert ledger.story(mapper.pid, inode(new)) == [("load", "mmap"), ("unload", "munmap")] * 100
    ledger.wait_equal(mapper.pid)


# ---- losses and repairs --------------------------------------------------------------------------


def test_after_a_storm_that_a_tiny_ring_cannot_hold_the_map_is_repaired(
    open_ledger: Callable[..., Ledger], start: Start, library: NewLibrary
) -> None:
    mappers = [start() for _ in range(4)]
    libraries = [library(f"libstorm{number}.so") for number in range(5)]
    rule = Rule(rf"{libraries[0].parent}/", kind=KINDS, name="ours")
    ledger = open_ledger(rule, config=Config(ring_bytes=4096))
    flooder = start()
    with storm(mappers, libraries):
        with standing_still(ledger.watcher):
            for _ in range(100):
                flooder.unmap(*flooder.map(libraries[0]))
        ledger.wait_for(lambda: "lost" in ledger.controls(), "a ring of one page was enough")
    for number, mapper in enumerate(mappers):
        mapper.map(libraries[number])

    def is_repaired() -> bool:
        controls = ledger.controls()
        return controls[-1] == "repaired" and ledger.watcher.is_repaired

    ledger.wait_for(is_repaired, lambda: f"no repair: {ledger.controls()[-5:]}", 20)
    wanted = {inode(path) for path in libraries}

    def differences() -> dict[int, Any]:
        return {
            mapper.pid: (ledger.inodes(mapper.pid), executable_inodes(mapper.pid) & wanted)
            for mapper in mappers
            if ledger.inodes(mapper.pid) != executable_inodes(mapper.pid) & wanted
        }

    ledger.wait_for(lambda: not differences(), lambda: f"(ours, proc's): {differences()}")

    def holders() -> set[int]:
        return {process.pid for process, files in ledger._held.items() if files}

    # Losses are counted once a second: what the storm lost last is repaired after the first repair that was seen.
    ledger.wait_for(lambda: holders() == {mapper.pid for mapper in mappers}, lambda: f"held by {holders()}")
    assert ledger.watcher.stats.lost_kernel > 0
    assert ledger.watcher.stats.repairs > 0


def test_the_exit_of_a_process_that_was_lost_is_found_by_the_repair(
    open_ledger: Callable[..., Ledger], start: Start, library: NewLibrary
) -> None:
    flooder, victim, new = start(), start(), library()
    ledger = open_ledger(Rule(rf"{new.parent}/", name="ours"), config=Config(ring_bytes=4096))
    victim.map(new)
    ledger.wait_load(victim.pid, inode(new))
    with standing_still(ledger.watcher):
        flooder.emit("loop", library("libflood.so"), 1000)
        victim.exit()
    ledger.wait_for(lambda: "lost" in ledger.controls(), "nothing was lost")
    ledger.wait_unload(victim.pid, inode(new))
    ledger.wait_for(lambda: ledger.controls()[-1] == "repaired", "no repair", 30)
    assert ledger.inodes(flooder.pid) == set()


@pytest.mark.parametrize("strategy", ["core", "prebuilt"])
@pytest.mark.parametrize("how", ["vfork", "spawn"])
def test_children_that_shared_memory_and_whose_records_were_lost_are_gone_after_the_repair(
    open_ledger: Callable[..., Ledger],
    start: Start,
    library: NewLibrary,
    closing: contextlib.ExitStack,
    strategy: str,
    how: str,
) -> None:
    parent, flooder, new = start(), start(), library()
    config = Config(**{"strategy": strategy, **FORCED, "ring_bytes": 4096})
    ledger = open_ledger(Rule(rf"{new.parent}/", name="ours"), config=config)
    parent.map(new)
    ledger.wait_load(parent.pid, inode(new))
    children = []
    # Each time the ring is full a record or two later: once after the fork of a child, and before its exec.
    first = 0 if ledger.ready.strategy == "core" else 22
    for count in range(first, first + 11):
        before = ledger.watcher.stats.lost_kernel
        with standing_still(ledger.watcher):
            if count:
                flooder.emit("loop", library("libflood.so"), count)
            programs = (["/bin/true"], ["/bin/sleep", "inf"])
            children += [int(parent.emit(how, *program)[0]) for program in programs]
            parent.emit("wait", children[-2])
            closing.callback(os.kill, children[-1], signal.SIGKILL)
            flooder.emit("loop", library("libflood.so"), 100)
        ledger.wait_for(lambda: ledger.watcher.stats.lost_kernel > before, "nothing was lost")  # noqa: B023
        ledger.wait_for(lambda: ledger.watcher.is_repaired, "no repair", 30)
    parent.exit()
    ledger.wait_unload(parent.pid, inode(new))
    sync(ledger, flooder, library("libmarker.so"))
    assert {pid: ledger.story(pid, inode(new)) for pid in children if ledger.story(pid, inode(new))} == {}
    assert {process.pid for process, files in ledger._held.items() if files} == {flooder.pid}
