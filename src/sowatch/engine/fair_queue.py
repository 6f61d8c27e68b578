"""`FairQueue`: what several ask for, one of each by turns, so that nobody waits behind all that another one wants."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

__all__ = ["FairQueue"]

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Any thread may put and get. Items of one asker keep their order."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        #: By asker, the one whose turn is next first.
        self._waiting: dict[Hashable, deque[T]] = {}

    def put(self, asker: Hashable, item: T) -> None:
        """Adds an item behind those of the same asker."""
        with self._changed:
            queue = self._waiting.get(asker)
            if queue is None:
                queue = self._waiting[asker] = deque()
            queue.append(item)
            self._changed.notify()

    def get(self) -> T:
        """The first item of the one whose turn it is; waits for one."""
        with self._changed:
            while not self._waiting:
                self._changed.wait()
            asker = next(iter(self._waiting))
            queue = self._waiting.pop(asker)
            item = queue.popleft()
            if queue:
                self._waiting[asker] = queue
            return item
