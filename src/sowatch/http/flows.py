"""From the bytes of connections to flows: requests matched with their responses. Pure: no I/O, no clock.

`FlowTable.take` gets what a tap saw, in order; it finds out what a connection speaks, decodes both directions, and
hands out a `Flow` for each request. What it cannot decode is counted in `FlowStats`, never guessed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Final

from sowatch.http.exchanges import Http1Exchanges, Http2Exchanges
from sowatch.http.flow import Chunk, ConnectionKey, Direction, Flow, FlowStats, Peer, Protocol, Side
from sowatch.http.http1 import may_start_message, starts_message
from sowatch.http.http2 import FRAME_HEAD_BYTES, PREFACE, begins_connection, looks_like_frames
from sowatch.model.header_names import header_names
from sowatch.model.identity import ProcessId

__all__ = [
    "Chunk",
    "ConnectionKey",
    "Direction",
    "Flow",
    "FlowStats",
    "FlowTable",
    "Peer",
    "Protocol",
    "Side",
]

#: Connections that are kept; those that were idle longest go first.
MAX_CONNECTIONS: Final = 16384
#: Heads and header blocks that wait for their rest, of all connections together.
MAX_BYTES: Final = 64 << 20
#: A connection that has shown no HTTP after this many calls of either direction keeps only its beginnings.
_MAX_TRIES: Final = 16


def may_start(data: bytes) -> bool:
    r"""Whether more bytes may make this the beginning of HTTP, where so far it is none.

    >>> may_start(b"GE"), may_start(b"PRI * HT"), may_start(bytes(4)), may_start(b"+PONG\r\n")
    (True, True, True, False)
    """
    return (
        PREFACE.startswith(data)
        or may_start_message(data, is_request=True)
        or may_start_message(data, is_request=False)
        or (len(data) < FRAME_HEAD_BYTES and data[:1] == b"\0")
    )


class _Connection:
    """One TLS connection: what it speaks, and where each direction is."""

    def __init__(self, key: ConnectionKey, table: FlowTable) -> None:
        self.key = key
        self._table = table
        self.stats = table.stats
        self.header_names = table.header_names
        self.peer: Peer | None = None
        self.local_port: int | None = None
        self.site = 0
        self._offsets: dict[Direction, int] = {}
        self._http1: Http1Exchanges | None = None
        self._http2: Http2Exchanges | None = None
        self._request_direction: Direction = "read"
        self._tries = 0
        #: What the table has counted of `held`.
        self.counted = 0
        self._is_undecoded = False
        #: The first bytes of a direction, while they are too few to determine what it speaks.
        self._first: dict[Direction, bytes] = {}

    def take(self, chunk: Chunk) -> None:
        if chunk.peer is not None:
            self.peer, self.local_port = chunk.peer, chunk.local_port
        self.site = chunk.site or self.site
        direction, time_ns = chunk.direction, chunk.time_ns
        expected = self._offsets.get(direction)
        # The program counts from the first call that it sees: what is before the first one that came here was lost.
        missing = max(0, chunk.offset - (expected or 0))
        if expected is None and chunk.offset:
            self.stats.joined_late += 1
        self._offsets[direction] = chunk.offset + chunk.length
        lead = missing + chunk.skipped
        if lead:
            self._skip(direction, lead, time_ns)
        if chunk.data:
            self._feed(direction, chunk.data, time_ns)
        rest = chunk.length - chunk.skipped - len(chunk.data)
        if rest:
            self._skip(direction, rest, time_ns)

    def take_whole(self, chunk: Chunk) -> bool:
        """Takes over a call that moved one whole message of HTTP/1 and nothing else; False: it is not that."""
        http1, direction = self._http1, chunk.direction
        if http1 is None or len(chunk.data) != chunk.length or self._offsets.get(direction) != chunk.offset:
            return False
        if chunk.peer is not None:
            self.peer, self.local_port = chunk.peer, chunk.local_port
        self.site = chunk.site or self.site
        decoder = http1.request if direction == self._request_direction else http1.response
        if not decoder.take_whole(chunk.data, chunk.time_ns):
            return False
        self._offsets[direction] = chunk.offset + chunk.length
        return True

    def skippable(self, direction: Direction) -> int:
        """How many of the next bytes nobody needs to send."""
        if self._http1 is not None:
            return self._http1.skippable(direction == self._request_direction)
        return 0 if self._http2 is None else self._http2.decoders[direction].skippable

    def offset(self, direction: Direction) -> int:
        return self._offsets.get(direction, 0)

    @property
    def is_ahead(self) -> bool:
        """Whether more than one request waits for its response."""
        return self._http1 is not None and self._http1.waiting > 1

    @property
    def held(self) -> int:
        """Bytes that wait for more."""
        first = sum(map(len, self._first.values())) if self._first else 0
        return first + (self._http1.held if self._http1 else self._http2.held if self._http2 else 0)

    def close(self, time_ns: int, *, is_ended: bool) -> None:
        spoken = self._http1 or self._http2
        if spoken is not None:
            before = spoken.resyncs, spoken.unknown
            spoken.close(time_ns, is_ended=is_ended)
            self._count(before)
        elif self._tries and not self._is_undecoded:
            self.stats.undecoded += 1
        self._http1 = self._http2 = None
        self._first.clear()

    def shut(self, time_ns: int) -> None:
        """Nothing is written any more: so ends a body whose end that is."""
        if self._http1 is not None:
            self._http1.shut(self._request_direction == "write", time_ns)

    def new_flow(self, side: Side, protocol: str) -> Flow:
        return Flow(self.key, side, protocol, site=self.site)  # type: ignore[arg-type]

    def hand_out(self, flow: Flow) -> None:
        flow.peer, flow.local_port, flow.site = self.peer, self.local_port, self.site
        self._table.hand_out(flow)

    def drop(self, flow: Flow) -> None:
        self.stats.dropped += 1
        self.hand_out(flow)

    # ---- inside -----------------------------------------------------------------------------------

    def _count(self, before: tuple[int, int]) -> None:
        spoken = self._http1 or self._http2
        if spoken is not None:
            self.stats.resyncs += spoken.resyncs - before[0]
            self.stats.unknown_fields += spoken.unknown - before[1]

    def _feed(self, direction: Direction, data: bytes, time_ns: int) -> None:
        if self._http1 is None and self._http2 is None:
            first = self._first.pop(direction, b"")
            # What began before may have been no beginning: a call that begins a message decides.
            if first and self._recognise(direction, first + data):
                data = first + data
            elif not self._recognise(direction, data):
                self._keep_first(direction, first + data)
                return
        spoken = self._http1 or self._http2
        assert spoken is not None
        before = spoken.resyncs, spoken.unknown
        if self._http1 is not None:
            self._http1.feed(direction == self._request_direction, data, time_ns)
        elif self._http2 is not None:
            self._http2.decoders[direction].feed(data, time_ns)
        self._count(before)

    def _skip(self, direction: Direction, size: int, time_ns: int) -> None:
        spoken = self._http1 or self._http2
        self._first.pop(direction, None)
        if spoken is None:
            return
        before = spoken.resyncs, spoken.unknown
        if self._http1 is not None:
            self._http1.skip(direction == self._request_direction, size, time_ns)
        elif self._http2 is not None:
            self._http2.decoders[direction].skip(size, time_ns)
        if spoken.resyncs != before[0]:
            self.stats.gaps += 1
        self._count(before)

    def _recognise(self, direction: Direction, data: bytes) -> bool:
        """Finds out what a connection speaks from bytes that begin a call; False: not yet."""
        if data.startswith(PREFACE):
            self._http2 = Http2Exchanges(self, "client" if direction == "write" else "server")
        elif starts_message(data, is_request=True):
            self._request_direction = direction
            self._http1 = Http1Exchanges(self, "client" if direction == "write" else "server")
        elif starts_message(data, is_request=False):
            self._request_direction = "read" if direction == "write" else "write"
            self._http1 = Http1Exchanges(self, "server" if direction == "write" else "client")
        elif looks_like_frames(data):
            self._http2 = Http2Exchanges(self, None)
            self.stats.joined_late += not begins_connection(data)
        else:
            return False
        return True

    def _keep_first(self, direction: Direction, data: bytes) -> None:
        """Keeps bytes that may yet become the beginning of something; else the call was a try that failed."""
        if may_start(data):
            self._first[direction] = data
            return
        self._tries += 1
        if self._tries >= _MAX_TRIES and not self._is_undecoded:
            self._is_undecoded = True
            self.stats.undecoded += 1


class FlowTable:
    """Every connection that is under way; hands out flows. One thread at a time may use it.

    Args:
        on_flow: called with each flow once it is over.
        max_connections: are kept; the one that was idle longest is closed for another one.
        max_bytes: that wait for more, of all connections together; beyond it the same.
        keeps_query: paths keep what stands behind ``?``.
        headers: names of header fields that flows keep; see `sowatch.model.header_names.header_names`.
    """

    def __init__(
        self,
        on_flow: Callable[[Flow], None],
        *,
        max_connections: int = MAX_CONNECTIONS,
        max_bytes: int = MAX_BYTES,
        keeps_query: bool = False,
        headers: Iterable[str] = (),
    ) -> None:
        self._on_flow = on_flow
        self.header_names = header_names(headers)
        self._max = max_connections
        self._max_bytes = max_bytes
        self._held = 0
        self._keeps_query = keeps_query
        self._connections: OrderedDict[ConnectionKey, _Connection] = OrderedDict()
        self.stats = FlowStats()

    def __len__(self) -> int:
        return len(self._connections)

    def take(self, chunk: Chunk) -> int:
        """Takes over what one call moved.

        Returns:
            up to which offset of this direction the bytes are body for certain, so that the program need not send
            them; 0 if none are.
        """
        self.stats.calls += 1
        connection = self._connections.get(chunk.key)
        if connection is None:
            if len(self._connections) >= self._max:
                self._drop_idle(chunk.time_ns)
            connection = self._connections[chunk.key] = _Connection(chunk.key, self)
        else:
            self._connections.move_to_end(chunk.key)
            if connection.take_whole(chunk):
                # One request that waits is what every connection may have; counting costs a fifth of the decoding.
                if connection.counted or connection.is_ahead:
                    self._count_held(connection, chunk.time_ns)
                return 0
        connection.take(chunk)
        self._count_held(connection, chunk.time_ns)
        left = connection.skippable(chunk.direction)
        return connection.offset(chunk.direction) + left if left else 0

    def _count_held(self, connection: _Connection, time_ns: int) -> None:
        """Counts what a connection has come to hold, and gives up idle ones while all of them hold too much."""
        held = connection.held
        self._held += held - connection.counted
        connection.counted = held
        while self._held > self._max_bytes and len(self._connections) > 1:
            self._drop_idle(time_ns)

    def end(self, key: ConnectionKey, time_ns: int, *, is_ended: bool = True) -> None:
        """A connection ended: its object was freed.

        ``is_ended`` is false where it is only given up: a response that lasts until the end is not complete then.
        """
        connection = self._connections.pop(key, None)
        if connection is not None:
            self._held -= connection.counted
            connection.close(time_ns, is_ended=is_ended)

    def shut(self, key: ConnectionKey, time_ns: int) -> None:
        """A process writes no more to a connection; it may still read."""
        if (connection := self._connections.get(key)) is not None:
            connection.shut(time_ns)
            self._count_held(connection, time_ns)

    def end_process(self, process: ProcessId, time_ns: int, *, born_before_ns: int | None = None) -> None:
        """A process is gone, and every connection of it; or its program is, and the connections that it had by then."""
        for key in [key for key in self._connections if key.process == process]:
            if born_before_ns is None or key.born_ns < born_before_ns:
                self.end(key, time_ns)

    def _drop_idle(self, time_ns: int) -> None:
        """Gives up the connection that was idle longest."""
        self.stats.dropped += 1
        self.end(next(iter(self._connections)), time_ns, is_ended=False)

    def close(self, time_ns: int) -> None:
        """Gives up every connection: what is under way is not complete."""
        for key in list(self._connections):
            self.end(key, time_ns, is_ended=False)

    def hand_out(self, flow: Flow) -> None:
        """Counts a flow and hands it on."""
        if flow.path is not None and not self._keeps_query and "?" in flow.path:
            flow.path = flow.path.partition("?")[0]
        self.stats.flows += 1
        self.stats.incomplete += not flow.is_complete
        self.stats.unknown_peers += flow.peer is None
        self._on_flow(flow)
