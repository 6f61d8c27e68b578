"""Runs a Watcher for a test and keeps all it tells."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Self

from sowatch import Rule, Watcher
from sowatch.model.events import Event, LibraryEvent, Lost, Ready
from sowatch.model.literals import KINDS

__all__ = ["Follower"]

#: How often a condition that lies outside the event stream (a pid file, /proc) is looked at again.
_LOOK_EVERY_S = 0.05


class Follower:
    """A watcher of every mapped file of every kind, from before it starts.

    Args:
        timeout_s: how long `wait_until` waits before it fails the test.
        check: called with each event; raises if the event is not as it should be.
        options: given to `Watcher`.
    """

    def __init__(self, *, timeout_s: float, check: Callable[[Event], None], **options: Any) -> None:
        self._timeout_s = timeout_s
        self._check = check
        self.watcher = Watcher(Rule(None, name="everything", kind=KINDS), **options)
        self._subscription = self.watcher.subscribe(events=("load", "unload"))
        self.events: list[LibraryEvent] = []
        self.lost: list[Lost] = []
        self._of: dict[int, list[LibraryEvent]] = defaultdict(list)

    def __enter__(self) -> Self:
        self.ready: Ready = self.watcher.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.watcher.stop()

    def wait_until(self, condition: Callable[[], object], what: str | Callable[[], str]) -> None:
        """Take events until ``condition`` holds; fail with ``what`` if it never does."""
        deadline = time.monotonic() + self._timeout_s
        while True:
            self._take_all()
            if condition():
                return
            if time.monotonic() >= deadline:
                raise AssertionError(what if isinstance(what, str) else what())
            self._take(self._subscription.get(_LOOK_EVERY_S))

    def about(self, pid: int) -> list[LibraryEvent]:
        """Everything told so far about processes with this pid."""
        return self._of[pid]

    def mapped(self, pid: int) -> set[tuple[str, int]]:
        """What the events told so far leave mapped, as (device, inode)."""
        held: set[tuple[str, int]] = set()
        for event in self._of[pid]:
            file = (event.library.id.dev, event.library.id.inode)
            if event.event == "load":
                assert file not in held, f"a second load without an unload: {event}"
                held.add(file)
            else:
                assert file in held, f"an unload without a load: {event}"
                held.remove(file)
        return held

    def _take_all(self) -> None:
        while (event := self._subscription.get(0)) is not None:
            self._take(event)

    def _take(self, event: Event | None) -> None:
        if event is None:
            return
        self._check(event)
        if isinstance(event, Lost):
            self.lost.append(event)
        elif isinstance(event, LibraryEvent):
            self.events.append(event)
            assert event.process
            self._of[event.process.pid].append(event)
