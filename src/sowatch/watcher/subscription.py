"""`Subscription`: what a reader of a watch holds. The engine's side of the same queue is not in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from sowatch.engine.subscription import SubscriberQueue
from sowatch.model.events import Event

__all__ = ["Subscription"]


class Subscription:
    """One reader's events, as `Watcher.subscribe` gives it. Iterate over it, or `get`; a context manager.

    A reader that falls behind by more than the limits loses events; when it has caught up it gets
    `Lost` (where ``queue``), then whatever changed meanwhile with cause ``repair``, then
    `Repaired`. Iteration ends after `Stopped`, or after `close`. Any one thread may read.

    >>> with Watcher() as watcher, watcher.subscribe() as subscription:  # doctest: +SKIP
    ...     for event in subscription:
    ...         print(event.event)
    """

    __slots__ = ("_queue",)

    def __init__(self, queue: SubscriberQueue) -> None:
        self._queue = queue

    def __repr__(self) -> str:
        state = "ended" if self.has_ended else "open"
        return f"<Subscription {state}: {self.waiting} waiting, {self.lost} lost>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.close()

    def __iter__(self) -> Iterator[Event]:
        return iter(self._queue)

    def get(self, timeout_s: float | None = None) -> Event | None:
        """The next event; None after the last one, or if none came within the time.

        `has_ended` distinguishes the two.

        Raises:
            UsageError: in a child of ``os.fork()``, where no event comes.
        """
        return self._queue.get(timeout_s)

    @property
    def has_ended(self) -> bool:
        """Whether `get` will give nothing any more."""
        return self._queue.has_ended

    @property
    def waiting(self) -> int:
        """Events that were queued and not yet read."""
        return self._queue.waiting

    @property
    def waiting_bytes(self) -> int:
        """About how many bytes they take."""
        return self._queue.waiting_bytes

    @property
    def lost(self) -> int:
        """Events that this reader has lost so far, because it was slow."""
        return self._queue.lost

    def close(self) -> None:
        """No further events; wakes a reader. Safe to call again, from any thread."""
        self._queue.close()

    def call_on_event(self, callback: Callable[[], None] | None) -> None:
        """A callback on the engine's thread whenever there is something to `get`; it must not block. None: no more."""
        self._queue.call_on_event(callback)
