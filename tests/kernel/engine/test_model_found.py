"""What the model check found, each with its exact steps, so that none of it comes back unseen."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.kernel import Ledger
from support.model import ARENA, PAGE, World
from support.model_judge import Judge, Stage
from support.programs import make_libraries

FIRST, SECOND = 0, 1


@pytest.fixture
def stage(
    programs: Any, open_ledger: Callable[..., Ledger], tmp_path: Path, scratch: Path, deadline: Any
) -> Iterator[Stage]:
    """A stage whose watch has not begun."""
    actor, libraries = programs.variant("actor", "-pthread"), make_libraries(tmp_path, 2)
    with Stage(actor, libraries, scratch, open_ledger, deadline(10)) as made:
        yield made


@pytest.fixture
def world(stage: Stage) -> Iterator[World]:
    with contextlib.closing(stage.world()) as made:
        yield made


@pytest.fixture
def judge(stage: Stage) -> Judge:
    """Asking for it starts the watch."""
    return stage.watch()


def test_the_snapshot_has_the_ranges_that_are_mapped_now_not_those_of_the_load(world: World, judge: Judge) -> None:
    actor = world.start()
    world.run([(actor, world.map(actor, FIRST, ARENA, 4, sharing="private"))])
    judge.check(world)
    world.run([(actor, world.unmap(actor, ARENA, 1)), (actor, world.protect(actor, ARENA + 3 * PAGE, 1, "r"))])
    judge.check(world)
    world.run([(actor, world.map(actor, FIRST, ARENA + 8 * PAGE, 2, sharing="private"))])
    judge.check(world)


@pytest.mark.parametrize("who", ["parent", "child"])
def test_two_that_share_their_memory_from_before_anything_was_wanted_are_told_of_together(
    world: World, judge: Judge, who: str
) -> None:
    parent = world.start()
    child = world.share(parent)
    actor = parent if who == "parent" else child
    world.run([(actor, world.map(actor, FIRST, ARENA, 2, sharing="private"))])
    judge.check(world)
    other = child if who == "parent" else parent
    world.run([(other, world.unmap(other, ARENA, 2))])
    judge.check(world)


@pytest.mark.parametrize("who", ["parent", "child"])
def test_two_that_share_their_memory_from_before_the_watch_are_told_of_together(
    world: World, stage: Stage, who: str
) -> None:
    parent = world.start()
    child = world.share(parent)
    world.run([(parent, world.map(parent, FIRST, ARENA, 2, sharing="private"))])
    judge = stage.watch()
    child.is_silent = False  # it was there before, so it has what its parent has
    judge.check(world)
    actor = parent if who == "parent" else child
    world.run([(actor, world.map(actor, SECOND, ARENA + 8 * PAGE, 2, sharing="private"))])
    judge.check(world)
    other = child if who == "parent" else parent
    world.run([(other, world.unmap(other, ARENA, 2))])
    judge.check(world)


@pytest.mark.parametrize("who", ["parent", "child"])
def test_two_that_share_their_memory_from_before_the_watch_and_map_later_are_told_of_together(
    world: World, stage: Stage, who: str
) -> None:
    parent = world.start()
    child = world.share(parent)
    judge = stage.watch()
    child.is_silent = False  # it was there before, so it has what its parent has
    actor = parent if who == "parent" else child
    world.run([(actor, world.map(actor, FIRST, ARENA, 2, sharing="private"))])
    judge.check(world)


def test_what_a_vfork_child_maps_is_its_parents_even_if_nothing_of_that_one_was_wanted(
    world: World, judge: Judge
) -> None:
    parent = world.start()
    world.vfork(parent, FIRST)
    judge.check(world)


def test_what_a_vfork_child_mapped_for_its_parent_is_unloaded_when_the_parent_maps_over_it(
    world: World, judge: Judge
) -> None:
    parent = world.start()
    world.run([(parent, world.map(parent, SECOND, ARENA, 1, sharing="private"))])
    world.vfork(parent, FIRST)
    judge.check(world)
    at = next(at for at, page in parent.space.pages.items() if at != ARENA)
    world.run([(parent, world.map(parent, SECOND, at, 1, protection="r", sharing="private"))])
    judge.check(world)


def test_what_a_child_that_shares_memory_mapped_is_unloaded_when_its_parent_unmaps_it_after_the_childs_end(
    world: World, judge: Judge
) -> None:
    parent = world.start()
    world.run([(parent, world.map(parent, SECOND, ARENA, 1, sharing="private"))])
    child = world.share(parent)
    world.run([(child, world.map(child, FIRST, ARENA + 8 * PAGE, 2, sharing="private"))])
    judge.check(world)
    world.end(child, "exit")
    judge.check(world)
    world.run([(parent, world.unmap(parent, ARENA + 8 * PAGE, 2))])
    judge.check(world)


def test_a_library_is_told_of_that_mprotect_made_executable_before_it_met_a_hole(world: World, judge: Judge) -> None:
    actor = world.start()
    world.run([(actor, world.map(actor, FIRST, ARENA, 2, protection="r", sharing="private"))])
    world.run([(actor, world.protect(actor, ARENA, 4, "rx"))])
    judge.check(world)


def test_children_that_map_a_library_and_end_at_once_while_a_thread_of_their_parent_maps_are_forgotten(
    world: World, judge: Judge
) -> None:
    """A reading that found nothing wanted must not settle a child that is on its way to map something."""
    parent = world.start()
    world.loop(parent, "map", SECOND, 300)
    for _ in range(30):
        world.brief(parent, FIRST, 3)
    world.stop(parent)
    judge.check(world)


@pytest.mark.parametrize("who", ["parent", "child"])
def test_who_shares_the_memory_of_one_that_maps_and_unmaps_is_told_of_what_that_one_maps_later(
    world: World, judge: Judge, who: str
) -> None:
    """The look for those who share it may come while nothing is mapped."""
    parent = world.start()
    child = world.share(parent)
    actor = parent if who == "parent" else child
    world.loop(actor, "fixed", SECOND, 1000)
    judge.check(world)
    world.stop(actor)
    judge.check(world)
    world.run([(actor, world.map(actor, FIRST, ARENA, 2, sharing="private"))])
    judge.check(world)


def test_what_a_child_that_shares_memory_did_just_before_it_was_killed_is_told_of_its_parent(
    world: World, judge: Judge
) -> None:
    parent = world.start()
    world.run([(parent, world.map(parent, FIRST, ARENA, 2, sharing="private"))])
    for round_number in range(10):
        child = world.share(parent)
        at = ARENA + (4 + 2 * round_number) * PAGE
        world.run([(child, world.cover(child, ARENA, 1)), (child, world.map(child, SECOND, at, 1, sharing="private"))])
        world.end(child, "kill")
        judge.check(world)


def test_a_program_that_is_executed_as_soon_as_it_was_started_is_told_of_again(stage: Stage) -> None:
    stage.with_programs = True
    judge = stage.watch()
    with contextlib.closing(stage.world()) as world:
        for _ in range(20):
            actor = world.start()
            world.exec(actor, "exec")
            judge.check(world)
            world.end(actor, "exit")
