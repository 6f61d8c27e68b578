"""Where events go besides subscribers: the `Sink` protocol, and the thread that feeds one.

The queue between the watcher and a sink is a subscription like any reader's: bounded, never waited for by the
watcher, its losses counted apart from the kernel's and made good by a repair once the sink has caught up.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Protocol, Self

from msgspec import Struct

from sowatch.model.errors import SinkError
from sowatch.model.events import Event
from sowatch.watcher.subscription import Subscription

__all__ = ["Sink", "SinkRunner", "SinkStats"]

LOG = logging.getLogger("sowatch.telemetry")

#: Events handed over at once.
_BATCH_EVENTS: Final = 512
#: Between two tries; doubled up to the second.
_FIRST_PAUSE_S: Final = 0.1
_LAST_PAUSE_S: Final = 5.0
#: Between two tries while the end is waited for.
_CLOSING_PAUSE_S: Final = 0.05
#: How long the thread of a sink that is to end is waited for.
_GRACE_S: Final = 0.2


class Sink(Protocol):
    """Takes events: `FileSink`, `StdoutSink`, `OtlpLogSink`. One thread calls ``write`` and ``close``."""

    @property
    def name(self) -> str:
        """What metrics and messages call it."""

    def write(self, events: Sequence[Event]) -> int:
        """Delivers events in order; how many. May wait some seconds.

        Those it did not deliver are given again, with those that came meanwhile.

        Raises:
            SinkError: it did not take all of them, and why; ``delivered`` says how many it did.
        """

    def reopen(self) -> None:
        """Asks for its file to be opened anew by its name, as after a rotation; from any thread, at once."""

    def interrupt(self) -> None:
        """Ends a ``write`` that waits, as far as that can be done; from any thread, at once. No more come then."""

    def close(self) -> None:
        """Gives back what it holds. Safe to call again."""


class SinkStats(Struct, frozen=True):
    """Figures of a sink so far.

    Attributes:
        events: delivered.
        lost: missed because the sink was slow, or not delivered before it was closed.
        errors: deliveries that failed.
        waiting: in its queue.
        is_up: whether the last delivery succeeded; True before the first.
        last_error: why it did not.
    """

    events: int
    lost: int
    errors: int
    waiting: int
    is_up: bool
    last_error: str | None


class SinkRunner:
    """The thread that takes events from a subscription to a sink. A context manager.

    It owns both. What a sink does not take is tried again, less and less often; meanwhile the
    subscription fills up and loses events, which the sink gets as `Lost` (where ``queue``) and the
    repair that follows. It ends with the watch, with `close`, or when the sink says that it never will
    take anything again.

    Args:
        sink: where to.
        subscription: where from; ``watcher.subscribe(limit=...)``, made before the start to have the snapshot.
    """

    def __init__(self, sink: Sink, subscription: Subscription) -> None:
        self.name = sink.name
        self._sink = sink
        self._subscription = subscription
        self._closing = threading.Event()
        self._deadline_s = float("inf")
        self._batch: list[Event] = []
        self._events = 0
        self._errors = 0
        self._lost_at_the_end = 0
        self._has_ended = False
        self._last_error: str | None = None
        self._thread = threading.Thread(target=self._run, name=f"sowatch-sink-{self.name}"[:60], daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def reopen(self) -> None:
        """See `Sink.reopen`."""
        self._sink.reopen()

    def close(self, timeout_s: float = 2.0, *, stall_s: float | None = None) -> None:
        """Delivers what waits for up to ``timeout_s``, counts the rest as lost, ends the thread.

        Returns after about that time even if the sink is stuck, or after ``stall_s`` in which it took nothing. Safe to
        call again, from any thread.
        """
        self._deadline_s = min(self._deadline_s, time.monotonic() + timeout_s)
        self._closing.set()
        self._subscription.close()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._await_delivery(stall_s or timeout_s)
            self._thread.join(max(0.0, self._deadline_s - time.monotonic()) + _GRACE_S)
            if self._thread.is_alive():
                self._sink.interrupt()
                self._thread.join(_GRACE_S)
            if self._thread.is_alive():
                LOG.warning("the sink %s is stuck and was abandoned; it missed %d events", self.name, self.stats.lost)

    def _await_delivery(self, stall_s: float) -> None:
        """Until the thread has ended, or the time is up; once the sink has taken nothing for so long it is up."""
        seen, since_s = self._events, time.monotonic()
        while self._thread.is_alive() and (now_s := time.monotonic()) < self._deadline_s:
            if self._events != seen:
                seen, since_s = self._events, now_s
            elif now_s - since_s >= stall_s:
                self._deadline_s = now_s
                return
            self._thread.join(min(_CLOSING_PAUSE_S, self._deadline_s - now_s))

    @property
    def stats(self) -> SinkStats:
        """The figures so far; from any thread."""
        subscription = self._subscription
        waiting = 0 if self._has_ended else subscription.waiting + len(self._batch)
        is_over = not self._has_ended and time.monotonic() >= self._deadline_s
        return SinkStats(
            events=self._events,
            lost=subscription.lost + self._lost_at_the_end + (waiting if is_over else 0),
            errors=self._errors,
            waiting=0 if is_over else waiting,
            is_up=self._last_error is None,
            last_error=self._last_error,
        )

    def _run(self) -> None:
        pause_s = _FIRST_PAUSE_S
        try:
            while self._fill():
                error = self._deliver()
                if error is None:
                    pause_s = _FIRST_PAUSE_S
                    continue
                if error.is_final or time.monotonic() >= self._deadline_s:
                    break
                self._pause(pause_s)
                pause_s = min(_LAST_PAUSE_S, 2 * pause_s)
        finally:
            self._subscription.close()
            self._lost_at_the_end = self._subscription.waiting + len(self._batch)
            self._has_ended = True
            if self._lost_at_the_end:
                LOG.warning("the sink %s ended before it took the last %d events", self.name, self._lost_at_the_end)
            self._close_sink()

    def _fill(self) -> bool:
        """Takes more events, waiting for one if there is none; False at the end."""
        batch = self._batch
        timeout_s: float | None = 0.0 if batch else None
        while len(batch) < _BATCH_EVENTS and (event := self._subscription.get(timeout_s)) is not None:
            batch.append(event)
            timeout_s = 0.0
        return bool(batch)

    def _deliver(self) -> SinkError | None:
        try:
            delivered = self._sink.write(self._batch)
            error = None
        except SinkError as refused:
            delivered, error = refused.delivered, refused
        except Exception as unknown:  # noqa: BLE001 - whatever a library raises must not end the sink in silence
            delivered, error = 0, SinkError(f"the sink {self.name} failed: {unknown}")
        self._events += delivered
        del self._batch[:delivered]
        if error is not None:
            self._errors += 1
            if self._last_error is None:
                LOG.warning("the sink %s did not take events: %s", self.name, error)
        elif self._last_error is not None:
            LOG.warning("the sink %s takes events again", self.name)
        self._last_error = None if error is None else str(error)
        return error

    def _pause(self, pause_s: float) -> None:
        if self._closing.wait(pause_s):
            # Once closing, the event is set for good; a little breath between the last tries.
            time.sleep(min(_CLOSING_PAUSE_S, max(0.0, self._deadline_s - time.monotonic())))

    def _close_sink(self) -> None:
        try:
            self._sink.close()
        except Exception:
            LOG.exception("the sink %s could not be closed", self.name)
