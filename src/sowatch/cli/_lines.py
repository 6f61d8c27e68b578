"""An event as a line for people: pieces of text, each with the name of its style.

Pure but for the local time zone. The pieces are joined as they are for plain text; ``_live`` gives the styles their
colours.
"""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Final

from sowatch.model.escape import visible
from sowatch.model.events import Event, Library, LibraryEvent, Lost, Process, Ready, Repaired, Stopped
from sowatch.model.plural import counted

__all__ = ["Pieces", "pieces_of", "plain"]

#: (text, style); styles are the event's name, or ``dim``, ``name``, ``path``, ``warn``.
Pieces = list[tuple[str, str]]

_SIGNS: Final = {"load": "+", "unload": "-", "activate": "*", "deactivate": "o"}
#: What stands in the place of a cause where the event has none.
_WITHOUT_CAUSE: Final = {"activate": "first", "deactivate": "last"}
_ID_LENGTH: Final = 12


def pieces_of(event: Event, *, with_rule: bool = False) -> Pieces:
    """The line of an event.

    Args:
        event: any event.
        with_rule: name the rule, which is worth a place only where there are several.
    """
    when = f"{_clock(event.time_ns // 1_000_000_000)}.{event.time_ns // 1_000_000 % 1000:03d} "
    if isinstance(event, LibraryEvent):
        return [(when, "dim"), *_library_event(event, with_rule=with_rule)]
    text, look = _control(event)
    return [(when, "dim"), (text, look)]


def plain(pieces: Pieces) -> str:
    """The pieces as text."""
    return "".join(text for text, _ in pieces)


@lru_cache(maxsize=8)
def _clock(seconds: int) -> str:
    return time.strftime("%H:%M:%S", time.localtime(seconds))


def _library_event(event: LibraryEvent, *, with_rule: bool) -> Pieces:
    what = event.cause or _WITHOUT_CAUSE.get(event.event) or "?"
    pieces = [(f"{_SIGNS.get(event.event, '?')} {what:<8} ", event.event), *_process(event.process)]
    if with_rule:
        pieces.append((f"<{visible(event.rule)}> ", "dim"))
    return [*pieces, *_library(event.library)]


def _process(process: Process | None) -> Pieces:
    if process is None:
        return [(" " * 24, "dim")]
    comm = "?" if process.comm is None else visible(process.comm)
    pieces = [(f"{process.pid:>7} ", "dim"), (f"{comm:<15} ", "name")]
    pod = process.pod
    if pod is not None and pod.name is not None:
        words = [one for one in (pod.namespace, pod.name, pod.container) if one]
        pieces.append((f"[{visible('/'.join(words))}] ", "dim"))
    elif process.container is not None:
        pieces.append((f"[{visible(process.container)[:_ID_LENGTH]}] ", "dim"))
    return pieces


def _library(library: Library) -> Pieces:
    pieces = [(visible(library.path), "path")]
    if library.path_partial:
        pieces.append((" (path incomplete)", "warn"))
    if library.deleted:
        pieces.append((" (deleted)", "warn"))
    return pieces


def _control(event: Event) -> tuple[str, str]:
    if isinstance(event, Ready):
        found = f"{counted(event.processes, 'process', 'processes')}, {counted(event.mappings, 'mapping')}"
        hooks = "" if event.hooks is None else f", {event.hooks} hooks"
        return f"ready: {found}; strategy {event.strategy} ({event.guarantee}{hooks})", "ready"
    if isinstance(event, Lost):
        return f"lost: {counted(event.count, 'event')} in the {event.where}; scanning again", "warn"
    if isinstance(event, Repaired):
        missed = f"{counted(event.loads, 'load')} and {counted(event.unloads, 'unload')}"
        return f"repaired in {event.seconds:.3f} s: {missed} had been missed", "ready"
    assert isinstance(event, Stopped)  # `watch` asks for no flows
    return f"stopped: {counted(event.loads, 'load')}, {counted(event.unloads, 'unload')}, {event.lost} lost", "ready"
