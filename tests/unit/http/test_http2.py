"""HTTP/2 streams out of frames, against the h2 library as the endpoint that sends them."""

from __future__ import annotations

from typing import Any

import h2.config
import h2.connection
import h2.settings
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sowatch.http.http2 import PREFACE, UNKNOWN, Http2Decoder, looks_like_frames


class Seen:
    """A decoder and what it gave."""

    def __init__(self) -> None:
        self.headers: list[tuple[int, dict[str, str], bool]] = []
        self.body: dict[int, int] = {}
        self.ended: list[int] = []
        self.resets: list[int] = []
        self.decoder = Http2Decoder(
            on_headers=self._headers, on_data=self._data, on_reset=lambda stream, _: self.resets.append(stream)
        )

    def _headers(self, stream: int, fields: list[tuple[str, str]], ends: bool, _: int) -> None:
        self.headers.append((stream, dict(fields), ends))
        if ends:
            self.ended.append(stream)

    def _data(self, stream: int, size: int, ends: bool, _: int) -> None:
        self.body[stream] = self.body.get(stream, 0) + size
        if ends:
            self.ended.append(stream)

    def feed(self, *parts: bytes) -> Seen:
        for part in parts:
            self.decoder.feed(part, 1)
        return self

    def shown(self) -> Any:
        return self.headers, self.body, self.ended, self.resets


def client() -> h2.connection.H2Connection:
    made = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
    made.initiate_connection()
    return made


def request(path: str, **more: str) -> list[tuple[str, str]]:
    fields = [(":method", "POST"), (":path", path), (":scheme", "https"), (":authority", "host.test")]
    return fields + [(name.replace("_", "-"), value) for name, value in more.items()]


def conversation(streams: int = 3) -> bytes:
    """What a client sends: interleaved streams with bodies, one with padding, one reset."""
    made = client()
    for number in range(streams):
        made.send_headers(2 * number + 1, request(f"/path/{number}", x_same="a value that goes into the table"))
    for number in range(streams):
        made.send_data(2 * number + 1, b"x" * (100 * number), pad_length=5 if number == 1 else None)
    for number in range(streams):
        if number == 2:
            made.reset_stream(2 * number + 1)
        else:
            made.send_data(2 * number + 1, b"", end_stream=True)
    return made.data_to_send()


WHOLE = conversation()
SHOWN = Seen().feed(WHOLE).shown()


def test_streams_of_one_buffer_are_told_apart() -> None:
    headers, body, ended, resets = SHOWN
    assert [(stream, fields[":path"]) for stream, fields, _ in headers] == [
        (1, "/path/0"),
        (3, "/path/1"),
        (5, "/path/2"),
    ]
    assert body == {1: 0, 3: 100, 5: 200}
    assert (ended, resets) == ([1, 3], [5])


@given(st.sets(st.integers(1, len(WHOLE) - 1), max_size=60))
def test_frames_are_the_same_however_they_are_cut(cuts: set[int]) -> None:
    at = sorted(cuts)
    parts = [WHOLE[a:b] for a, b in zip([0, *at], [*at, len(WHOLE)], strict=True)]
    # The preface is recognised before a decoder gets bytes, so it comes whole.
    while len(parts) > 1 and len(parts[0]) < len(PREFACE):
        parts[:2] = [parts[0] + parts[1]]
    seen = Seen().feed(*parts)
    headers, body, ended, resets = seen.shown()
    assert (headers, body, ended, resets) == SHOWN
    assert seen.decoder.resyncs == 0


def test_a_block_in_continuation_frames() -> None:
    made = client()
    made.data_to_send()
    made.send_headers(1, request("/long", **{f"x_{number}": "y" * 2000 for number in range(20)}), end_stream=True)
    sent = made.data_to_send()
    assert sent.count(b"\x09") >= 1
    seen = Seen().feed(sent[:20], sent[20:])
    assert [(stream, fields[":path"], ends) for stream, fields, ends in seen.headers] == [(1, "/long", True)]


def test_fields_that_were_sent_before_are_unknown_and_those_after_are_not() -> None:
    made = client()
    made.send_headers(1, request("/before", x_early="1"), end_stream=True)
    made.data_to_send()
    made.send_headers(3, request("/before", x_early="1", x_new="2"), end_stream=True)
    made.send_headers(5, request("/after", x_new="2"), end_stream=True)
    seen = Seen().feed(made.data_to_send())
    first, second = (fields for _, fields, _ in seen.headers)
    assert first[":method"] == "POST"
    assert first[UNKNOWN] == UNKNOWN
    assert first["x-new"] == second["x-new"] == "2"
    assert second[":path"] == "/after"
    assert seen.decoder.unknown >= 2


def test_after_a_gap_frames_are_found_again_and_no_field_is_guessed() -> None:
    made = client()
    made.send_headers(1, request("/one", x_early="1"), end_stream=True)
    seen = Seen().feed(made.data_to_send())
    made.send_headers(3, request("/two", x_lost="1"), end_stream=True)
    seen.decoder.skip(len(made.data_to_send()), 2)
    made.send_headers(5, request("/three", x_lost="1"), end_stream=True)
    seen.feed(made.data_to_send())
    assert seen.decoder.resyncs == 1
    assert seen.headers[-1][1][":path"] == "/three"
    assert "x-lost" not in seen.headers[-1][1]
    assert UNKNOWN in seen.headers[-1][1]


def test_body_that_was_not_captured_is_counted() -> None:
    made = client()
    made.send_headers(1, request("/up"))
    made.send_data(1, b"z" * 10_000, end_stream=True)
    sent = made.data_to_send()
    cut = len(sent) - 9_000
    seen = Seen().feed(sent[:cut])
    assert seen.decoder.skippable == 9_000
    seen.decoder.skip(9_000, 2)
    assert (seen.body, seen.ended) == ({1: 10_000}, [1])


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(64),
        b"\x00\x00\x05\x00\x00\x00\x00\x00\x00hello",
        b"\x00\x00\x08\x04\x00\x00\x00\x00\x01" + bytes(8),
    ],
)
def test_what_is_no_http2_is_not_taken_for_it(data: bytes) -> None:
    """Frames of yamux begin with zeros, too (OBI #2706)."""
    assert not looks_like_frames(data)


@given(st.lists(st.binary(max_size=60), max_size=30))
def test_nothing_that_comes_in_is_an_error(parts: list[bytes]) -> None:
    seen = Seen().feed(*parts)
    seen.decoder.skip(5, 1)
    assert len(seen.decoder._buffer) <= (1 << 20) + 9


@given(st.data())
def test_damaged_frames_are_no_error(data: st.DataObject) -> None:
    damaged = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    Seen().feed(bytes(damaged))
