"""Mappings into which the kernel puts no uprobes, and that an explanation says so of just those."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sowatch import Watcher
from sowatch.explain import PathReport, ProcessReport
from sowatch.uprobes import CallCounter
from support.callers import is_probed
from support.programs import Mapper


@pytest.fixture
def new_mapper(programs: Any, tmp_path: Path, closing: Any) -> Callable[[], Mapper]:
    return lambda: closing.enter_context(Mapper(programs["mapper"], tmp_path))


@pytest.fixture
def counted(probed: Callable[..., Path], closing: Any) -> tuple[Path, CallCounter, Watcher]:
    library = probed()
    counter = closing.enter_context(CallCounter(["plain"]))
    watcher = closing.enter_context(Watcher(counter.rule(re.escape(str(library)))))
    return library, counter, watcher


@pytest.mark.parametrize("is_mapped_before", [False, True])
def test_the_kernel_probes_just_the_mappings_that_are_not_said_to_be_unprobed(
    is_mapped_before: bool,
    counted: tuple[Path, CallCounter, Watcher],
    new_mapper: Callable[[], Mapper],
    wait_until: Any,
) -> None:
    library, counter, watcher = counted
    private, shared, writable = new_mapper(), new_mapper(), new_mapper()
    first = new_mapper()

    def attach() -> None:
        first.map(library)
        wait_until(lambda: counter.stats.attached == counter.stats.expected == 2)

    if not is_mapped_before:
        attach()
    # Mapped writable from the start: what was probed before it became so keeps its breakpoints.
    at, length = writable.map(library, "write")
    writable.protect(at, length, "rwx")
    private.map(library)
    shared.map(library, "shared")
    if is_mapped_before:
        attach()
    for mapper, why in ((private, ()), (shared, ("shared",)), (writable, ("writable",))):
        report = watcher.explain(mapper.pid)
        assert isinstance(report, ProcessReport)
        (found,) = [one for one in report.mappings if one.library.path == str(library)]
        assert (found.unprobed, is_probed(mapper.pid, library, "plain")) == (why, not why)
    report = watcher.explain(str(library))
    assert isinstance(report, PathReport)
    assert {one.process.pid: one.unprobed for one in report.mapped} == {
        first.pid: (),
        private.pid: (),
        shared.pid: ("shared",),
        writable.pid: ("writable",),
    }
