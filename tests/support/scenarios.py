"""What one process, or a few, may do with a file, and what each strategy has to tell of it.

Data for `test_conformance`, and for tests that do the same by another way.

What a strategy does otherwise is said in `DIFFERENCES`, as data, and nowhere else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from support.forced import FORCED
from support.kernel import TAG, Ledger
from support.programs import Mapper

__all__ = [
    "DIFFERENCES",
    "GUARANTEES",
    "OFTEN",
    "SCENARIOS",
    "STRATEGIES",
    "Reported",
    "Stage",
    "exec_maps_the_program_itself",
]

Story = list[tuple[str, str | None]]

#: What `ready` may say of each strategy: first what it says today, then what it says on kernels before 5.17.
GUARANTEES = {
    "core": ("exact", "exact, but for what only a scan can find"),
    "runtime": ("exact", "exact, but for what only a scan can find"),
    "prebuilt": ("exact events, files found in /proc",),
    "procfs": ("sampled",),
}
STRATEGIES = [FORCED["strategy"]] if FORCED else list(GUARANTEES)
#: One second between two looks, the default, would be most of what this module takes.
OFTEN = {"poll_interval_s": 0.05, "poll_cpu_percent": 100}

MAPPED = ("load", "mmap")
UNMAPPED = ("unload", "munmap")
INHERITED = ("load", "fork")
ENDED = ("unload", "exit")
REPLACED = ("unload", "exec")


class Reported(NamedTuple):
    """What one process has to be told to have had of one file."""

    pid: int
    inode: int
    story: Story


class Stage:
    """What a scenario may use."""

    def __init__(
        self,
        ledger: Ledger,
        start: Callable[..., Mapper],
        library: Callable[..., Path],
        programs: Any,
        closing: contextlib.ExitStack,
    ) -> None:
        self.ledger, self.start, self.library, self.programs = ledger, start, library, programs
        self._closing = closing

    def fork(self, mapper: Mapper, *, how: str = "fork") -> Mapper:
        """A child that ends with the test."""
        return self._closing.enter_context(mapper.fork(how=how))

    def map(self, mapper: Mapper, file: Path) -> tuple[int, int]:
        """Maps the file, and waits until that was told."""
        at, length = mapper.map(file)
        self.ledger.wait_load(mapper.pid, file.stat().st_ino)
        return at, length


def a_file_is_mapped_and_unmapped(stage: Stage) -> list[Reported]:
    mapper, file = stage.start(), stage.library()
    mapper.unmap(*stage.map(mapper, file))
    return [Reported(mapper.pid, file.stat().st_ino, [MAPPED, UNMAPPED])]


def a_process_ends(stage: Stage) -> list[Reported]:
    mapper, file = stage.start(), stage.library()
    stage.map(mapper, file)
    mapper.exit()
    return [Reported(mapper.pid, file.stat().st_ino, [MAPPED, ENDED])]


def a_child_inherits(stage: Stage) -> list[Reported]:
    mapper, file = stage.start(), stage.library()
    stage.map(mapper, file)
    child = stage.fork(mapper)
    stage.ledger.wait_load(child.pid, file.stat().st_ino)
    child.exit()
    return [
        Reported(mapper.pid, file.stat().st_ino, [MAPPED]),
        Reported(child.pid, file.stat().st_ino, [INHERITED, ENDED]),
    ]


def a_child_unmaps_what_it_inherited(stage: Stage) -> list[Reported]:
    mapper, file = stage.start(), stage.library()
    at = stage.map(mapper, file)
    child = stage.fork(mapper)
    stage.ledger.wait_load(child.pid, file.stat().st_ino)
    child.unmap(*at)
    return [
        Reported(mapper.pid, file.stat().st_ino, [MAPPED]),
        Reported(child.pid, file.stat().st_ino, [INHERITED, UNMAPPED]),
    ]


def exec_drops_everything(stage: Stage) -> list[Reported]:
    mapper, file = stage.start(), stage.library()
    stage.map(mapper, file)
    mapper.exec()
    return [Reported(mapper.pid, file.stat().st_ino, [MAPPED, REPLACED])]


def a_thread_executes_another_program(stage: Stage) -> list[Reported]:
    mapper, file = stage.start(), stage.library()
    stage.map(mapper, file)
    mapper.exec(how="execthread")
    return [Reported(mapper.pid, file.stat().st_ino, [MAPPED, REPLACED])]


def protection_goes_and_comes_back(stage: Stage) -> list[Reported]:
    mapper, file = stage.start(), stage.library()
    at = stage.map(mapper, file)
    mapper.protect(*at, "r")
    stage.ledger.wait_unload(mapper.pid, file.stat().st_ino)
    mapper.protect(*at, "rx")
    return [Reported(mapper.pid, file.stat().st_ino, [MAPPED, UNMAPPED, MAPPED])]


def another_file_takes_its_place(stage: Stage) -> list[Reported]:
    mapper, file, other = stage.start(), stage.library(f"libone{TAG}.so"), stage.library(f"libother{TAG}.so")
    at, length = stage.map(mapper, file)
    mapper.map(other, "at", f"{at:x}", "len", length)
    return [
        Reported(mapper.pid, file.stat().st_ino, [MAPPED, UNMAPPED]),
        Reported(mapper.pid, other.stat().st_ino, [MAPPED]),
    ]


def a_process_with_threads_maps_and_unmaps(stage: Stage) -> list[Reported]:
    mapper, file = stage.start(), stage.library()
    mapper.emit("thread", "idle", file)
    mapper.unmap(*stage.map(mapper, file))
    return [Reported(mapper.pid, file.stat().st_ino, [MAPPED, UNMAPPED])]


def the_leader_ends_first(stage: Stage) -> list[Reported]:
    mapper, file, later = stage.start(), stage.library(f"libone{TAG}.so"), stage.library(f"liblater{TAG}.so")
    stage.map(mapper, file)
    mapper.emit("leaderexit")
    stage.map(mapper, later)
    mapper.exit()
    return [
        Reported(mapper.pid, file.stat().st_ino, [MAPPED, ENDED]),
        Reported(mapper.pid, later.stat().st_ino, [MAPPED, ENDED]),
    ]


def an_address_space_is_shared(stage: Stage) -> list[Reported]:
    mapper, file, later = stage.start(), stage.library(f"libone{TAG}.so"), stage.library(f"liblater{TAG}.so")
    stage.map(mapper, file)
    child = stage.fork(mapper, how="clonevm")
    stage.ledger.wait_load(child.pid, file.stat().st_ino)
    child.unmap(*stage.map(mapper, later))
    stage.ledger.wait_unload(mapper.pid, later.stat().st_ino)
    child.exit()
    return [
        Reported(mapper.pid, file.stat().st_ino, [MAPPED]),
        Reported(mapper.pid, later.stat().st_ino, [MAPPED, UNMAPPED]),
        Reported(child.pid, file.stat().st_ino, [INHERITED, ENDED]),
    ]


def a_child_of_vfork_has_nothing_of_its_parents(stage: Stage) -> list[Reported]:
    mapper, file = stage.start(), stage.library()
    stage.map(mapper, file)
    (pid,) = mapper.emit("vfork", "/bin/true")
    mapper.emit("wait", pid)
    return [Reported(mapper.pid, file.stat().st_ino, [MAPPED]), Reported(int(pid), file.stat().st_ino, [])]


def a_file_that_is_deleted_stays_mapped(stage: Stage) -> list[Reported]:
    mapper, file = stage.start(), stage.library()
    inode = file.stat().st_ino
    stage.map(mapper, file)
    file.unlink()
    child = stage.fork(mapper)
    stage.ledger.wait_load(child.pid, inode)
    return [Reported(mapper.pid, inode, [MAPPED]), Reported(child.pid, inode, [INHERITED])]


def a_file_is_mapped_for_a_moment(stage: Stage) -> list[Reported]:
    mapper, file = stage.start(), stage.library()
    mapper.unmap(*mapper.map(file))
    return [Reported(mapper.pid, file.stat().st_ino, [MAPPED, UNMAPPED])]


def a_child_lives_for_a_moment(stage: Stage) -> list[Reported]:
    mapper, file = stage.start(), stage.library()
    stage.map(mapper, file)
    child = stage.fork(mapper)
    child.exit()
    return [
        Reported(mapper.pid, file.stat().st_ino, [MAPPED]),
        Reported(child.pid, file.stat().st_ino, [INHERITED, ENDED]),
    ]


def exec_maps_the_program_itself(stage: Stage) -> list[Reported]:
    mapper = stage.start()
    program = stage.programs["mapper"].stat().st_ino
    stage.ledger.wait_load(mapper.pid, program)
    mapper.exit()
    return [Reported(mapper.pid, program, [("load", "exec"), ENDED])]


SCENARIOS = (
    a_file_is_mapped_and_unmapped,
    a_process_ends,
    a_child_inherits,
    a_child_unmaps_what_it_inherited,
    exec_drops_everything,
    a_thread_executes_another_program,
    protection_goes_and_comes_back,
    another_file_takes_its_place,
    a_process_with_threads_maps_and_unmaps,
    the_leader_ends_first,
    an_address_space_is_shared,
    a_child_of_vfork_has_nothing_of_its_parents,
    a_file_that_is_deleted_stays_mapped,
    a_file_is_mapped_for_a_moment,
    a_child_lives_for_a_moment,
    exec_maps_the_program_itself,
)

#: By strategy, the scenarios in which it may tell another story than the one that happened: which one happened,
#: and what may be told instead.
DIFFERENCES: dict[str, dict[Callable[[Stage], list[Reported]], list[tuple[Story, Story]]]] = {
    "core": {},
    "runtime": {},
    # What has gone before it was looked up in /proc is counted as lost.
    "prebuilt": {a_file_is_mapped_for_a_moment: [([MAPPED, UNMAPPED], [])]},
    # What comes and goes between two looks is not seen, and until it executes another program a child of vfork
    # looks like its parent.
    "procfs": {
        a_file_is_mapped_for_a_moment: [([MAPPED, UNMAPPED], [])],
        a_child_lives_for_a_moment: [([INHERITED, ENDED], [])],
        a_child_of_vfork_has_nothing_of_its_parents: [([], [INHERITED, REPLACED]), ([], [INHERITED, ENDED])],
    },
}
