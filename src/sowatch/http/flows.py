"""From the bytes of connections to flows: requests matched with their responses. Pure: no I/O, no clock.

`FlowTable.take` gets what a tap saw, in order; it finds out what a connection speaks, decodes both directions, and
hands out a `Flow` for each request. What it cannot decode is counted in `FlowStats`, never guessed.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from msgspec import Struct

from sowatch.http.http1 import Http1Decoder, Message, may_start_message, starts_message
from sowatch.http.http2 import (
    FRAME_HEAD_BYTES,
    MAX_STREAMS,
    PREFACE,
    UNKNOWN,
    HeaderBlock,
    Http2Decoder,
    begins_connection,
    looks_like_frames,
)
from sowatch.model.identity import ProcessId

__all__ = ["Chunk", "ConnectionKey", "Flow", "FlowStats", "FlowTable", "Peer", "Protocol", "Side"]

Side = Literal["client", "server"]
Protocol = Literal["HTTP/1.0", "HTTP/1.1", "HTTP/2"]
Direction = Literal["read", "write"]

#: Connections that are kept; those that were idle longest go first.
MAX_CONNECTIONS: Final = 16384
#: Heads and header blocks that wait for their rest, of all connections together.
MAX_BYTES: Final = 64 << 20
#: Requests of one connection that wait for their response: more than any client pipelines.
_MAX_WAITING: Final = 256
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


class ConnectionKey(NamedTuple):
    """A TLS connection: the pointer to its object is one connection's only until it is freed, so its birth counts.

    ``born_ns``: when it was first seen, CLOCK_MONOTONIC.
    """

    process: ProcessId
    pointer: int
    born_ns: int = 0


class Peer(NamedTuple):
    """The other end of the socket: an address as text, and a port."""

    address: str
    port: int


class Chunk(Struct, frozen=True, gc=False):
    """What one call of a TLS library moved.

    Attributes:
        key: of which connection.
        direction: ``read`` or ``write``, as the process sees it.
        data: what was captured: the bytes from ``skipped`` on.
        length: how many bytes the call moved; what is not in ``data`` was not captured.
        skipped: how many bytes at its beginning were not captured.
        offset: how many bytes of this direction passed before.
        time_ns: when they passed: of a write its beginning, of a read its end; CLOCK_MONOTONIC.
        site: the cookie of the probe that saw it.
        peer: if the socket is known.
        local_port: of the socket.
    """

    key: ConnectionKey
    direction: Direction
    data: bytes
    length: int
    skipped: int
    offset: int
    time_ns: int
    site: int = 0
    peer: Peer | None = None
    local_port: int | None = None


@dataclass(slots=True)
class FlowStats:
    """What passed, and what could not be reported of it; figures only grow.

    Attributes:
        calls: that were taken over. Of a tap ``passed = calls + lost + spared + no_room`` once it is closed.
        flows: handed out.
        incomplete: of those, whose end was not seen or whose framing was lost.
        joined_late: responses whose request passed before the watch, and connections that were joined in the middle.
        resyncs: how often framing was lost and the next message searched for.
        unknown_fields: HTTP/2 fields that were sent before the watch.
        unknown_peers: flows whose socket was never seen.
        undecoded: connections that have shown no HTTP.
        gaps: calls whose bytes were lost or not captured where they were needed.
        dropped: connections and requests that were given up for want of space.
    """

    calls: int = 0
    flows: int = 0
    incomplete: int = 0
    joined_late: int = 0
    resyncs: int = 0
    unknown_fields: int = 0
    unknown_peers: int = 0
    undecoded: int = 0
    gaps: int = 0
    dropped: int = 0


class Flow(Struct, gc=False):
    """One request and its response. What is not known is None; HTTP/2 fields sent before the watch are ``<unknown>``.

    Times are in ns of CLOCK_MONOTONIC; sizes are those of the bodies, in bytes.
    """

    key: ConnectionKey
    side: Side
    protocol: Protocol
    method: str | None = None
    authority: str | None = None
    path: str | None = None
    status: int | None = None
    grpc_status: int | None = None
    request_bytes: int = 0
    response_bytes: int = 0
    begin_ns: int | None = None
    first_byte_ns: int | None = None
    end_ns: int | None = None
    is_complete: bool = False
    peer: Peer | None = None
    local_port: int | None = None
    site: int = 0

    @property
    def ttfb_ns(self) -> int | None:
        """From the first byte of the request to the first of the response."""
        if self.begin_ns is None or self.first_byte_ns is None:
            return None
        return max(0, self.first_byte_ns - self.begin_ns)

    @property
    def duration_ns(self) -> int | None:
        """From the first byte of the request to the last of the response."""
        if self.begin_ns is None or self.end_ns is None:
            return None
        return max(0, self.end_ns - self.begin_ns)


class _Http1:
    """Both directions of an HTTP/1 connection: responses answer requests in the order of those."""

    def __init__(self, connection: _Connection, side: Side) -> None:
        self._connection = connection
        self._side = side
        self._waiting: deque[tuple[Flow, Message]] = deque()
        #: The request that the response under way answers, if it was seen.
        self._answered: Flow | None = None
        self._request_message: Message | None = None
        self.request = Http1Decoder("request", on_head=self._request, on_end=self._request_end)
        self.response = Http1Decoder(
            "response", on_head=self._response, on_end=self._response_end, method_of=self._method
        )

    def feed(self, is_request: bool, data: bytes, time_ns: int) -> None:
        (self.request if is_request else self.response).feed(data, time_ns)

    def skip(self, is_request: bool, size: int, time_ns: int) -> None:
        (self.request if is_request else self.response).skip(size, time_ns)

    def skippable(self, is_request: bool) -> int:
        return (self.request if is_request else self.response).skippable

    def close(self, time_ns: int) -> None:
        self.request.close(time_ns)
        self.response.close(time_ns)
        while self._waiting:
            flow, _ = self._waiting.popleft()
            self._connection.hand_out(flow)

    @property
    def resyncs(self) -> int:
        return self.request.resyncs + self.response.resyncs

    @property
    def unknown(self) -> int:
        return 0

    @property
    def held(self) -> int:
        return self.request.held + self.response.held

    def _method(self) -> str | None:
        return self._waiting[0][0].method if self._waiting else None

    def _request(self, message: Message) -> None:
        if len(self._waiting) >= _MAX_WAITING:
            flow, _ = self._waiting.popleft()
            self._connection.drop(flow)
        flow = self._connection.new_flow(self._side, f"HTTP/{message.version}")
        flow.method, flow.path, flow.begin_ns = message.method, message.target, message.begin_ns
        flow.authority = message.host
        if message.method == "CONNECT":
            flow.authority, flow.path = message.target, None
        elif message.target and message.target.startswith(("http://", "https://")):
            # A proxy is asked by whole addresses; their host counts (RFC 9112, section 3.2.2).
            _, _, rest = message.target.partition("://")
            authority, slash, path = rest.partition("/")
            flow.authority, flow.path = authority, slash + path or "/"
        self._waiting.append((flow, message))

    def _request_end(self, message: Message) -> None:
        for flow, request in self._waiting:
            if request is message:
                flow.request_bytes = message.body_bytes

    def _response(self, message: Message) -> None:
        if message.status is not None and 100 <= message.status < 200 and message.status != 101:
            return
        if self._waiting:
            self._answered, request = self._waiting.popleft()
            self._answered.request_bytes = request.body_bytes
            self._request_message = request
        else:
            self._answered = self._connection.new_flow(self._side, f"HTTP/{message.version}")
            self._request_message = None
            self._connection.stats.joined_late += 1
        self._answered.status = message.status
        self._answered.first_byte_ns = message.begin_ns

    def _response_end(self, message: Message) -> None:
        flow, self._answered = self._answered, None
        if flow is None:
            return
        if self._request_message is not None:
            flow.request_bytes = self._request_message.body_bytes
        flow.response_bytes, flow.end_ns = message.body_bytes, message.end_ns
        flow.is_complete = message.is_complete and flow.begin_ns is not None
        self._connection.hand_out(flow)
        if self.response.is_tunnel or message.status == 101:
            self.request.open_tunnel()


class _Http2:
    """Both directions of an HTTP/2 connection: a response is on the stream of its request."""

    def __init__(self, connection: _Connection, side: Side | None) -> None:
        self._connection = connection
        self._side = side
        self._streams: OrderedDict[int, Flow] = OrderedDict()
        self._ended: set[tuple[int, str]] = set()
        self.decoders: dict[Direction, Http2Decoder] = {
            direction: Http2Decoder(
                on_headers=lambda *args, at=direction: self._headers(at, *args),
                on_data=lambda *args, at=direction: self._data(at, *args),
                on_reset=self._reset,
            )
            for direction in ("read", "write")
        }

    def close(self, time_ns: int) -> None:
        for stream in list(self._streams):
            self._end(stream, time_ns, is_complete=False)

    @property
    def resyncs(self) -> int:
        return sum(decoder.resyncs for decoder in self.decoders.values())

    @property
    def unknown(self) -> int:
        return sum(decoder.unknown for decoder in self.decoders.values())

    @property
    def held(self) -> int:
        return sum(decoder.held for decoder in self.decoders.values())

    def _is_request(self, direction: Direction) -> bool | None:
        return None if self._side is None else (direction == "write") == (self._side == "client")

    def _headers(self, direction: Direction, stream: int, fields: HeaderBlock, ends: bool, time_ns: int) -> None:
        known = dict(fields)
        if self._side is None:
            # Nothing but a request has a method, nothing but a response a status.
            if ":method" in known:
                self._side = "client" if direction == "write" else "server"
            elif ":status" in known:
                self._side = "server" if direction == "write" else "client"
        is_request = self._is_request(direction)
        if is_request is None:
            return
        flow = self._streams.get(stream)
        if flow is None:
            if len(self._streams) >= MAX_STREAMS:
                self._connection.drop(self._streams.popitem(last=False)[1])
            flow = self._streams[stream] = self._connection.new_flow(self._side or "client", "HTTP/2")
            if not is_request:
                self._connection.stats.joined_late += 1
        if is_request:
            _note_request(flow, known, time_ns)
        elif not _note_response(flow, known, time_ns):
            return
        if ends:
            self._half_end(direction, stream, time_ns)

    def _data(self, direction: Direction, stream: int, size: int, ends: bool, time_ns: int) -> None:
        flow = self._streams.get(stream)
        if flow is None:
            return
        if self._is_request(direction):
            flow.request_bytes += size
        else:
            flow.response_bytes += size
        if ends:
            self._half_end(direction, stream, time_ns)

    def _half_end(self, direction: Direction, stream: int, time_ns: int) -> None:
        # A response may be over before its request is; the flow is over with the response.
        if self._is_request(direction):
            return
        flow = self._streams.get(stream)
        self._end(stream, time_ns, is_complete=flow is not None and flow.begin_ns is not None)

    def _reset(self, stream: int, time_ns: int) -> None:
        self._end(stream, time_ns, is_complete=False)

    def _end(self, stream: int, time_ns: int, *, is_complete: bool) -> None:
        flow = self._streams.pop(stream, None)
        if flow is not None:
            flow.end_ns, flow.is_complete = time_ns, is_complete
            self._connection.hand_out(flow)


def _note_request(flow: Flow, fields: dict[str, str], time_ns: int) -> None:
    """Takes over a request's fields; its trailers say nothing that is kept."""
    if flow.begin_ns is not None:
        return
    flow.begin_ns = time_ns
    missing = UNKNOWN if UNKNOWN in fields else None
    flow.method = fields.get(":method", missing)
    flow.path = fields.get(":path", missing)
    flow.authority = fields.get(":authority", fields.get("host", missing))


def _note_response(flow: Flow, fields: dict[str, str], time_ns: int) -> bool:
    """Takes over a response's fields, or its trailers; False: it is an interim one."""
    status = fields.get(":status", "")
    if status.isdigit():
        if status.startswith("1"):
            return False
        flow.status = int(status)
    flow.first_byte_ns = flow.first_byte_ns or time_ns
    if fields.get("grpc-status", "").isdigit():
        flow.grpc_status = int(fields["grpc-status"])
    return True


class _Connection:
    """One TLS connection: what it speaks, and where each direction is."""

    def __init__(self, key: ConnectionKey, table: FlowTable) -> None:
        self.key = key
        self._table = table
        self.stats = table.stats
        self.peer: Peer | None = None
        self.local_port: int | None = None
        self.site = 0
        self._offsets: dict[Direction, int] = {}
        self._http1: _Http1 | None = None
        self._http2: _Http2 | None = None
        self._request_direction: Direction = "read"
        self._tries = 0
        self._is_undecoded = False
        #: The first bytes of a direction, while they are too few to determine what it speaks.
        self._first: dict[Direction, bytes] = {}

    def take(self, chunk: Chunk) -> None:
        if chunk.peer is not None:
            self.peer, self.local_port = chunk.peer, chunk.local_port
        self.site = chunk.site or self.site
        direction, time_ns = chunk.direction, chunk.time_ns
        expected = self._offsets.get(direction)
        missing = 0 if expected is None else max(0, chunk.offset - expected)
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
    def held(self) -> int:
        """Bytes that wait for more."""
        first = sum(map(len, self._first.values())) if self._first else 0
        return first + (self._http1.held if self._http1 else self._http2.held if self._http2 else 0)

    def close(self, time_ns: int) -> None:
        spoken = self._http1 or self._http2
        if spoken is not None:
            before = spoken.resyncs, spoken.unknown
            spoken.close(time_ns)
            self._count(before)
        elif self._tries and not self._is_undecoded:
            self.stats.undecoded += 1
        self._http1 = self._http2 = None
        self._first.clear()

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
            self._http2 = _Http2(self, "client" if direction == "write" else "server")
        elif starts_message(data, is_request=True):
            self._request_direction = direction
            self._http1 = _Http1(self, "client" if direction == "write" else "server")
        elif starts_message(data, is_request=False):
            self._request_direction = "read" if direction == "write" else "write"
            self._http1 = _Http1(self, "server" if direction == "write" else "client")
        elif looks_like_frames(data):
            self._http2 = _Http2(self, None)
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
    """

    def __init__(
        self,
        on_flow: Callable[[Flow], None],
        *,
        max_connections: int = MAX_CONNECTIONS,
        max_bytes: int = MAX_BYTES,
        keeps_query: bool = False,
    ) -> None:
        self._on_flow = on_flow
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
                return 0
        before = connection.held
        connection.take(chunk)
        self._held += connection.held - before
        while self._held > self._max_bytes and len(self._connections) > 1:
            self._drop_idle(chunk.time_ns)
        left = connection.skippable(chunk.direction)
        return connection.offset(chunk.direction) + left if left else 0

    def end(self, key: ConnectionKey, time_ns: int) -> None:
        """A connection ended: its object was freed, or shut down."""
        connection = self._connections.pop(key, None)
        if connection is not None:
            self._held -= connection.held
            connection.close(time_ns)

    def end_process(self, process: ProcessId, time_ns: int) -> None:
        """A process is gone, and every connection of it."""
        for key in [key for key in self._connections if key.process == process]:
            self.end(key, time_ns)

    def _drop_idle(self, time_ns: int) -> None:
        """Gives up the connection that was idle longest."""
        self.stats.dropped += 1
        self.end(next(iter(self._connections)), time_ns)

    def close(self, time_ns: int) -> None:
        """Ends every connection."""
        for key in list(self._connections):
            self.end(key, time_ns)

    def hand_out(self, flow: Flow) -> None:
        """Counts a flow and hands it on."""
        if flow.path is not None and not self._keeps_query and "?" in flow.path:
            flow.path = flow.path.partition("?")[0]
        self.stats.flows += 1
        self.stats.incomplete += not flow.is_complete
        self.stats.unknown_peers += flow.peer is None
        self._on_flow(flow)
