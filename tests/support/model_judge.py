"""What a watch says of the processes of a `support.model.World`, compared with the model and with ``/proc``."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Self

from sowatch import Rule
from support.kernel import Ledger, standing_still
from support.model import ARENA, PAGE, File, Ranges, World, mapped_by_proc, merged, subreaper

__all__ = ["Judge", "Stage"]

#: By process and file.
Map = dict[tuple[int, File], Ranges]


#: So often what was right may not stay so while nothing is done.
MAX_SETTLING: Final = 3


class Stage(contextlib.ExitStack):
    """A watch of all that happens in one directory, and worlds in it; a context manager.

    Args:
        program: the compiled actor.
        libraries: what the libraries of each world are copies of.
        scratch: the directory.
        open_ledger: the fixture.
        timeout_s: how long an actor may take for an answer.
        with_programs: watch the actors' program, too.
        wanted: a regular expression for the names of the libraries that are watched.
        options: for `sowatch.Watcher`.
    """

    def __init__(
        self,
        program: Path,
        libraries: list[Path],
        scratch: Path,
        open_ledger: Callable[..., Ledger],
        timeout_s: float,
        *,
        with_programs: bool = False,
        wanted: str = "lib",
        **options: Any,
    ) -> None:
        super().__init__()
        self._libraries, self._scratch, self._timeout_s = libraries, scratch, timeout_s
        self._open_ledger, self._options = open_ledger, options
        self.with_programs, self._wanted = with_programs, wanted
        self._program = scratch / "actor"
        #: Shared by all worlds: a file that one replaces keeps its place in the next.
        self._files: dict[File, str] = {}
        shutil.copy(program, self._program)

    def __enter__(self) -> Self:
        super().__enter__()
        self.enter_context(subreaper())
        return self

    def watch(self) -> Judge:
        """Starts the watch."""
        rules = [Rule(rf"^({self._scratch}/\w+/|/memfd:){self._wanted}", name="libraries")]
        if self.with_programs:
            rules.append(Rule(rf"^{self._program}$", name="programs", kind="executable"))
        self.ledger = self._open_ledger(*rules, **self._options)
        marker = self.enter_context(contextlib.closing(self.world("marker", self._libraries[:1])))
        return Judge(self.ledger, marker, with_programs=self.with_programs, wanted=self._wanted)

    def world(self, name: str = "world", libraries: list[Path] | None = None) -> World:
        """A new world, which its user closes."""
        directory = self._scratch / name
        directory.mkdir(exist_ok=True)
        return World(self._program, libraries or self._libraries, directory, self._timeout_s, self._files)


class Judge:
    """Whether a watch, the model and ``/proc`` agree.

    Args:
        ledger: the watch, started; what it told is checked as it comes.
        marker: a world of one process and one library: what this maps is told after all that
            happened before.
        with_programs: the watch has a rule for the actors' program.
        wanted: which names of libraries it has a rule for.
    """

    def __init__(self, ledger: Ledger, marker: World, *, with_programs: bool = False, wanted: str = "") -> None:
        self._ledger, self._marker = ledger, marker
        self._with_programs, self._wanted = with_programs, re.compile(wanted)
        self._is_marked = False
        marker.start()
        self.comparisons = 0

    def barrier(self) -> None:
        """Takes all events of what has happened so far."""
        (actor,) = self._marker.actors
        if self._is_marked:
            self._marker.run([(actor, self._marker.unmap(actor, ARENA, 1))])
        else:
            self._marker.run([(actor, self._marker.map(actor, 0, ARENA, 1, sharing="private"))])
        self._is_marked = not self._is_marked
        self._marker.steps.clear()
        inode = File.at(self._marker.library(0)).inode
        self._ledger.wait_for(
            lambda: (inode in self._ledger.inodes(actor.pid)) == self._is_marked, "the marker was not told of"
        )

    @contextlib.contextmanager
    def deaf(self) -> Iterator[None]:
        """The watch hears nothing of what is done meanwhile: its ring, which has to be small, is full."""
        (actor,) = self._marker.actors
        with standing_still(self._ledger.watcher):
            for _ in range(50):
                self._marker.run([(actor, self._marker.map(actor, 0, ARENA + PAGE, 1, sharing="private"))])
                self._marker.run([(actor, self._marker.unmap(actor, ARENA + PAGE, 1))])
            self._marker.steps.clear()
            yield

    def reported(self, world: World) -> set[tuple[int, File]]:
        """Who has what by the events so far."""
        pids, ours = set(world.pids), world.files.keys() | {world.program}
        return {
            (process.pid, file)
            for process, files in self._ledger._held.items()
            if process.pid in pids
            for file in (File(*one[:3]) for one in files)
            if file in ours
        }

    def published(self, world: World) -> Map:
        """Who has what by the watcher's snapshot."""
        pids, ours = set(world.pids), world.files.keys() | {world.program}
        found: Map = {}
        for one in self._ledger.watcher.snapshot():
            file = File(*one.library.id[:3])
            # A pid may have gone to somebody else, who has none of our files.
            if one.process.pid in pids and file in ours:
                assert (one.process.pid, file) not in found, f"two processes with pid {one.process.pid}"
                pages = ((file, at) for start, end in one.ranges for at in range(start, end, PAGE))
                found[one.process.pid, file] = merged(pages).get(file, ())
        return found

    def expected(self, world: World) -> Map:
        """Who has what by the model."""
        found: Map = {}
        for actor in world.actors:
            found |= {
                (actor.pid, file): ranges
                for file, ranges in actor.space.executable().items()
                if self._wanted.match(world.files[file])
            }
            if self._with_programs:
                found |= {(actor.pid, world.program): ((actor.image.start, actor.image.stop),)}
        return found

    def by_proc(self, world: World) -> Map:
        """Who has what by ``/proc``."""
        wanted = {file for file, name in world.files.items() if self._wanted.match(name)}
        if self._with_programs:
            wanted.add(world.program)
        return {
            (actor.pid, file): ranges
            for actor in world.actors
            for file, ranges in mapped_by_proc(actor.tid).items()
            if file in wanted
        }

    def check(self, world: World) -> None:
        """Waits until all three agree, and stay so.

        Raises:
            AssertionError: they do not, with all that was done.
        """
        expected = self.expected(world)
        self._agree(world, self.by_proc(world), expected, "/proc")
        self.barrier()

        def agree() -> bool:
            return not self._not_reported(world, expected) and not self._differences(
                world, self.published(world), expected
            )

        # Records of a process that is scanned wait for its scan, and the marker's do not wait for them: what was done
        # before it may be reported after it. Who may be silent may be announced file by file. But neither goes on.
        for _ in range(MAX_SETTLING):
            self._ledger.wait_for(agree, lambda: self._story(world, expected))
            self._notice_announced(world)
            self.barrier()
            if agree():
                break
        else:
            raise AssertionError(self._story(world, expected))
        self.comparisons += 1

    def forget(self, world: World) -> None:
        """After the world was closed: nothing of it may be left. Makes room for the next one."""
        self.check(world)
        held = self._ledger._held
        for process in [process for process, files in held.items() if not files]:
            del held[process]
        self._ledger.events.clear()
        self._ledger._checked.clear()

    def _restless(self, world: World) -> set[tuple[int, File]]:
        return {
            (actor.pid, file)
            for actor in world.actors
            for file in actor.space.restless
            if self._wanted.match(world.files[file])
        }

    def _silent(self, world: World, found: set[tuple[int, File]]) -> set[int]:
        """Those that may be silent and are."""
        return {actor.pid for actor in world.actors if actor.is_silent} - {pid for pid, _ in found}

    def _notice_announced(self, world: World) -> None:
        heard = {pid for pid, _ in self.reported(world)}
        for actor in world.actors:
            actor.is_silent = actor.is_silent and actor.pid not in heard

    def _not_reported(self, world: World, expected: Map) -> set[tuple[int, File]]:
        """Where the events so far differ from the model."""
        reported = self.reported(world)
        silent = self._silent(world, reported)
        wanted = {key for key in expected if key[0] not in silent}
        # A restless file may be there at any moment, but must be if it also has pages that stay.
        return (reported ^ wanted) - (self._restless(world) - wanted)

    def _differences(self, world: World, found: Map, expected: Map) -> dict[tuple[int, File], tuple[Ranges, Ranges]]:
        silent = self._silent(world, set(found))
        restless = self._restless(world)
        differences = {}
        for key in found | expected:
            ours, theirs = found.get(key, ()), expected.get(key, ())
            is_fine = key[0] in silent or (bool(ours) >= bool(theirs) if key in restless else ours == theirs)
            if not is_fine:
                differences[key] = (ours, theirs)
        return differences

    def _agree(self, world: World, found: Map, expected: Map, who: str) -> None:
        restless = self._restless(world)
        for key in found | expected:
            if key not in restless:
                assert found.get(key) == expected.get(key), (
                    f"the model is wrong: {key} has {_hex(expected.get(key, ()))}, but by {who} "
                    f"{_hex(found.get(key, ()))}\n" + "\n".join(world.steps)
                )

    def _story(self, world: World, expected: Map) -> str:
        differences = self._differences(world, self.published(world), expected)
        lines = [f"untold: {self._not_reported(world, expected)}"]
        lines += [
            f"{pid} {file}: ours {_hex(ours)}, the model's {_hex(theirs)}"
            for (pid, file), (ours, theirs) in differences.items()
        ]
        lines += ["what was done:", *world.steps, "what was told:"]
        for pid in dict.fromkeys(world.pids):
            lines += [f"{pid}: {one.event} {one.cause} {one.library.id} {one.t_ns}" for one in self._ledger.of(pid)]
        return "\n".join(lines)


def _hex(ranges: Ranges) -> str:
    return " ".join(f"{start:x}-{end:x}" for start, end in ranges) or "nothing"
