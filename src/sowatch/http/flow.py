"""What goes into a `FlowTable`, and what comes out: connections, chunks, flows, figures. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from msgspec import Struct

from sowatch.model.identity import ProcessId
from sowatch.model.literals import HttpProtocol, HttpSide

__all__ = ["Chunk", "ConnectionKey", "Direction", "Flow", "FlowStats", "Headers", "Peer", "Protocol", "Side"]

Side = HttpSide
Protocol = HttpProtocol
Direction = Literal["read", "write"]
#: Names in lower case with their values.
Headers = tuple[tuple[str, str], ...]


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
        calls: that were taken over. Of a tap ``passed = calls + lost + spared + no_room`` once it has finished.
        flows: handed out.
        incomplete: of those, whose end was not seen or whose framing was lost.
        joined_late: responses whose request was not seen, and connections that were joined in the middle.
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

    Of header fields it has those that the table was given the names of.

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
    request_headers: Headers = ()
    response_headers: Headers = ()

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
