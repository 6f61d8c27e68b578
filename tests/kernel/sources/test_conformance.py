"""One set of scenarios under every strategy: each gives the events that its guarantee promises.

The scenarios are in `support.scenarios`. If `support.forced` has options, they run under these alone.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sowatch import Config, Rule
from sowatch.sources.select import CANDIDATES
from support import bpfsys
from support.forced import FORCED
from support.kernel import TAG, Ledger
from support.scenarios import DIFFERENCES, GUARANTEES, OFTEN, SCENARIOS, STRATEGIES, Reported, Stage


@pytest.fixture(scope="module", params=STRATEGIES)
def watched(request: pytest.FixtureRequest, schema: Any, deadline: Any, programs: Any) -> Iterator[Ledger]:
    """A Ledger of the tests' own files under one strategy, which its scenarios share."""
    error = bpfsys.why_no_bpf()
    if error is not None:
        pytest.skip(f"bpf(2) cannot create a map: {error.strerror}")
    config = Config(**{"strategy": request.param, **FORCED, **OFTEN})
    rules = (Rule(rf"{TAG}\.so$"), Rule(re.escape(str(programs.directory)), kind="executable"))
    with Ledger(*rules, timeout_s=deadline(20), check=schema, config=config) as ledger:
        yield ledger
        ledger.stop()


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_strategy_tells_the_story_that_happened(
    watched: Ledger,
    scenario: Callable[[Stage], list[Reported]],
    start: Any,
    library: Any,
    programs: Any,
    closing: contextlib.ExitStack,
) -> None:
    stage = Stage(watched, start, library, programs, closing)
    reported = scenario(stage)
    # Told after all of it, so what must not be told would have been.
    stage.map(start(), library(f"libafter{TAG}.so"))
    differences = DIFFERENCES[watched.ready.strategy].get(scenario, [])

    for pid, inode, story in reported:
        stories = [story, *(instead for happened, instead in differences if happened == story)]
        with contextlib.suppress(AssertionError):  # what came instead is the better message
            watched.wait_for(lambda p=pid, i=inode, s=stories: watched.story(p, i) in s, "no such story")
        assert watched.story(pid, inode) in stories


def test_ready_says_the_strategy_and_its_guarantee(watched: Ledger) -> None:
    ready = watched.ready

    assert ready.guarantee in GUARANTEES[ready.strategy]
    assert [attempt for attempt in ready.attempts if attempt.ok] == [(ready.strategy, True, None)]


def test_the_map_is_right_when_nothing_moves(watched: Ledger, start: Any, library: Any) -> None:
    mapper, file = start(), library()
    mapper.map(file)
    watched.wait_load(mapper.pid, file.stat().st_ino)

    ours = [one for one in watched.watcher.audit().differences if one.pid == mapper.pid]

    assert ours == []


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_mapped_before_the_start_is_in_the_snapshot(
    strategy: str, open_ledger: Callable[..., Ledger], start: Any, library: Any
) -> None:
    mapper, file = start(), library()
    mapper.map(file)
    child = mapper.fork()

    ledger = open_ledger(Rule(rf"{TAG}\.so$"), config=Config(**{"strategy": strategy, **FORCED, **OFTEN}))

    for pid in (mapper.pid, child.pid):
        assert ledger.wait_load(pid, file.stat().st_ino).cause == "snapshot"
    child.exit()
    ledger.wait_unload(child.pid, file.stat().st_ino)


def test_every_rung_of_the_ladder_is_in_this_table() -> None:
    assert CANDIDATES.keys() == GUARANTEES.keys() == DIFFERENCES.keys()
