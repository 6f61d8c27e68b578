"""What an agent keeps of what was loaded: bounded, and honest about it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sowatch import Config, Rule, Watcher
from sowatch.agent.loaded_set import LoadedSet
from sowatch.inventory.loaded import LoadedAnswer
from sowatch.inventory.packages import PackageIdentity, Packages
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


def test_at_the_bound_what_was_loaded_first_and_has_gone_makes_room(
    watcher: Watcher,
    packages: Packages,
    programs: Any,
    make_library: Callable[..., Path],
    tmp_path: Path,
    wait_until: Any,
) -> None:
    kept = LoadedSet(watcher, ProcFs(), packages, max_files=2)
    first, second, third = (make_library(f"lib{name}.so") for name in "abc")
    with watcher, kept, Mapper(programs["mapper"], tmp_path) as stays:
        stays.map(first)
        wait_until(lambda: len(kept._files) == 1, 20, "the first one is kept")
        with Mapper(programs["mapper"], tmp_path) as one:
            one.map(second)
            wait_until(lambda: len(kept._files) == 2, 20, "both are kept")
        wait_until(lambda: len(watcher.snapshot()) == 1, 20, "the second one has gone")
        with Mapper(programs["mapper"], tmp_path) as one:
            one.map(third)
            wait_until(lambda: kept.evicted == 1, 20, "room was made")
        wait_until(lambda: paths(answer(kept, watcher)) == ["liba.so", "libc.so"], 20, "the third one is kept")
        assert kept.left_out == 0
        (why,) = answer(kept, watcher).open_ends
        assert why == "2 files are kept, and 1 that had gone were forgotten since the start"


class FirstOnly:
    """Knows the package of what it is asked for first."""

    def __init__(self, packages: Packages) -> None:
        self.content_name = packages.content_name
        self.is_first = True

    def identify(self, files: Any) -> list[PackageIdentity | None]:
        found = [LAMP if self.is_first else None for _ in list(files)]
        self.is_first = False
        return found


def without_build_id(path: Path, number: int) -> Path:
    path.with_suffix(".c").write_text(f"int lamp(void) {{ return {number}; }}")
    subprocess.run(["cc", "-shared", "-fPIC", "-Wl,--build-id=none", "-o", path, path.with_suffix(".c")], check=True)
    return path


LAMP = PackageIdentity("liblamp1", "1-1", None, "pkg:deb/debian/liblamp1@1-1", "dpkg")


def test_content_that_was_written_over_another_has_not_its_package(
    watcher: Watcher, packages: Packages, programs: Any, tmp_path: Path, wait_until: Any
) -> None:
    library, other = without_build_id(tmp_path / "libraw.so", 1), without_build_id(tmp_path / "other", 2)
    kept = LoadedSet(watcher, ProcFs(), FirstOnly(packages))  # type: ignore[arg-type]

    def found() -> list[tuple[PackageIdentity | None, int]]:
        return sorted(((one.package, one.processes) for one in answer(kept, watcher).files), key=lambda one: one[1])

    with watcher, kept:
        with Mapper(programs["mapper"], tmp_path) as one:
            one.map(library)
            wait_until(lambda: kept._files, 20, "it is kept")
            assert found() == [(LAMP, 1)]
        shutil.copyfile(other, library)  # into the same inode
        with Mapper(programs["mapper"], tmp_path) as one:
            one.map(library)
            wait_until(lambda: len(kept._files) == 2, 20, "the new content is kept, too")
            assert found() == [(LAMP, 0), (None, 1)]
        assert len({one.build_id for one in answer(kept, watcher).files}) == 2


def test_the_answer_says_what_the_rules_leave_out(
    watcher: Watcher, packages: Packages, programs: Any, make_library: Callable[..., Path], tmp_path: Path
) -> None:
    kept = LoadedSet(watcher, ProcFs(), packages)
    with watcher, kept:
        (limit,) = answer(kept, watcher).rule_limits or ()
        assert limit.startswith("rule ")
        assert "only files of kind library with ^" in limit
        watcher.set_rules(Rule(None, name="all", kind=("library", "executable", "interpreter")))
        assert answer(kept, watcher).rule_limits == ()
        watcher.set_rules(Rule(None, name="a", kind=("executable", "interpreter")), Rule(None, name="b"))
        assert answer(kept, watcher).rule_limits == ()
        watcher.set_rules(Rule(None, name="a", kind=("library", "executable", "interpreter"), exports=("f",)))
        assert answer(kept, watcher).rule_limits == (
            "rule a: only files of kind executable, interpreter, library that export f",
        )


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
