"""What a 64-bit program maps by calls of the 32-bit kind (int $0x80) is told as what it maps by its own.

The syscall tracepoints leave such calls out. The scenarios are those of `support.scenarios`.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sowatch import Config, Rule
from sowatch.sources.select import CANDIDATES
from support import bpfsys, scenarios
from support.forced import FORCED
from support.kernel import TAG, Ledger
from support.programs import SOURCES, Mapper
from support.scenarios import OFTEN, STRATEGIES, Reported, Stage

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86 has a second way into the kernel")

COMPAT = ("-include", str(SOURCES / "compat.h"))
#: A vfork child and what exec maps make no calls of their own.
SCENARIOS = [one for one in scenarios.SCENARIOS if one is not scenarios.exec_maps_the_program_itself]

#: Such a call is a claim: what has gone before the process is scanned is not told.
FOUND_BY_SCANS = {scenarios.a_file_is_mapped_for_a_moment: [([scenarios.MAPPED, scenarios.UNMAPPED], [])]}


@pytest.fixture(scope="module", params=STRATEGIES)
def watched(request: pytest.FixtureRequest, schema: Any, deadline: Any) -> Iterator[Ledger]:
    """A Ledger of the tests' own files under one strategy, which its scenarios share."""
    error = bpfsys.why_no_bpf()
    if error is not None:
        pytest.skip(f"bpf(2) cannot create a map: {error.strerror}")
    config = Config(**{"strategy": request.param, **FORCED, **OFTEN})
    with Ledger(Rule(rf"{TAG}\.so$"), timeout_s=deadline(20), check=schema, config=config) as ledger:
        yield ledger
        ledger.stop()


@pytest.fixture
def start_compat(start: Callable[..., Mapper], programs: Any) -> Callable[[], Mapper]:
    """Starts a mapper that makes all its calls by int $0x80, if the kernel takes them."""
    program = programs.variant("mapper", *COMPAT)

    def run() -> Mapper:
        mapper = start(program)
        at, length = mapper.map(program, "noexec")
        assert at < 1 << 32, "that was no compat call"
        mapper.unmap(at, length)
        return mapper

    return run


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_calls_of_the_32_bit_kind_by_a_64_bit_program_tell_the_same_story(
    watched: Ledger,
    scenario: Callable[[Stage], list[Reported]],
    start: Any,
    start_compat: Any,
    library: Any,
    programs: Any,
    closing: contextlib.ExitStack,
) -> None:
    stage = Stage(watched, start_compat, library, programs, closing)
    reported = scenario(stage)
    # Told after all of it, so what must not be told would have been.
    stage.map(start(), library(f"libafter{TAG}.so"))
    differences = [*scenarios.DIFFERENCES[watched.ready.strategy].get(scenario, []), *FOUND_BY_SCANS.get(scenario, [])]

    for pid, inode, story in reported:
        stories = [story, *(instead for happened, instead in differences if happened == story)]
        with contextlib.suppress(AssertionError):  # what came instead is the better message
            watched.wait_for(lambda p=pid, i=inode, s=stories: watched.story(p, i) in s, "no such story")
        assert watched.story(pid, inode) in stories


def test_what_such_calls_move_attach_and_detach_is_found(watched: Ledger, start_compat: Any, library: Any) -> None:
    mapper, file = start_compat(), library()
    at, length = mapper.map(file)
    watched.wait_load(mapper.pid, file.stat().st_ino)
    moved, _ = mapper.emit("remap", f"{at:x}", length, length, f"{at - (64 << 20):x}")
    assert int(moved, 16) != at
    watched.wait_equal_of(mapper.pid, file.stat().st_ino)
    mapper.unmap(int(moved, 16), length)
    watched.wait_unload(mapper.pid, file.stat().st_ino)


def test_every_strategy_is_tried() -> None:
    assert FORCED or set(STRATEGIES) == set(CANDIDATES)


def test_the_header_replaces_every_call_that_the_mapper_makes() -> None:
    text = (Path(SOURCES) / "compat.h").read_text(encoding="utf-8")
    assert {line.split()[1] for line in text.splitlines() if line.startswith("#define ") and " compat_" in line} == {
        "mmap",
        "munmap",
        "mprotect",
        "mremap",
        "shmat",
        "shmdt",
    }
