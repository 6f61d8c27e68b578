"""Facts of HTTP requests as OpenTelemetry's semantic conventions for HTTP (v1.23, stable) have them. Values only."""

from __future__ import annotations

from typing import Final

__all__ = ["host_and_port", "known", "method_name"]

#: What a field of HTTP/2 is that was sent before the connection was watched; as `sowatch.http.http2.UNKNOWN`.
_UNKNOWN: Final = "<unknown>"
#: RFC 9110 and RFC 5789, as the conventions have it; others are ``_OTHER`` there.
_METHODS: Final = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"})


def known(field: str | None) -> str | None:
    """A field of a request; None if it was sent before the watch, too."""
    return None if field == _UNKNOWN else field


def method_name(method: str | None) -> str | None:
    """The attribute ``http.request.method``, so that nobody can make up new ones.

    >>> method_name("GET"), method_name("BREW"), method_name("<unknown>"), method_name(None)
    ('GET', '_OTHER', None, None)
    """
    if known(method) is None:
        return None
    return method if method in _METHODS else "_OTHER"


def host_and_port(authority: str | None) -> tuple[str | None, int | None]:
    """``server.address`` and ``server.port`` of an authority; of https the port is 443 where none is given.

    >>> host_and_port("shop.example"), host_and_port("[::1]:8443"), host_and_port("shop.example:"), host_and_port(None)
    (('shop.example', 443), ('::1', 8443), ('shop.example', 443), (None, None))
    """
    authority = known(authority)
    if not authority:
        return None, None
    host, colon, port = authority.rpartition(":")
    if not colon or (":" in host and not host.startswith("[")) or not (port == "" or port.isdecimal()):
        host, port = authority, ""
    number = int(port) if port.isascii() and 0 < len(port) <= 5 else 443
    return host.removeprefix("[").removesuffix("]").lower(), number
