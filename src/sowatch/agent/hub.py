"""The events of the watch for many HTTP clients: one subscription, each event encoded once.

Everything here runs on the event loop of the HTTP thread. A subscription for each client would cost the draining
thread a step an event and client; this way a hundred clients cost it as much as one.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Collection, Iterable, Iterator
from typing import Final

from msgspec.structs import replace

from sowatch.model.events import Activate, AddedEvent, Event, Http, LibraryEvent, Load, Lost, Ready, Unload, size_of
from sowatch.model.identity import FileId, ProcessId
from sowatch.model.lines import to_json
from sowatch.model.literals import STREAM_KINDS
from sowatch.watcher.subscription import Subscription

__all__ = ["Client", "EventHub", "HubIsFull"]

#: Clients at once; each costs memory for what it has not read yet.
MAX_CLIENTS: Final = 256
#: Events a client may be behind. One that is further behind gets `Lost` and is cut off: it comes back, and
#: begins with what is mapped then.
MAX_WAITING: Final = 20_000
#: And so many bytes of text; clients that are as far behind share them.
MAX_WAITING_BYTES: Final = 16 << 20
#: Events kept for clients that come back with the id of the last one they had.
KEPT_EVENTS: Final = 10_000
#: And what they may take.
KEPT_BYTES: Final = 8 << 20
#: So many events are sent together.
_CHUNK_EVENTS: Final = 500
_CHUNK_BYTES: Final = 1 << 20
#: A comment is sent to a client that hears nothing else for so long, so that a dead one is noticed.
_SILENCE_S: Final = 15.0
#: Taken from the queue before others get a turn.
_TURN_EVENTS: Final = 1_000


class HubIsFull(Exception):
    """There are as many clients as there may be, or the watch is over."""


class Client:
    """One reader of the stream. Made by `EventHub.join`, closed by what sends it.

    ``past`` is what it gets first, which ends with the event of that ``number``.
    """

    def __init__(self, events: Collection[str], rule: str | None, past: Iterable[Event], number: int) -> None:
        self._events = frozenset(events)
        self._rule = rule
        self.past = past
        self.number = number
        self._waiting: deque[_Line] = deque()
        self._waiting_bytes = 0
        self.news = asyncio.Event()
        self.missed = 0
        self.has_ended = False

    def wants(self, event: Event) -> bool:
        """Whether the event is for it."""
        if isinstance(event, Http):
            return "http" in self._events
        if not isinstance(event, LibraryEvent | AddedEvent):
            return True
        return event.event in self._events and self._rule in (None, event.rule)

    def offer(self, line: _Line) -> None:
        """Queues a line, or counts it as missed: from the first one on, all."""
        if self.missed or len(self._waiting) >= MAX_WAITING or self._waiting_bytes >= MAX_WAITING_BYTES:
            self.missed += 1
        else:
            self._waiting.append(line)
            self._waiting_bytes += line.bytes
        self.news.set()

    def take(self) -> _Line | None:
        """The next line; None if it has had all."""
        if not self._waiting:
            return None
        line = self._waiting.popleft()
        self._waiting_bytes -= line.bytes
        return line


class _Line:
    """An encoded event with a gap for the number of its line, which each client counts on its own."""

    __slots__ = ("after", "before", "number")

    def __init__(self, event: Event, number: int) -> None:
        self.number = number
        text = to_json(event, 0)
        head, gap, tail = text.partition('"seq":0')
        self.before = f"event: {event.event}\ndata: {head}{gap[:-1]}"
        self.after = f"{tail}\n\n"

    @property
    def bytes(self) -> int:
        """How long its text is, about."""
        return len(self.before) + len(self.after)


class EventHub:
    """Hands the events of one subscription to HTTP clients, as server-sent events of schema 1.

    Args:
        subscription: made before the watch starts, with control events; the hub closes it.

    Made anywhere; `run` and everything else on one event loop, but for the counters.
    """

    def __init__(self, subscription: Subscription) -> None:
        self._subscription = subscription
        #: Distinguishes the ids of this agent from those of the one before it.
        self._name = secrets.token_hex(4)
        self._number = 0
        self._kept: deque[tuple[int, Event]] = deque()
        self._kept_bytes = 0
        self._held: dict[ProcessId, dict[FileId, Load]] = {}
        self._ready: Ready | None = None
        self._clients: set[Client] = set()
        self._has_ended = False
        self.clients_cut_off = 0

    @property
    def clients(self) -> int:
        """How many there are."""
        return len(self._clients)

    async def run(self) -> None:
        """Takes events until the watch ends."""
        loop = asyncio.get_running_loop()
        news = asyncio.Event()
        is_signalled = threading.Event()

        def signal() -> None:
            if not is_signalled.is_set():
                is_signalled.set()
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to hear it
                    loop.call_soon_threadsafe(news.set)

        self._subscription.call_on_event(signal)
        signal()
        try:
            while not self._subscription.has_ended:
                await news.wait()
                news.clear()
                is_signalled.clear()
                if self._take_some():
                    news.set()
                await asyncio.sleep(0)  # the others' turn
        finally:
            self._subscription.call_on_event(None)
            self._subscription.close()
            self._has_ended = True
            for client in self._clients:
                client.has_ended = True
                client.news.set()

    def join(
        self,
        *,
        events: Collection[str] = STREAM_KINDS,
        rule: str | None = None,
        last_id: str | None = None,
        wants_snapshot: bool = True,
    ) -> Client:
        """A new client, from the next event on; to be given to `stream`, or to `leave`.

        Args:
            events: which library events it wants, and whether flows; control events always come.
            rule: only library events of this rule; None: of all.
            last_id: of the last event the client had; if it is still known, the stream goes on after it.
            wants_snapshot: begin with what is mapped now.

        Raises:
            HubIsFull: there are too many, or the watch has ended.
        """
        if len(self._clients) >= MAX_CLIENTS or self._has_ended:
            raise HubIsFull
        missed = self._after(last_id)
        past = missed if missed is not None else self._snapshot() if wants_snapshot else self._greeting()
        client = Client(events, rule, past, self._number)
        self._clients.add(client)
        return client

    def leave(self, client: Client) -> None:
        """The client is gone. Safe to call again."""
        self._clients.discard(client)

    async def stream(self, client: Client) -> AsyncIterator[bytes]:
        """The text of the stream: what is mapped, `Ready`, then what happens. The client leaves at its end."""
        seq = 0
        try:
            chunk = ["retry: 2000\n\n"]
            for event in client.past:
                if client.wants(event):
                    line = _Line(event, client.number)
                    chunk.append(f"{line.before}{seq}{line.after}")
                    seq += 1
                if len(chunk) >= _CHUNK_EVENTS:
                    yield "".join(chunk).encode()
                    chunk.clear()
            # Only now: who loses the connection within the snapshot has to begin anew.
            yield "".join([*chunk, f"id: {self._name}-{client.number}\n\n"]).encode()
            async for text in self._live(client, seq):
                yield text
        finally:
            self.leave(client)

    async def _live(self, client: Client, seq: int) -> AsyncIterator[bytes]:
        while True:
            try:
                await asyncio.wait_for(client.news.wait(), _SILENCE_S)
            except TimeoutError:
                yield b": nothing new\n\n"
                continue
            client.news.clear()
            while (line := client.take()) is not None:
                chunk: list[str] = []
                size = 0
                while line is not None:
                    chunk.append(f"id: {self._name}-{line.number}\n{line.before}{seq}{line.after}")
                    seq += 1
                    size += line.bytes
                    if len(chunk) >= _CHUNK_EVENTS or size >= _CHUNK_BYTES:
                        break
                    line = client.take()
                yield "".join(chunk).encode()
            if client.missed:
                self.clients_cut_off += 1
                lost = _Line(Lost(time.time_ns(), client.missed, "queue"), 0)
                yield f"{lost.before}{seq}{lost.after}".encode()
                return
            if client.has_ended:
                return

    # ---- the past -----------------------------------------------------------------------------

    def _snapshot(self) -> Iterable[Event]:
        """What is mapped now, and `Ready`; the events themselves are made as they are sent."""
        held = [event for files in self._held.values() for event in files.values()]
        return itertools.chain(_as_snapshot(held), self._greeting())

    def _greeting(self) -> list[Event]:
        return [] if self._ready is None else [self._ready]

    def _after(self, last_id: str | None) -> list[Event] | None:
        """The events after that one; None if that cannot be determined any more."""
        name, _, number = (last_id or "").partition("-")
        if name != self._name or not number.isascii() or not number.isdigit() or len(number) > 18:
            return None
        last = int(number)
        first_kept = self._kept[0][0] if self._kept else self._number + 1
        if not first_kept - 1 <= last <= self._number:
            return None
        return [event for kept, event in self._kept if kept > last]

    # ---- the present --------------------------------------------------------------------------

    def _take_some(self) -> bool:
        """Takes what is there, but not for long; whether there is more."""
        for _ in range(_TURN_EVENTS):
            event = self._subscription.get(0)
            if event is None:
                return False
            self._take(event)
        return True

    def _take(self, event: Event) -> None:
        self._number += 1
        self._keep(event)
        self._note(event)
        if isinstance(event, Ready):
            self._ready = event
        line: _Line | None = None
        for client in self._clients:
            if client.wants(event):
                line = line or _Line(event, self._number)
                client.offer(line)

    def _keep(self, event: Event) -> None:
        self._kept.append((self._number, event))
        self._kept_bytes += size_of(event)
        while len(self._kept) > KEPT_EVENTS or self._kept_bytes > KEPT_BYTES:
            _, oldest = self._kept.popleft()
            self._kept_bytes -= size_of(oldest)

    def _note(self, event: Event) -> None:
        if isinstance(event, Load):
            self._held.setdefault(event.process.id, {})[event.library.id] = event
        elif isinstance(event, Unload) and (files := self._held.get(event.process.id)) is not None:
            files.pop(event.library.id, None)
            if not files:
                del self._held[event.process.id]


def _as_snapshot(held: Iterable[Load]) -> Iterator[Event]:
    """Loads that happened before the client came, with the activation of each file before its first."""
    activated = set()
    for load in held:
        key = (load.rule, load.library.id)
        now_ns = time.time_ns()
        if key not in activated:
            activated.add(key)
            yield Activate(load.rule, load.library, load.process, None, load.t_ns, now_ns)
        yield replace(load, cause="snapshot", time_ns=now_ns)
