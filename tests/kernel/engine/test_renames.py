"""A file has another path, although nobody renamed it itself: a directory above it was renamed, or a mount was moved.

What was ignored under the old path is told under the new one, if a rule wants that.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sowatch import Config, Rule
from support.forced import FORCED
from support.kernel import IN_OWN_MOUNTS, TAG, Ledger, with_prelude
from support.programs import Mapper
from support.scenarios import OFTEN, STRATEGIES

WANTED = f"wanted{TAG}"
#: Longer than any test: nothing here is told because an answer grew old.
NEVER_S = 100_000.0


@pytest.fixture(params=STRATEGIES)
def open_ours(request: pytest.FixtureRequest, open_ledger: Callable[..., Ledger]) -> Callable[..., Ledger]:
    """A Ledger of what lies below a directory with the wanted name, and of markers."""

    def open_one(*, ignore_ttl_s: float = NEVER_S) -> Ledger:
        config = Config(**{"strategy": request.param, "ignore_ttl_s": ignore_ttl_s, **FORCED, **OFTEN})
        return open_ledger(Rule(rf"/{WANTED}/|marker{TAG}\.so$"), config=config)

    return open_one


def learn_to_ignore(ledger: Ledger, mapper: Mapper, file: Path | str, marker: Path) -> None:
    """Maps and unmaps a file that nobody wants, and waits until that was answered."""
    mapper.unmap(*mapper.map(file))
    mapper.map(marker)
    ledger.wait_load(mapper.pid, marker.stat().st_ino)


def test_a_file_below_a_renamed_directory_is_told_by_its_new_path(
    open_ours: Callable[..., Ledger], start: Callable[..., Mapper], library: Callable[..., Path]
) -> None:
    mapper, file, ledger = start(), library("before/lib/libnew.so"), open_ours()
    inode, top = file.stat().st_ino, file.parent.parent
    learn_to_ignore(ledger, mapper, file, library(f"marker{TAG}.so"))
    top.rename(top.with_name(WANTED))

    mapper.map(top.with_name(WANTED) / "lib/libnew.so")

    assert ledger.wait_load(mapper.pid, inode).library.path == str(top.with_name(WANTED) / "lib/libnew.so")


def test_a_file_moved_under_its_own_name_is_told_by_its_new_path(
    open_ours: Callable[..., Ledger], start: Callable[..., Mapper], library: Callable[..., Path], scratch: Path
) -> None:
    mapper, file, ledger = start(), library("before/libnew.so"), open_ours()
    learn_to_ignore(ledger, mapper, file, library(f"marker{TAG}.so"))
    (scratch / WANTED).mkdir()
    moved = file.rename(scratch / WANTED / "libnew.so")

    mapper.map(moved)

    assert ledger.wait_load(mapper.pid, moved.stat().st_ino).library.path == str(moved)


def test_a_file_on_a_mount_that_was_moved_is_told_by_its_new_path(
    open_ours: Callable[..., Ledger],
    start: Callable[..., Mapper],
    library: Callable[..., Path],
    scratch: Path,
    programs: Any,
) -> None:
    file, ledger = library("source/libnew.so"), open_ours()
    (scratch / "before").mkdir()
    (scratch / WANTED).mkdir()
    commands = f'mount --bind {scratch}/source {scratch}/before; exec {programs["mapper"]} "$0"'
    mapper = start(with_prelude(scratch, programs["mapper"], commands, launcher=IN_OWN_MOUNTS))
    learn_to_ignore(ledger, mapper, scratch / "before/libnew.so", library(f"marker{TAG}.so"))
    move = ["nsenter", "-t", str(mapper.pid), "-m", "mount", "--move", scratch / "before", scratch / WANTED]
    subprocess.run(move, check=True)

    mapper.map(scratch / WANTED / "libnew.so")

    load = ledger.wait_load(mapper.pid, file.stat().st_ino)
    assert load.library.path == str(scratch / WANTED / "libnew.so")


def test_who_mapped_a_file_before_its_directory_was_renamed_is_found_when_answers_grow_old(
    open_ours: Callable[..., Ledger], start: Callable[..., Mapper], library: Callable[..., Path]
) -> None:
    mapper, file, marker, ledger = (
        start(),
        library("before/libnew.so"),
        library(f"marker{TAG}.so"),
        open_ours(ignore_ttl_s=1),
    )
    mapper.map(file)
    mapper.map(marker)
    ledger.wait_load(mapper.pid, marker.stat().st_ino)
    file.parent.rename(file.parent.with_name(WANTED))

    load = ledger.wait_load(mapper.pid, (file.parent.with_name(WANTED) / "libnew.so").stat().st_ino)

    assert load.library.path == str(file.parent.with_name(WANTED) / "libnew.so")
    assert [one for one in ledger.watcher.audit().differences if one.pid == mapper.pid] == []


def test_a_file_whose_directory_is_renamed_after_it_was_told_is_unloaded_once(
    open_ours: Callable[..., Ledger], start: Callable[..., Mapper], library: Callable[..., Path]
) -> None:
    mapper, file, marker, ledger = start(), library(f"{WANTED}/libnew.so"), library(f"marker{TAG}.so"), open_ours()
    inode = file.stat().st_ino
    at, length = mapper.map(file)
    ledger.wait_load(mapper.pid, inode)
    file.parent.rename(file.parent.with_name("after"))
    mapper.unmap(at, length)
    ledger.wait_unload(mapper.pid, inode)
    mapper.map(marker)
    ledger.wait_load(mapper.pid, marker.stat().st_ino)

    assert ledger.story(mapper.pid, inode) == [("load", "mmap"), ("unload", "munmap")]
