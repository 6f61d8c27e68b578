"""What is mapped, put together for people: a row a library, a row a process, loads over time.

The page and ``sowatch top`` show what `Inventory` gives. It reads the published map when it is asked to, so a
storm of loads costs it nothing while nobody asks, and no more than one view a time when many do.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Final, Protocol, Self, TypeVar

from msgspec import Struct

from sowatch.inventory.staleness import Disk, StaleAnswer, Staleness, seen_at
from sowatch.linux.proc import ProcFs
from sowatch.model.events import Library, Process, Ready
from sowatch.model.identity import FileId, ProcessId

__all__ = ["HISTORY_S", "Inventory", "InventoryView", "LibraryRow", "ProcessRow", "RateSample", "Watched"]

LOG = logging.getLogger("sowatch")

#: How much of the past is kept, one entry a second.
HISTORY_S: Final = 600
#: Mappings that are put together; a host that has more reports the rest as a number.
MAX_MAPPINGS: Final = 200_000
#: How often the disk is compared with what is mapped, while somebody asks, and how much of the time at most.
_DISK_EVERY_S: Final = 10.0
_DISK_SHARE: Final = 0.1
#: Nobody has asked for this long: the disk is not read.
_UNWATCHED_S: Final = 30.0

K = TypeVar("K")


class MappedLike(Protocol):
    """One entry of `sowatch.watcher.watcher.Watcher.snapshot`."""

    @property
    def process(self) -> Process: ...
    @property
    def library(self) -> Library: ...
    @property
    def ranges(self) -> tuple[tuple[int, int], ...]: ...
    @property
    def range_count(self) -> int | None: ...
    @property
    def cause(self) -> str | None: ...
    @property
    def time_ns(self) -> int: ...


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


class Watched(Protocol):
    """What is asked of a `sowatch.watcher.watcher.Watcher`."""

    def snapshot(self, *, with_ranges: bool = True) -> Sequence[MappedLike]:
        """The published map; ``with_ranges`` as they are now."""

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
    """

    number: int
    library: Library
    holders: tuple[int, ...]
    containers: tuple[str, ...]
    staleness: Staleness | None
    since_ns: int
    is_older: bool
    stale_reason: str | None = None


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


#: What distinguishes one row of libraries from another.
_FileKey = tuple[FileId, str]


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

    Runs two threads from `start` to `close`: one counts loads each second, the other compares mapped
    files with the disk while somebody asks.

    Args:
        watcher: whose map is shown; not owned.
        proc: the host's ``/proc``. Default: ``/proc``.
        sample_s: the distance between two entries of `history`.
    """

    def __init__(self, watcher: Watched, *, proc: ProcFs | None = None, sample_s: float = 1.0) -> None:
        self.watcher = watcher
        self._proc = proc or ProcFs()
        self._sample_s = sample_s
        self._lock = threading.Lock()
        self._files: _Numbers[_FileKey] = _Numbers()
        self._processes: _Numbers[ProcessId] = _Numbers()
        self._first: dict[_FileKey, tuple[int, bool]] = {}
        self._history: deque[RateSample] = deque(maxlen=int(HISTORY_S / sample_s))
        #: Replaced as a whole.
        self._stale: dict[tuple[ProcessId, _FileKey], StaleAnswer] = {}
        self._looked_s = float("-inf")
        self._looked = threading.Event()
        self._closing = threading.Event()
        self._threads = [
            threading.Thread(target=self._count, name="sowatch-history", daemon=True),
            threading.Thread(target=self._keep_comparing, name="sowatch-stale", daemon=True),
        ]

    def start(self) -> None:
        """Starts counting."""
        for thread in self._threads:
            thread.start()

    def close(self, timeout_s: float = 1.0) -> None:
        """Ends both threads, waiting at most that long for each. Safe to call again."""
        self._closing.set()
        self._looked.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout_s)

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
        self._looked_s = time.monotonic()
        self._looked.set()
        with self._lock:
            return self._look(self.watcher.snapshot(with_ranges=False))

    def compare(self) -> None:
        """Compares what is mapped with the disk, now and in this thread; the next view has it.

        For one answer only. What lies on a file system that does not answer is ``unknown``.
        """
        with Disk(self._proc) as disk:
            self._stale = _stale(self.watcher.snapshot(), disk, self._closing.is_set)

    def _look(self, mapped: Sequence[MappedLike]) -> InventoryView:
        shown = mapped[:MAX_MAPPINGS]
        files: dict[_FileKey, list[MappedLike]] = {}
        processes: dict[ProcessId, list[MappedLike]] = {}
        for one in shown:
            files.setdefault(_file_key(one), []).append(one)
            processes.setdefault(one.process.id, []).append(one)
        self._files.keep(files)
        self._processes.keep(processes)
        self._first = {key: self._first.get(key) or _first(group) for key, group in files.items()}
        stale = self._stale
        libraries = (self._library(key, group, stale) for key, group in files.items())
        holders = (self._process(group, stale) for group in processes.values())
        return InventoryView(
            libraries={row.number: row for row in libraries},
            processes={row.number: row for row in holders},
            mappings=len(mapped),
            left_out=len(mapped) - len(shown),
        )

    def _library(
        self, key: _FileKey, group: list[MappedLike], stale: dict[tuple[ProcessId, _FileKey], StaleAnswer]
    ) -> LibraryRow:
        since_ns, is_older = self._first[key]
        answers = [answer for one in group if (answer := stale.get((one.process.id, key)))] if stale else []
        worst = max(answers, key=_badness, default=None)
        return LibraryRow(
            number=self._files[key],
            library=group[0].library,
            holders=tuple(sorted(self._processes[one.process.id] for one in group)),
            containers=tuple(sorted({one.process.container for one in group if one.process.container})),
            staleness=None if worst is None else worst.stale,
            since_ns=since_ns,
            is_older=is_older,
            stale_reason=None if worst is None else worst.reason,
        )

    def _process(self, group: list[MappedLike], stale: dict[tuple[ProcessId, _FileKey], StaleAnswer]) -> ProcessRow:
        # Of one that was gone before it could be read, the kernel's record says less.
        process = next((one.process for one in group if one.process.exe is not None), group[-1].process)
        since_ns, is_older = _first(group)
        answers = [stale.get((process.id, _file_key(one))) for one in group] if stale else []
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

    def _keep_comparing(self) -> None:
        while not self._closing.is_set():
            if time.monotonic() - self._looked_s > _UNWATCHED_S:
                self._looked.clear()
                self._looked.wait()
                continue
            begun_s = time.monotonic()
            try:
                self.compare()
            except Exception:
                LOG.exception("the files on disk could not be compared with those that are mapped")
            self._closing.wait(max(_DISK_EVERY_S, (time.monotonic() - begun_s) / _DISK_SHARE))


def _stale(
    mapped: Sequence[MappedLike], disk: Disk, is_over: Callable[[], bool]
) -> dict[tuple[ProcessId, _FileKey], StaleAnswer]:
    found = {}
    for one in mapped[:MAX_MAPPINGS]:
        if is_over():
            break
        loaded_ns = seen_at(one.cause, one.time_ns)
        answer = disk.staleness(one.process, one.library, one.ranges, loaded_ns=loaded_ns)
        if answer.stale is not None:
            found[one.process.id, _file_key(one)] = answer
    return found


def _badness(answer: StaleAnswer) -> int:
    order = (Staleness.UNKNOWN, Staleness.MODIFIED, Staleness.DELETED, Staleness.REPLACED)
    return order.index(answer.stale or Staleness.UNKNOWN)


def _file_key(one: MappedLike) -> _FileKey:
    return one.library.id, one.library.path


def _first(group: Sequence[MappedLike]) -> tuple[int, bool]:
    first = min(group, key=lambda one: one.time_ns)
    return first.time_ns, first.cause == "snapshot"
