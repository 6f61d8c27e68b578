"""What is mapped, put together for people: a row a library, a row a process, loads over time.

The page and ``sowatch top`` show what `Inventory` gives. It reads the published map when it is asked to, so a
storm of loads costs it nothing while nobody asks, and no more than one view a time when many do.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Final, Protocol, Self, TypeVar

from msgspec import Struct

from sowatch.inventory.stale_watch import FileKey, HasSnapshot, StaleWatch, file_key
from sowatch.inventory.staleness import StaleAnswer, Staleness, badness
from sowatch.linux.proc import ProcFs
from sowatch.model.events import Library, Process, Ready
from sowatch.model.identity import ProcessId
from sowatch.model.stats import Mapped

__all__ = ["HISTORY_S", "Inventory", "InventoryView", "LibraryRow", "ProcessRow", "RateSample", "Watched"]

#: How much of the past is kept, one entry a second.
HISTORY_S: Final = 600
#: Mappings that are put together; a host that has more reports the rest as a number.
MAX_MAPPINGS: Final = 200_000

K = TypeVar("K")


class StatsLike(Protocol):
    """The counters that the history is made of."""

    @property
    def loads(self) -> int: ...
    @property
    def unloads(self) -> int: ...
    @property
    def lost_kernel(self) -> int: ...
    @property
    def lost_queue(self) -> int: ...


class StaleSource(Protocol):
    """What is asked of a `StaleWatch`."""

    @property
    def answers(self) -> Mapping[tuple[ProcessId, FileKey], StaleAnswer]:
        """For each process and file that is stale or unknown."""

    def ask(self) -> None:
        """Somebody wants the answers; returns at once."""

    def compare(self) -> None:
        """One pass, now and in this thread."""


class Watched(HasSnapshot, Protocol):
    """What is asked of a `sowatch.watcher.watcher.Watcher`."""

    @property
    def stats(self) -> StatsLike:
        """The counters so far."""

    @property
    def ready(self) -> Ready | None:
        """What the ``ready`` event reported."""

    @property
    def is_repaired(self) -> bool:
        """Whether every loss was made good."""


class LibraryRow(Struct, frozen=True):
    """A file under one path, and who has it mapped.

    Attributes:
        number: names the row from one view to the next; never used again for another.
        library: the file, as one of the processes that map it sees it.
        holders: numbers of `ProcessRow` s, rising.
        containers: ids, sorted.
        staleness: ``replaced`` or ``deleted`` if a process maps what its path no longer names, ``modified`` if it was
            written to since, ``unknown`` if that cannot be determined of one.
        stale_reason: see `StaleAnswer`.
        since_ns: wall clock, in ns since the epoch, of the first load since the row exists.
        is_older: it was mapped already when the watch began, at ``since_ns``.
        oldest_start_ns: when the oldest of the processes that have it began, in ns since boot.
    """

    number: int
    library: Library
    holders: tuple[int, ...]
    containers: tuple[str, ...]
    staleness: Staleness | None
    since_ns: int
    is_older: bool
    stale_reason: str | None = None
    oldest_start_ns: int = 0


class ProcessRow(Struct, frozen=True):
    """A process that has something mapped. ``since_ns`` and ``is_older`` are of its first library.

    ``unknown_libraries`` are those of which it cannot be determined whether they are stale.
    """

    number: int
    process: Process
    libraries: int
    stale_libraries: int
    since_ns: int
    is_older: bool
    unknown_libraries: int = 0


class RateSample(Struct, frozen=True):
    """What a second brought. ``time_s`` is its end by the wall clock; all others are a second's worth."""

    time_s: int
    loads: float
    unloads: float
    lost: float


class InventoryView(Struct, frozen=True):
    """What is mapped at one moment. Rows by their numbers; ``left_out`` mappings were too many to be put together."""

    libraries: dict[int, LibraryRow]
    processes: dict[int, ProcessRow]
    mappings: int
    left_out: int


class _Numbers(dict[K, int]):
    """Numbers for keys, given once and forgotten with the key."""

    def __init__(self) -> None:
        super().__init__()
        self._next = itertools.count(1)

    def __missing__(self, key: K) -> int:
        number = self[key] = next(self._next)
        return number

    def keep(self, keys: Iterable[K]) -> None:
        """Forgets all others."""
        for key in self.keys() - set(keys):
            del self[key]


class Inventory:
    """Puts together what a watcher knows. A context manager; every method from any thread.

    A thread counts loads each second, from `start` to `close`. Mapped files are compared with the disk while somebody
    asks.

    Args:
        watcher: whose map is shown; not owned.
        proc: the host's ``/proc``. Default: ``/proc``.
        sample_s: the distance between two entries of `history`.
        stale: what compares, not owned. Default: one of its own.
    """

    def __init__(
        self,
        watcher: Watched,
        *,
        proc: ProcFs | None = None,
        sample_s: float = 1.0,
        stale: StaleSource | None = None,
    ) -> None:
        self.watcher = watcher
        self._own_stale = StaleWatch(watcher, proc=proc) if stale is None else None
        self._stale_watch = stale or self._own_stale or StaleWatch(watcher, proc=proc)
        self._sample_s = sample_s
        self._lock = threading.Lock()
        self._files: _Numbers[FileKey] = _Numbers()
        self._processes: _Numbers[ProcessId] = _Numbers()
        self._first: dict[FileKey, tuple[int, bool]] = {}
        self._history: deque[RateSample] = deque(maxlen=int(HISTORY_S / sample_s))
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._count, name="sowatch-history", daemon=True)

    def start(self) -> None:
        """Starts counting."""
        self._thread.start()
        if self._own_stale is not None:
            self._own_stale.start()

    def close(self, timeout_s: float = 1.0) -> None:
        """Ends its threads, waiting at most that long for each. Safe to call again."""
        self._closing.set()
        if self._own_stale is not None:
            self._own_stale.close(timeout_s)
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called: nobody should wait for more."""
        return self._closing.is_set()

    def history(self) -> list[RateSample]:
        """The last `HISTORY_S` seconds, oldest first."""
        return list(self._history)

    def look(self) -> InventoryView:
        """The map as published now. Takes some 3 ms for a thousand mappings."""
        self._stale_watch.ask()
        with self._lock:
            return self._look(self.watcher.snapshot(with_ranges=False))

    def compare(self) -> None:
        """Compares what is mapped with the disk, now and in this thread; the next view has it.

        For one answer only. What lies on a file system that does not answer is ``unknown``.
        """
        self._stale_watch.compare()

    def _look(self, mapped: Sequence[Mapped]) -> InventoryView:
        shown = mapped[:MAX_MAPPINGS]
        files: dict[FileKey, list[Mapped]] = {}
        processes: dict[ProcessId, list[Mapped]] = {}
        for one in shown:
            files.setdefault(file_key(one), []).append(one)
            processes.setdefault(one.process.id, []).append(one)
        self._files.keep(files)
        self._processes.keep(processes)
        self._first = {key: self._first.get(key) or _first(group) for key, group in files.items()}
        stale = self._stale_watch.answers
        libraries = (self._library(key, group, stale) for key, group in files.items())
        holders = (self._process(group, stale) for group in processes.values())
        return InventoryView(
            libraries={row.number: row for row in libraries},
            processes={row.number: row for row in holders},
            mappings=len(mapped),
            left_out=len(mapped) - len(shown),
        )

    def _library(
        self, key: FileKey, group: list[Mapped], stale: Mapping[tuple[ProcessId, FileKey], StaleAnswer]
    ) -> LibraryRow:
        since_ns, is_older = self._first[key]
        answers = [answer for one in group if (answer := stale.get((one.process.id, key)))] if stale else []
        worst = max(answers, key=badness, default=None)
        return LibraryRow(
            number=self._files[key],
            library=group[0].library,
            holders=tuple(sorted(self._processes[one.process.id] for one in group)),
            containers=tuple(sorted({one.process.container for one in group if one.process.container})),
            staleness=None if worst is None else worst.stale,
            since_ns=since_ns,
            is_older=is_older,
            stale_reason=None if worst is None else worst.reason,
            oldest_start_ns=min(one.process.start_ns for one in group),
        )

    def _process(self, group: list[Mapped], stale: Mapping[tuple[ProcessId, FileKey], StaleAnswer]) -> ProcessRow:
        # Of one that was gone before it could be read, the kernel's record says less.
        process = next((one.process for one in group if one.process.exe is not None), group[-1].process)
        since_ns, is_older = _first(group)
        answers = [stale.get((process.id, file_key(one))) for one in group] if stale else []
        stale_count = sum(answer is not None for answer in answers)
        unknown_count = sum(answer is not None and answer.stale is Staleness.UNKNOWN for answer in answers)
        return ProcessRow(
            number=self._processes[process.id],
            process=process,
            libraries=len(group),
            stale_libraries=stale_count - unknown_count,
            since_ns=since_ns,
            is_older=is_older,
            unknown_libraries=unknown_count,
        )

    # ---- the threads --------------------------------------------------------------------------

    def _count(self) -> None:
        before, before_s = self._totals(), time.monotonic()
        while not self._closing.wait(self._sample_s):
            now, now_s = self._totals(), time.monotonic()
            loads, unloads, lost = ((new - old) / (now_s - before_s) for new, old in zip(now, before, strict=True))
            self._history.append(RateSample(int(time.time()), round(loads, 1), round(unloads, 1), round(lost, 1)))
            before, before_s = now, now_s

    def _totals(self) -> tuple[int, int, int]:
        stats = self.watcher.stats
        return stats.loads, stats.unloads, stats.lost_kernel + stats.lost_queue


def _first(group: Sequence[Mapped]) -> tuple[int, bool]:
    first = min(group, key=lambda one: one.time_ns)
    return first.time_ns, first.cause == "snapshot"
