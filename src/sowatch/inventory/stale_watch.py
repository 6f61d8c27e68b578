"""`StaleWatch`: which processes have files mapped that are no longer on disk, compared again and again.

A pass costs one stat for each directory in which something is mapped: as long as a directory is the same, so are the
names in it. The files themselves are compared when they are new, when their directory has changed, and every few
minutes. docs/decisions/0051-staleness-in-the-background.md has the figures.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from types import TracebackType
from typing import Final, NamedTuple, Protocol, Self, TypeAlias

from sowatch.inventory.remediation import Remediations
from sowatch.inventory.roots import DirectoryState, RootKey
from sowatch.inventory.stale_history import StaleHistory
from sowatch.inventory.staleness import Disk, StaleAnswer, Staleness, seen_at
from sowatch.linux.disk_calls import HangingCalls
from sowatch.linux.proc import ProcFs
from sowatch.model.identity import FileId, ProcessId
from sowatch.model.literals import RenewedCause
from sowatch.model.stats import Mapped

__all__ = ["FileKey", "HasSnapshot", "StaleChange", "StaleWatch", "file_key"]

LOG = logging.getLogger("sowatch")

#: Mappings that are compared; a host that has more leaves the rest out, and no pass is complete.
MAX_MAPPINGS: Final = 200_000
#: Files that one pass compares; what is due beyond that waits for the next ones, the oldest first.
MAX_LOOKS: Final = 5_000
#: Everything is compared this often, whatever its directory says: a file may be covered by a mount of its own.
LOOK_EVERY_S: Final = 300.0
#: Passes take this share of the time at most.
_SHARE: Final = 0.1
#: Nobody has asked for this long: a comparison that is made for those who ask pauses.
_UNWATCHED_S: Final = 30.0
#: How often the disk is compared with what is mapped, while somebody asks.
ASKED_EVERY_S: Final = 10.0
#: A directory that changed so short a time ago may change again without showing it: file systems have coarse clocks.
_UNSETTLED_NS: Final = 2_000_000_000

#: What distinguishes one mapped file from another: a file may be mapped under several paths.
FileKey: TypeAlias = tuple[FileId, str]
_Key: TypeAlias = tuple[ProcessId, FileKey]


class HasSnapshot(Protocol):
    """What is asked of a `sowatch.watcher.watcher.Watcher`."""

    def snapshot(self, *, with_ranges: bool = True) -> Sequence[Mapped]:
        """The published map; ``with_ranges`` as they are now."""


def file_key(one: Mapped) -> FileKey:
    """That of what is mapped."""
    return one.library.id, one.library.path


class StaleChange(NamedTuple):
    """A process has a stale file mapped, or no longer: then ``cause`` says why and ``answer`` is the last one."""

    mapped: Mapped
    answer: StaleAnswer
    cause: RenewedCause | None = None


class _Seen:
    """A process: its root, when each of its files was compared (CLOCK_MONOTONIC), and those that changed since."""

    __slots__ = ("compared_s", "pending", "root", "rooted_s")

    def __init__(self) -> None:
        self.root: RootKey | None = None
        self.rooted_s = float("-inf")
        self.compared_s: dict[FileKey, float] = {}
        self.pending: set[FileKey] = set()


class StaleWatch:
    """Compares the map of a watcher with the disk, on a thread of its own from `start` on. A context manager.

    What does not answer is ``unknown`` and costs a second once; see `Disk`.

    Args:
        watcher: whose map; not owned.
        proc: the host's ``/proc``. Default: ``/proc``.
        interval_s: from one pass to the next; 0: every ten seconds, while somebody calls `ask`. May be changed.
        on_change: called on the thread, after each pass in which something became stale or was renewed.

    Attributes:
        answers: for each process and file that is stale or unknown; replaced as a whole.
        history: what was stale from when to when.
        remediations: how long a file that was replaced went on running.
        compared_ns: the wall clock at the end of the last pass, in ns since the epoch; None before the first.
        seconds: how long the last pass took.
        is_complete: whether the last pass has compared all that was due, and left no mapping out.
        hanging: what does not answer; other disks may share it.
    """

    def __init__(
        self,
        watcher: HasSnapshot,
        *,
        proc: ProcFs | None = None,
        interval_s: float = 0.0,
        on_change: Callable[[Sequence[StaleChange]], None] | None = None,
    ) -> None:
        self._watcher = watcher
        self.hanging = HangingCalls()
        self._disk = Disk(proc, self.hanging)
        self._on_change = on_change
        self._interval_s = interval_s
        self._comparing = threading.Lock()
        self._seen: dict[ProcessId, _Seen] = {}
        self._states: dict[tuple[RootKey, str], DirectoryState | None] = {}
        self._stale: dict[_Key, tuple[Mapped, StaleAnswer]] = {}
        self.answers: Mapping[_Key, StaleAnswer] = {}
        self.history = StaleHistory()
        self.remediations = Remediations()
        self.compared_ns: int | None = None
        self.seconds = 0.0
        self.is_complete = False
        self._logged: str | None = None
        self._asked_s = float("-inf")
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sowatch-stale", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self, timeout_s: float = 1.0) -> None:
        """Ends it, waiting at most that long. Safe to call again."""
        self._closing.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        if not self._thread.is_alive():
            self._disk.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def interval_s(self) -> float:
        """See the arguments."""
        return self._interval_s

    @interval_s.setter
    def interval_s(self, value: float) -> None:
        self._interval_s = value
        self._wake.set()

    def ask(self) -> None:
        """Somebody wants the answers: keeps the comparison going for a while."""
        self._asked_s = time.monotonic()
        if not self._interval_s:
            self._wake.set()

    def stale(self) -> list[tuple[Mapped, StaleAnswer]]:
        """What is stale by the last pass; any thread."""
        return list(self._stale.copy().values())

    def compare(self) -> None:
        """One pass, now and in this thread.

        What lies on a file system that does not answer is ``unknown``.
        """
        with self._comparing:
            begun_s = time.monotonic()
            self._disk.begin_pass()
            mapped, is_cut = self._compared()
            due = self._due(mapped, begun_s)
            try:
                looked = self._look_at(due, mapped, begun_s)
            finally:
                self._disk.forget_processes()
            changes = self._take(mapped, looked)
            self.is_complete = len(looked) == len(due) and not is_cut
            now_ns, is_first = time.time_ns(), self.compared_ns is None
            self.history.add(changes, now_ns, is_first=is_first)
            self.remediations.add(changes, now_ns, is_first=is_first, replaced_ns=self._replaced_ns)
            self.compared_ns = now_ns
            self.seconds = time.monotonic() - begun_s
        if changes and self._on_change is not None:
            self._on_change(changes)

    # ---- what has to be looked at -------------------------------------------------------------

    def _compared(self) -> tuple[dict[_Key, Mapped], bool]:
        """What is compared, and whether that leaves some out: never what is stale, which would seem to be unmapped."""
        mapped = {(one.process.id, file_key(one)): one for one in self._watcher.snapshot(with_ranges=False)}
        if len(mapped) <= MAX_MAPPINGS:
            return mapped, False
        first = {key: mapped[key] for key in self._stale if key in mapped}
        rest = ((key, one) for key, one in mapped.items() if key not in first)
        first.update(islice(rest, max(0, MAX_MAPPINGS - len(first))))
        return first, True

    def _due(self, mapped: Mapping[_Key, Mapped], now_s: float) -> list[_Key]:
        """What may have changed, the one that was looked at longest ago first."""
        files: dict[ProcessId, list[FileKey]] = {}
        for process, file in mapped:
            files.setdefault(process, []).append(file)
        self._seen = {process: self._seen.get(process) or _Seen() for process in files}
        for process, seen in self._seen.items():
            kept = files[process]
            seen.compared_s = {file: seen.compared_s[file] for file in kept if file in seen.compared_s}
            seen.pending.intersection_update(kept)
            if self._closing.is_set():
                return []
            if now_s - seen.rooted_s >= LOOK_EVERY_S:
                self._find_root(process, seen, now_s)
        changed = self._changed_directories(files)
        due: list[tuple[float, _Key]] = []
        for process, seen in self._seen.items():
            for file in files[process]:
                if (seen.root, os.path.dirname(file[1])) in changed:
                    seen.pending.add(file)  # at its old age: one that changes all the time is not always the oldest
                compared_s = seen.compared_s.get(file, float("-inf"))
                if file in seen.pending or now_s - compared_s >= LOOK_EVERY_S:
                    due.append((compared_s, (process, file)))
        due.sort(key=lambda one: one[0])
        return [key for _, key in due]

    def _find_root(self, process: ProcessId, seen: _Seen, now_s: float) -> None:
        root = self._disk.root_of(process.pid)
        if root != seen.root:
            seen.root = root
            seen.compared_s.clear()
        seen.rooted_s = now_s

    def _changed_directories(self, files: Mapping[ProcessId, Sequence[FileKey]]) -> set[tuple[RootKey | None, str]]:
        """The directories of a root that are not what they were, or cannot be read."""
        pids: dict[RootKey, list[int]] = {}
        paths: dict[RootKey, dict[str, None]] = {}
        for process, seen in self._seen.items():
            if seen.root is not None:
                pids.setdefault(seen.root, []).append(process.pid)
                named = paths.setdefault(seen.root, {})
                named.update((os.path.dirname(path), None) for _, path in files[process] if path.startswith("/"))
        states: dict[tuple[RootKey, str], DirectoryState | None] = {}
        for root, wanted in paths.items():
            if self._closing.is_set():
                return set()
            found = self._disk.directories(root, pids[root], list(wanted))
            states |= {(root, path): state for path, state in found.items()}
        before, self._states = self._states, {key: _settled(state) for key, state in states.items()}
        return {key for key, state in states.items() if key in before and before[key] != state}

    # ---- the looks ----------------------------------------------------------------------------

    def _look_at(self, due: Sequence[_Key], mapped: dict[_Key, Mapped], now_s: float) -> dict[_Key, StaleAnswer]:
        if not due:
            return {}
        # What is mapped where has changed since the load, and the draining thread is asked for that.
        mapped |= {
            key: one
            for one in self._watcher.snapshot(with_ranges=True)
            if (key := (one.process.id, file_key(one))) in mapped
        }
        looked: dict[_Key, StaleAnswer] = {}
        # The mappings of each process are read once.
        for key in sorted(due[:MAX_LOOKS], key=lambda key: key[0]):
            if self._closing.is_set():
                break
            one = mapped[key]
            loaded_ns = seen_at(one.cause, one.time_ns)
            try:
                looked[key] = self._disk.staleness(one.process, one.library, one.ranges, loaded_ns=loaded_ns)
            except Exception as error:  # noqa: BLE001 - one file keeps no other from being compared
                looked[key] = StaleAnswer(Staleness.UNKNOWN, self._failed(one, error))
            seen = self._seen[key[0]]
            seen.compared_s[key[1]] = now_s
            seen.pending.discard(key[1])
        return looked

    def _failed(self, one: Mapped, error: Exception) -> str:
        """The reason of the answer. It is logged where it is not the same as that of the last one that failed."""
        reason = f"it could not be compared: {str(error) or type(error).__name__}"
        if reason != self._logged:
            LOG.error("%s of process %d: %s", one.library.path, one.process.pid, reason, exc_info=error)
            self._logged = reason
        return reason

    def _take(self, mapped: Mapping[_Key, Mapped], looked: Mapping[_Key, StaleAnswer]) -> list[StaleChange]:
        """Keeps what was found, and says what is new in it."""
        answers = {key: answer for key, answer in self.answers.items() if key in mapped and key not in looked}
        stale = {key: found for key, found in self._stale.items() if key in mapped}
        changes = [StaleChange(*found, "unmapped") for key, found in self._stale.items() if key not in mapped]
        for key, answer in looked.items():
            before = stale.get(key)
            if answer.stale is not None:
                answers[key] = answer
            if answer.stale is Staleness.UNKNOWN:
                continue  # it may be as it was
            if answer.stale is None:
                # Of one that has just ended that is the answer, too; the next map is without it.
                if before is not None and not self._disk.has_ended(mapped[key].process):
                    del stale[key]
                    changes.append(StaleChange(mapped[key], answer, "restored"))
                continue
            stale[key] = mapped[key], answer
            if before is None or before[1].stale is not answer.stale:
                changes.append(StaleChange(mapped[key], answer))
        self.answers, self._stale = answers, stale
        return changes

    def _replaced_ns(self, one: Mapped, answer: StaleAnswer) -> int | None:
        if answer.stale is Staleness.MODIFIED:
            return None
        return self._disk.replaced_ns(one.process.pid, answer.path or one.library.path)

    # ---- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing.is_set():
            self._wake.clear()
            if not self._interval_s and time.monotonic() - self._asked_s > _UNWATCHED_S:
                if not self._closing.is_set():
                    self._wake.wait()
                continue
            begun_s = time.monotonic()
            try:
                self.compare()
            except Exception:
                LOG.exception("the files on disk could not be compared with those that are mapped")
            took_s = time.monotonic() - begun_s
            self._pause(begun_s + max(self._interval_s or ASKED_EVERY_S, took_s / _SHARE))

    def _pause(self, until_s: float) -> None:
        interval_s = self._interval_s
        while True:
            self._wake.clear()
            left_s = until_s - time.monotonic()
            if left_s <= 0 or self._closing.is_set() or self._interval_s != interval_s:
                return
            self._wake.wait(left_s)


def _settled(state: DirectoryState | None) -> DirectoryState | None:
    """What a later state is compared with; None, which is like no other, if it may change without showing it."""
    if state is None or abs(time.time_ns() - state.changed_ns) < _UNSETTLED_NS:
        return None
    return state
