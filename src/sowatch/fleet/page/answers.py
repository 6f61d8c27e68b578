"""What the page shows: the questions of `sowatch.fleet.questions`, asked once for all who look, and kept for a while.

One question is under way at a time, and few may wait. An answer is kept for some times what it took, so that pages that
are open cost the store a part of its time, however many there are.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, TypeVar

from cachetools import LRUCache
from msgspec import Struct

from sowatch.fleet.asks import Asks, rows
from sowatch.fleet.questions import Fleet
from sowatch.fleet.targets import Target, target_of
from sowatch.model.encoding import dumps
from sowatch.model.errors import SowatchError
from sowatch.model.lines import stamp
from sowatch.model.wire_fleet import FleetAnswer, FleetHost, FleetRemediation, FleetVersion

__all__ = ["DAYS", "Kept", "TooBusy", "Views"]

T = TypeVar("T")

#: Days of `Views.over_time`, at most: what the history has.
DAYS: Final = 90
#: Rows of an answer that are kept, and their bytes: a fleet that has more of them is asked more closely.
MAX_ROWS: Final = 20_000
MAX_BYTES: Final = 32 << 20
#: Memory of all answers that are kept; one that takes more is given, and not kept.
MAX_KEPT_BYTES: Final = 64 << 20
#: An answer is as new as this, or as so many times what it took, up to the last.
_AGE_S: Final = 2.0
_AGE_TIMES: Final = 10.0
_OLDEST_S: Final = 60.0
#: Questions that may wait for their turn.
_WAITING: Final = 16
#: Builds of which the history is read, and lines that are drawn.
_BUILDS_READ: Final = 12
_LINES: Final = 6
_STATES: Final = ("silent", "lossy", "unsupported", "answered")
_DAY_NS: Final = 86_400_000_000_000

_LIBRARIES: Final = """
SELECT if(soname != '', soname, substringIndex(path, '/', -1)) AS name, uniqExact(build_id) AS builds,
    uniqExact(host_id) AS hosts, sum(processes) AS processes, uniqExactIf(host_id, stale != '') AS stale_hosts
FROM fleet_in_force(now = {now:UInt64})
WHERE answer = 'mapped' AND kind = 'library'
GROUP BY name
ORDER BY hosts DESC, name
"""


class TooBusy(SowatchError):
    """As many questions as may wait already do."""


class Library(Struct, frozen=True, gc=False):
    """What is called the same, on the hosts of which it is known."""

    name: str
    builds: int
    hosts: int
    processes: int
    stale_hosts: int


class Reason(Struct, frozen=True, gc=False):
    """Hosts that are in one state for one reason."""

    state: str
    reason: str
    hosts: int


class Kept(Struct, frozen=True):
    """An answer: its first line, and its rows; ``is_cut`` if there are more than are kept; ``size`` in memory."""

    answer: FleetAnswer
    rows: Sequence[Any]
    is_cut: bool = False
    size: int = 0

    def page(self, offset: int, limit: int) -> bytes:
        """Some of the rows, as the JSON that the page gets."""
        shown = {
            "answer": self.answer,
            "rows": self.rows[offset : offset + limit],
            "total": len(self.rows),
            "offset": offset,
            "is_cut": self.is_cut,
        }
        return dumps(shown).encode("ascii") + b"\n"


class _Made(Struct, frozen=True):
    value: Any
    at_s: float
    took_s: float
    size: int


class Views:
    """The answers of a store. Used on one event loop."""

    def __init__(self, asks: Asks, now_ns: Callable[[], int] = time.time_ns) -> None:
        self._asks = asks
        self._now_ns = now_ns
        self._thread = ThreadPoolExecutor(1, "sowatch-fleet-page")
        #: Of both: the loop takes what the thread puts there.
        self._lock = threading.Lock()
        self._asked: dict[Hashable, Future[_Made]] = {}
        self._answers: LRUCache[Hashable, _Made] = LRUCache(MAX_KEPT_BYTES, getsizeof=lambda made: made.size)

    @property
    def kept_bytes(self) -> int:
        """What the answers that are kept take."""
        return int(self._answers.currsize)

    def close(self) -> None:
        """Ends the thread; what waits is dropped. Safe to call again."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    async def coverage(self, state: str, search: str, host: str) -> Kept:
        """The hosts, those of a state and with a text in name, id or reason; or one of them."""
        found = await self._coverage()
        word = search.lower()

        def is_meant(row: FleetHost) -> bool:
            texts = (row.host_name, row.host_id, row.reason)
            return (
                (not state or row.state == state)
                and (not host or row.host_id == host)
                and (not word or any(word in one.lower() for one in texts))
            )

        # First those of which something is not known.
        shown = sorted(filter(is_meant, found.rows), key=lambda row: _STATES.index(row.state))
        return Kept(found.answer, shown, found.is_cut)

    async def reasons(self) -> Kept:
        """How many hosts are in which state, and why."""
        found = await self._coverage()
        counts = Counter((row.state, row.reason) for row in found.rows)
        return Kept(found.answer, [Reason(*key, hosts) for key, hosts in counts.most_common()], found.is_cut)

    async def libraries(self, search: str) -> Kept:
        """What is mapped, by name, most hosts first."""

        def ask() -> Kept:
            now_ns = self._now_ns()
            head = Fleet(self._asks, now_ns).head("coverage")
            return _kept(head, rows(self._asks, _LIBRARIES, Library, now=now_ns))

        found: Kept = await self._once(("libraries",), ask)
        word = search.lower()
        return Kept(found.answer, [row for row in found.rows if word in row.name.lower()], found.is_cut)

    async def versions(self, what: str) -> Kept:
        """The builds of a library."""
        target = target_of(what)
        return await self._once(("versions", target), lambda: _kept(*self._fleet().versions(target)))

    async def who(self, what: str) -> Kept:
        """Who maps it."""
        target = target_of(what)
        return await self._once(("who", target), lambda: _kept(*self._fleet().who(target)))

    async def history(self, what: str) -> Kept:
        """Which hosts had it mapped, from when to when."""
        target = target_of(what)
        return await self._once(("history", target), lambda: _kept(*self._fleet().history(target)))

    async def stale(self) -> Kept:
        """Who runs on files that are not the ones on disk any more."""
        return await self._once(("stale",), lambda: _kept(*self._fleet().stale()))

    async def over_time(self, what: str, days: int) -> bytes:
        """On how many hosts each build was mapped, in the last days; as the JSON that the page gets."""
        target = target_of(what)
        return await self._once(("time", target, days), lambda: self._over_time(target, days))

    # ---- on the thread ------------------------------------------------------------------------

    def _fleet(self) -> Fleet:
        return Fleet(self._asks, self._now_ns())

    def _over_time(self, target: Target, days: int) -> bytes:
        fleet = self._fleet()
        until_ns = self._now_ns()
        since_ns = until_ns - days * _DAY_NS
        head, lines = fleet.versions(target)
        builds = [one for one in lines if isinstance(one, FleetVersion) and one.build_id]
        series: list[tuple[int, dict[str, Any]]] = []
        for build in builds[:_BUILDS_READ]:
            changes = [
                (change.time, change.host_count)
                for line in fleet.history(Target("build_id", build.build_id), since_ns=since_ns).lines
                if isinstance(line, FleetRemediation)
                for change in line.hosts_over_time
            ]
            if changes:
                line = {"build_id": build.build_id, "purls": build.purls, "points": changes}
                series.append((max(hosts for _, hosts in changes), line))
        series.sort(key=lambda one: -one[0])
        shown = {
            "answer": head,
            "from": stamp(since_ns),
            "to": stamp(until_ns),
            "series": [line for _, line in series[:_LINES]],
            "other_builds": len(builds) - min(len(builds), _BUILDS_READ) + max(0, len(series) - _LINES),
        }
        return dumps(shown).encode("ascii") + b"\n"

    # ---- once for all -------------------------------------------------------------------------

    async def _coverage(self) -> Kept:
        found: Kept = await self._once(("coverage",), lambda: _kept(*self._fleet().coverage()))
        return found

    async def _once(self, key: Hashable, ask: Callable[[], T]) -> T:
        """The answer to a question: one that is new enough, or one that others wait for, too.

        Raises:
            TooBusy: too many questions wait already.
        """
        with self._lock:
            for old in [one for one, made in self._answers.items() if _is_old(made)]:
                del self._answers[old]
            kept = self._answers.get(key)
            asked = self._asked.get(key)
            if kept is None and asked is None:
                if len(self._asked) > _WAITING:
                    raise TooBusy("the store has more questions than it can answer. Ask again in some seconds.")
                asked = self._asked[key] = self._thread.submit(self._answer, key, ask)
        made = kept
        if made is None:
            assert asked is not None
            made = await asyncio.shield(asyncio.wrap_future(asked))
        value: T = made.value
        return value

    def _answer(self, key: Hashable, ask: Callable[[], Any]) -> _Made:
        """Asks, on the thread, and keeps the answer."""
        made = None
        try:
            begun_s = time.monotonic()
            value = ask()
            now_s = time.monotonic()
            size = value.size if isinstance(value, Kept) else sys.getsizeof(value)
            made = _Made(value, now_s, now_s - begun_s, size)
            return made
        finally:
            with self._lock:
                del self._asked[key]
                if made is not None and made.size <= MAX_KEPT_BYTES:
                    self._answers[key] = made


def _is_old(made: _Made) -> bool:
    return time.monotonic() - made.at_s > min(_OLDEST_S, max(_AGE_S, _AGE_TIMES * made.took_s))


def _kept(head: FleetAnswer, lines: Iterable[Any]) -> Kept:
    """As much of an answer as is kept."""
    found: list[Any] = []
    size, memory = 0, _memory(head)
    for line in lines:
        size += len(dumps(line))
        if len(found) == MAX_ROWS or size > MAX_BYTES:
            return Kept(head, found, is_cut=True, size=memory)
        found.append(line)
        memory += _memory(line)
    return Kept(head, found, size=memory)


def _memory(value: Any) -> int:
    """Of a line with all its members; what two of them share counts twice."""
    size = sys.getsizeof(value)
    if isinstance(value, Struct):
        return size + sum(_memory(getattr(value, name)) for name in value.__struct_fields__)
    return size + sum(map(_memory, value)) if isinstance(value, list | tuple) else size
