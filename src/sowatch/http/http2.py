"""HTTP/2 as one direction of a connection has it: frames in, streams out. Pure, incremental, bounded.

A small walker of frames (RFC 9113). Header blocks are decoded by `hpack` in the order they have on the wire, with one
decoder for each direction: each block changes the table of the next. A connection that was joined late refers to
fields that were sent before: those are `UNKNOWN`, counted, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

import hpack
from hpack.table import HeaderTable

__all__ = [
    "FRAME_HEAD_BYTES",
    "MAX_STREAMS",
    "PREFACE",
    "UNKNOWN",
    "HeaderBlock",
    "Http2Decoder",
    "begins_connection",
    "looks_like_frames",
]

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
#: What a field is that was sent before the connection was watched.
UNKNOWN: Final = "<unknown>"
#: Header blocks are at most this long, with their continuations; nginx takes 16 KiB, gRPC 16 KiB, others 64 KiB.
_MAX_BLOCK_BYTES: Final = 256 << 10
#: Streams of one connection whose end was not seen.
MAX_STREAMS: Final = 4096
#: Length, type, flags and stream.
FRAME_HEAD_BYTES: Final = 9
#: Frame types (RFC 9113, section 6).
_DATA, _HEADERS, _PRIORITY, _RST_STREAM, _SETTINGS, _PUSH_PROMISE, _PING, _GOAWAY, _WINDOW, _CONTINUATION = range(10)
_END_STREAM, _END_HEADERS, _PADDED, _PRIORITY_FLAG, _ACK = 0x1, 0x4, 0x8, 0x20, 0x1
#: Which flags a type may have, and the length that it must have (None: any).
_SHAPES: Final[dict[int, tuple[int, int | None]]] = {
    _DATA: (_END_STREAM | _PADDED, None),
    _HEADERS: (_END_STREAM | _END_HEADERS | _PADDED | _PRIORITY_FLAG, None),
    _PRIORITY: (0, 5),
    _RST_STREAM: (0, 4),
    _SETTINGS: (_ACK, None),
    _PUSH_PROMISE: (_END_HEADERS | _PADDED, None),
    _PING: (_ACK, 8),
    _GOAWAY: (0, None),
    _WINDOW: (0, 4),
    _CONTINUATION: (_END_HEADERS, None),
}
_ON_CONNECTION: Final = frozenset({_SETTINGS, _PING, _GOAWAY})
_ON_STREAM: Final = frozenset({_DATA, _HEADERS, _PRIORITY, _RST_STREAM, _PUSH_PROMISE, _CONTINUATION})
#: SETTINGS_MAX_FRAME_SIZE is 2**14 unless it was raised; nobody raises it above 1 MiB.
_MAX_FRAME_BYTES: Final = 1 << 20

#: Types whose payload is needed.
_WHOLE: Final = frozenset({_HEADERS, _CONTINUATION, _PUSH_PROMISE, _RST_STREAM})

_NAME: Final = re.compile(r":?[!#$%&'*+.^_`|~0-9a-z-]+")

HeaderBlock = list[tuple[str, str]]


class _Table(HeaderTable):
    """A dynamic table that may have begun before it was watched: what it does not have is `UNKNOWN`."""

    def __init__(self) -> None:
        super().__init__()
        self.unknown = 0

    @property
    def held(self) -> int:
        """Bytes beyond what every connection may have, as RFC 7541, section 4.1, counts them."""
        return max(0, self._current_size - self.DEFAULT_SIZE)

    def get_by_index(self, index: int) -> tuple[bytes, bytes]:
        try:
            return super().get_by_index(index)
        except hpack.InvalidTableIndex:
            if index < 1:
                raise
            self.unknown += 1
            return UNKNOWN.encode(), UNKNOWN.encode()


def looks_like_frames(data: bytes) -> bool:
    """Whether bytes in the middle of a connection are frames, and one of them has settings or a whole header block.

    >>> looks_like_frames(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])), looks_like_frames(b"GET / HTTP/1.1")
    (True, False)
    """
    at, has_meaning = 0, False
    while at + FRAME_HEAD_BYTES <= len(data):
        length, kind, flags, stream = _head_of(data, at)
        if not _is_sound(length, kind, flags, stream):
            return False
        frame = data[at : at + FRAME_HEAD_BYTES + length]
        is_whole = len(frame) == FRAME_HEAD_BYTES + length and flags & _END_HEADERS
        if kind == _HEADERS and (stream % 2 == 0 or not length or (is_whole and not _has_fields(frame))):
            return False
        has_meaning |= bool(is_whole) if kind == _HEADERS else kind == _SETTINGS
        at += FRAME_HEAD_BYTES + length
    return has_meaning and at >= len(data)


def _has_fields(frame: bytes) -> bool:
    """Whether a whole HEADERS frame has a header block; what yamux and random bytes have is none."""
    found: list[HeaderBlock] = []
    tried = Http2Decoder(
        on_headers=lambda _stream, fields, _ends, _time_ns: found.append(fields),
        on_data=lambda *_: None,
        on_reset=lambda *_: None,
    )
    tried.feed(frame, 0)
    # Names are in lower case (RFC 9113, section 8.2.1).
    return bool(found) and all(name == UNKNOWN or _NAME.fullmatch(name) for name, _ in found[0])


def begins_connection(data: bytes) -> bool:
    """Whether frames are the first that a server sends: SETTINGS that acknowledge nothing (RFC 9113, section 3.4)."""
    _, kind, flags, stream = _head_of(data, 0)
    return kind == _SETTINGS and not flags & _ACK and not stream


class Http2Decoder:
    """Decodes one direction of a connection.

    Args:
        on_headers: called with the stream, its header block, and whether the stream ends there.
        on_data: called with the stream, how many bytes of body passed, and whether the stream ends there.
        on_reset: called with a stream that was given up.
        on_lost: called without arguments after frames were lost: of any stream.

    The last argument of each other callback is the time in ns of CLOCK_MONOTONIC. Whatever comes in, nothing is raised.
    """

    def __init__(
        self,
        *,
        on_headers: Callable[[int, HeaderBlock, bool, int], None],
        on_data: Callable[[int, int, bool, int], None],
        on_reset: Callable[[int, int], None],
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_lost = on_lost
        self._on_headers = on_headers
        self._on_data = on_data
        self._on_reset = on_reset
        self._table = _Table()
        self._decoder = self._new_decoder()
        self._buffer = bytearray()
        #: Bytes of a frame that are passed over, and of which stream they are the body (0: of none).
        self._left = 0
        self._left_stream = 0
        self._left_ends = False
        self._padding = 0
        self._open: _Block | None = None
        self._is_lost = False
        #: How often frames were lost, and searched for.
        self.resyncs = 0

    def _new_decoder(self) -> hpack.Decoder:
        decoder = hpack.Decoder(max_header_list_size=_MAX_BLOCK_BYTES)
        decoder.header_table = self._table
        # The limit is the receiver's to say, in a SETTINGS frame that may have passed before.
        decoder.max_allowed_table_size = 1 << 20
        return decoder

    @property
    def unknown(self) -> int:
        """Fields that were sent before the watch."""
        return self._table.unknown

    @property
    def is_lost(self) -> bool:
        """Whether frames are searched for."""
        return self._is_lost

    @property
    def skippable(self) -> int:
        """How many of the next bytes are body for certain."""
        return self._left if self._left_stream else 0

    @property
    def held(self) -> int:
        """Bytes of a frame or a header block that wait for their rest, and of the dynamic table."""
        return len(self._buffer) + (len(self._open.data) if self._open else 0) + self._table.held

    def feed(self, data: bytes, time_ns: int) -> None:
        """Takes over bytes of one call; see `sowatch.http.http1.Http1Decoder.feed`."""
        if self._is_lost:
            if not looks_like_frames(data):
                return
            self._is_lost = False
        at, end = 0, len(data)
        if not self._buffer and data.startswith(PREFACE):
            at = len(PREFACE)
        while at < end:
            if self._left:
                at += self._pass_over(min(self._left, end - at), time_ns)
                continue
            taken = self._take_frame(data, at, time_ns)
            if taken is None or self._is_lost:
                return
            at = taken

    def skip(self, size: int, time_ns: int) -> None:
        """Takes over that ``size`` bytes passed which nobody has: of a body, or frames are lost."""
        if self._is_lost or not size:
            return
        if size <= self._left:
            self._pass_over(size, time_ns)
        else:
            self.lose()

    def lose(self) -> None:
        """Forgets the frame that was under way, and every field of the dynamic table."""
        self.resyncs += 1
        self._is_lost = True
        self._buffer.clear()
        self._left, self._left_stream, self._padding, self._open = 0, 0, 0, None
        unknown = self._table.unknown
        self._table = _Table()
        self._table.unknown = unknown
        self._decoder = self._new_decoder()
        self._on_lost()

    # ---- inside -----------------------------------------------------------------------------------

    def _pass_over(self, size: int, time_ns: int) -> int:
        self._left -= size
        if self._left_stream and self._left:
            self._on_data(self._left_stream, size, False, time_ns)
        elif not self._left:
            self._end_body(time_ns, size)
        return size

    def _end_body(self, time_ns: int, size: int = 0) -> None:
        """The frame has given what it has of a body; its padding is passed over next."""
        if self._left_stream:
            self._on_data(self._left_stream, size, self._left_ends, time_ns)
        self._left, self._left_stream, self._padding = self._padding, 0, 0

    def _take_frame(self, data: bytes, at: int, time_ns: int) -> int | None:
        """Takes one frame, or the head of one whose payload nobody needs.

        Gives where the next bytes stand, None if all are taken.
        """
        buffer = self._buffer
        while (missing := self._needed() - len(buffer)) > 0:
            buffer += data[at : at + missing]
            at += missing
            if at > len(data):
                return None
        frame = bytes(buffer)
        buffer.clear()
        length, kind, flags, stream = _head_of(frame, 0)
        if not _is_sound(length, kind, flags, stream) and (kind in _SHAPES or length > _MAX_FRAME_BYTES):
            self.lose()
            return None
        if self._open is not None and (kind != _CONTINUATION or stream != self._open.stream):
            # Nothing stands between a block and its rest (RFC 9113, section 6.10): something was not seen, and what
            # there is of the block would change the table otherwise than it changed the peer's.
            self.lose()
            return None
        if kind in _WHOLE:
            self._take_payload(kind, flags, stream, frame[FRAME_HEAD_BYTES:], time_ns)
            return at
        # Types that nobody knows are to be ignored (RFC 9113, section 5.5).
        self._left, self._padding = length, 0
        self._left_stream = stream if kind == _DATA else 0
        self._left_ends = kind == _DATA and bool(flags & _END_STREAM)
        if kind == _DATA and flags & _PADDED and length:
            self._padding = min(frame[FRAME_HEAD_BYTES], length - 1)
            self._left = length - 1 - self._padding
        if not self._left:
            self._end_body(time_ns)
        return at

    def _needed(self) -> int:
        """How many bytes the buffer has to have before a frame can be taken."""
        buffer = self._buffer
        if len(buffer) < FRAME_HEAD_BYTES:
            return FRAME_HEAD_BYTES
        length, kind, flags, _ = _head_of(buffer, 0)
        if length > (_MAX_BLOCK_BYTES if kind in _WHOLE else _MAX_FRAME_BYTES):
            return FRAME_HEAD_BYTES  # it is refused
        if kind in _WHOLE:
            return FRAME_HEAD_BYTES + length
        return FRAME_HEAD_BYTES + (kind == _DATA and bool(flags & _PADDED) and length > 0)

    def _take_payload(self, kind: int, flags: int, stream: int, payload: bytes, time_ns: int) -> None:
        if kind == _RST_STREAM:
            self._on_reset(stream, time_ns)
            return
        if kind == _CONTINUATION:
            if self._open is None:
                self.lose()
                return
            block = self._open
            block.data += payload
        else:
            body = _without_padding(payload, flags)
            if body is None or len(body) < (4 if kind == _PUSH_PROMISE else 5 if flags & _PRIORITY_FLAG else 0):
                self.lose()
                return
            if kind == _PUSH_PROMISE:
                block = _Block(stream, False, True, bytearray(body[4:]))
            else:
                fields = body[5:] if flags & _PRIORITY_FLAG else body
                block = _Block(stream, bool(flags & _END_STREAM), False, bytearray(fields))
        self._open = None if flags & _END_HEADERS else block
        if len(block.data) > _MAX_BLOCK_BYTES:
            self.lose()
        elif self._open is None:
            self._decode(block, time_ns)

    def _decode(self, block: _Block, time_ns: int) -> None:
        try:
            fields = self._decoder.decode(bytes(block.data), raw=True)
        except (hpack.HPACKError, IndexError, ValueError):
            self.lose()
            return
        # A promise changes the table, and is a request that nobody sent.
        if not block.is_promise:
            shown = [(_text(field[0]), _text(field[1])) for field in fields]
            self._on_headers(block.stream, shown, block.ends_stream, time_ns)


class _Block:
    """A header block that goes on in CONTINUATION frames until one has END_HEADERS."""

    __slots__ = ("data", "ends_stream", "is_promise", "stream")

    def __init__(self, stream: int, ends_stream: bool, is_promise: bool, data: bytearray) -> None:
        self.stream = stream
        self.ends_stream = ends_stream
        self.is_promise = is_promise
        self.data = data


def _head_of(data: bytes | bytearray, at: int) -> tuple[int, int, int, int]:
    """Length, type, flags and stream of the frame head there; the reserved bit makes the stream negative."""
    length = int.from_bytes(data[at : at + 3], "big")
    stream = int.from_bytes(data[at + 5 : at + FRAME_HEAD_BYTES], "big")
    return length, data[at + 3], data[at + 4], stream if stream < 1 << 31 else -1


def _is_sound(length: int, kind: int, flags: int, stream: int) -> bool:
    """Whether a frame may look like that (RFC 9113, section 6)."""
    shape = _SHAPES.get(kind)
    if shape is None or length > _MAX_FRAME_BYTES or stream < 0 or flags & ~shape[0]:
        return False
    if kind in _WHOLE and length > _MAX_BLOCK_BYTES:
        return False
    if shape[1] is not None and length != shape[1]:
        return False
    if kind == _SETTINGS and (length % 6 or (flags & _ACK and length)):
        return False
    return not (kind in _ON_CONNECTION and stream) and not (kind in _ON_STREAM and not stream)


def _without_padding(payload: bytes, flags: int) -> bytes | None:
    """None: the padding is longer than the payload (RFC 9113, section 6.2: an error of the connection)."""
    if not flags & _PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        return None
    return payload[1 : len(payload) - payload[0]]


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value
