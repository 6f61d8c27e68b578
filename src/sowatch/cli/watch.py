"""Live feed of loads and unloads.

First what is mapped already (cause `snapshot`), then `ready`, then every change as it happens, on
the whole host and in all its containers. On a terminal it scrolls in colour. SIGINT, SIGTERM or
--duration end it with `stopped`.

Examples:
  sowatch watch                                  every shared library
  sowatch watch 'libssl|libgnutls'               who uses TLS
  sowatch watch --pid 1234 --events load         what one process still loads
  sowatch watch --json libcuda | jq .process     for programs
"""

# Heavy modules (the watcher, rich) are imported only where they are used.

from __future__ import annotations

import threading
from argparse import Namespace
from collections.abc import Callable
from typing import Final

from sowatch.cli._options import (
    OpenWatcher,
    Selection,
    SubscriptionLike,
    WatcherLike,
    add_common,
    open_watcher,
    selection_of,
    wants_json,
)
from sowatch.cli._out import Out, PipeClosed
from sowatch.cli._parser import Parser, event_list
from sowatch.cli._stop import Stopper
from sowatch.cli._views import JsonView, TextView, View
from sowatch.model.errors import UsageError
from sowatch.model.events import Event, Lost, Ready, Repaired, Stopped
from sowatch.model.literals import EVENT_KINDS

#: Events written between two flushes while more are waiting.
_BATCH: Final = 256
#: How often, while the watcher starts, we look whether it failed.
_START_TICK_S: Final = 0.05
#: How long the last lines wait for a reader that does not read.
_LAST_WORDS_S: Final = 2.0


def configure(parser: Parser) -> None:
    """Add the command's options."""
    add_common(parser, has_baseline=True)
    parser.add_argument(
        "--events",
        type=event_list(EVENT_KINDS),
        default=EVENT_KINDS,
        metavar="LIST",
        help=f"comma-separated: {','.join(EVENT_KINDS)}. Default: all. Control events are always sent",
    )


def run(args: Namespace, *, out: Out, warn: Callable[[str], None], open_watcher: OpenWatcher = open_watcher) -> int:
    """Watch until the end is asked for; returns the exit code."""
    if not args.events:
        raise UsageError("--events needs at least one event.")
    as_json = wants_json(args)
    selection = selection_of(args)
    start = _Start()

    def stop() -> None:
        out.finish_within(_LAST_WORDS_S)
        start.stop()

    with Stopper(stop) as stopper:
        try:
            watcher = open_watcher(selection)
            subscription = watcher.subscribe(events=args.events)
            view = JsonView(out) if as_json else _view_for_people(out, selection, watcher)
            tally = _Tally(warn)
            try:
                start.begin(watcher)
                _follow(watcher, subscription, start, view, tally, out, stopper, args.duration)
            finally:
                view.close()
        except PipeClosed:
            out.discard()
            return 0
        finally:
            start.stop()
        subscription.close()
    return tally.exit_code()


def _view_for_people(out: Out, selection: Selection, watcher: WatcherLike) -> View:
    with_rule = len(selection.rules) > 1
    if not out.is_terminal:
        return TextView(out, with_rule=with_rule)
    from sowatch.cli._live import LiveView

    return LiveView(out, stats=lambda: watcher.stats, with_rule=with_rule, fold_snapshot=not selection.is_selective)


class _Start:
    """Starts the watcher on a thread of its own, so that the snapshot is written while it is taken.

    A snapshot may be larger than a subscriber's queue; reading it only after ``start()`` would
    lose part of it.
    """

    def __init__(self) -> None:
        self._watcher: WatcherLike | None = None
        self._done = threading.Event()
        self._error: BaseException | None = None

    @property
    def under_way(self) -> bool:
        return not self._done.is_set()

    def begin(self, watcher: WatcherLike) -> None:
        self._watcher = watcher
        threading.Thread(target=self._run, name="sowatch-start", daemon=True).start()

    def check(self) -> None:
        """Raise what kept the watcher from starting."""
        if self._done.is_set() and self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Stop the watcher; one that is starting is stopped once it has."""
        if self._watcher is not None:
            self._done.wait()
            self._watcher.stop()

    def _run(self) -> None:
        assert self._watcher is not None
        try:
            self._watcher.start()
        except BaseException as error:  # noqa: BLE001  (raised again by `check` on the main thread)
            self._error = error
        finally:
            self._done.set()


class _Tally:
    """What of the feed decides about warnings and the exit code."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._is_stopped = False
        self._unrepaired = 0

    def note(self, event: Event) -> None:
        if isinstance(event, Lost):
            self._unrepaired += event.count
        elif isinstance(event, Repaired):
            self._unrepaired = 0
        elif isinstance(event, Stopped):
            self._is_stopped = True
        elif isinstance(event, Ready):
            warn_of_fallback(event, self._warn)

    def has_ended(self) -> bool:
        return self._is_stopped

    def exit_code(self) -> int:
        if not self._is_stopped:
            self._warn("the watch ended before it was stopped. The lines so far are right.")
            return 1
        if self._unrepaired:
            self._warn(f"{self._unrepaired} events were lost and not made good before the end.")
            return 1
        return 0


def warn_of_fallback(ready: Ready, warn: Callable[[str], None]) -> None:
    """Say so if a weaker strategy than the best had to do: what is lost, and how to get more."""
    if ready.guarantee == "exact":
        return
    failed = "; ".join(f"{one.strategy}: {one.error}" for one in ready.attempts if not one.ok)
    because = f" because {failed}" if failed else ""
    limits = f" Limits: {'; '.join(ready.limits)}." if ready.limits else ""
    as_root = "Run it as root to see everything: sudo sowatch ... " if "CAP_" in failed else ""
    warn(f"watching with {ready.strategy} ({ready.guarantee}){because}.{limits} {as_root}See `sowatch doctor`.")


def _follow(
    watcher: WatcherLike,
    subscription: SubscriptionLike,
    start: _Start,
    view: View,
    tally: _Tally,
    out: Out,
    stopper: Stopper,
    duration_s: float | None,
) -> None:
    """Show events until `Stopped`: each at once, and as many together as are waiting."""
    seq = 0
    is_ending = False
    while not tally.has_ended():
        event = subscription.get(_START_TICK_S if start.under_way else view.tick_s)
        if event is None:
            if is_ending:
                return  # the watcher has ended and its queue is empty: there is no `stopped` to come
            start.check()
            if out.reader_is_gone():
                raise PipeClosed
            view.idle()
            is_ending = not start.under_way and watcher.wait(0)
            continue
        batch = 0
        while event is not None:
            seq += 1
            view.show(event, seq)
            tally.note(event)
            if isinstance(event, Ready) and duration_s is not None:
                stopper.stop_after(duration_s)
            batch += 1
            if tally.has_ended() or batch == _BATCH:
                break
            event = subscription.get(0)
        view.flush()
