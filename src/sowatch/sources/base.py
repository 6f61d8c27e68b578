"""What a source of records and scans is: the protocol `EventSource`, and the values that it speaks in.

A source knows nothing of rules or of the mapping table; it hands on what the kernel says and carries answers back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping
from enum import IntFlag
from types import TracebackType
from typing import NamedTuple, Protocol, Self

from sowatch.bpf.record_log import RecordLog
from sowatch.bpf.records import Record
from sowatch.model.errors import LoadAttempt
from sowatch.model.identity import FileId
from sowatch.model.literals import Hooks, Strategy
from sowatch.model.rules import RuleSet
from sowatch.model.stats import Losses
from sowatch.sources.scan_rows import ProcessScan
from sowatch.sources.unread import UnreadProcesses

__all__ = [
    "Clock",
    "EventSource",
    "Polls",
    "ProcessScan",
    "Report",
    "Setting",
    "TrackedEntry",
    "Verdict",
    "Verdicts",
    "base_report",
]


class Report(IntFlag):
    """enum report_bit: what the kernel side reports beyond tracked processes."""

    NOTHING = 0
    PROCESSES = 1
    RANGES = 2
    IMAGES = 4
    SCANS = 8
    INTROS = 16
    FENCE = 32


def base_report(rules: RuleSet) -> Report:
    """What is reported all the time."""
    return Report.IMAGES if rules.wants_images else Report.NOTHING


class TrackedEntry(NamedTuple):
    """What the kernel side remembers of a process: struct process of ``state.bpf.h``.

    ``activity`` is the activity generation, 0 if the process is untracked: nothing of it is wanted.
    ``ranges`` are the first of the ``range_count`` executable ranges that it knows.
    """

    start_ns: int
    range_count: int
    needs_rescan: bool
    is_introduced: bool
    shares_vm: bool
    activity: int
    ranges: tuple[tuple[int, int], ...]


class Verdict(NamedTuple):
    """An answer that the source remembers of a file in a view. ``seconds_left`` of an ignore."""

    file_id: FileId
    view: Hashable
    is_match: bool
    seconds_left: int | None


class Verdicts(Protocol):
    """The answers that the kernel side remembers, those that grew too old left out. A context manager.

    Any one thread may use it, also after its source was closed.
    """

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def look_up(self, key: Hashable) -> Verdict | None:
        """The answer for a file under one name in one view."""

    def of_inodes(self, inodes: Collection[int]) -> list[Verdict]:
        """Every answer for a file with one of these inode numbers, whatever its device, name and view."""

    def close(self) -> None:
        """Safe to call again."""


class Polls(Protocol):
    """Of a source that polls."""

    @property
    def interval_s(self) -> float:
        """Seconds between two polls, as it is now; from any thread."""

    def ask(self) -> None:
        """Makes the next `EventSource.drain` poll, so that it brings everything up to now."""


class Setting(Protocol):
    """A number that the source obeys from the moment it is set."""

    def set(self, value: int) -> None:
        """Sets it."""


class Clock(Protocol):
    """Verdicts expire by it."""

    def tick(self) -> None:
        """To be called about once a second."""


class EventSource(Protocol):
    """The seam between the kernel and the mapping table. One thread uses a source; any may `close` it.

    What only some sources can do is an object that a source offers, or None.
    """

    strategy: Strategy
    guarantee: str
    hooks: Hooks | None
    limits: tuple[str, ...]
    attempts: tuple[LoadAttempt, ...]
    #: Processes that could not be read at the last attempt.
    unread: UnreadProcesses

    @property
    def polls(self) -> Polls | None:
        """None: everything is there to be drained as it happens."""

    @property
    def reports(self) -> Setting | None:
        """A `Report`: what is reported beyond the processes that are tracked. None: everything always is."""

    @property
    def record_limit(self) -> Setting | None:
        """How many records one process may send in a second, see `Config.max_records_s`. None: no such limit."""

    @property
    def answer_clock(self) -> Clock | None:
        """None: answers do not grow old."""

    def fileno(self) -> int:
        """A descriptor that polls readable when `drain` has something."""

    def drain(self) -> list[Record]:
        """What happened since the last call, in the order of the ring."""

    def scan_all(self, meanwhile: Callable[[], None] | None = None) -> tuple[list[ProcessScan], RecordLog]:
        """The mappings of every process that is not ``unread`` then, and the records drained meanwhile.

        Args:
            meanwhile: drains, in the place of the scan: called repeatedly during it, if the source allows a drain then.

        Raises:
            ScanTimeout: no process could be read.
        """

    def scan_process(self, pid: int, meanwhile: Callable[[], None] = lambda: None) -> ProcessScan | None:
        """One process's mappings, perhaps none at all; None if the process is gone.

        Args:
            pid: of the process.
            meanwhile: called repeatedly during a long scan, if the source allows a drain then.

        Raises:
            ScanTimeout: the scan hangs, and the process is ``unread`` now.
        """

    def answer(self, places: Mapping[Hashable, int], *, is_wanted: bool) -> None:
        """Sets the verdict on files: those that are not wanted are not reported again for a while.

        Args:
            places: by key, which place the verdict is about, `MapRecord.place`; a file that is at another one is
                asked about again.
            is_wanted: of all of them.
        """

    def untrack(self, pid: int, start_ns: int, activity: int) -> bool:
        """Untracks a process of which nothing is wanted; False if its activity generation has changed since."""

    def new_epoch(self) -> None:
        """Invalidates every earlier verdict."""

    def losses(self) -> Losses:
        """What was lost so far."""

    def tracked(self, pid: int) -> TrackedEntry | None:
        """What is remembered of a process, None if nothing. It may be of an earlier process with that pid."""

    def open_verdicts(self) -> Verdicts:
        """The verdicts that are remembered; the caller closes them."""

    def close(self) -> None:
        """Detaches everything. Safe to call again."""
