"""The queue between the thread that drains the kernel and the one that runs callbacks.

User code runs here only, in one thread and in the order of the facts.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

from sowatch.engine.backlog import Backlog
from sowatch.engine.failure_log import FailureLog
from sowatch.model.literals import ProcessKind
from sowatch.model.process_events import ProcessCallback, ProcessEvent

__all__ = ["Counts", "Delivery", "Subscribers", "Subscription"]

_log = logging.getLogger("sowatch.processes")


class Counts:
    """Named counters that several threads raise."""

    __slots__ = ("_counts", "_lock")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, name: str, count: int = 1) -> None:
        """Raises one counter."""
        with self._lock:
            self._counts[name] += count

    def read(self) -> dict[str, int]:
        """All counters that ever moved."""
        with self._lock:
            return dict(self._counts)


class Subscription:
    """A callback for one kind of event, until it is ended."""

    __slots__ = ("callback", "is_active", "kind")

    def __init__(self, kind: ProcessKind, callback: ProcessCallback) -> None:
        self.kind = kind
        self.callback = callback
        self.is_active = True


class Subscribers:
    """All subscriptions. Its lock also guards what is decided together with them (see `run.py`)."""

    __slots__ = ("_by_kind", "lock")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        # Tuples: a queued event keeps the ones of its time.
        self._by_kind: dict[ProcessKind, tuple[Subscription, ...]] = {"exec": (), "fork": (), "exit": ()}

    def of(self, kind: ProcessKind) -> tuple[Subscription, ...]:
        """Those that want this kind of event."""
        return self._by_kind[kind]

    def add(self, subscription: Subscription) -> None:
        """From the next event on."""
        self._by_kind[subscription.kind] += (subscription,)

    def remove(self, subscription: Subscription) -> None:
        """From now on, queued events included. May be repeated."""
        subscription.is_active = False
        kept = tuple(one for one in self._by_kind[subscription.kind] if one is not subscription)
        self._by_kind[subscription.kind] = kept


def _size_of(event: ProcessEvent) -> int:
    """About what it takes: a process chooses how long its paths are."""
    process = event.process
    return 300 + len(process.exe or "") + len(process.cgroup or "")


class Delivery:
    """A bounded queue and the thread that empties it into callbacks.

    Args:
        limit: events that may wait.
        limit_bytes: what they may take, about.
        counts: where callbacks, their errors and what was left at the end are counted.
        on_room: called from the thread after an event found the queue full and it is half empty again.
    """

    def __init__(self, limit: int, limit_bytes: int, counts: Counts, on_room: Callable[[], None]) -> None:
        self._backlog = Backlog(limit, limit_bytes)
        self._counts = counts
        self._on_room = on_room
        self._failures = FailureLog(_log)
        self._changed = threading.Condition(threading.Lock())
        # Who gets an event is decided when it is queued: a subscriber that comes later was given
        # the processes as they are then, and must not see older news after that.
        self._waiting: deque[tuple[Sequence[ProcessEvent], Sequence[Subscription]]] = deque()
        self._is_short_of_room = False
        self._deadline_s: float | None = None
        self._thread = threading.Thread(target=self._run, name="sowatch-process-callbacks", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def put(self, event: ProcessEvent, subscriptions: Sequence[Subscription]) -> bool:
        """Queues one event; False if the queue is full. Never waits."""
        if not subscriptions:
            return True
        with self._changed:
            if self._backlog.is_full:
                self._is_short_of_room = True
                return False
            self._append((event,), subscriptions)
            return True

    @property
    def has_room(self) -> bool:
        """Whether the queue is at most half full."""
        return self._backlog.is_below(2)

    def put_scan(self, events: Sequence[ProcessEvent], subscriptions: Sequence[Subscription]) -> None:
        """Queues a scan, however full the queue is: it is bounded by the number of processes."""
        if events and subscriptions:
            with self._changed:
                self._append(events, subscriptions)

    def _append(self, events: Sequence[ProcessEvent], subscriptions: Sequence[Subscription]) -> None:
        self._waiting.append((events, subscriptions))
        self._backlog.add(sum(map(_size_of, events)), len(events))
        self._changed.notify()

    def finish(self, deadline_s: float) -> None:
        """Lets the thread end: with the last event, or at ``deadline_s`` (time.monotonic)."""
        with self._changed:
            self._deadline_s = deadline_s
            self._changed.notify()

    def join(self) -> bool:
        """Waits until the deadline of `finish` for the thread; whether it has ended."""
        if self._thread is threading.current_thread():
            return True  # a callback stops the monitor: it ends after it has returned
        assert self._deadline_s is not None
        self._thread.join(max(0.0, self._deadline_s - time.monotonic()))
        if not self._thread.is_alive():
            return True
        # A callback is stuck. What waits behind it is lost now, not when it comes back.
        with self._changed:
            self._lose(sum(len(events) for events, _ in self._waiting))
            self._waiting.clear()
        return False

    def _run(self) -> None:
        while (item := self._next()) is not None:
            events, subscriptions = item
            for done, event in enumerate(events):
                if self._is_too_late():
                    self._lose(len(events) - done)
                    break
                for subscription in subscriptions:
                    if subscription.is_active:
                        self._call(subscription, event)
            self._made_room(events)

    def _next(self) -> tuple[Sequence[ProcessEvent], Sequence[Subscription]] | None:
        with self._changed:
            while not self._waiting and self._deadline_s is None:
                self._changed.wait()
            return self._waiting.popleft() if self._waiting else None

    def _is_too_late(self) -> bool:
        return self._deadline_s is not None and time.monotonic() >= self._deadline_s

    def _lose(self, count: int) -> None:
        if count:
            _log.warning("%d process events were not delivered before the monitor stopped", count)
            self._counts.add("lost_queue", count)

    def _made_room(self, events: Sequence[ProcessEvent]) -> None:
        with self._changed:
            self._backlog.take(sum(map(_size_of, events)), len(events))
            has_room_again = self._is_short_of_room and self.has_room
            if has_room_again:
                self._is_short_of_room = False
        if has_room_again:
            self._on_room()

    def _call(self, subscription: Subscription, event: ProcessEvent) -> None:
        self._counts.add("callbacks")
        try:
            subscription.callback(event)
        except BaseException as error:  # noqa: BLE001 - a SystemExit here would end the thread in silence
            self._counts.add("callback_errors")
            self._failures.note(f"the callback for {event.kind} events", error)
