"""What the page gets: everything once, then each second what has changed, as server-sent events.

One task takes the view and encodes it for all clients, and only while there are any. A client that cannot keep up
misses changes and then gets everything anew; nothing waits for it, and nothing is kept for it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from starlette.responses import StreamingResponse
from starlette.types import Send

from sowatch.agent.call_tally import SymbolCalls
from sowatch.inventory.inventory import Inventory, InventoryView, LibraryRow, ProcessRow, RateSample
from sowatch.linux.cgroups import unit_of
from sowatch.linux.users import user_name
from sowatch.model.encoding import dumps
from sowatch.model.identity import FileId
from sowatch.model.lines import library_dict, process_dict

__all__ = ["CallSums", "Feed", "FeedResponse"]

CallSums = Callable[[], Mapping[FileId, Sequence[SymbolCalls]]]

LOG = logging.getLogger("sowatch")

#: Between two views, at least; and how much of the time they may take.
_EVERY_S: Final = 1.0
_SHARE: Final = 0.1
#: Changes that are kept for clients that are late.
_KEPT: Final = 4
#: A client that takes nothing for so long is let go.
_STUCK_S: Final = 30.0


#: Of a library: symbol, calls, upper bounds of the time of half and of 99 % of them, in ns or None.
_Calls = list[tuple[str, int, int | None, int | None]]


@dataclass(slots=True)
class _State:
    """What all clients have got, up to ``version``."""

    version: int
    view: InventoryView
    seconds: list[RateSample]
    status: dict[str, Any]
    calls: dict[int, _Calls]
    everything: bytes | None = None
    changes: deque[tuple[int, bytes]] = field(default_factory=lambda: deque(maxlen=_KEPT))


class Feed:
    """Frames for any number of clients; lives on one event loop."""

    def __init__(self, inventory: Inventory, calls: CallSums = dict) -> None:
        self._inventory = inventory
        self._calls = calls
        self._state: _State | None = None
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._encoding = asyncio.Lock()
        #: Open streams.
        self.clients = 0

    def enter(self) -> None:
        """One client more."""
        self.clients += 1
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    def leave(self) -> None:
        """One client less; the last one ends the work."""
        self.clients -= 1
        if not self.clients and self._task is not None:
            self._task.cancel()
            self._task = self._state = None

    async def next(self, version: int) -> tuple[int, bytes] | None:
        """The frame for a client that has seen ``version`` (0: nothing), and the version it leads to.

        Returns:
            None once there will be no more.
        """
        while not self._inventory.is_closed:
            state = self._state
            if state is None or state.version == version:
                await self._news.wait()
                continue
            for made, frame in state.changes:
                if made == version + 1:
                    return made, frame
            return await self._everything(state)
        return None

    async def _everything(self, state: _State) -> tuple[int, bytes]:
        async with self._encoding:
            version, frame = state.version, state.everything
            if frame is None:
                frame = await asyncio.to_thread(
                    _everything, state.view, list(state.seconds), state.status, state.calls, version
                )
                if state.version == version:
                    state.everything = frame
        return version, frame

    async def _run(self) -> None:
        try:
            while not self._inventory.is_closed:
                begun_s = time.monotonic()
                try:
                    await self._look()
                except Exception:
                    LOG.exception("the page could not be sent what is mapped; it is tried again")
                spent_s = time.monotonic() - begun_s
                await asyncio.sleep(max(_EVERY_S - spent_s, spent_s / _SHARE))
        finally:
            self._emit()

    async def _look(self) -> None:
        inventory, state = self._inventory, self._state
        view = await asyncio.to_thread(inventory.look)
        seconds, status = inventory.history(), _status(inventory, view)
        calls = await asyncio.to_thread(_calls_of, view, self._calls)
        if state is None:
            self._state = _State(1, view, seconds, status, calls)
        else:
            last = state.seconds[-1] if state.seconds else None
            new = seconds[seconds.index(last) + 1 :] if last in seconds else seconds
            version = state.version + 1
            changed = {number: rows for number, rows in calls.items() if state.calls.get(number) != rows}
            changed |= {number: [] for number in state.calls.keys() - calls.keys()}
            frame = await asyncio.to_thread(_change, state.view, view, new, status, changed, version)
            state.changes.append((version, frame))
            state.version, state.view, state.seconds, state.status = version, view, seconds, status
            state.calls = calls
            state.everything = None
        self._emit()

    def _emit(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()


class FeedResponse(StreamingResponse):
    """One client's stream, until either side ends it."""

    def __init__(self, feed: Feed, *, headers: Mapping[str, str]) -> None:
        super().__init__((), media_type="text/event-stream", headers=headers)
        self._feed = feed

    async def stream_response(self, send: Send) -> None:
        """Sends frame after frame."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        self._feed.enter()
        try:
            version = 0
            while (found := await self._feed.next(version)) is not None:
                version, frame = found
                async with asyncio.timeout(_STUCK_S):
                    await send({"type": "http.response.body", "body": frame, "more_body": True})
        except TimeoutError:
            pass
        finally:
            self._feed.leave()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


# ---- the wire form ------------------------------------------------------------------------------


def _everything(
    view: InventoryView, seconds: list[RateSample], status: dict[str, Any], calls: dict[int, _Calls], version: int
) -> bytes:
    content = {
        "libraries": [_library(row) for row in view.libraries.values()],
        "processes": [_process(row) for row in view.processes.values()],
        "seconds": _seconds(seconds),
        "status": status,
        "calls": calls,
    }
    return _frame("everything", version, content)


def _change(
    old: InventoryView,
    new: InventoryView,
    seconds: list[RateSample],
    status: dict[str, Any],
    calls: dict[int, _Calls],
    version: int,
) -> bytes:
    content = {
        "libraries": [_library(row) for key, row in new.libraries.items() if old.libraries.get(key) != row],
        "processes": [_process(row) for key, row in new.processes.items() if old.processes.get(key) != row],
        "gone_libraries": sorted(old.libraries.keys() - new.libraries.keys()),
        "gone_processes": sorted(old.processes.keys() - new.processes.keys()),
        "seconds": _seconds(seconds),
        "status": status,
        "calls": calls,
    }
    return _frame("change", version, content)


def _frame(event: str, version: int, content: dict[str, Any]) -> bytes:
    # JSON as we write it is ASCII without line breaks, whatever is in the names.
    return f"event: {event}\nid: {version}\ndata: {dumps(content)}\n\n".encode("ascii")


def _calls_of(view: InventoryView, calls: CallSums) -> dict[int, _Calls]:
    """By number of the library, whatever of it is counted."""
    sums = calls()
    return {
        row.number: [(one.symbol, one.calls, one.p50_ns, one.p99_ns) for one in found]
        for row in view.libraries.values()
        if (found := sums.get(row.library.id))
    }


def _library(row: LibraryRow) -> dict[str, Any]:
    return library_dict(row.library) | {
        "number": row.number,
        "holders": row.holders,
        "containers": row.containers,
        "stale": row.staleness,
        "stale_reason": row.stale_reason,
        "since_ms": row.since_ns // 1_000_000,
        "older": row.is_older,
    }


def _process(row: ProcessRow) -> dict[str, Any]:
    process, unit = row.process, unit_of(row.process.cgroup)
    return process_dict(process) | {
        "number": row.number,
        "user": user_name(process),
        "unit": None if unit is None else unit.name,
        "libraries": row.libraries,
        "stale_libraries": row.stale_libraries,
        "unknown_libraries": row.unknown_libraries,
        "since_ms": row.since_ns // 1_000_000,
        "older": row.is_older,
    }


def _seconds(seconds: list[RateSample]) -> list[list[float]]:
    return [[one.time_s, one.loads, one.unloads, one.lost] for one in seconds]


def _status(inventory: Inventory, view: InventoryView) -> dict[str, Any]:
    watcher = inventory.watcher
    stats, ready = watcher.stats, watcher.ready
    return {
        "host": None if ready is None else ready.host,
        "strategy": None if ready is None else ready.strategy,
        "guarantee": None if ready is None else ready.guarantee,
        "mappings": view.mappings,
        "left_out": view.left_out,
        "loads": stats.loads,
        "unloads": stats.unloads,
        "lost_kernel": stats.lost_kernel,
        "lost_queue": stats.lost_queue,
        "repaired": watcher.is_repaired,
    }
