"""What a reader holds: `SubscriberQueue`, a bounded queue of events that knows how to catch up.

The engine's thread offers, any one thread reads.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from types import TracebackType
from typing import Final, Protocol, Self, get_args

from msgspec.structs import replace

from sowatch.engine.backlog import Backlog
from sowatch.engine.owner import Owner
from sowatch.engine.published_map import Loads
from sowatch.model.events import (
    Activate,
    AddedEvent,
    Deactivate,
    Event,
    LibraryEvent,
    Load,
    Lost,
    Renewed,
    Repaired,
    Stale,
    Unload,
    size_of,
)
from sowatch.model.identity import FileId

__all__ = ["SubscriberQueue"]


class Origin(Protocol):
    """What a subscription needs of its publisher."""

    lost_in_queues: int

    def held_copy(self) -> Loads:
        """The published map."""

    def unsubscribe(self, subscription: SubscriberQueue) -> None:
        """No further offers."""


class SubscriberQueue:
    """One reader's queue of events. Iterate over it, or `get`; a context manager.

    A reader that falls behind by more than the limits loses events; when it has caught up it gets
    `Lost` (where ``queue``), then whatever changed meanwhile with cause ``repair``, then
    `Repaired`. Iteration ends after `Stopped`, or after `close`. Any one thread may read.
    """

    def __init__(
        self,
        publisher: Origin,
        *,
        events: Collection[str],
        control: bool,
        limit: int,
        limit_bytes: int,
        rule: str | None = None,
        without_rules: Collection[str] = (),
    ) -> None:
        self._publisher = publisher
        self._events = frozenset(events)
        self._control = control
        #: Which types of events the reader wants: looked up for each event.
        self._wants = {kind: _is_wanted(kind, self._events, control=control) for kind in get_args(Event)}
        self._backlog = Backlog(limit, limit_bytes)
        self._rule = rule
        self._without_rules = frozenset(without_rules)
        # Whole batches, each event with its size: one wake of the reader for each, not one for each event.
        self._queue: queue.SimpleQueue[list[tuple[Event, int]] | None] = queue.SimpleQueue()
        self._batch: list[tuple[Event, int]] = []  # the engine's
        self._open: deque[tuple[Event, int]] = deque()  # the reader's
        #: The (rule, file) whose activate was the last event offered.
        self._activated: tuple[str, FileId] | None = None
        self._missed = 0
        self._seen: Loads | None = None
        self._is_closed = False
        self._has_ended = False
        self._on_event: Callable[[], None] | None = None
        self._owner = Owner()
        #: Events lost in this queue so far.
        self.lost = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Event]:
        while (event := self.get()) is not None:
            yield event

    def get(self, timeout_s: float | None = None) -> Event | None:
        """The next event; None after the last one, or if none came within the time.

        `has_ended` distinguishes the two.

        Raises:
            UsageError: in a child of ``os.fork()``, where no event comes.
        """
        opened = self._open
        if not opened:
            if self._has_ended:
                return None
            self._owner.check()
            try:
                batch = self._queue.get(timeout=timeout_s) if timeout_s != 0 else self._queue.get_nowait()
            except queue.Empty:
                return None
            if batch is None:
                self._has_ended = True
                return None
            opened.extend(batch)
        event, size_bytes = opened.popleft()
        self._backlog.take(size_bytes)
        return event

    @property
    def has_ended(self) -> bool:
        """Whether `get` will give nothing any more."""
        return self._has_ended and not self._open

    @property
    def waiting(self) -> int:
        """Events that were queued and not yet read."""
        return self._backlog.events

    @property
    def waiting_bytes(self) -> int:
        """What they take, as `sowatch.model.events.size_of` has it."""
        return self._backlog.bytes

    def close(self) -> None:
        """No further events; wakes a reader. Safe to call again, from any thread."""
        if not self._is_closed:
            self._is_closed = True
            self._publisher.unsubscribe(self)
            self._queue.put(None)
            self._signal()

    def call_on_event(self, callback: Callable[[], None] | None) -> None:
        """A callback on the engine's thread whenever there is something to `get`; it must not block."""
        self._on_event = callback

    # ---- the engine's side --------------------------------------------------------------------

    def offer(self, event: Event) -> None:
        """Queues the event if this reader wants it and has space."""
        if not self._wants[type(event)]:
            return
        if self._rule is not None and isinstance(event, _LIBRARY_EVENTS) and event.rule != self._rule:
            return
        if self._without_rules and isinstance(event, _OF_A_RULE) and event.rule in self._without_rules:
            return
        if self._seen is None and self._backlog.is_full and not self._belongs_to_the_last(event):
            self._seen = self._publisher.held_copy()
            # The event that did not fit has been taken into account already.
            self._undo(self._seen, event)
        if self._seen is not None and event.event != "stopped":
            self._missed += 1
            self.lost += 1
            self._publisher.lost_in_queues += 1
            return
        self._put(event)

    def offer_again(self, event: Activate) -> bool:
        """Hands over the activate event of an active file once more, however full the queue is.

        No repair makes up for it, as nothing that is mapped has changed. The caller limits how many of them wait.

        Returns:
            Whether it did. Not if the reader has missed the file so far: the repair has its activate event.
        """
        key = (event.rule, event.library.id)
        if self._seen is not None and key not in _active(self._seen):
            return False
        self._put(event)
        self.hand_over()
        return True

    def _belongs_to_the_last(self, event: Event) -> bool:
        """A deactivate, and the load right after its activate, end what the reader got before."""
        if isinstance(event, Load):
            return self._activated == (event.rule, event.library.id)
        return isinstance(event, Deactivate)

    @staticmethod
    def _undo(held: Loads, event: Event) -> None:
        if isinstance(event, Load | Activate):
            held.get(event.process.id, {}).pop(event.library.id, None)
        elif isinstance(event, Unload):
            held.setdefault(event.process.id, {})[event.library.id] = Load(
                event.rule, event.library, event.process, "repair", event.t_ns, event.time_ns
            )

    def catch_up(self) -> None:
        """Repairs the reader's view once it has made space; called from time to time."""
        if self._seen is not None and self._backlog.is_below(4):
            self._emit_missed(self._seen)

    def finish(self) -> None:
        """The last event, to this reader only, once it got what it missed."""
        if self._seen is not None:
            self._emit_missed(self._seen)
        self._publisher.unsubscribe(self)
        self.end()

    def _emit_missed(self, seen: Loads) -> None:
        begun = time.monotonic()
        self._seen = None
        missed, self._missed = self._missed, 0
        now_ns = time.time_ns()
        self._put_control(Lost(now_ns, missed, "queue"))
        loads = unloads = 0
        for event in difference(seen, self._publisher.held_copy(), now_ns):
            if (self._rule is not None and event.rule != self._rule) or event.rule in self._without_rules:
                continue
            loads += event.event == "load"
            unloads += event.event == "unload"
            if event.event in self._events:
                self._put(event)
        self._put_control(Repaired(now_ns, loads, unloads, time.monotonic() - begun))

    def hand_over(self) -> None:
        """Gives the reader what was offered since the last time."""
        batch = self._batch
        if batch:
            self._batch = []
            self._queue.put(batch)
            self._signal()

    def end(self) -> None:
        """Hands over what is left, and ends the queue."""
        self._is_closed = True
        self.hand_over()
        self._queue.put(None)
        self._signal()

    def _put_control(self, event: Event) -> None:
        if self._control:
            self._put(event)

    def _put(self, event: Event) -> None:
        self._activated = (event.rule, event.library.id) if isinstance(event, Activate) else None
        size_bytes = size_of(event)
        self._backlog.add(size_bytes)
        self._batch.append((event, size_bytes))

    def _signal(self) -> None:
        if self._on_event is not None:
            self._on_event()


#: `LibraryEvent`, which is asked for faster as a tuple.
_LIBRARY_EVENTS: Final = (Load, Unload, Activate, Deactivate)
#: Events that name the rule that wanted their file.
_OF_A_RULE: Final = (*get_args(LibraryEvent), Stale, Renewed)


def _is_wanted(kind: type[Event], events: Collection[str], *, control: bool) -> bool:
    return kind.event in events if issubclass(kind, LibraryEvent | AddedEvent) else control


def difference(seen: Loads, now: Loads, now_ns: int) -> Iterator[LibraryEvent]:
    """The events that lead from one published map to another, cause ``repair``."""
    before, after = _active(seen), _active(now)
    activated: set[tuple[str, FileId]] = set()
    for process, files in seen.items():
        for file, old in files.items():
            kept = now.get(process, {}).get(file)
            if kept is None or kept.rule != old.rule:
                yield Unload(old.rule, old.library, old.process, "repair", old.t_ns, now_ns)
    gone: set[tuple[str, FileId]] = set()
    for files in seen.values():
        for file, old in files.items():
            key = (old.rule, file)
            if key not in after and key not in gone:
                gone.add(key)
                yield Deactivate(old.rule, old.library, None, old.t_ns, now_ns)
    for process, files in now.items():
        for file, new in files.items():
            known = seen.get(process, {}).get(file)
            if known is not None and known.rule == new.rule:
                continue
            key = (new.rule, file)
            if key not in before and key not in activated:
                activated.add(key)
                yield Activate(new.rule, new.library, new.process, None, new.t_ns, now_ns)
            yield replace(new, cause="repair", time_ns=now_ns)


def _active(held: Loads) -> set[tuple[str, FileId]]:
    """Each rule and file of which some process has a load event in force."""
    return {(event.rule, file) for files in held.values() for file, event in files.items()}
