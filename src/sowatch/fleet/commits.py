"""Group commit: requests that come while an insert runs are the next one. One thread inserts.

What a request brought is on the disk when its future has a result. Where an insert of several fails for what one of
them has, each is tried by itself, so that none fails for another one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Final, Protocol

from msgspec import Struct

from sowatch.fleet.log_requests import Decoded
from sowatch.fleet.store import StoreFull
from sowatch.model.errors import SowatchError

__all__ = ["CommitCounts", "Commits", "QueueFull"]

LOG = logging.getLogger("sowatch.fleet")

#: Rows that wait for their insert; more are refused until there is room.
QUEUE_BYTES: Final = 64 << 20
#: Rows of one insert, and days that they are of: each day is a part of its own.
INSERT_BYTES: Final = 32 << 20
INSERT_DAYS: Final = 64
#: Between two lines about inserts that fail.
_COMPLAINT_S: Final = 30.0


class QueueFull(SowatchError):
    """Too much waits for its insert."""

    def __init__(self) -> None:
        super().__init__("too many records wait to be stored. Send them again in some seconds.")


class Inserts(Protocol):
    """What the rows go to: a `sowatch.fleet.store.Store`."""

    def insert(self, rows: Iterable[bytes]) -> None:
        """Returns when they are on the disk."""
        ...


class CommitCounts(Struct):
    """What was inserted since the start; each number only grows but those of what waits.

    Attributes:
        inserts: that succeeded.
        failures: inserts that did not, those of a full disk among them.
        last_s: of `time.monotonic`, when the last one succeeded; None: none yet.
    """

    records: int = 0
    bytes: int = 0
    inserts: int = 0
    failures: int = 0
    insert_s: float = 0.0
    last_s: float | None = None
    waiting_records: int = 0
    waiting_bytes: int = 0


class _Waiting(Struct):
    decoded: Decoded
    done: Future[None]


class Commits:
    """Inserts what is submitted, in order, on a thread of its own.

    Args:
        store: closed by the one who made it, after `close`.
    """

    def __init__(self, store: Inserts) -> None:
        self._store = store
        self._waiting: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._is_closing = False
        self._complained_s = -_COMPLAINT_S
        self.counts = CommitCounts()
        #: Why the last insert failed; None: it did not.
        self.failure: SowatchError | None = None
        self._thread = threading.Thread(target=self._run, name="sowatch-commits", daemon=True)
        self._thread.start()

    def submit(self, decoded: Decoded) -> Future[None]:
        """Its result comes when the rows are on the disk, its `SowatchError` when they cannot be stored.

        Raises:
            QueueFull: too much waits, or this is about to end.
        """
        done: Future[None] = Future()
        with self._changed:
            if self._is_closing or self.counts.waiting_bytes + decoded.bytes > QUEUE_BYTES:
                raise QueueFull
            self._waiting.append(_Waiting(decoded, done))
            self.counts.waiting_bytes += decoded.bytes
            self.counts.waiting_records += decoded.records
            self._changed.notify()
        return done

    def close(self) -> None:
        """Inserts what waits and ends the thread. Safe to call again."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while group := self._next_group():
            # One that nobody waits for any more was not answered. From here on it cannot be cancelled.
            self._commit([one for one in group if one.done.set_running_or_notify_cancel()])
            with self._changed:
                for one in group:
                    self.counts.waiting_bytes -= one.decoded.bytes
                    self.counts.waiting_records -= one.decoded.records

    def _next_group(self) -> list[_Waiting]:
        """Waits for something; empty when all is done."""
        with self._changed:
            while not self._waiting:
                if self._is_closing:
                    return []
                self._changed.wait()
            group = [self._waiting.popleft()]
            size = group[0].decoded.bytes
            days = set(group[0].decoded.days)
            while self._waiting:
                following = self._waiting[0].decoded
                size += following.bytes
                days |= following.days
                if size > INSERT_BYTES or len(days) > INSERT_DAYS:
                    break
                group.append(self._waiting.popleft())
            return group

    def _commit(self, group: list[_Waiting]) -> None:
        if not group:
            return
        begun_s = time.monotonic()
        try:
            self._store.insert([b"".join(one.decoded.rows) for one in group])
        except SowatchError as error:
            self._fail(group, error)
            return
        except Exception as error:
            # A fault of ours; the thread goes on with the next one.
            LOG.exception("%d records were not stored", sum(one.decoded.records for one in group))
            self.counts.failures += 1
            for one in group:
                one.done.set_exception(error)
            return
        now_s = time.monotonic()
        self.failure = None
        counts = self.counts
        counts.inserts += 1
        counts.insert_s += now_s - begun_s
        counts.last_s = now_s
        for one in group:
            counts.records += one.decoded.records
            counts.bytes += one.decoded.bytes
            one.done.set_result(None)

    def _fail(self, group: list[_Waiting], error: SowatchError) -> None:
        self.counts.failures += 1
        if len(group) > 1 and not isinstance(error, StoreFull):
            for one in group:
                self._commit([one])
            return
        self.failure = error
        if time.monotonic() - self._complained_s >= _COMPLAINT_S:
            self._complained_s = time.monotonic()
            LOG.error("%d records were not stored: %s", sum(one.decoded.records for one in group), error)
        for one in group:
            one.done.set_exception(error)
