"""What was stale, from when to when: the last of it, bounded. Fed by a `StaleWatch`."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Final, Protocol

from msgspec import Struct
from msgspec.structs import replace

from sowatch.inventory.staleness import StaleAnswer, Staleness
from sowatch.model.identity import FileId, ProcessId
from sowatch.model.literals import RenewedCause
from sowatch.model.stats import Mapped

__all__ = ["KEPT", "Change", "StaleHistory", "StaleSpell"]

#: Spells that are kept; of those beyond, which are over go first.
KEPT: Final = 500


class Change(Protocol):
    """A `sowatch.inventory.stale_watch.StaleChange`."""

    @property
    def mapped(self) -> Mapped:
        """Who has what."""

    @property
    def answer(self) -> StaleAnswer:
        """What is stale of it."""

    @property
    def cause(self) -> RenewedCause | None:
        """Why it is over; None: it begins."""


class StaleSpell(Struct, frozen=True):
    """The time in which a process had a file mapped that was not the one on disk.

    Attributes:
        number: names the spell; later ones have higher numbers.
        mapped: who had what.
        staleness: ``replaced``, ``deleted`` or ``modified``; of several in turn the last.
        reason: see `StaleAnswer`.
        since_ns: when it was noticed, by the wall clock, in ns since the epoch.
        is_older: the very first comparison found it: it may have begun at any time before.
        until_ns: when it was noticed to be over; None: it goes on.
        cause: why it is over: see `sowatch.model.events.Renewed`.
    """

    number: int
    mapped: Mapped
    staleness: Staleness
    reason: str | None
    since_ns: int
    is_older: bool
    until_ns: int | None = None
    cause: RenewedCause | None = None


class StaleHistory:
    """The last `KEPT` spells, and how many were left out for their sake. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spells: dict[int, StaleSpell] = {}
        self._open: dict[tuple[ProcessId, FileId, str], int] = {}
        self._last = 0
        self._left_out = 0

    def add(self, changes: Iterable[Change], now_ns: int, *, is_first: bool) -> None:
        """Takes what a comparison found; ``is_first``: it was the first one."""
        with self._lock:
            for change in changes:
                self._add(change, now_ns, is_first=is_first)
            self._bound()

    def spells(self) -> tuple[list[StaleSpell], int]:
        """Those that are kept, the oldest first, and how many were left out."""
        with self._lock:
            return list(self._spells.values()), self._left_out

    def _add(self, change: Change, now_ns: int, *, is_first: bool) -> None:
        one, answer = change.mapped, change.answer
        key = (one.process.id, one.library.id, one.library.path)
        known = self._open.get(key)
        if change.cause is not None:
            if known is not None:
                del self._open[key]
                self._spells[known] = replace(self._spells[known], until_ns=now_ns, cause=change.cause)
        elif answer.stale is not None and known is not None:
            self._spells[known] = replace(self._spells[known], staleness=answer.stale, reason=answer.reason)
        elif answer.stale is not None:
            self._last += 1
            self._open[key] = self._last
            self._spells[self._last] = StaleSpell(self._last, one, answer.stale, answer.reason, now_ns, is_first)

    def _bound(self) -> None:
        excess = len(self._spells) - KEPT
        if excess <= 0:
            return
        over = [number for number, spell in self._spells.items() if spell.until_ns is not None]
        going_on = [number for number, spell in self._spells.items() if spell.until_ns is None]
        for number in [*over, *going_on][:excess]:
            del self._spells[number]
        self._open = {key: number for key, number in self._open.items() if number in self._spells}
        self._left_out += excess
