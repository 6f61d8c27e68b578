"""Real processes do random things under one watch, which has to agree with a model and with ``/proc`` after each.

SOWATCH_MODEL_EXAMPLES is the number of sequences (default 240, in four settings), SOWATCH_MODEL_STEPS
how long one may be. With CI set they are the same each time; a failure tells its steps in any
case, for the kernel's timing is not.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from sowatch import Config
from sowatch.model.stats import Stats
from support.kernel import Ledger
from support.model import ARENA, ARENA_PAGES, PAGE, Actor, Move, Piece, World
from support.model_judge import Judge, Stage
from support.programs import make_libraries

EXAMPLES = int(os.environ.get("SOWATCH_MODEL_EXAMPLES") or 240)
STEPS = int(os.environ.get("SOWATCH_MODEL_STEPS") or 20)
#: A failure that needs the right moment does not come again when it is shrunk: its steps are told as they were.
SETTINGS = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    derandomize=bool(os.environ.get("CI")),
    phases=[Phase.generate, *([Phase.shrink] if os.environ.get("SOWATCH_MODEL_SHRINK") else [])],
    suppress_health_check=list(HealthCheck),
)
#: Two minutes are enough for this many on a machine of one's own, not on a busy one.
pytestmark = pytest.mark.timeout(max(600, 3 * EXAMPLES))
LIBRARIES = 3
MAX_ACTORS = 5
MAX_LOOPS = 2

some = st.integers(0, 63)
numbers = st.integers(0, LIBRARIES - 1)
places = st.integers(0, ARENA_PAGES - 1)
lengths = st.integers(1, 5)
firsts = st.integers(0, 4)
protections = st.sampled_from(["rx", "rx", "r", "none"])
sharings = st.sampled_from(["private", "shared"])
calls = st.sampled_from(["protect", "pkeyprotect"])
#: One thing done to the arena, without looking: what, where, how many pages, of which library, how.
deeds = st.tuples(st.sampled_from(["map", "map", "unmap", "cover", "protect"]), places, lengths, numbers, protections)


Deed = tuple[str, int, int, int, str]


def has_pieces(actor: Actor) -> bool:
    return bool(actor.space.pieces())


def has_loop_to_spare(actor: Actor) -> bool:
    return len(actor.loops) < MAX_LOOPS


def anybody(condition: Callable[[Actor], object] = lambda actor: True) -> Any:
    return precondition(lambda machine: any(condition(actor) for actor in machine.world.actors))


def room() -> Any:
    return precondition(lambda machine: 0 < len(machine.world.actors) < MAX_ACTORS)


class Machine(RuleBasedStateMachine):
    """The watch outlives the machine: a sequence costs its processes, not the programs' loading."""

    make_world: Callable[[], World]
    judge: Judge
    #: The watch loses what happens in the beginning of each sequence, and now and then later.
    is_lossy = False

    def __init__(self) -> None:
        super().__init__()
        self.world = self.make_world()

    def teardown(self) -> None:
        self.world.close()
        self.judge.forget(self.world)

    @initialize()
    def begin(self) -> None:
        with self.losses():
            self.world.start()

    def losses(self) -> contextlib.AbstractContextManager[None]:
        return self.judge.deaf() if self.is_lossy else contextlib.nullcontext()

    @invariant()
    def all_agree(self) -> None:
        self.judge.check(self.world)

    # ---- files --------------------------------------------------------------------------------

    @rule(number=numbers)
    def a_library_is_replaced(self, number: int) -> None:
        self.world.replace(number)

    @rule(number=numbers)
    def a_library_is_deleted(self, number: int) -> None:
        self.world.delete(number)

    # ---- mappings -----------------------------------------------------------------------------

    @anybody()
    @rule(
        who=some,
        number=numbers,
        place=st.none() | places,
        pages=lengths,
        skip=st.integers(0, 2),
        protection=protections,
        sharing=sharings,
    )
    def a_library_is_mapped(
        self, who: int, number: int, place: int | None, pages: int, skip: int, protection: str, sharing: str
    ) -> None:
        actor, at = self.pick(who), self.address(place)
        self.move(actor, self.world.map(actor, number, at, pages, skip=skip, protection=protection, sharing=sharing))

    @anybody()
    @rule(who=some, number=numbers, place=st.none() | places, pages=lengths)
    def a_memfd_is_mapped(self, who: int, number: int, place: int | None, pages: int) -> None:
        self.world.map_memory(self.pick(who), number, self.address(place), pages)

    @anybody(has_pieces)
    @rule(who=some, which=some, first=firsts, pages=lengths)
    def a_part_is_unmapped(self, who: int, which: int, first: int, pages: int) -> None:
        actor, part = self.part(who, which, first, pages)
        self.move(actor, self.world.unmap(actor, part.at, part.pages))

    @anybody(has_pieces)
    @rule(who=some, which=some)
    def a_whole_piece_is_unmapped(self, who: int, which: int) -> None:
        actor, piece = self.part(who, which, 0, 99)
        self.move(actor, self.world.unmap(actor, piece.at, piece.pages))

    @anybody(has_pieces)
    @rule(who=some, which=some, first=firsts, pages=lengths)
    def memory_is_mapped_over_a_part(self, who: int, which: int, first: int, pages: int) -> None:
        actor, part = self.part(who, which, first, pages)
        self.move(actor, self.world.cover(actor, part.at, part.pages))

    @anybody(has_pieces)
    @rule(who=some, which=some, first=firsts, pages=lengths, number=numbers, protection=protections)
    def a_library_is_mapped_over_a_part(
        self, who: int, which: int, first: int, pages: int, number: int, protection: str
    ) -> None:
        actor, part = self.part(who, which, first, pages)
        move = self.world.map(actor, number, part.at, part.pages, protection=protection, sharing="private")
        self.move(actor, move)

    @anybody(has_pieces)
    @rule(who=some, which=some, first=firsts, pages=lengths, protection=protections, call=calls)
    def a_part_is_protected(self, who: int, which: int, first: int, pages: int, protection: str, call: str) -> None:
        actor, part = self.part(who, which, first, pages)
        self.move(actor, self.world.protect(actor, part.at, part.pages, protection, call=call))

    @anybody(has_pieces)
    @rule(who=some, which=some, first=firsts, pages=lengths, new=st.none() | lengths, place=st.none() | places)
    def a_part_is_moved(self, who: int, which: int, first: int, pages: int, new: int | None, place: int | None) -> None:
        """To a place or anywhere, with a new length; without one it also stays (MREMAP_DONTUNMAP)."""
        actor, part = self.part(who, which, first, pages)
        to, length = self.address(place), new or part.pages
        if part.at < to + length * PAGE and to < part.at + part.pages * PAGE:
            to = 0  # the kernel refuses to move a mapping onto itself
        self.move(actor, self.world.move(actor, part, length, to, keep=new is None))

    @anybody()
    @rule(who=some, place=places, pages=st.integers(1, ARENA_PAGES), protection=protections)
    def a_stretch_is_protected(self, who: int, place: int, pages: int, protection: str) -> None:
        """Over several mappings, and into holes."""
        actor = self.pick(who)
        self.move(actor, self.world.protect(actor, self.address(place), pages, protection))

    @anybody()
    @rule(who=some, place=places, pages=st.integers(1, ARENA_PAGES))
    def a_stretch_is_unmapped(self, who: int, place: int, pages: int) -> None:
        actor = self.pick(who)
        self.move(actor, self.world.unmap(actor, self.address(place), pages))

    @anybody()
    @rule(who=some, deeds=st.lists(deeds, min_size=2, max_size=8), ends=st.sampled_from(["", "", "exec", "kill"]))
    def much_is_done_without_a_pause(self, who: int, deeds: list[Deed], ends: str) -> None:
        """By two processes at once, if there are two that do not share their memory."""
        first, second = self.pick(who), self.pick(who + 1)
        actors = [first, second] if first.space is not second.space else [first]
        turns = list(zip(itertools.cycle(actors), deeds, strict=False))
        with self.losses():
            self.world.run([(actor, self.as_move(actor, deed)) for actor, deed in turns])
        if ends == "exec":
            self.world.exec(first, "exec")
        elif ends:
            self.world.end(first, ends)

    @anybody()
    @rule(who=some, number=numbers)
    def a_library_is_opened(self, who: int, number: int) -> None:
        self.world.dlopen(self.pick(who), number)

    @anybody(lambda actor: actor.space.opened)
    @rule(who=some, which=some)
    def a_library_is_closed(self, who: int, which: int) -> None:
        actor = self.pick(who, lambda actor: actor.space.opened)
        self.world.dlclose(actor, sorted(actor.space.opened)[which % len(actor.space.opened)])

    # ---- threads ------------------------------------------------------------------------------

    @anybody(has_loop_to_spare)
    @rule(who=some, kind=st.sampled_from(["map", "fixed", "protect"]), number=numbers, pause_us=st.integers(100, 1000))
    def a_thread_begins_to_map_and_unmap(self, who: int, kind: str, number: int, pause_us: int) -> None:
        self.world.loop(self.pick(who, has_loop_to_spare), kind, number, pause_us)

    @anybody(lambda actor: actor.loops)
    @rule(who=some)
    def the_threads_stop(self, who: int) -> None:
        self.world.stop(self.pick(who, lambda actor: actor.loops))

    @anybody(lambda actor: actor.tid == actor.pid)
    @rule(who=some)
    def the_leader_ends(self, who: int) -> None:
        self.world.end_leader(self.pick(who, lambda actor: actor.tid == actor.pid))

    # ---- processes ----------------------------------------------------------------------------

    @precondition(lambda machine: len(machine.world.actors) < 2)
    @rule()
    def another_begins(self) -> None:
        self.world.start()

    @room()
    @rule(who=some, how=st.sampled_from(["fork", "fork", "orphan"]))
    def one_forks(self, who: int, how: str) -> None:
        self.world.fork(self.pick(who), how)

    @room()
    @rule(who=some)
    def one_shares_its_memory(self, who: int) -> None:
        self.world.share(self.pick(who))

    @room()
    @rule(who=some)
    def one_spawns(self, who: int) -> None:
        self.world.spawn(self.pick(who))

    @room()
    @rule(who=some, number=st.none() | numbers)
    def one_vforks(self, who: int, number: int | None) -> None:
        self.world.vfork(self.pick(who), number)

    @anybody()
    @rule(who=some, number=numbers, count=st.integers(1, 3))
    def one_has_children_that_end_at_once(self, who: int, number: int, count: int) -> None:
        self.world.brief(self.pick(who), number, count)

    @anybody()
    @rule(who=some, how=st.sampled_from(["exec", "exec", "execthread"]))
    def one_executes(self, who: int, how: str) -> None:
        self.world.exec(self.pick(who), how)

    @anybody()
    @rule(who=some, how=st.sampled_from(["exit", "kill"]))
    def one_ends(self, who: int, how: str) -> None:
        self.world.end(self.pick(who), how)

    # ---- what the rules are made of -----------------------------------------------------------

    def pick(self, which: int, condition: Callable[[Actor], object] = lambda actor: True) -> Actor:
        fitting = [actor for actor in self.world.actors if condition(actor)]
        return fitting[which % len(fitting)]

    def part(self, who: int, which: int, first: int, pages: int) -> tuple[Actor, Piece]:
        """Some pages of one mapping."""
        actor = self.pick(who, has_pieces)
        pieces = actor.space.pieces()
        piece = pieces[which % len(pieces)]
        first = min(first, piece.pages - 1)
        return actor, piece.part(first, min(pages, piece.pages - first))

    def address(self, place: int | None) -> int:
        return 0 if place is None else ARENA + place * PAGE

    def move(self, actor: Actor, move: Move) -> None:
        self.world.run([(actor, move)])

    def as_move(self, actor: Actor, deed: Deed) -> Move:
        what, place, pages, number, protection = deed
        at = self.address(place)
        if what == "map":
            return self.world.map(actor, number, at, pages, protection=protection, sharing="private")
        if what == "protect":
            return self.world.protect(actor, at, pages, protection)
        return self.world.cover(actor, at, pages) if what == "cover" else self.world.unmap(actor, at, pages)


@pytest.fixture
def check(
    programs: Any,
    open_ledger: Callable[..., Ledger],
    tmp_path: Path,
    scratch: Path,
    deadline: Any,
    record_property: Any,
) -> Callable[..., Stats]:
    """``check(examples, **options)`` runs so many sequences under one watch; for the options see `Stage`."""
    actor, libraries = programs.variant("actor", "-pthread"), make_libraries(tmp_path, LIBRARIES)

    def run(examples: int, *, is_lossy: bool = False, **options: Any) -> Stats:
        with Stage(actor, libraries, scratch, open_ledger, deadline(10), **options) as stage:
            judge = stage.watch()
            one = type(
                "One", (Machine,), {"make_world": staticmethod(stage.world), "judge": judge, "is_lossy": is_lossy}
            )
            run_state_machine_as_test(one, settings=settings(SETTINGS, max_examples=examples))
            assert stage.ledger.watcher.audit().differences == ()
            stage.ledger.stop()
        stats = stage.ledger.watcher.stats
        record_property("comparisons", judge.comparisons)
        record_property("stats", str(stats))
        return stats

    return run


def test_the_map_is_right_after_whatever_processes_do(check: Callable[..., Stats]) -> None:
    check(EXAMPLES // 2)


def test_the_map_is_right_after_whatever_processes_do_if_their_programs_are_watched_too(
    check: Callable[..., Stats],
) -> None:
    check(EXAMPLES // 6, with_programs=True)


def test_the_map_is_right_after_whatever_processes_do_if_few_of_their_files_are_wanted(
    check: Callable[..., Stats],
) -> None:
    check(EXAMPLES // 6, wanted="lib0")


def test_the_map_is_right_again_after_whatever_processes_do_if_a_tiny_ring_loses_much_of_it(
    check: Callable[..., Stats],
) -> None:
    assert check(EXAMPLES // 12, is_lossy=True, config=Config(ring_bytes=4096)).lost_kernel > 0
