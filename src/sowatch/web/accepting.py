"""How many connections a listening socket keeps, together and of one address: counted from accept to close.

Protocols count too late: with TLS theirs begins after the handshake, for which asyncio takes 256 KiB at accept.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from collections import Counter
from typing import Any, Final

__all__ = ["Listener"]

#: Connections that are refused in a row before others of the event loop have their turn.
_IN_A_ROW: Final = 64
#: Bits of an IPv6 address that are one network's: its hosts choose the others.
_NETWORK_BITS: Final = 64


class Listener(socket.socket):
    """A TCP socket that closes at once what it accepts beyond its bounds. Used on one thread.

    Attributes:
        most: connections that are kept; None: any number.
        most_of_one: of them, those of one address (of IPv6: of one /64); None: any number.
    """

    def __init__(self, family: int, *, most: int | None = None, most_of_one: int | None = None) -> None:
        super().__init__(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.most = most
        self.most_of_one = most_of_one
        self._kept: Counter[str] = Counter()

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection that is within the bounds."""
        for _ in range(_IN_A_ROW):
            made, address = super().accept()
            source = _source_of(address[0])
            if self._may_keep(source):
                return _Accepted(made, self._kept, source), address
            made.close()
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def _may_keep(self, source: str) -> bool:
        return (self.most is None or self._kept.total() < self.most) and (
            self.most_of_one is None or self._kept[source] < self.most_of_one
        )


class _Accepted(socket.socket):
    """A connection; counted until it is closed."""

    def __init__(self, made: socket.socket, kept: Counter[str], source: str) -> None:
        super().__init__(made.family, made.type, made.proto, fileno=made.detach())
        self._kept: Counter[str] | None = kept
        self._source = source
        kept[source] += 1

    def close(self) -> None:
        super().close()
        kept, self._kept = self._kept, None
        if kept is not None:
            kept[self._source] -= 1
            if not kept[self._source]:
                del kept[self._source]


def _source_of(address: str) -> str:
    """Whose share an address has.

    >>> _source_of("192.0.2.7"), _source_of("::ffff:192.0.2.7")
    ('192.0.2.7', '192.0.2.7')
    >>> _source_of("2001:db8::7") == _source_of("2001:db8::8")
    True
    >>> _source_of("2001:db8::7") == _source_of("2001:db8:0:1::7")
    False
    """
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return hex(int(found) >> (128 - _NETWORK_BITS))
