"""The metrics as StatsD lines over UDP or a unix datagram socket.

Written here, because a line is a name, a number and a letter: the packages for it either know no tags and no unix
sockets or are the client of one vendor's product.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Iterator
from typing import Final, Literal
from urllib.parse import urlsplit

from sowatch.model.errors import ConfigError, SowatchError
from sowatch.telemetry.metrics import Counter, Gauge, Histogram, Metric, MetricRegistry

__all__ = ["StatsdExporter", "parse_address"]

#: What fits into one packet of an Ethernet, headers taken off; unix sockets have no such limit.
_UDP_BYTES: Final = 1432
_UNIX_BYTES: Final = 8192
_SEND_TIMEOUT_S: Final = 1.0

#: A total that was sent, by series and part ("", "count", "sum").
_Key = tuple[str, tuple[str, ...], str]


class StatsdExporter:
    """Sends counters as growth, gauges as values, histograms as growth of their count and sum.

    Growth that could not be handed to the socket is sent the next time. UDP does not report what was
    lost on the way. Used by one thread (`Pusher`).

    Args:
        registry: whose metrics.
        address: ``udp://HOST:PORT`` or ``unixgram:///PATH``.
        prefix: comes before each name, with a dot.
        tags: ``dogstatsd`` appends ``|#key:value``, which most servers know; ``name`` appends the values to
            the name, for those that know no tags.

    Raises:
        ConfigError: the address is none of the two.
    """

    name = "statsd"

    def __init__(
        self,
        registry: MetricRegistry,
        address: str = "udp://127.0.0.1:8125",
        *,
        prefix: str = "sowatch",
        tags: Literal["dogstatsd", "name"] = "dogstatsd",
    ) -> None:
        self._registry = registry
        self._address = address
        self._prefix = prefix
        self._tags = tags
        self._host, self._port, self._path = parse_address(address)
        self._max_bytes = _UNIX_BYTES if self._path else _UDP_BYTES
        self._socket: socket.socket | None = None
        self._reported: dict[_Key, int | float] = {}

    def push(self) -> None:
        """Sends everything that is due.

        Raises:
            SowatchError: the socket did not take it.
        """
        metrics = [metric for metric in self._registry.collect() if metric.goes_to("statsd")]
        try:
            out = self._connected()
            for datagram, totals in self._datagrams(metrics):
                out.send(datagram)
                self._reported.update(totals)
        except OSError as error:
            # A server that was started again has another unix socket, a host another address.
            self.close()
            raise SowatchError(
                f"cannot send to {self._address}: {error.strerror or error}. "
                "See whether a StatsD server listens there; it is tried again."
            ) from error

    def close(self) -> None:
        """Closes the socket. Safe to call again."""
        out, self._socket = self._socket, None
        if out is not None:
            out.close()

    def _connected(self) -> socket.socket:
        if self._socket is None:
            self._socket = self._connect()
            # Only a unix socket can make a sender wait, and then only as long as its reader sleeps.
            self._socket.settimeout(_SEND_TIMEOUT_S)
        return self._socket

    def _connect(self) -> socket.socket:
        if self._path:
            out = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            target: tuple[str, int] | str = self._path
        else:
            found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_DGRAM)
            family, kind, protocol, _, address = found[0]
            out = socket.socket(family, kind | socket.SOCK_CLOEXEC, protocol)
            target = address  # type: ignore[assignment]
        try:
            out.connect(target)
        except OSError:
            out.close()
            raise
        return out

    def _datagrams(self, metrics: Iterable[Metric]) -> Iterator[tuple[bytes, dict[_Key, int | float]]]:
        """Full packets, and the totals that count as sent once each is sent."""
        lines: list[bytes] = []
        totals: dict[_Key, int | float] = {}
        size = 0
        for line, key, total in self._lines(metrics):
            if lines and size + len(line) + 1 > self._max_bytes:
                yield b"\n".join(lines), totals
                lines, totals, size = [], {}, 0
            lines.append(line)
            size += len(line) + 1
            if key is not None:
                totals[key] = total
        if lines:
            yield b"\n".join(lines), totals

    def _lines(self, metrics: Iterable[Metric]) -> Iterator[tuple[bytes, _Key | None, int | float]]:
        for metric in metrics:
            if isinstance(metric, Gauge):
                value = metric.get()
                # A sign would make it a change of the gauge: back to zero first, in the same packet.
                reset = self._line(metric, "", 0, "g") + b"\n" if value < 0 else b""
                yield reset + self._line(metric, "", value, "g"), None, 0
            elif isinstance(metric, Counter):
                yield from self._growth(metric, "", metric.get())
            elif isinstance(metric, Histogram):
                found = metric.get()
                yield from self._growth(metric, "count", found.count)
                yield from self._growth(metric, "sum", found.total)

    def _growth(self, metric: Metric, part: str, total: float) -> Iterator[tuple[bytes, _Key, int | float]]:
        key = (metric.name, metric.tags, part)
        delta = total - self._reported.get(key, 0)
        if delta > 0:
            yield self._line(metric, part, delta, "c"), key, total

    def _line(self, metric: Metric, part: str, value: float, letter: str) -> bytes:
        words = [self._prefix, metric.name, part]
        suffix = ""
        if metric.labels and self._tags == "dogstatsd":
            suffix = "|#" + ",".join(f"{_plain(key)}:{_plain(text)}" for key, text in metric.labels.items())
        elif metric.labels:
            words += [_plain(text).replace(".", "_") for text in metric.labels.values()]
        name = ".".join(filter(None, words))
        return f"{name}:{value}|{letter}{suffix}".encode()


def parse_address(address: str) -> tuple[str, int, str]:
    """Host, port and path of an address; only a unix socket has a path.

    Raises:
        ConfigError: it is none.
    """
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        parts, host, port = urlsplit(""), None, None
    if parts.scheme == "udp" and host and port and not parts.path:
        return host, port, ""
    if parts.scheme == "unixgram" and not host and parts.path.startswith("/"):
        return "", 0, parts.path
    raise ConfigError(
        "statsd address", f"{address!r} is none. Use udp://127.0.0.1:8125 or unixgram:///run/statsd.sock."
    )


def _plain(text: str) -> str:
    """Without the characters that mean something in a line."""
    return re.sub(r"[:|,#@\s]", "_", text)
