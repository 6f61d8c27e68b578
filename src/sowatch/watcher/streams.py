"""`watch` and `awatch`: the whole product in one function, and its twin for asyncio.

Each runs a `Watcher` of its own for as long as somebody iterates.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Collection, Iterator
from typing import TYPE_CHECKING, Literal, TypedDict, Unpack, overload

from sowatch.model.config import Config
from sowatch.model.events import Event, LibraryEvent, Load, Unload
from sowatch.model.literals import EventKinds
from sowatch.model.rules import Rule
from sowatch.watcher.watcher import Watcher

if TYPE_CHECKING:
    import asyncio

__all__ = ["awatch", "watch"]


def _rules_of(patterns: tuple[str | Rule, ...]) -> list[Rule]:
    """Rules as they are, and one for each different text."""
    texts = [pattern for pattern in patterns if not isinstance(pattern, Rule)]
    rules = [pattern for pattern in patterns if isinstance(pattern, Rule)]
    rules += [Rule(text) for text in dict.fromkeys(texts)]
    return rules


class WatchOptions(TypedDict, total=False):
    """Options of `Watcher` that `watch` and `awatch` take."""

    config: Config
    pids: Collection[int]
    follow: bool
    container: str | None
    exclude_self: bool
    exclude_pids: Collection[int]
    snapshot: bool


@overload
def watch(
    *patterns: str | Rule,
    stop: threading.Event | None = None,
    events: EventKinds = ...,
    control: Literal[True],
    **options: Unpack[WatchOptions],
) -> Iterator[Event]: ...
@overload
def watch(
    *patterns: str | Rule,
    stop: threading.Event | None = None,
    events: EventKinds,
    control: Literal[False] = False,
    **options: Unpack[WatchOptions],
) -> Iterator[LibraryEvent]: ...
@overload
def watch(
    *patterns: str | Rule,
    stop: threading.Event | None = None,
    control: Literal[False] = False,
    **options: Unpack[WatchOptions],
) -> Iterator[Load | Unload]: ...
def watch(
    *patterns: str | Rule,
    stop: threading.Event | None = None,
    events: EventKinds = ("load", "unload"),
    control: bool = False,
    **options: Unpack[WatchOptions],
) -> Iterator[Event]:
    r"""Library events of the whole host, one after the other, until ``stop`` is set.

    Args:
        patterns: regular expressions or rules; none: every shared library.
        stop: ends the iteration; checked ten times a second.
        events: which of ``load``, ``unload``, ``activate``, ``deactivate``.
        control: also `Ready`, `Lost`, `Repaired` and `Stopped`: who counts what is there learns of a gap by them.
        options: as for `Watcher`: ``config``, ``pids``, ``follow``, ``container``, ``exclude_self``,
            ``exclude_pids``, ``snapshot``.

    Raises:
        SowatchError: at the first step, before anything is attached; see `Watcher.start`.

    >>> for event in watch(r"libssl\.so"):  # doctest: +SKIP
    ...     print(event.cause, event.process.pid, event.library.path)
    """
    watcher = Watcher(*_rules_of(patterns), **options)
    with watcher.subscribe(events=events, control=control) as subscription:
        with watcher:
            while stop is None or not stop.is_set():
                event = subscription.get(None if stop is None else 0.1)
                if event is not None:
                    yield event
                elif subscription.has_ended:
                    return
        if control:
            yield from subscription


@overload
def awatch(
    *patterns: str | Rule,
    stop: asyncio.Event | None = None,
    events: EventKinds = ...,
    control: Literal[True],
    **options: Unpack[WatchOptions],
) -> AsyncIterator[Event]: ...
@overload
def awatch(
    *patterns: str | Rule,
    stop: asyncio.Event | None = None,
    events: EventKinds,
    control: Literal[False] = False,
    **options: Unpack[WatchOptions],
) -> AsyncIterator[LibraryEvent]: ...
@overload
def awatch(
    *patterns: str | Rule,
    stop: asyncio.Event | None = None,
    control: Literal[False] = False,
    **options: Unpack[WatchOptions],
) -> AsyncIterator[Load | Unload]: ...
async def awatch(
    *patterns: str | Rule,
    stop: asyncio.Event | None = None,
    events: EventKinds = ("load", "unload"),
    control: bool = False,
    **options: Unpack[WatchOptions],
) -> AsyncIterator[Event]:
    """`watch` for asyncio: the same words and options; ``stop`` is an `asyncio.Event`.

    Loading the programs and stopping run in a thread, so the event loop goes on meanwhile.
    """
    # Here, not above: it takes as long to import as all the rest, and maps libssl.
    import asyncio

    loop = asyncio.get_running_loop()
    watcher = Watcher(*_rules_of(patterns), **options)
    news = asyncio.Event()
    is_signalled = threading.Event()

    def signal() -> None:
        if not is_signalled.is_set():
            is_signalled.set()
            loop.call_soon_threadsafe(news.set)

    subscription = watcher.subscribe(events=events, control=control)
    subscription.call_on_event(signal)
    reads_to_the_end = False
    stopper = None if stop is None else asyncio.ensure_future(_set_when(stop, news))
    try:
        await asyncio.to_thread(watcher.start)
        while stop is None or not stop.is_set():
            await news.wait()
            news.clear()
            is_signalled.clear()
            while (event := subscription.get(0)) is not None:
                yield event
            if subscription.has_ended:
                return
        reads_to_the_end = control
    finally:
        subscription.call_on_event(None)
        if stopper is not None:
            stopper.cancel()
        if not reads_to_the_end:
            subscription.close()
        await asyncio.to_thread(watcher.stop)
    with subscription:
        while reads_to_the_end and (event := subscription.get(0)) is not None:
            yield event


async def _set_when(stop: asyncio.Event, news: asyncio.Event) -> None:
    await stop.wait()
    news.set()
