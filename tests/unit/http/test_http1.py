"""HTTP/1 messages out of bytes: framing by RFC 9112, whatever the bytes are cut into."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sowatch.http.http1 import MAX_HEAD_BYTES, Http1Decoder, Message, starts_message


@dataclass
class Run:
    """A decoder and what it gave."""

    kind: str = "response"
    methods: list[str | None] = field(default_factory=list)
    heads: list[Message] = field(default_factory=list)
    ends: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.decoder = Http1Decoder(
            self.kind,  # type: ignore[arg-type]
            on_head=self.heads.append,
            on_end=self.ends.append,
            method_of=lambda: self.methods.pop(0) if self.methods else None,
        )

    def feed(self, *parts: bytes) -> Run:
        for time_ns, part in enumerate(parts, 1):
            self.decoder.feed(part, time_ns)
        return self

    def shown(self) -> list[tuple[object, ...]]:
        return [(one.method, one.target, one.status, one.body_bytes, one.is_complete) for one in self.ends]


REQUESTS = [
    (b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n", ("GET", "/a", None, 0, True)),
    (b"POST /b HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello", ("POST", "/b", None, 5, True)),
    (
        b"PUT /c HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n1\r\n!\r\n0\r\nTrailer: 1\r\n\r\n",
        ("PUT", "/c", None, 6, True),
    ),
    (b"\r\nGET /d HTTP/1.0\r\n\r\n", ("GET", "/d", None, 0, True)),
    (b"BREW /pot HTTP/1.1\nHost: x\n\n", ("BREW", "/pot", None, 0, True)),
]
RESPONSES = [
    (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", "GET", [(None, None, 200, 3, True)]),
    (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 3\r\n\r\n", "GET", [(None, None, 304, 0, True)]),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n", "HEAD", [(None, None, 200, 0, True)]),
    (b"HTTP/1.1 204 No Content\r\n\r\n", "DELETE", [(None, None, 204, 0, True)]),
    (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\nA\r\n0123456789\r\n0\r\n\r\n",
        "GET",
        [(None, None, 200, 10, True)],
    ),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "GET", [(None, None, 200, 0, True)]),
]


@given(st.lists(st.sampled_from(REQUESTS), min_size=1, max_size=6), st.data())
def test_requests_are_the_same_however_they_are_cut(messages: list[tuple[bytes, tuple]], data: st.DataObject) -> None:
    stream = b"".join(one for one, _ in messages)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(stream) - 1), max_size=40)))
    parts = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    run = Run("request").feed(*parts)
    assert run.shown() == [expected for _, expected in messages]
    assert run.decoder.resyncs == 0


@given(st.lists(st.sampled_from(RESPONSES), min_size=1, max_size=6), st.data())
def test_responses_are_the_same_however_they_are_cut(messages: list[tuple], data: st.DataObject) -> None:
    stream = b"".join(one for one, _, _ in messages)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(stream) - 1), max_size=40)))
    parts = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    run = Run(methods=[method for _, method, _ in messages]).feed(*parts)
    assert run.shown() == [one for _, _, expected in messages for one in expected]
    assert run.decoder.resyncs == 0


def test_every_byte_by_itself() -> None:
    stream = b"".join(one for one, _ in REQUESTS)
    assert Run("request").feed(*(bytes([byte]) for byte in stream)).shown() == [expected for _, expected in REQUESTS]


def test_a_response_without_a_length_ends_with_the_connection() -> None:
    run = Run().feed(b"HTTP/1.0 200 OK\r\n\r\nabc", b"def")
    assert run.ends == []
    run.decoder.close(9)
    assert run.shown() == [(None, None, 200, 6, True)]
    assert run.ends[0].end_ns == 9


def test_a_body_whose_end_was_not_seen_is_not_complete() -> None:
    run = Run().feed(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc")
    run.decoder.close(9)
    assert run.shown() == [(None, None, 200, 3, False)]


@pytest.mark.parametrize("status", [100, 103])
def test_an_interim_response_has_no_body_and_answers_nothing(status: int) -> None:
    run = Run(methods=["POST", "POST"]).feed(
        b"HTTP/1.1 %d Continue\r\n\r\nHTTP/1.1 201 Created\r\nContent-Length: 1\r\n\r\nx" % status
    )
    assert [one.status for one in run.ends] == [status, 201]


@pytest.mark.parametrize(
    ("method", "head"),
    [
        ("GET", b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n"),
        ("CONNECT", b"HTTP/1.1 200 OK\r\n\r\n"),
    ],
)
def test_after_an_upgrade_nothing_is_decoded_any_more(method: str, head: bytes) -> None:
    run = Run(methods=[method]).feed(head, b"HTTP/1.1 200 OK\r\n\r\n", b"\x81\x05hello")
    assert run.decoder.is_tunnel
    assert len(run.ends) == 1


def test_bytes_of_a_body_that_were_not_captured_are_counted() -> None:
    run = Run().feed(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    assert run.decoder.skippable == 1_000_000
    run.decoder.skip(999_999, 2)
    run.decoder.feed(b"xHTTP/1.1 204 No\r\n\r\n", 3)
    assert run.shown() == [(None, None, 200, 1_000_000, True), (None, None, 204, 0, True)]
    assert run.decoder.resyncs == 0


def test_bytes_of_a_chunk_that_were_not_captured_are_counted() -> None:
    run = Run().feed(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfff\r\n")
    run.decoder.skip(0xFFF, 2)
    run.decoder.feed(b"\r\n0\r\n\r\n", 3)
    assert run.shown() == [(None, None, 200, 0xFFF, True)]


def test_a_gap_in_the_framing_is_counted_and_the_next_message_found() -> None:
    run = Run().feed(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n")
    run.decoder.skip(0x1FF, 2)
    run.decoder.feed(b"in the middle of something HTTP/1.1 200", 3)
    run.decoder.feed(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n", 4)
    assert run.shown() == [(None, None, 200, 0, False), (None, None, 201, 0, True)]
    assert run.decoder.resyncs == 1


@pytest.mark.parametrize("size", [MAX_HEAD_BYTES - 1, MAX_HEAD_BYTES, MAX_HEAD_BYTES + 1])
def test_the_longest_head(size: int) -> None:
    start, end = b"GET / HTTP/1.1\r\nX: ", b"\r\n\r\n"
    run = Run("request").feed(start + b"x" * (size - len(start) - len(end)) + end, b"GET /next HTTP/1.1\r\n\r\n")
    targets = [one.target for one in run.ends]
    assert targets == (["/", "/next"] if size <= MAX_HEAD_BYTES else ["/next"])


def test_unequal_lengths_are_no_message() -> None:
    """Who takes one of them may be led astray (request smuggling); llhttp and nginx refuse both."""
    run = Run().feed(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd")
    assert run.ends == []
    assert run.decoder.resyncs == 1


@given(st.lists(st.binary(max_size=80), max_size=30), st.sampled_from(["request", "response"]))
def test_nothing_that_comes_in_is_an_error(parts: list[bytes], kind: str) -> None:
    run = Run(kind).feed(*parts)
    run.decoder.skip(7, 1)
    run.decoder.close(2)
    assert len(run.decoder._buffer) <= MAX_HEAD_BYTES + 80


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=20), st.sampled_from([part for one, _ in REQUESTS for part in (one, one[:9], one[9:])])
        ),
        max_size=20,
    )
)
def test_pieces_of_requests_in_any_order_are_no_error(parts: list[bytes]) -> None:
    run = Run("request").feed(*parts)
    run.decoder.close(2)


def test_other_protocols_are_no_messages() -> None:
    for data in (b"+PONG\r\n", b"\x00\x00\x00\x08\x04\xd2\x16/", b"SSH-2.0-x\r\n", b"EHLO me\r\n", b"SELECT 1;"):
        assert not starts_message(data, is_request=True)
        assert not starts_message(data, is_request=False)


@pytest.mark.parametrize(
    ("kind", "data", "is_whole"),
    [
        ("request", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", True),
        ("request", b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", True),
        ("request", b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nab", False),
        ("request", b"GET / HTTP/1.1\r\n\r\nGET /2 HTTP/1.1\r\n\r\n", False),
        ("request", b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", False),
        ("request", b"\r\nGET / HTTP/1.1\r\n\r\n", False),
        ("request", b"GET / HTTP/1.1\nHost: a\n\n\r\n\r\n", False),
        ("request", b"GET / HTTP/1.1\r\nHost: a\r\n", False),
        ("request", b"\r\n\r\n", False),
        ("request", b"nothing at all\r\n\r\n", False),
        ("response", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", True),
        ("response", b"HTTP/1.0 404 Not Found\r\nContent-Length: 0\r\n\r\n", True),
        ("response", b"HTTP/1.1 200 OK\r\n\r\nuntil it is closed", False),
        ("response", b"HTTP/1.1 100 Continue\r\n\r\n", False),
        ("response", b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", False),
        ("response", b"HTTP/1.1 101 Switching Protocols\r\nContent-Length: 0\r\n\r\n", False),
    ],
)
def test_a_call_with_one_whole_message_gives_what_its_bytes_one_by_one_give(
    kind: Literal["request", "response"], data: bytes, is_whole: bool
) -> None:
    def decoded(*, at_once: bool) -> list[tuple[str, Message]]:
        found: list[tuple[str, Message]] = []
        decoder = Http1Decoder(
            kind,
            on_head=lambda message: found.append(("head", message)),
            on_end=lambda message: found.append(("end", message)),
        )
        if at_once:
            assert decoder.take_whole(data, 5) is is_whole
        if not at_once or not is_whole:
            for index in range(len(data)):
                decoder.feed(data[index : index + 1], 5)
        decoder.close(5)
        return found

    assert decoded(at_once=True) == decoded(at_once=False)


@pytest.mark.parametrize("method", ["HEAD", "CONNECT"])
def test_a_response_is_whole_only_if_its_request_lets_it_have_a_body(method: str) -> None:
    decoder = Http1Decoder("response", on_head=str, on_end=str, method_of=lambda: method)
    assert not decoder.take_whole(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 1)
