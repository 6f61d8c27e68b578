"""What the tap's program puts into its ring, decoded: bytes end here."""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping
from typing import Final, NamedTuple

from sowatch.http.flows import Chunk, ConnectionKey, Direction, Peer
from sowatch.model.identity import ProcessId

__all__ = ["CONNECTION", "COUNTERS", "HEAD", "Ended", "decode", "spare_key"]

#: struct tls_record of tls_taps.h without its bytes, 112 bytes.
HEAD: Final = struct.Struct("=QQQQQQIIIIIBBHHHI16s16s")
#: struct tls_connection_key, 32 bytes.
CONNECTION: Final = struct.Struct("=QQIIQ")
#: enum tls_counter, in order.
COUNTERS: Final = ("lost", "unreadable", "spared", "no_room")
_DATA: Final = 1
_DIRECTIONS: Final[Mapping[int, Direction]] = {0: "read", 1: "write"}
_NUMBERS: Final[Mapping[Direction, int]] = {"read": 0, "write": 1}
_FAMILIES: Final = {2: (socket.AF_INET, 4), 10: (socket.AF_INET6, 16)}
_MAPPED: Final = b"\0" * 10 + b"\xff\xff"


class _Head(NamedTuple):
    """struct tls_record of tls_taps.h without its bytes."""

    pointer: int
    start_ns: int
    site: int
    begin_ns: int
    end_ns: int
    offset: int
    tgid: int
    tid: int
    length: int
    skipped: int
    captured: int
    kind: int
    direction: int
    family: int
    peer_port: int
    local_port: int
    unused: int
    peer: bytes
    local: bytes


class Ended(NamedTuple):
    """A connection's object was freed, shut down, or given another socket."""

    key: ConnectionKey
    time_ns: int


def decode(record: bytes) -> Chunk | Ended:
    """One record of the ring.

    A write has passed when it began, a read when it ended: so a request is older than its response.
    """
    head = _Head(*HEAD.unpack_from(record))
    key = ConnectionKey(ProcessId(head.tgid, head.start_ns), head.pointer)
    if head.kind != _DATA:
        return Ended(key, head.end_ns)
    return Chunk(
        key,
        _DIRECTIONS[head.direction],
        record[HEAD.size : HEAD.size + head.captured],
        head.length,
        head.skipped,
        head.offset,
        head.begin_ns if head.direction else head.end_ns,
        head.site,
        peer_of(head.family, head.peer, head.peer_port),
        head.local_port or None,
    )


def peer_of(family: int, address: bytes, port: int) -> Peer | None:
    """The other end of a socket; None if it was not seen.

    >>> peer_of(2, bytes([127, 0, 0, 1]) + bytes(12), 443)
    Peer(address='127.0.0.1', port=443)
    """
    known = _FAMILIES.get(family)
    if known is None:
        return None
    if family == socket.AF_INET6 and address.startswith(_MAPPED):
        return Peer(socket.inet_ntop(socket.AF_INET, address[12:16]), port)
    return Peer(socket.inet_ntop(known[0], address[: known[1]]), port)


def spare_key(key: ConnectionKey, direction: Direction) -> bytes:
    """What the program's map `spare` has for one direction of a connection."""
    return CONNECTION.pack(key.pointer, key.process.start_ns, key.process.pid, _NUMBERS[direction], 0)
