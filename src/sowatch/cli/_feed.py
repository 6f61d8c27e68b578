"""One watch whose events are shown, from its start to its `Stopped`: what ``watch`` and ``run`` have in common."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from sowatch.cli._options import WatcherLike
from sowatch.cli._out import Out, PipeClosed
from sowatch.model.errors import SowatchError
from sowatch.model.events import Event, Lost, Ready, Repaired, Stopped
from sowatch.model.literals import EventKinds
from sowatch.model.plural import counted

if TYPE_CHECKING:
    from sowatch.cli._views import View

__all__ = ["Feed", "warn_of_fallback"]

#: Events written between two flushes while more are waiting.
_BATCH: Final = 256
#: How often, while the watcher starts, we look whether it failed.
_START_TICK_S: Final = 0.05
#: One that is to be stopped while it starts (loads, compiles, takes its snapshot) is waited for so long, then left: it
#: ends with this process.
_START_ENDS_S: Final = 0.4


class Feed:
    """Starts a watcher on a thread of its own, so that the snapshot is shown while it is taken.

    A snapshot may be larger than a subscriber's queue; reading it only after ``start()`` would lose part of it.

    Args:
        watcher: not started yet.
        out: where the view writes.
        warn: gets a line for stderr.
        on_ready: called with `Ready` once it is shown.
    """

    def __init__(
        self,
        watcher: WatcherLike,
        out: Out,
        warn: Callable[[str], None],
        on_ready: Callable[[Ready], None] = lambda _: None,
    ) -> None:
        self._watcher = watcher
        self._out = out
        self._warn = warn
        self._on_ready = on_ready
        self._is_begun = False
        self._is_up = threading.Event()
        self._error: BaseException | None = None
        self._is_asked_to_stop = False
        self._is_left = False
        self._is_stopped = False
        self._unrepaired = 0

    def show(self, view: View, events: EventKinds) -> None:
        """Shows events until `Stopped`: each at once, and as many together as are waiting.

        Raises:
            PipeClosed: the reader of the output has gone.
            SowatchError: the watcher could not start.
        """
        subscription = self._watcher.subscribe(events=events)
        self._is_begun = True
        if self._is_asked_to_stop:
            self._is_left = True  # it is not to begin
        else:
            threading.Thread(target=self._start, name="sowatch-start", daemon=True).start()
        try:
            seq = 0
            is_ending = False
            while not self._is_stopped:
                event = subscription.get(view.tick_s if self._is_up.is_set() else _START_TICK_S)
                if event is not None and not self._is_left:
                    seq = self._show_waiting(event, seq, view, subscription.get)
                    continue
                if self._is_left or is_ending:
                    # The watcher was left, or has ended and its queue is empty: there is no `stopped` to come.
                    if self._is_asked_to_stop:
                        self._show(self._stopped(), seq + 1, view)
                        view.flush()
                    return
                if self._is_up.is_set() and self._error is not None:
                    raise self._error
                if self._out.reader_is_gone():
                    raise PipeClosed
                view.idle()
                is_ending = self._is_up.is_set() and self._watcher.wait(0)
        finally:
            view.close()
            subscription.close()

    def stop(self) -> None:
        """Stops the watcher; one that is still starting after `_START_ENDS_S` is left. Any thread, more than once."""
        self._is_asked_to_stop = True
        if not self._is_begun or self._is_left:
            return
        if self._is_up.wait(_START_ENDS_S):
            self._watcher.stop()
        else:
            self._is_left = True

    def exit_code(self) -> int:
        """What the command ends with, once `show` has returned."""
        if not self._is_stopped:
            self._warn("the watch ended before it was stopped. The lines so far are right.")
            return 1
        if self._unrepaired:
            were = "was" if self._unrepaired == 1 else "were"
            self._warn(f"{counted(self._unrepaired, 'event')} {were} lost and not made good before the end.")
            return 1
        return 0

    def _start(self) -> None:
        try:
            self._watcher.start()
        except BaseException as error:  # noqa: BLE001  (raised again by `show` on the main thread)
            self._error = error
        finally:
            self._is_up.set()

    def _show_waiting(self, event: Event | None, seq: int, view: View, get: Callable[[float], Event | None]) -> int:
        try:
            while event is not None and not self._is_left:
                seq += 1
                self._show(event, seq, view)
                if self._is_stopped:
                    break
                if seq % _BATCH == 0:
                    view.flush()
                event = get(0)
        except SowatchError:
            with suppress(SowatchError, PipeClosed):
                view.flush()  # what came before is right
            raise
        view.flush()
        return seq

    def _show(self, event: Event, seq: int, view: View) -> None:
        view.show(event, seq)
        if isinstance(event, Lost):
            self._unrepaired += event.count
        elif isinstance(event, Repaired):
            self._unrepaired = 0
        elif isinstance(event, Stopped):
            self._is_stopped = True
        elif isinstance(event, Ready):
            warn_of_fallback(event, self._warn)
            view.flush()  # an output that fails does so before anything is begun
            self._on_ready(event)

    def _stopped(self) -> Stopped:
        """Of a watch that was asked to end and could not say so itself in time."""
        stats = self._watcher.stats
        return Stopped(time.time_ns(), stats.loads, stats.unloads, stats.lost_kernel + stats.lost_queue)


def warn_of_fallback(ready: Ready, warn: Callable[[str], None]) -> None:
    """Say so if a weaker strategy than the best had to do: what is lost, and how to get more."""
    if ready.guarantee == "exact":
        return
    failed = "; ".join(f"{one.strategy}: {one.error}" for one in ready.attempts if not one.ok)
    because = f" because {failed}" if failed else ""
    limits = f" Limits: {'; '.join(ready.limits)}." if ready.limits else ""
    as_root = "Run it as root to see everything: sudo sowatch ... " if "CAP_" in failed else ""
    warn(f"watching with {ready.strategy} ({ready.guarantee}){because}.{limits} {as_root}See `sowatch doctor`.")
