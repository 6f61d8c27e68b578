"""`Sender`: the thread that takes records to a receiver, and waits as long as that does not answer.

It holds one batch, which it sends again until the receiver takes it; everything else stays with the source, which makes
no queue without end of it.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections.abc import Sequence
from typing import Final, Protocol

from msgspec import Struct

from sowatch.fleet.exporter import Refusal
from sowatch.fleet.records import Record

__all__ = ["RecordExporter", "RecordSource", "Sender", "SenderStats"]

LOG = logging.getLogger("sowatch.agent")

#: Records of one request.
BATCH: Final = 512
#: How long records wait for others, so that what happens at the same time is one request.
LINGER_S: Final = 1.0
#: Between two tries; doubled up to the second.
_FIRST_PAUSE_S: Final = 1.0
_LAST_PAUSE_S: Final = 60.0
#: How long the thread is waited for once the exporter was closed.
_GRACE_S: Final = 0.5


class RecordExporter(Protocol):
    """A `sowatch.fleet.exporter.FleetExporter`."""

    def send(self, records: Sequence[Record]) -> None:
        """Raises `Refusal` if they did not arrive."""

    def close(self) -> None:
        """Ends a `send` that waits; from any thread."""


class RecordSource(Protocol):
    """Where records come from; called by the thread of the sender."""

    def take(self, limit: int) -> list[Record]:
        """The next ones, if there are any."""

    def drop(self, count: int) -> None:
        """Some that were taken will not arrive."""


class SenderStats(Struct, frozen=True):
    """Figures so far.

    Attributes:
        sent: records that the receiver took.
        errors: requests that failed.
        waiting: records of the batch that is being sent.
        is_up: whether the last request succeeded, True before the first; and the thread lives.
        last_error: why it did not.
    """

    sent: int
    errors: int
    waiting: int
    is_up: bool
    last_error: str | None


class Sender:
    """Sends what a source has, on a thread of its own from `start` on.

    Args:
        source: see `wake`.
        exporter: owned.
        linger_s: see `LINGER_S`.
    """

    def __init__(self, source: RecordSource, exporter: RecordExporter, *, linger_s: float = LINGER_S) -> None:
        self._source = source
        self._exporter = exporter
        self._linger_s = linger_s
        self._batch: list[Record] = []
        self._size = BATCH
        self._sent = 0
        self._errors = 0
        self._last_error: str | None = None
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._deadline_s = float("inf")
        self._thread = threading.Thread(target=self._run, name="sowatch-fleet-send", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def wake(self) -> None:
        """The source has records; any thread, at once."""
        self._wake.set()

    @property
    def stats(self) -> SenderStats:
        """The figures so far; any thread."""
        has_died = self._thread.ident is not None and not self._thread.is_alive() and not self._closing.is_set()
        is_up = self._last_error is None and not has_died
        return SenderStats(self._sent, self._errors, len(self._batch), is_up, self._last_error)

    def close(self, timeout_s: float) -> None:
        """Sends what there is for so long, ends the thread. Safe to call again."""
        self._deadline_s = time.monotonic() + (timeout_s if self._last_error is None else 0.0)
        self._closing.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s if self._last_error is None else _GRACE_S)
            if self._thread.is_alive():
                self._exporter.close()
                self._thread.join(_GRACE_S)
        self._exporter.close()

    def _run(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                if not self._batch and not self._fill():
                    return
                refusal = self._send()
            except Exception as error:
                LOG.exception("records of the fleet could not be taken; it is tried again")
                refusal = self._fault(error)
            if refusal is None or (refusal.is_too_large and self._batch):
                pause_s = _FIRST_PAUSE_S
                continue
            if self._closing.is_set():
                return
            # Not all agents at the same time, once a receiver answers again.
            spread = random.uniform(0.8, 1.2)  # noqa: S311 - no secret
            self._closing.wait(
                pause_s * spread if refusal.retry_after_s is None else refusal.retry_after_s + spread - 0.8
            )
            pause_s = min(_LAST_PAUSE_S, 2 * pause_s)

    def _fill(self) -> bool:
        """Waits for records; False at the end."""
        while True:
            is_last = self._closing.is_set()
            self._wake.clear()
            self._batch = self._source.take(BATCH)
            if self._batch:
                return time.monotonic() < self._deadline_s
            if is_last:
                return False
            self._wake.wait()
            if not self._closing.is_set():
                self._closing.wait(self._linger_s)

    def _fault(self, error: Exception) -> Refusal:
        """The source has failed; what it would have given may be lost, so everything is sent anew."""
        self._errors += 1
        self._last_error = f"records could not be taken: {error}"
        with contextlib.suppress(Exception):
            self._source.drop(0)
        return Refusal(self._last_error)

    def _send(self) -> Refusal | None:
        some = self._batch[: self._size]
        try:
            self._exporter.send(some)
        except Refusal as refusal:
            return self._note(refusal)
        except Exception as error:  # noqa: BLE001 - whatever a library raises: counted, logged, tried again
            return self._note(Refusal(f"records could not be sent: {error}"))
        if self._last_error is not None:
            LOG.warning("the fleet's receiver takes records again")
        self._sent += len(some)
        del self._batch[: len(some)]
        self._size = min(BATCH, 2 * self._size)
        self._last_error = None
        return None

    def _note(self, refusal: Refusal) -> Refusal:
        self._errors += 1
        if self._last_error is None:
            LOG.warning("the fleet's receiver did not take records: %s", refusal)
        self._last_error = str(refusal)
        if refusal.is_too_large and self._size > 1:
            # Half of what was sent, and so on down to one record, which is given up then.
            self._size = min(self._size, len(self._batch)) // 2 or 1
        elif refusal.is_final:
            self._source.drop(len(self._batch))
            self._batch = []
        return refusal
