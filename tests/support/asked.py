"""What the kernel tests of explanations share: libraries, and what a running watcher says when it is asked."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sowatch import Watcher
from sowatch.explain import MappingReport, PathReport, ProcessReport
from support.kernel import TAG
from support.programs import Mapper

__all__ = [
    "OTHER",
    "PAGE",
    "WANTED",
    "NewLibrary",
    "Start",
    "Watch",
    "mapping",
    "pages",
    "path_of",
    "process",
    "reported",
]

PAGE = 4096

#: The types of fixtures.
Start = Callable[..., Mapper]
NewLibrary = Callable[..., Path]
Watch = Callable[..., Watcher]

#: Of the one rule that the tests share; the tag keeps other runs of the tests out.
WANTED = f"libwanted{TAG}.so"
OTHER = f"libother{TAG}.so"


def pages(length: int) -> int:
    """A length in bytes, as whole pages."""
    return -(-length // PAGE) * PAGE


def process(watcher: Watcher, pid: int) -> ProcessReport:
    """The report of a process."""
    report = watcher.explain(pid)
    assert isinstance(report, ProcessReport)
    return report


def path_of(watcher: Watcher, path: Path | str) -> PathReport:
    """The report of a path."""
    report = watcher.explain(os.fspath(path))
    assert isinstance(report, PathReport)
    return report


def reported(watcher: Watcher, pid: int, path: Path | str, wait_until: Any) -> MappingReport:
    """The mapping of a file, once its load was told."""

    def find() -> MappingReport | None:
        found = mapping(process(watcher, pid), path)
        return found if found.seen else None

    found = wait_until(find, what=f"a load of {path}")
    assert isinstance(found, MappingReport)
    return found


def mapping(report: ProcessReport, path: Path | str) -> MappingReport:
    """The one mapping of a file that a report has."""
    found = [one for one in report.mappings if one.library.path == os.fspath(path)]
    assert len(found) == 1, [one.library.path for one in report.mappings]
    return found[0]
