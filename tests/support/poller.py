"""A `ProcfsSource` and a mapping table that a test drives by hand: a look when it says so, and what came of it."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import Any, Self

from sowatch.engine.address_space import Change
from sowatch.engine.effects import Causes
from sowatch.model.config import Config
from sowatch.model.identity import FileId
from sowatch.model.rules import Rule, RuleSet
from sowatch.sources.polling import ProcfsSource
from support.programs import executable_images
from support.tracking import KeptEffects

__all__ = ["Poller"]


class Poller:
    """Follows the files whose path has ``pattern`` in it, from now on, without a thread.

    A context manager. ``changes`` are all there were since, without those of the first look.
    """

    def __init__(self, pattern: str, **config: Any) -> None:
        self.source = ProcfsSource(Config(**config))
        self.rules = RuleSet([Rule(pattern, kind=("library", "executable", "interpreter", "other"))])
        self.table = KeptEffects(self.rules)
        scans, records = self.source.scan_all()
        self.table.merge(scans, records, Causes("snapshot", "repair"), is_start=True)
        self.snapshot = self._take()
        self.changes: list[Change] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.source.close()

    def look(self, times: int = 1) -> list[str]:
        """Looks, and gives what changed as `story` does."""
        before = len(self.changes)
        for _ in range(times):
            self.source.polls.ask()
            for record in self.source.drain():
                self.table.apply(record)
            self.changes += self._take()
        return self.reported(self.changes[before:])

    def reported(self, changes: list[Change]) -> list[str]:
        """``+10 libssl.so mmap`` for a load, with the last part of the path."""
        return [
            f"{'+' if one.is_load else '-'}{one.process.pid} {Path(one.name.path).name} {one.cause}" for one in changes
        ]

    def held(self, pid: int) -> set[int]:
        """The inodes that the map has for a process."""
        process = self.table.get(pid)
        return set() if process is None else {file.inode for file in process.space.files}

    def check_alternation(self) -> None:
        """Loads and unloads of one file in one process alternate, beginning with what was there."""
        held: dict[tuple[int, int], set[FileId]] = defaultdict(set)
        for change in [*self.snapshot, *self.changes]:
            files = held[change.process.pid, change.process.start_ns]
            assert (change.name.file_id not in files) == change.is_load, change
            (files.add if change.is_load else files.remove)(change.name.file_id)

    def _take(self) -> list[Change]:
        wanted, ignored = self.table.take_answers()
        self.source.answer(wanted, is_wanted=True)
        self.source.answer(ignored, is_wanted=False)
        for pid, start_ns, activity in self.table.take_idle():
            if self.source.untrack(pid, start_ns, activity):
                self.table.untracked(pid, start_ns)
        # A poll leaves nothing open of the test's own processes; others of the host may be within an exec.
        assert not [pid for pid in self.table.needs_rescan if parent_of(pid) == os.getpid()]
        return self.table.take_changes()


def mapped(pid: int, below: Path) -> set[int]:
    """The inodes of files below a directory that the process really has mapped executable."""
    return {image.inode for image in executable_images(pid) if image.path.startswith(f"{below}/")}


def parent_of(pid: int) -> int | None:
    """The parent of a process; None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[1])
