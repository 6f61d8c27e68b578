"""What the tap's program puts into its ring, decoded: bytes end here."""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping
from functools import lru_cache
from typing import Final, NamedTuple

from sowatch.http.flows import Chunk, ConnectionKey, Direction, Peer
from sowatch.model.identity import ProcessId

__all__ = ["CONNECTION", "COUNTERS", "HEAD", "Ended", "decode", "spare_key"]

#: struct tls_record of tls_taps.h without its bytes, 120 bytes.
HEAD: Final = struct.Struct("=QQQQQQQIIIIIBBHHHI16s16s")
#: struct tls_connection_key, 32 bytes.
CONNECTION: Final = struct.Struct("=QQIIQ")
#: enum tls_counter, in order.
COUNTERS: Final = ("lost", "unreadable", "spared", "no_room", "lost_ends", "passed")
#: Connections and peers that are remembered: each has many records.
_CACHED: Final = 8192
_DATA: Final = 1
_SHUT: Final = 3
_DIRECTIONS: Final[Mapping[int, Direction]] = {0: "read", 1: "write"}
_NUMBERS: Final[Mapping[Direction, int]] = {"read": 0, "write": 1}
_FAMILIES: Final = {2: (socket.AF_INET, 4), 10: (socket.AF_INET6, 16)}
_MAPPED: Final = b"\0" * 10 + b"\xff\xff"


class Ended(NamedTuple):
    """A connection's object was freed, or given another socket; or (``is_half``) nothing is written any more."""

    key: ConnectionKey
    time_ns: int
    is_half: bool = False


def decode(record: bytes) -> Chunk | Ended:
    """One record of the ring.

    A write has passed when it began, a read when it ended: so a request is older than its response.
    """
    fields = HEAD.unpack_from(record)
    pointer, start_ns, site, begin_ns, end_ns, offset, born_ns, tgid = fields[:8]
    length, skipped, captured, kind, direction = fields[9:14]
    key = _key(tgid, start_ns, pointer, born_ns)
    if kind != _DATA:
        return Ended(key, end_ns, is_half=kind == _SHUT)
    family, peer_port, local_port, _unused, peer, _local = fields[14:]
    return Chunk(
        key,
        _DIRECTIONS[direction],
        record[HEAD.size : HEAD.size + captured],
        length,
        skipped,
        offset,
        begin_ns if direction else end_ns,
        site,
        peer_of(family, peer, peer_port),
        local_port or None,
    )


@lru_cache(maxsize=_CACHED)
def _key(tgid: int, start_ns: int, pointer: int, born_ns: int) -> ConnectionKey:
    return ConnectionKey(ProcessId(tgid, start_ns), pointer, born_ns)


@lru_cache(maxsize=_CACHED)
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
    return CONNECTION.pack(key.pointer, key.process.start_ns, key.process.pid, _NUMBERS[direction], key.born_ns)
