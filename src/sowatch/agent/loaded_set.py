"""`LoadedSet`: what was loaded since the agent runs, with its packages, for ``GET /sbom``.

Each distinct file, path and container once, however many processes have it and however short they live. Its package is
looked up soon after the load, so that it is known after an upgrade. Bounded: what is beyond is counted and reported.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Collection, Sequence
from typing import Final, Self

from msgspec.structs import replace

from sowatch.inventory.coverage import coverage_of_answers
from sowatch.inventory.loaded import (
    LoadedAnswer,
    PlaceKey,
    is_file,
    limits_of_memory,
    limits_of_rules,
    loaded_files,
    place_of,
)
from sowatch.inventory.packages import Packages
from sowatch.inventory.sbom import LoadedFile
from sowatch.inventory.stale_watch import StaleWatch, file_key
from sowatch.inventory.staleness import Staleness
from sowatch.linux.proc import ProcFs
from sowatch.model.events import Load, Lost, Ready
from sowatch.model.lines import stamp
from sowatch.model.literals import StreamKind
from sowatch.watcher.subscription import Subscription
from sowatch.watcher.watcher import Watcher

__all__ = ["LoadedSet"]

LOG = logging.getLogger("sowatch.agent")

#: Distinct files with path and container that are kept.
MAX_FILES: Final = 20_000
#: Loads whose package is looked up together.
_BATCH: Final = 256
#: What comes within this time is looked up together; an upgrade takes longer.
_TOGETHER_S: Final = 0.25
_TURN_S: Final = 1.0
#: This part of the bound is made free at once, as finding out what is mapped takes a while.
_SPARE: Final = 32
#: So long it is not tried again when all is mapped.
_NO_ROOM_S: Final = 10.0
_EVENTS: Final[tuple[StreamKind, ...]] = ("load",)
_GONE: Final = (Staleness.REPLACED, Staleness.DELETED)


class LoadedSet:
    """Keeps what was loaded. A context manager; `answer` from any thread.

    Args:
        watcher: the agent's, not started yet, or what it finds at its start is missing.
        proc: the host's.
        packages: finds those of files; others may ask it, too.
        max_files: that are kept.
    """

    def __init__(self, watcher: Watcher, proc: ProcFs, packages: Packages, *, max_files: int = MAX_FILES) -> None:
        self._watcher = watcher
        self._proc = proc
        self._max_files = max_files
        self._packages = packages
        #: Finds packages; others may ask it, too.
        self.packages = packages
        self._files: dict[PlaceKey, LoadedFile] = {}
        self._changing = threading.Lock()
        #: Loads of files for which there was no room, as all that are kept are mapped.
        self.left_out = 0
        #: Files that were forgotten to make room, as nobody had them mapped any more.
        self.evicted = 0
        self._no_room_until_s = 0.0
        self._lost = 0
        self._since_ns = time.time_ns()
        self._subscription: Subscription = watcher.subscribe(events=_EVENTS)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sowatch-loaded", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, timeout_s: float = 1.0) -> None:
        """Ends its thread, waiting at most that long. Safe to call again."""
        self._closing.set()
        self._subscription.close()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def answer(
        self,
        ready: Ready,
        stale: StaleWatch | None,
        *,
        pids: Collection[int],
        without: Collection[int],
        since_start: bool,
    ) -> LoadedAnswer:
        """What is loaded now; with ``since_start`` what was since then, too.

        Args:
            ready: what the watch reported.
            stale: what compares with the disk.
            pids: only what these have now; empty: all.
            without: what only these have is left out.
            since_start: not only what is loaded now.
        """
        mapped = [
            one
            for one in self._watcher.snapshot()
            if one.process.pid not in without and (not pids or one.process.pid in pids)
        ]
        answers = {} if stale is None else stale.answers
        gone = {
            place_of(one)
            for one in mapped
            if (found := answers.get((one.process.id, file_key(one)))) is not None and found.stale in _GONE
        }
        now = loaded_files(mapped, self._packages, gone)
        keys = dict.fromkeys(place_of(one) for one in mapped if is_file(one))
        files: list[LoadedFile] = []
        with self._changing:
            for key, one in zip(keys, now, strict=True):
                kept = self._files.get(key)
                if kept is not None and one.package is None and _is_same_content(key, kept, one):
                    one = replace(one, package=kept.package, build_id=one.build_id or kept.build_id)  # noqa: PLW2901
                files.append(one)
            if since_start:
                files += [one for key, one in self._files.items() if key not in keys]
        hung = {pid for pid in self._watcher.unread if not pids or pid in pids}
        read = {one.process.pid for one in mapped}
        coverage = coverage_of_answers(self._proc, ready.strategy, read, hung, pids)
        rules = self._watcher.rules
        return LoadedAnswer(
            schema=1,
            event="loaded",
            time=stamp(time.time_ns()),
            since=stamp(self._since_ns),
            host=ready.origin.host,
            host_id=ready.origin.host_id,
            boot_id=ready.origin.boot_id,
            version=ready.origin.version,
            files=tuple(files),
            open_ends=tuple(
                self._open_ends(since_start=since_start) + ([] if coverage.is_complete else [str(coverage)])
            ),
            limits=(*ready.limits, *limits_of_memory(mapped), *self._limits()),
            rules=tuple(rule.name for rule in rules),
            rule_limits=limits_of_rules(rules),
        )

    def _open_ends(self, *, since_start: bool) -> list[str]:
        found = []
        if since_start and self.left_out:
            found.append(
                f"{self._max_files} files are kept, and {self.left_out} loads of others were left out since the start"
            )
        if since_start and self.evicted:
            found.append(
                f"{self._max_files} files are kept, and {self.evicted} that had gone were forgotten since the start"
            )
        if since_start and self._lost:
            found.append(f"{self._lost} records were lost: what they had loaded and has gone may be missing")
        if not self._watcher.is_repaired:
            found.append("a loss is not repaired yet")
        return found

    def _limits(self) -> list[str]:
        """Also of what is loaded now."""
        if not self.left_out:
            return []
        return [f"{self.left_out} loads beyond {self._max_files} files: after an upgrade their packages may be unknown"]

    # ---- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        own_pid = os.getpid()
        while not (self._closing.is_set() or self._subscription.has_ended):
            event = self._subscription.get(timeout_s=_TURN_S)
            if event is None:
                continue
            # What comes meanwhile is read at once: a wake for each load would cost more than all else.
            self._closing.wait(_TOGETHER_S)
            pending: dict[PlaceKey, Load] = {}
            while event is not None:
                if isinstance(event, Lost):
                    self._lost += event.count
                elif isinstance(event, Load):
                    self._take(event, pending, own_pid)
                if len(pending) >= _BATCH:
                    self._keep(pending)
                    pending = {}
                event = self._subscription.get(timeout_s=0)
            if pending:
                self._keep(pending)

    def _take(self, load: Load, pending: dict[PlaceKey, Load], own_pid: int) -> None:
        key = place_of(load)
        if key in self._files or key in pending or load.process.pid == own_pid or not is_file(load):
            return
        pending[key] = load

    def _keep(self, pending: dict[PlaceKey, Load]) -> None:
        loads: Sequence[Load] = list(pending.values())
        try:
            identities = self._packages.identify(loads)
            names = [self._packages.content_name(load) for load in loads]
        except Exception:  # one file keeps no other from being kept
            LOG.exception("packages of loaded files could not be looked up")
            identities, names = [None] * len(loads), [load.library.build_id for load in loads]
        self._make_room(len(pending))
        with self._changing:
            for (key, load), identity, name in zip(pending.items(), identities, names, strict=True):
                if len(self._files) >= self._max_files:
                    self.left_out += 1
                    continue
                self._files[key] = LoadedFile(
                    load.library.path,
                    load.library.kind,
                    name,
                    load.library.soname,
                    load.process.container,
                    identity,
                )

    def _make_room(self, wanted: int) -> None:
        """Forgets those that were kept first and that nobody has mapped any more, and some more than it has to."""
        missing = len(self._files) + wanted - self._max_files
        now_s = time.monotonic()
        if missing <= 0 or now_s < self._no_room_until_s:
            return
        mapped = {place_of(one) for one in self._watcher.snapshot(with_ranges=False)}
        gone = [key for key in self._files if key not in mapped][: max(missing, self._max_files // _SPARE)]
        if len(gone) < missing:
            self._no_room_until_s = now_s + _NO_ROOM_S
        with self._changing:
            for key in gone:
                del self._files[key]
        self.evicted += len(gone)


def _is_same_content(key: PlaceKey, kept: LoadedFile, now: LoadedFile) -> bool:
    """Whether what was looked up at the load is of what is mapped now: another file may be in the same inode."""
    if None not in (kept.build_id, now.build_id):
        return kept.build_id == now.build_id
    return key[2] is not None or key[4] != 0
