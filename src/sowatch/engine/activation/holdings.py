"""The counting: which processes hold which file. No callbacks, no lock of its own.

The registry calls it with its lock held.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from sowatch.engine.activation.records import FileCallback, FileState, RegisteredFile
from sowatch.model.events import Library
from sowatch.model.identity import TICK_NS, FileId, ProcessId

__all__ = ["Entry", "Holder", "Holdings", "Key"]


class Key(NamedTuple):
    """What activation is counted by."""

    rule: str
    file_id: FileId


class Holder:
    """A process, and how many entries it holds. The object is the identity: one for each process at a time."""

    __slots__ = ("count", "process")

    def __init__(self, process: ProcessId) -> None:
        self.process = process
        self.count = 0


class Entry:
    """One (rule, file) and its state.

    ``first`` is the process that came when no other had the file, ``deactivate`` what ends the activation,
    ``off_asked`` that it is to end as soon as it has begun.
    """

    __slots__ = (
        "deactivate",
        "first",
        "holders",
        "key",
        "library",
        "off_asked",
        "since_s",
        "state",
        "time_ns",
    )

    def __init__(self, key: Key, library: Library, since_s: float) -> None:
        self.key = key
        self.library = library
        #: A dict takes half the memory of a set.
        self.holders: dict[Holder, None] = {}
        self.first: ProcessId | None = None
        self.deactivate: FileCallback | None = None
        self.off_asked = False
        self.enter("held", since_s)

    def enter(self, state: FileState, since_s: float) -> None:
        """Goes on to the next state."""
        self.state: FileState = state
        self.since_s = since_s
        self.time_ns = time.time_ns()

    def record(self) -> RegisteredFile:
        """As it is now."""
        return RegisteredFile(
            rule=self.key.rule,
            library=self.library,
            state=self.state,
            processes=frozenset(holder.process for holder in self.holders),
            since_s=self.since_s,
            time_ns=self.time_ns,
        )

    def __str__(self) -> str:
        # For the log: containers choose the names of their files, line breaks included.
        return f"{self.library.path!r} ({self.key.file_id}) of rule {self.key.rule!r}"


class Holdings:
    """Entries by key and processes by id, at the precision at which ids from everywhere agree."""

    __slots__ = ("_clock", "entries", "holders")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.entries: dict[Key, Entry] = {}
        self.holders: dict[tuple[int, int], Holder] = {}

    def entry(self, key: Key, file: Library) -> Entry:
        """The entry, made if it is not there."""
        found = self.entries.get(key)
        if found is None:
            found = self.entries[key] = Entry(key, file, self._clock())
        return found

    def holder(self, process: ProcessId) -> Holder | None:
        """The process, if it holds anything."""
        return self.holders.get(_tick(process))

    def hold(self, key: Key, file: Library, process: ProcessId) -> tuple[Entry, Holder | None]:
        """The entry, and the process if it did not hold it before."""
        entry = self.entry(key, file)
        tick = _tick(process)
        holder = self.holders.get(tick)
        if holder is None:
            holder = self.holders[tick] = Holder(process)
        elif holder in entry.holders:
            return entry, None
        if not entry.holders:
            entry.first = process
        entry.holders[holder] = None
        holder.count += 1
        return entry, holder

    def let_go(self, entry: Entry, holder: Holder) -> bool:
        """Whether that was the last process."""
        if holder not in entry.holders:
            return False
        del entry.holders[holder]
        holder.count -= 1
        if not holder.count:
            del self.holders[_tick(holder.process)]
        self.drop_if_unused(entry)
        return not entry.holders

    def let_all_go(self) -> None:
        """Nobody holds anything any more."""
        self.holders.clear()
        for entry in list(self.entries.values()):
            entry.holders.clear()
            self.drop_if_unused(entry)

    def drop_if_unused(self, entry: Entry) -> None:
        """Forgets an entry that nobody holds and no callback works on."""
        if entry.state == "held" and not entry.holders:
            self.entries.pop(entry.key, None)


def _tick(process: ProcessId) -> tuple[int, int]:
    return process.pid, process.start_ns // TICK_NS
