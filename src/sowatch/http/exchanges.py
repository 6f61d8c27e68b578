"""Requests of one connection matched with their responses, from what both of its directions carry. Pure.

What cannot be matched for certain is handed out apart: a request without a response, a response without a request.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Final, Protocol

from sowatch.http.flow import Direction, Flow, FlowStats, Headers, Side
from sowatch.http.http1 import Http1Decoder, Message
from sowatch.http.http2 import MAX_STREAMS, UNKNOWN, HeaderBlock, Http2Decoder
from sowatch.model.header_names import kept_value

__all__ = ["Connection", "Http1Exchanges", "Http2Exchanges"]

#: Requests of one connection that wait for their response: more than any client pipelines.
_MAX_WAITING: Final = 256
#: What a request that waits for its response counts for in `MAX_BYTES`, beside its path and authority.
_WAITING_BYTES: Final = 512


class Connection(Protocol):
    """Whose exchanges they are: makes flows, and hands them out."""

    stats: FlowStats
    #: Of header fields that flows keep, in lower case.
    header_names: tuple[str, ...]

    def new_flow(self, side: Side, protocol: str) -> Flow:
        """A flow of this connection of which nothing is known yet."""

    def hand_out(self, flow: Flow) -> None:
        """The flow is over."""

    def drop(self, flow: Flow) -> None:
        """The flow is given up for want of space."""


class Http1Exchanges:
    """Both directions of an HTTP/1 connection: responses answer requests in the order of those."""

    def __init__(self, connection: Connection, side: Side) -> None:
        self._connection = connection
        self._side = side
        #: None: as many requests as nobody knows, because framing was lost; responses from there on answer none.
        self._waiting: deque[tuple[Flow, Message] | None] = deque()
        #: Requests after those, which were given up for want of space; their responses are passed over.
        self._unkept = 0
        self._waiting_bytes = 0
        #: The request that the response under way answers, if it was seen.
        self._answered: Flow | None = None
        self._request_message: Message | None = None
        self.request = Http1Decoder(
            "request",
            on_head=self._request,
            on_end=self._request_end,
            on_lost=self._request_lost,
            names=connection.header_names,
        )
        self.response = Http1Decoder(
            "response",
            on_head=self._response,
            on_end=self._response_end,
            on_lost=self._response_lost,
            method_of=self._method,
            names=connection.header_names,
        )

    def feed(self, is_request: bool, data: bytes, time_ns: int) -> None:
        """Takes over bytes of one direction; see `Http1Decoder.feed`."""
        (self.request if is_request else self.response).feed(data, time_ns)

    def skip(self, is_request: bool, size: int, time_ns: int) -> None:
        """Takes over that bytes of one direction passed which nobody has."""
        (self.request if is_request else self.response).skip(size, time_ns)

    def skippable(self, is_request: bool) -> int:
        """How many of the next bytes of a direction are body for certain."""
        if not is_request and self._may_answer_head:
            return 0
        return (self.request if is_request else self.response).skippable

    def shut(self, is_request: bool, time_ns: int) -> None:
        """Nothing more comes in one direction."""
        (self.request if is_request else self.response).close(time_ns)

    def close(self, time_ns: int, *, is_ended: bool) -> None:
        """Hands out what is under way; ``is_ended``: the connection ended, and is not only given up."""
        self.request.close(time_ns, is_ended=is_ended)
        self.response.close(time_ns, is_ended=is_ended)
        self._give_up_waiting()

    @property
    def resyncs(self) -> int:
        """How often framing was lost, in both directions."""
        return self.request.resyncs + self.response.resyncs

    @property
    def unknown(self) -> int:
        """Fields that were sent before the watch."""
        return 0

    @property
    def held(self) -> int:
        """Bytes that wait for more, in both directions."""
        return self.request.held + self.response.held + self._waiting_bytes

    @property
    def waiting(self) -> int:
        """How many requests wait for their responses."""
        return len(self._waiting)

    @property
    def _may_answer_head(self) -> bool:
        """Whether nobody knows what the response under way answers, and no body has come so far."""
        flow = self._answered
        return flow is not None and flow.begin_ns is None and not self.response.has_begun_body

    def _method(self) -> str | None:
        first = self._waiting[0] if self._waiting else None
        return first[0].method if first is not None else None

    def _next_waiting(self) -> tuple[Flow, Message] | None:
        """Takes out the request that the next response answers; None: that is not known."""
        first = self._waiting[0] if self._waiting else None
        if first is not None:
            self._waiting.popleft()
            self._waiting_bytes -= _weight(first[0])
        return first

    def _give_up_waiting(self) -> None:
        """Hands out what waits: nobody knows which response is whose."""
        waiting, self._waiting = self._waiting, deque()
        self._unkept = self._waiting_bytes = 0
        for one in waiting:
            if one is not None:
                self._connection.hand_out(one[0])

    def _request_lost(self) -> None:
        # Without anything under way a client has its responses: the next request is answered by the next response.
        if (self._waiting or self._answered is not None) and (not self._waiting or self._waiting[-1] is not None):
            self._waiting.append(None)

    def _response_lost(self) -> None:
        self._give_up_waiting()
        self._waiting.append(None)

    def _request(self, message: Message) -> None:
        if self._may_answer_head:
            # A client that asks again has all of the response. (Of one that pipelines a body follows, and is a gap.)
            self.response.end_without_body(message.begin_ns)
        if self._answered is None and len(self._waiting) == 1 and self._waiting[0] is None:
            # A client that asks again while nothing is under way has got what was lost. (Only one that pipelines
            # may have more to come.)
            self._waiting.clear()
        flow = self._connection.new_flow(self._side, f"HTTP/{message.version}")
        flow.method, flow.path, flow.begin_ns = message.method, message.target, message.begin_ns
        flow.authority, flow.request_headers = message.host, message.headers
        if message.method == "CONNECT":
            flow.authority, flow.path = message.target, None
        elif message.target and message.target.startswith(("http://", "https://")):
            # A proxy is asked by whole addresses; their host counts (RFC 9112, section 3.2.2).
            _, _, rest = message.target.partition("://")
            authority, slash, path = rest.partition("/")
            flow.authority, flow.path = authority, slash + path or "/"
        if self._unkept or len(self._waiting) >= _MAX_WAITING:
            # Its place is kept, or each response after it would be another request's.
            self._unkept += 1
            self._connection.drop(flow)
            return
        self._waiting.append((flow, message))
        self._waiting_bytes += _weight(flow)

    def _request_end(self, message: Message) -> None:
        for one in reversed(self._waiting):
            if one is not None and one[1] is message:
                one[0].request_bytes = message.body_bytes
                return

    def _response(self, message: Message) -> None:
        if message.status is not None and 100 <= message.status < 200 and message.status != 101:
            return
        self._request_message = None
        if (waiting := self._next_waiting()) is not None:
            self._answered, request = waiting
            self._answered.request_bytes = request.body_bytes
            self._request_message = request
        elif self._unkept and not self._waiting:
            self._unkept -= 1
            self._answered = None
            return
        else:
            if self._waiting:
                self._response_lost()
            self._answered = self._connection.new_flow(self._side, f"HTTP/{message.version}")
            self._connection.stats.joined_late += 1
        self._answered.status = message.status
        self._answered.first_byte_ns, self._answered.response_headers = message.begin_ns, message.headers

    def _response_end(self, message: Message) -> None:
        flow, self._answered = self._answered, None
        request, self._request_message = self._request_message, None
        if flow is not None:
            if request is not None:
                flow.request_bytes = request.body_bytes
            flow.response_bytes, flow.end_ns = message.body_bytes, message.end_ns
            flow.is_complete = message.is_complete and request is not None and not request.is_lost
            self._connection.hand_out(flow)
        if self.response.is_tunnel or message.status == 101:
            self.request.open_tunnel()


class Http2Exchanges:
    """Both directions of an HTTP/2 connection: a response is on the stream of its request."""

    def __init__(self, connection: Connection, side: Side | None) -> None:
        self._connection = connection
        self._side = side
        self._streams: OrderedDict[int, Flow] = OrderedDict()
        #: Streams that were handed out, the last ones: what comes on them later is no flow of its own.
        self._ended: OrderedDict[int, None] = OrderedDict()
        #: Streams of whose frames some may have been lost.
        self._damaged: set[int] = set()
        #: By stream how long its response says that it is, and when the last byte of it passed.
        self._lengths: dict[int, int] = {}
        self._last_ns: dict[int, int] = {}
        self._streams_bytes = 0
        self.decoders: dict[Direction, Http2Decoder] = {
            direction: Http2Decoder(
                on_headers=lambda *args, at=direction: self._headers(at, *args),
                on_data=lambda *args, at=direction: self._data(at, *args),
                on_reset=self._break_off,
                on_lost=self._lost,
            )
            for direction in ("read", "write")
        }

    def close(self, time_ns: int, *, is_ended: bool) -> None:  # noqa: ARG002 - no stream ends with its connection
        """Hands out what is under way; ``is_ended``: the connection ended, and is not only given up."""
        for stream in list(self._streams):
            self._break_off(stream, time_ns)

    @property
    def resyncs(self) -> int:
        """How often framing was lost, in both directions."""
        return sum(decoder.resyncs for decoder in self.decoders.values())

    @property
    def unknown(self) -> int:
        """Fields that were sent before the watch."""
        return sum(decoder.unknown for decoder in self.decoders.values())

    @property
    def held(self) -> int:
        """Bytes that wait for more, in both directions."""
        return self._streams_bytes + sum(decoder.held for decoder in self.decoders.values())

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
        # A server pushes on even streams (RFC 9113, section 5.1.1): nobody requested that.
        if is_request is None or stream in self._ended or stream % 2 == 0:
            return
        flow = self._streams.get(stream)
        if flow is None:
            if len(self._streams) >= MAX_STREAMS:
                oldest = next(iter(self._streams))
                self._connection.stats.dropped += 1
                self._end(oldest, time_ns, is_complete=False)
            flow = self._streams[stream] = self._connection.new_flow(self._side or "client", "HTTP/2")
            if not is_request:
                self._connection.stats.joined_late += 1
        if is_request:
            self._streams_bytes -= _weight(flow) if flow.begin_ns is not None else 0
            _note_request(flow, known, time_ns, self._kept(fields))
            self._streams_bytes += _weight(flow)
        elif not _note_response(flow, known, time_ns, self._kept(fields)):
            return
        elif (length := known.get("content-length", "")).isdecimal() and len(length) < 18:
            self._lengths[stream] = int(length)
        if ends:
            self._half_end(direction, stream, time_ns)

    def _kept(self, fields: HeaderBlock) -> Headers:
        """Of the fields those that are kept; one that is not there may be one that is not known."""
        found: dict[str, list[str]] = {}
        is_unknown = False
        for name, value in fields if self._connection.header_names else ():
            is_unknown |= name == UNKNOWN
            if name in self._connection.header_names:
                found.setdefault(name, []).append(value)
        if is_unknown:
            found = {name: [UNKNOWN] for name in self._connection.header_names if name not in found} | found
        return tuple((name, kept_value(values)) for name, values in found.items())

    def _data(self, direction: Direction, stream: int, size: int, ends: bool, time_ns: int) -> None:
        flow = self._streams.get(stream)
        if flow is None:
            return
        if self._is_request(direction):
            flow.request_bytes += size
        else:
            flow.response_bytes += size
            self._last_ns[stream] = time_ns
        if ends:
            self._half_end(direction, stream, time_ns)

    def _half_end(self, direction: Direction, stream: int, time_ns: int) -> None:
        # A response may be over before its request is; the flow is over with the response.
        if self._is_request(direction):
            return
        flow = self._streams.get(stream)
        self._end(stream, time_ns, is_complete=flow is not None and flow.begin_ns is not None)

    def _break_off(self, stream: int, time_ns: int) -> None:
        """A stream ends before its end was seen: curl gives up one whose body it has, as its length says."""
        flow, length = self._streams.get(stream), self._lengths.get(stream)
        is_whole = flow is not None and flow.begin_ns is not None and length == flow.response_bytes
        self._end(stream, self._last_ns.get(stream, time_ns) if is_whole else time_ns, is_complete=is_whole)

    def _end(self, stream: int, time_ns: int, *, is_complete: bool) -> None:
        flow = self._streams.pop(stream, None)
        self._lengths.pop(stream, None)
        self._last_ns.pop(stream, None)
        if flow is None:
            return
        self._ended[stream] = None
        if len(self._ended) > MAX_STREAMS:
            self._ended.popitem(last=False)
        if flow.begin_ns is not None:
            self._streams_bytes -= _weight(flow)
        flow.end_ns, flow.is_complete = time_ns, is_complete and stream not in self._damaged
        self._damaged.discard(stream)
        self._connection.hand_out(flow)

    def _lost(self) -> None:
        self._damaged.update(self._streams)


def _weight(flow: Flow) -> int:
    """What a flow counts for in `MAX_BYTES` while it waits for its response."""
    headers = sum(len(value) for _, value in flow.request_headers)
    return _WAITING_BYTES + len(flow.path or "") + len(flow.authority or "") + headers


def _note_request(flow: Flow, fields: dict[str, str], time_ns: int, headers: Headers) -> None:
    """Takes over a request's fields; its trailers say nothing that is kept."""
    if flow.begin_ns is not None:
        return
    flow.begin_ns, flow.request_headers = time_ns, headers
    missing = UNKNOWN if UNKNOWN in fields else None
    flow.method = fields.get(":method", missing)
    flow.path = fields.get(":path", missing)
    flow.authority = fields.get(":authority", fields.get("host", missing))


def _note_response(flow: Flow, fields: dict[str, str], time_ns: int, headers: Headers) -> bool:
    """Takes over a response's fields, or its trailers; False: it is an interim one."""
    status = fields.get(":status", "")
    if status.isdigit():
        if status.startswith("1"):
            return False
        flow.status = int(status)
    if flow.first_byte_ns is None:
        flow.response_headers = headers
    flow.first_byte_ns = flow.first_byte_ns or time_ns
    if fields.get("grpc-status", "").isdigit():
        flow.grpc_status = int(fields["grpc-status"])
    return True
