"""What an agent keeps of what was loaded: bounded, and honest about it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sowatch import Config, Rule, Watcher
from sowatch.agent.loaded_set import LoadedSet
from sowatch.inventory.loaded import LoadedAnswer
from sowatch.inventory.packages import Packages
from sowatch.linux.proc import ProcFs
from support.programs import Mapper


@pytest.fixture
def watcher(tmp_path: Path) -> Watcher:
    return Watcher(Rule(f"^{re.escape(str(tmp_path))}/lib"))


@pytest.fixture
def packages() -> Iterator[Packages]:
    with Packages() as made:
        yield made


def answer(loaded: LoadedSet, watcher: Watcher, **options: Any) -> LoadedAnswer:
    assert watcher.ready is not None
    asked = {"pids": (), "without": (), "since_start": True, **options}
    return loaded.answer(watcher.ready, None, **asked)


def paths(found: LoadedAnswer) -> list[str]:
    return sorted(os.path.basename(one.path) for one in found.files)


def test_what_has_gone_is_kept_once_however_many_had_it(
    watcher: Watcher,
    packages: Packages,
    programs: Any,
    make_library: Callable[..., Path],
    tmp_path: Path,
    wait_until: Any,
) -> None:
    kept = LoadedSet(watcher, ProcFs(), packages)
    first, second = make_library("liba.so"), make_library("libb.so")
    with watcher, kept:
        for _ in range(3):
            with Mapper(programs["mapper"], tmp_path) as one:
                one.map(first)
        with Mapper(programs["mapper"], tmp_path) as one:
            one.map(second)
            wait_until(lambda: paths(answer(kept, watcher)) == ["liba.so", "libb.so"], 20, "both are kept")
            found = {os.path.basename(each.path): each for each in answer(kept, watcher).files}
            assert (found["liba.so"].processes, found["libb.so"].processes) == (0, 1)
            assert found["liba.so"].build_id is not None
            assert paths(answer(kept, watcher, since_start=False)) == ["libb.so"]
            assert paths(answer(kept, watcher, since_start=False, without=(one.pid,))) == []
            assert answer(kept, watcher).open_ends == ()


def test_beyond_the_bound_it_says_that_something_was_left_out(
    watcher: Watcher,
    packages: Packages,
    programs: Any,
    make_library: Callable[..., Path],
    tmp_path: Path,
    wait_until: Any,
) -> None:
    kept = LoadedSet(watcher, ProcFs(), packages, max_files=2)
    libraries = [make_library(f"lib{name}.so") for name in "abcd"]
    with watcher, kept:
        with Mapper(programs["mapper"], tmp_path) as one:
            for library in libraries:
                one.map(library)
            wait_until(lambda: kept.left_out == 2, 20, "two were left out")
            # What is loaded now is there in any case.
            assert paths(answer(kept, watcher)) == ["liba.so", "libb.so", "libc.so", "libd.so"]
        wait_until(lambda: paths(answer(kept, watcher)) == ["liba.so", "libb.so"], 20, "the process has ended")

        (why,) = answer(kept, watcher).open_ends
        assert why == "2 files are kept, and 2 loads of others were left out since the start"
        assert answer(kept, watcher, since_start=False).open_ends == ()


def test_loss_is_an_open_end_of_what_has_gone(
    packages: Packages, programs: Any, make_library: Callable[..., Path], tmp_path: Path, wait_until: Any
) -> None:
    watcher = Watcher(Rule(f"^{re.escape(str(tmp_path))}/lib"), config=Config(queue_events=2))
    kept = LoadedSet(watcher, ProcFs(), packages)
    libraries = [make_library(f"lib{number}.so") for number in range(8)]
    with watcher:
        with Mapper(programs["mapper"], tmp_path) as one:
            for library in libraries:
                one.map(library)
            wait_until(lambda: kept._subscription.lost > 0, 20, "its queue was too short")
        with kept:  # only now does it read
            wait_until(lambda: answer(kept, watcher).open_ends, 20, "it has read of the loss")
            (why,) = answer(kept, watcher).open_ends
            assert re.fullmatch(r"\d+ records were lost: what they had loaded and has gone may be missing", why)
            assert answer(kept, watcher, since_start=False).open_ends == ()


def test_thread_ends_with_the_watch(watcher: Watcher, packages: Packages, wait_until: Any) -> None:
    kept = LoadedSet(watcher, ProcFs(), packages)
    with kept:
        with watcher:
            pass
        wait_until(lambda: not kept._thread.is_alive(), 20, "nothing comes any more")
