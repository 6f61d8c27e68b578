"""`Backlog`: how much waits in a queue between two threads, and whether that is too much."""

from __future__ import annotations

__all__ = ["Backlog"]


class Backlog:
    """What was put into a queue and not yet taken out, in events and in bytes.

    One thread adds and one takes, without a lock: each writes numbers of its own. Any thread may read.

    Args:
        limit: events that may wait.
        limit_bytes: what they may take.
    """

    __slots__ = ("_added", "_added_bytes", "_limit", "_limit_bytes", "_taken", "_taken_bytes")

    def __init__(self, limit: int, limit_bytes: int) -> None:
        self._limit = limit
        self._limit_bytes = limit_bytes
        self._added = self._added_bytes = 0
        self._taken = self._taken_bytes = 0

    def add(self, size_bytes: int, events: int = 1) -> None:
        """Some were put in."""
        self._added += events
        self._added_bytes += size_bytes

    def take(self, size_bytes: int, events: int = 1) -> None:
        """Some were taken out."""
        self._taken += events
        self._taken_bytes += size_bytes

    @property
    def events(self) -> int:
        """How many wait."""
        return self._added - self._taken

    @property
    def bytes(self) -> int:
        """What they take."""
        return self._added_bytes - self._taken_bytes

    @property
    def is_full(self) -> bool:
        """Whether either limit is reached."""
        # Asked for each event: without the properties, which take longer than what they compute.
        return self._added - self._taken >= self._limit or self._added_bytes - self._taken_bytes >= self._limit_bytes

    def is_below(self, divisor: int) -> bool:
        """Whether what waits is at most that part of both limits: 2 for a half, 4 for a quarter."""
        return self.events <= self._limit // divisor and self.bytes <= self._limit_bytes // divisor
