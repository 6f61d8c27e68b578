"""HTTP/1.0 and HTTP/1.1 as one direction of a connection has it: bytes in, messages out. Pure, incremental, bounded.

A head is parsed by llhttp (`httptools`) once all of it is there; what follows it is framed here, because the bytes of a
body may never have been captured and are then only counted. Framing is that of RFC 9112, section 6.3.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, Literal, NamedTuple

import httptools
from msgspec import Struct

from sowatch.model.header_names import kept_value

__all__ = ["MAX_HEAD_BYTES", "Http1Decoder", "Message", "may_start_message", "starts_message"]

#: nginx and Apache take 8 KiB, node 16 KiB, some proxies 64 KiB; a head that is longer is given up.
MAX_HEAD_BYTES: Final = 64 << 10
#: Heads whose meaning is remembered.
_CACHED_HEADS: Final = 2048
#: A chunk's size has at most 16 hexadecimal digits, and extensions that few use.
_MAX_CHUNK_LINE_BYTES: Final = 4096
#: What of a head is read to determine whether it may be one.
_START_BYTES: Final = 256
#: How a message begins: a token as the method and a target, or the version of a response (RFC 9112, sections 3 and 4).
_RESPONSE: Final = re.compile(rb"HTTP/1\.[01] [1-9][0-9]{2}(?: |\r|\n)")
#: Methods that anything may begin with are few; a request by another one is taken once its version was seen.
_METHODS: Final = re.compile(rb"(?:GET|HEAD|POST|PUT|DELETE|CONNECT|OPTIONS|TRACE|PATCH|PROPFIND|REPORT|PURGE) ")
_REQUEST_LINE: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,32} [\x21-\x7e\x80-\xff]+ HTTP/1\.[01]\r?\n")

#: What may become one of them.
_REQUEST_PART: Final = re.compile(
    rb"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}"
    rb"(?: (?:[\x21-\x7e\x80-\xff]+(?: (?:H(?:T(?:T(?:P(?:/(?:1(?:\.(?:[01]\r?)?)?)?)?)?)?)?)?)?)?)?"
)
_RESPONSE_PART: Final = re.compile(
    rb"H(?:T(?:T(?:P(?:/(?:1(?:\.(?:[01](?: (?:[1-9](?:[0-9](?:[0-9])?)?)?)?)?)?)?)?)?)?)?"
)

_HEAD, _LENGTH, _CHUNK_SIZE, _CHUNK_DATA, _CHUNK_END, _TRAILER, _UNTIL_CLOSE, _TUNNEL, _LOST = range(9)


def starts_message(data: bytes, *, is_request: bool) -> bool:
    """Whether these bytes look like the beginning of a message, as a call that starts one hands them over.

    >>> starts_message(b"GET / HTTP/1.1", is_request=True), starts_message(b"+OK", is_request=True)
    (True, False)
    >>> starts_message(b"HTTP/1.1 200 OK", is_request=False)
    True
    """
    if is_request:
        return bool(_METHODS.match(data) or _REQUEST_LINE.match(data))
    return _RESPONSE.match(data) is not None


def may_start_message(data: bytes, *, is_request: bool) -> bool:
    """Whether more bytes may make this the beginning of a message.

    >>> may_start_message(b"BREW /po", is_request=True), may_start_message(b"HTTP/1.", is_request=False)
    (True, True)
    """
    if is_request:
        return len(data) <= MAX_HEAD_BYTES and _REQUEST_PART.fullmatch(data) is not None
    return _RESPONSE_PART.fullmatch(data) is not None


class Message(Struct, gc=False):
    """One request or response; times are those of the bytes, in ns of CLOCK_MONOTONIC.

    Attributes:
        method: of a request.
        target: of a request, as it was sent.
        status: of a response.
        version: ``1.0`` or ``1.1``.
        host: of a request, what its Host field names.
        begin_ns: of the first byte.
        end_ns: of the last byte; None while it goes on.
        body_bytes: of the body without its framing.
        is_complete: its end was seen, and no byte of its framing was missed.
        is_lost: its framing was lost, so what is counted of its body may be too little.
        headers: the fields that the decoder was given the names of, with their values.
    """

    begin_ns: int
    method: str | None = None
    target: str | None = None
    status: int | None = None
    version: str = ""
    host: str | None = None
    end_ns: int | None = None
    body_bytes: int = 0
    is_complete: bool = False
    is_lost: bool = False
    headers: tuple[tuple[str, str], ...] = ()


class _Head:
    """What llhttp calls while it parses one head."""

    __slots__ = ("headers", "is_whole", "target")

    def __init__(self) -> None:
        self.is_whole = False
        self.target = b""
        self.headers: list[tuple[bytes, bytes]] = []

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self.is_whole = True


class _Parsed(NamedTuple):
    """What a head says, first what `Message` has; ``length`` is None where none is given, or the body is in chunks."""

    method: str | None
    target: str | None
    status: int | None
    version: str
    host: str | None
    is_chunked: bool
    has_coding: bool
    length: int | None
    headers: tuple[tuple[str, str], ...]


class Http1Decoder:
    """Decodes one direction of a connection.

    Args:
        kind: what this direction carries.
        on_head: called with a message once its head is there.
        on_end: called with a message once it has ended, complete or not.
        on_lost: called after the framing was lost: as many messages as nobody knows may have passed.
        method_of: for responses: the method of the request that the next response answers; None if it is not known.
        names: of header fields that messages keep, in lower case.

    Whatever comes in, nothing is raised; memory is bounded by `MAX_HEAD_BYTES`. Any cut of the same bytes into calls
    gives the same messages.
    """

    def __init__(
        self,
        kind: Literal["request", "response"],
        *,
        on_head: Callable[[Message], None],
        on_end: Callable[[Message], None],
        on_lost: Callable[[], None] = lambda: None,
        method_of: Callable[[], str | None] = lambda: None,
        names: tuple[str, ...] = (),
    ) -> None:
        self._is_request = kind == "request"
        self._names = names
        self._on_head = on_head
        self._on_end = on_end
        self._on_lost = on_lost
        self._method_of = method_of
        self._state = _HEAD
        self._buffer = bytearray()
        self._scanned = 0
        self._left = 0
        self._message: Message | None = None
        #: How often the framing was lost, and the next message searched for.
        self.resyncs = 0

    @property
    def is_tunnel(self) -> bool:
        """Whether the connection speaks something else by now: after CONNECT or an upgrade."""
        return self._state == _TUNNEL

    @property
    def is_lost(self) -> bool:
        """Whether the next message is searched for."""
        return self._state == _LOST

    @property
    def skippable(self) -> int:
        """How many of the next bytes belong to a body for certain, so that nobody needs to send them."""
        return self._left if self._state in (_LENGTH, _CHUNK_DATA) else 0

    @property
    def held(self) -> int:
        """Bytes of a head or a line that wait for their rest."""
        return len(self._buffer)

    def feed(self, data: bytes, time_ns: int) -> None:
        """Takes over bytes of one call.

        Args:
            data: what follows the bytes of the last call.
            time_ns: when they passed.
        """
        if self._state == _LOST:
            # A message may begin where a call begins, and nowhere else for certain.
            if not starts_message(data, is_request=self._is_request):
                return
            self._state = _HEAD
        at, end = 0, len(data)
        while at < end:
            state = self._state
            if state in (_LENGTH, _CHUNK_DATA):
                at += self._take_body(min(end - at, self._left), time_ns)
            elif state in (_UNTIL_CLOSE, _TUNNEL):
                self._count(end - at, time_ns)
                at = end
            elif state == _LOST:
                return
            else:
                at = self._take_line(data, at, time_ns)

    def take_whole(self, data: bytes, time_ns: int) -> bool:
        """Takes over a call that moved one whole message and nothing else: the same as `feed`, in less time.

        Returns:
            False: it is not that, and nothing was taken.
        """
        end = data.find(b"\r\n\r\n") + 4
        if self._state != _HEAD or self._message is not None or not 4 < end <= MAX_HEAD_BYTES:
            return False
        if data[0] in b"\r\n" or data.find(b"\n\n", 0, end) >= 0:
            return False
        size = len(data) - end
        parsed = _parse(data[:end] if size else data, self._is_request, self._names)
        if parsed is None or parsed.has_coding:
            return False
        if self._is_request:
            if (parsed.length or 0) != size:
                return False
        elif (
            parsed.length != size
            or parsed.status is None
            or parsed.status < 200
            or parsed.status in (204, 304)
            or self._method_of() in ("HEAD", "CONNECT")
        ):
            return False
        message = Message(time_ns, *parsed[:5], headers=parsed.headers)
        self._on_head(message)
        message.body_bytes, message.end_ns, message.is_complete = size, time_ns, True
        self._on_end(message)
        return True

    def skip(self, size: int, time_ns: int) -> None:
        """Takes over that ``size`` bytes passed which nobody has: all of a body, or the framing is lost."""
        if self._state in (_LENGTH, _CHUNK_DATA) and size <= self._left:
            self._take_body(size, time_ns)
        elif self._state in (_UNTIL_CLOSE, _TUNNEL):
            self._count(size, time_ns)
        elif self._state != _LOST and size:
            self._lose(time_ns)

    def close(self, time_ns: int, *, is_ended: bool = True) -> None:
        """Nothing more comes. If the connection ended, a message whose end is that is complete, and no other one."""
        message = self._message
        if message is not None:
            self._finish(time_ns, is_complete=is_ended and self._state == _UNTIL_CLOSE)
        self._buffer.clear()
        self._state = _HEAD

    @property
    def has_begun_body(self) -> bool:
        """Whether bytes after the head of the message under way have come."""
        return bool(self._buffer) or (self._message is not None and self._message.body_bytes > 0)

    def end_without_body(self, time_ns: int) -> None:
        """The message under way has no body, whatever its head says: it answers HEAD."""
        if self._message is not None and self._state in (_LENGTH, _CHUNK_SIZE, _UNTIL_CLOSE):
            self._finish(time_ns, is_complete=False)

    def open_tunnel(self) -> None:
        """The other direction says that what follows is no HTTP/1."""
        self._state = _TUNNEL

    # ---- inside -----------------------------------------------------------------------------------

    def _count(self, size: int, time_ns: int) -> None:
        if self._message is not None:
            self._message.body_bytes += size
            self._message.end_ns = time_ns

    def _take_body(self, size: int, time_ns: int) -> int:
        self._count(size, time_ns)
        self._left -= size
        if not self._left:
            if self._state == _LENGTH:
                self._finish(time_ns, is_complete=True)
            else:
                self._state = _CHUNK_END
        return size

    def _take_line(self, data: bytes, at: int, time_ns: int) -> int:
        """Takes a head, or one line between chunks; gives where the bytes after it begin, or the end."""
        buffer = self._buffer
        if self._state == _HEAD and not buffer:
            # Empty lines before a request are to be ignored (RFC 9112, section 2.2).
            while at < len(data) and data[at] in b"\r\n":
                at += 1
            if at == len(data):
                return at
            self._message = Message(time_ns)
            end = data.find(b"\r\n\r\n", at) + 4
            if end > 3 and data.find(b"\n\n", at, end) < 0:
                # All of it in one call, as nearly always.
                if end - at <= MAX_HEAD_BYTES:
                    self._take_head(data[at:end], time_ns)
                else:
                    self._lose(time_ns)
                return end
        before = len(buffer)
        buffer += data[at:]
        end = self._end_of_head() if self._state == _HEAD else buffer.find(b"\n") + 1
        limit = MAX_HEAD_BYTES if self._state == _HEAD else _MAX_CHUNK_LINE_BYTES
        if not end:
            if len(buffer) > limit or (self._state == _HEAD and not self._may_be_head()):
                self._lose(time_ns)
            return len(data)
        taken = bytes(buffer[:end])
        buffer.clear()
        self._scanned = 0
        if len(taken) > limit:
            self._lose(time_ns)
        elif self._state == _HEAD:
            self._take_head(taken, time_ns)
        else:
            self._take_chunk_line(taken.strip(), time_ns)
        return at + end - before

    def _end_of_head(self) -> int:
        """Where the head in the buffer ends: after the first empty line; 0: not yet."""
        buffer, at = self._buffer, max(0, self._scanned - 3)
        while (at := buffer.find(b"\n", at)) >= 0:
            if buffer[at + 1 : at + 2] == b"\n":
                return at + 2
            if buffer[at + 1 : at + 3] == b"\r\n":
                return at + 3
            at += 1
        self._scanned = len(buffer)
        return 0

    def _may_be_head(self) -> bool:
        """Whether what is there may be the beginning of a head."""
        start = bytes(self._buffer[:_START_BYTES])
        return starts_message(start, is_request=self._is_request) or may_start_message(
            start, is_request=self._is_request
        )

    def _take_head(self, head: bytes, time_ns: int) -> None:
        message = self._message
        assert message is not None
        parsed = _parse(head, self._is_request, self._names)
        if parsed is None:
            self._message = None
            self._lose(time_ns)
            return
        message.end_ns = time_ns
        message.method, message.target, message.status, message.version, message.host, *_ = parsed
        message.headers = parsed.headers
        if self._is_request:
            self._on_head(message)
            if parsed.has_coding:
                self._state = _CHUNK_SIZE
            else:
                self._expect(parsed.length or 0, time_ns)
        else:
            method = self._method_of()
            self._on_head(message)
            self._frame_response(parsed, method, time_ns)

    def _frame_response(self, parsed: _Parsed, method: str | None, time_ns: int) -> None:
        """Gives the body of a response its end (RFC 9112, section 6.3)."""
        status = parsed.status or 0
        if status == 101 or (method == "CONNECT" and 200 <= status < 300):
            self._finish(time_ns, is_complete=True, then=_TUNNEL)
        elif 100 <= status < 200 or status in (204, 304) or method == "HEAD":
            self._finish(time_ns, is_complete=True)
        elif parsed.is_chunked:
            self._state = _CHUNK_SIZE
        elif parsed.length is not None and not parsed.has_coding:
            self._expect(parsed.length, time_ns)
        else:
            self._state = _UNTIL_CLOSE

    def _expect(self, length: int, time_ns: int) -> None:
        if length:
            self._state, self._left = _LENGTH, length
        else:
            self._finish(time_ns, is_complete=True)

    def _take_chunk_line(self, line: bytes, time_ns: int) -> None:
        if self._state == _CHUNK_END:
            if line:
                self._lose(time_ns)
            else:
                self._state = _CHUNK_SIZE
        elif self._state == _TRAILER:
            if not line:
                self._finish(time_ns, is_complete=True)
        else:
            digits = line.partition(b";")[0].strip()
            if not re.fullmatch(rb"[0-9a-fA-F]{1,16}", digits):
                self._lose(time_ns)
                return
            self._left = int(digits, 16)
            self._state = _CHUNK_DATA if self._left else _TRAILER

    def _finish(self, time_ns: int, *, is_complete: bool, then: int = _HEAD) -> None:
        message, self._message = self._message, None
        self._state = then
        if message is not None:
            message.end_ns = message.end_ns or time_ns
            if is_complete:
                message.end_ns = time_ns
            message.is_complete = is_complete
            self._on_end(message)

    def _lose(self, time_ns: int) -> None:
        """The framing is lost: the message is not complete, and the next one is searched for."""
        self.resyncs += 1
        self._buffer.clear()
        self._scanned = 0
        message = self._message
        if message is not None and message.version:
            message.is_lost = True
            self._finish(time_ns, is_complete=False)
        self._message = None
        self._state = _LOST
        self._on_lost()


def _parse(head: bytes, is_request: bool, names: tuple[str, ...]) -> _Parsed | None:
    """What a whole head says; None: it is no head. Remembered: clients send the same head again and again.

    By the hash of the head: the head itself has cookies, and is not kept. The hash is SipHash with a secret of this
    process (PEP 456), unless somebody has fixed that: then nothing is remembered.
    """
    key = hash(head), len(head), is_request, names
    if key in _PARSED:
        return _PARSED[key]
    parsed = _parse_anew(head, is_request, names)
    if sys.flags.hash_randomization:
        if len(_PARSED) >= _CACHED_HEADS:
            _PARSED.clear()
        _PARSED[key] = parsed
    return parsed


_PARSED: Final[dict[tuple[int, int, bool, tuple[str, ...]], _Parsed | None]] = {}


def _parse_anew(head: bytes, is_request: bool, names: tuple[str, ...]) -> _Parsed | None:
    """What a whole head says, from its bytes.

    llhttp knows the methods of the registry only and wants CR before each LF; what it refuses is given to it once more
    with another method and with both.
    """
    for is_changed in (False, True):
        parsed = _Head()
        parser: Any = (httptools.HttpRequestParser if is_request else httptools.HttpResponseParser)(parsed)
        # After the head it stops where the protocol changes; that is no fault of the head.
        with suppress(httptools.HttpParserUpgrade, httptools.HttpParserError):
            parser.feed_data(_as_llhttp_wants(head) if is_changed else head)
        if not parsed.is_whole:
            continue
        fields: dict[str, str] = {}
        kept: dict[str, list[str]] = {}
        for raw_name, raw_value in parsed.headers:
            name = raw_name.decode("latin-1").lower()
            if name in ("transfer-encoding", "content-length", "host"):
                value = raw_value.decode("utf-8", "surrogateescape")
                fields[name] = f"{fields[name]}, {value}" if name in fields and name != "host" else value
            if name in names:
                kept.setdefault(name, []).append(raw_value.decode("utf-8", "surrogateescape"))
        coding = fields.get("transfer-encoding")
        return _Parsed(
            head.lstrip(b"\r\n").partition(b" ")[0].decode("latin-1") if is_request else None,
            parsed.target.decode("utf-8", "surrogateescape") if is_request else None,
            None if is_request else parser.get_status_code(),
            parser.get_http_version(),
            fields.get("host"),
            coding is not None and coding.lower().rsplit(",")[-1].strip() == "chunked",
            coding is not None,
            _length_of(fields.get("content-length", "")),
            tuple((name, kept_value(values)) for name, values in kept.items()),
        )
    return None


def _as_llhttp_wants(head: bytes) -> bytes:
    lines = [line.rstrip(b"\r") for line in head.lstrip(b"\r\n").split(b"\n")]
    if not lines[0].startswith(b"HTTP/"):
        lines[0] = b"GET " + lines[0].partition(b" ")[2]
    return b"\r\n".join(lines)


def _length_of(field: str) -> int | None:
    """The length that a head names; None: none. Equal ones may stand there more than once."""
    lengths = {one.strip() for one in field.split(",")} - {""}
    if len(lengths) != 1 or not (length := lengths.pop()).isascii() or not length.isdigit() or len(length) > 18:
        return None
    return int(length)
