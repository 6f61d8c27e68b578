"""`watch` and `awatch`: the whole product in one function, and its twin for asyncio.

Each runs a `Watcher` of its own for as long as somebody iterates.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Collection, Iterator
from typing import TYPE_CHECKING, Any, overload

from sowatch.model.events import LibraryEvent, Load, Unload
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


@overload
def watch(
    *patterns: str | Rule, stop: threading.Event | None = None, events: Collection[str], **options: Any
) -> Iterator[LibraryEvent]: ...
@overload
def watch(*patterns: str | Rule, stop: threading.Event | None = None, **options: Any) -> Iterator[Load | Unload]: ...
def watch(
    *patterns: str | Rule,
    stop: threading.Event | None = None,
    events: Collection[str] = ("load", "unload"),
    **options: Any,
) -> Iterator[LibraryEvent]:
    r"""Library events of the whole host, one after the other, until ``stop`` is set.

    Args:
        patterns: regular expressions or rules; none: every shared library.
        stop: ends the iteration; checked ten times a second.
        events: which of ``load``, ``unload``, ``activate``, ``deactivate``.
        options: as for `Watcher`: ``config``, ``pids``, ``container``, ``exclude_self``, ``exclude_pids``,
            ``snapshot``.

    Raises:
        SowatchError: at the first step, before anything is attached; see `Watcher.start`.

    >>> for event in watch(r"libssl\.so"):  # doctest: +SKIP
    ...     print(event.cause, event.process.pid, event.library.path)
    """
    watcher = Watcher(*_rules_of(patterns), **options)
    with watcher.subscribe(events=events, control=False) as subscription, watcher:
        while stop is None or not stop.is_set():
            event = subscription.get(None if stop is None else 0.1)
            if isinstance(event, LibraryEvent):
                yield event
            elif subscription.has_ended:
                return


@overload
def awatch(
    *patterns: str | Rule, stop: asyncio.Event | None = None, events: Collection[str], **options: Any
) -> AsyncIterator[LibraryEvent]: ...
@overload
def awatch(
    *patterns: str | Rule, stop: asyncio.Event | None = None, **options: Any
) -> AsyncIterator[Load | Unload]: ...
async def awatch(
    *patterns: str | Rule,
    stop: asyncio.Event | None = None,
    events: Collection[str] = ("load", "unload"),
    **options: Any,
) -> AsyncIterator[LibraryEvent]:
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

    subscription = watcher.subscribe(events=events, control=False)
    subscription.call_on_event(signal)
    stopper = None if stop is None else asyncio.ensure_future(_set_when(stop, news))
    try:
        await asyncio.to_thread(watcher.start)
        while stop is None or not stop.is_set():
            await news.wait()
            news.clear()
            is_signalled.clear()
            while (event := subscription.get(0)) is not None:
                assert isinstance(event, LibraryEvent)
                yield event
            if subscription.has_ended:
                return
    finally:
        subscription.call_on_event(None)
        if stopper is not None:
            stopper.cancel()
        subscription.close()
        await asyncio.to_thread(watcher.stop)


async def _set_when(stop: asyncio.Event, news: asyncio.Event) -> None:
    await stop.wait()
    news.set()
