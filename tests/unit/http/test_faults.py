"""Faults that other tools had in the field, and those of hostile input, each as a test: what is right instead."""

from __future__ import annotations

import random
from typing import Any

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sowatch.http.flows import Chunk, Direction, Flow, FlowTable
from sowatch.http.http2 import MAX_STREAMS, PREFACE, UNKNOWN, looks_like_frames
from unit.http.test_flows import KEY, PEER, REQUEST, RESPONSE, Ends, Tap

NO_LENGTH = b"HTTP/1.1 200 OK\r\n\r\n"
HEADERS, RST_STREAM, PUSH_PROMISE, CONTINUATION, DATA = 1, 3, 5, 9, 0
END_STREAM, END_HEADERS, PADDED, PRIORITY = 1, 4, 8, 32


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def matched(tap: Tap) -> list[tuple[str | None, int | None, bool]]:
    return [(one.path, one.status, one.is_complete) for one in tap.flows]


# ---- HTTP/1: what was lost never shifts the answers ------------------------------------------------------


def test_a_lost_response_does_not_give_its_request_the_next_one() -> None:
    tap = Tap()
    tap.call("write", REQUEST % 1)
    tap.pass_unseen("read", 50)
    tap.call("write", REQUEST % 2)
    tap.call("read", b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n")
    tap.call("write", REQUEST % 3)
    tap.call("read", RESPONSE % (0, b""))
    assert matched(tap) == [("/1", None, False), ("/2", None, False), (None, 404, False), ("/3", 200, True)]


def test_a_lost_request_among_pipelined_ones_is_not_answered_by_the_next() -> None:
    tap = Tap()
    tap.call("write", REQUEST % 1)
    tap.pass_unseen("write", 40)
    tap.call("write", REQUEST % 3)
    for status in (201, 202, 203):
        tap.call("read", b"HTTP/1.1 %d OK\r\nContent-Length: 0\r\n\r\n" % status)
    tap.call("write", REQUEST % 4)
    tap.call("read", RESPONSE % (0, b""))
    assert matched(tap)[0] == ("/1", 201, True)
    assert ("/3", None, False) in matched(tap)
    assert [one.status for one in tap.flows if one.path is None] == [202, 203]
    assert matched(tap)[-1] == ("/4", 200, True)


def test_a_request_whose_framing_was_lost_is_not_complete() -> None:
    tap = Tap()
    tap.call("write", b"POST /up HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
    tap.pass_unseen("write", 100)
    tap.call("write", b"3\r\nabc\r\n0\r\n\r\n")
    tap.call("read", RESPONSE % (0, b""))
    assert matched(tap) == [("/up", 200, False)]


def test_requests_that_were_given_up_for_want_of_space_keep_their_place() -> None:
    tap = Tap()
    for number in range(300):
        tap.call("write", REQUEST % number)
    for number in range(300):
        tap.call("read", b"HTTP/1.1 %d OK\r\nContent-Length: 0\r\n\r\n" % (200 + number))
    answered = {one.path: one.status for one in tap.flows if one.status is not None}
    assert answered == {f"/{number}": 200 + number for number in range(256)}
    assert tap.table.stats.dropped == 44
    assert len(tap.flows) == 300
    tap.call("write", REQUEST % 999)
    tap.call("read", RESPONSE % (0, b""))
    assert matched(tap)[-1] == ("/999", 200, True)


def test_requests_that_nobody_answers_are_bounded_over_all_connections() -> None:
    tap = Tap(max_bytes=1_000_000)
    for number in range(2000):
        tap.call("write", b"GET /%s HTTP/1.1\r\n\r\n" % (b"x" * 15_000), key=KEY._replace(pointer=number % 20))
    waiting = sum(len(one.path or "") for one in _waiting(tap.table))
    assert waiting <= 1_000_000 + 15_000 * 256
    assert len(tap.table) < 20


def _waiting(table: FlowTable) -> list[Flow]:
    found: list[Flow] = []
    table._on_flow = found.append  # what is held comes out when the table is closed, and only that
    size = len(table)
    table.close(0)
    assert size
    return found


@pytest.mark.parametrize("status", [100, 102, 103])
def test_interim_responses_before_the_final_one_answer_nothing(status: int) -> None:
    tap = Tap()
    tap.call("write", REQUEST % 1)
    for _ in range(3):
        tap.call("read", b"HTTP/1.1 %d Go\r\nLink: </x>\r\n\r\n" % status)
    tap.call("read", RESPONSE % (3, b"abc"))
    assert tap.shown() == [("client", "GET", "/1", 200, 3, True)]


def test_a_response_before_the_request_has_ended() -> None:
    tap = Tap()
    tap.call("write", b"POST /up HTTP/1.1\r\nContent-Length: 10\r\n\r\nabc")
    tap.call("read", b"HTTP/1.1 413 Too large\r\nContent-Length: 0\r\n\r\n")
    tap.call("write", b"defghij")
    tap.call("write", REQUEST % 2)
    tap.call("read", RESPONSE % (0, b""))
    assert [(one.path, one.status) for one in tap.flows] == [("/up", 413), ("/2", 200)]


@pytest.mark.parametrize(
    "length",
    [b"Content-Length: 0", *(b"Content-Length: %d" % (41 * n) for n in (1, 3, 5_000)), b"Transfer-Encoding: chunked"],
)
def test_a_response_to_head_that_was_joined_late_takes_no_later_response_for_its_body(length: bytes) -> None:
    """Its head has the length that the body would have; 41 bytes are one of the responses that follow."""
    tap = Tap()
    tap.call("read", b"HTTP/1.1 200 OK\r\n%s\r\n\r\n" % length)
    for number in range(8):
        tap.call("write", REQUEST % number)
        until = tap.call("read", b"HTTP/1.1 %d OK\r\nContent-Length: 3\r\n\r\nabc" % (300 + number))
        assert until == 0
    assert matched(tap) == [(None, 200, False), *((f"/{number}", 300 + number, True) for number in range(8))]


def test_a_body_that_was_joined_late_is_passed_over_and_what_was_sent_ahead_is_not_matched_with_it() -> None:
    tap = Tap()
    tap.call("read", b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n")
    tap.call("write", REQUEST % 1)  # before the body of the response that is under way
    tap.call("read", b"b" * 20)
    tap.call("read", RESPONSE % (0, b""))
    tap.call("write", REQUEST % 2)
    tap.call("read", RESPONSE % (0, b""))
    assert matched(tap)[-1] == ("/2", 200, True)
    assert ("/1", 200, True) not in matched(tap)
    assert tap.table.stats.resyncs == 1


def test_trailers_of_chunks_belong_to_the_message() -> None:
    tap = Tap()
    tap.call("write", REQUEST % 1 + REQUEST % 2)
    tap.call(
        "read", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;a=b\r\nx\r\n0\r\nX-Sum: HTTP/1.1 500 x\r\n"
    )
    tap.call("read", b"\r\n" + RESPONSE % (0, b""))
    assert matched(tap) == [("/1", 200, True), ("/2", 200, True)]


@pytest.mark.parametrize(("is_ended", "is_complete"), [(True, True), (False, False)])
def test_a_response_without_a_length_is_complete_if_its_connection_ended(is_ended: bool, is_complete: bool) -> None:
    tap = Tap()
    tap.call("write", REQUEST % 1)
    tap.call("read", NO_LENGTH + b"data")
    if is_ended:
        tap.table.end(KEY, 99)
    else:
        tap.table.close(99)
    assert tap.shown() == [("client", "GET", "/1", 200, 4, is_complete)]


def test_a_connection_that_never_ends_holds_nothing() -> None:
    tap = Tap()
    tap.call("write", REQUEST % 1)
    tap.call("read", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(20_000):
        tap.call("read", b"4\r\ndata\r\n")
    assert tap.table._held <= 1024
    tap.call("read", b"0\r\n\r\n")
    assert tap.shown() == [("client", "GET", "/1", 200, 80_000, True)]


@pytest.mark.parametrize("size", [4095, 4096, 4097, 16_383, 16_384, 16_385])
@pytest.mark.parametrize("captured", [255, 256, 257, 1023, 1024, 1025, 4095, 4096, 4097, 16_384])
def test_lengths_around_a_clamp_are_counted_exactly(size: int, captured: int) -> None:
    """OBI #1976: a length that is clamped by a mask is wrong at its powers."""
    tap = Tap()
    tap.call("write", REQUEST % 1)
    tap.call("read", RESPONSE % (size, b""))
    tap.call("read", b"x" * size, captured=min(size, captured))
    tap.call("write", REQUEST % 2)
    tap.call("read", RESPONSE % (0, b""))
    assert [(one.path, one.response_bytes, one.is_complete) for one in tap.flows] == [
        ("/1", size, True),
        ("/2", 0, True),
    ]


# ---- HTTP/2 ----------------------------------------------------------------------------------------


class Http2:
    """A client's connection from its preface on, written frame by frame."""

    def __init__(self, **options: Any) -> None:
        self.tap = Tap(**options)
        self.requests, self.responses = hpack.Encoder(), hpack.Encoder()
        self.tap.call("write", PREFACE + frame(4, 0, 0))
        self.tap.call("read", frame(4, 0, 0))

    def block(self, path: str = "/") -> bytes:
        fields = [(":method", "GET"), (":path", path), (":scheme", "https"), (":authority", "host.test")]
        return self.requests.encode(fields)

    def ask(self, stream: int, path: str = "/") -> None:
        self.tap.call("write", frame(HEADERS, END_HEADERS | END_STREAM, stream, self.block(path)))

    def answer(self, stream: int, status: int = 200, flags: int = END_STREAM) -> None:
        block = self.responses.encode([(":status", str(status)), ("x-id", f"id-{stream}")])
        self.tap.call("read", frame(HEADERS, END_HEADERS | flags, stream, block))

    def matched(self) -> list[tuple[str | None, int | None, bool]]:
        return matched(self.tap)


def test_each_of_many_concurrent_streams_is_a_flow() -> None:
    """OBI #3291: two streams at once, and nothing was reported."""
    ends, tap = Ends(), Tap()
    streams = [ends.ask(f"/{n}") for n in range(100)]
    tap.call("write", ends.to_server())
    random.Random(1).shuffle(streams)
    for stream in streams:
        ends.answer(stream, b"x")
    tap.call("read", ends.to_client())
    assert sorted(one.path or "" for one in tap.flows) == sorted(f"/{n}" for n in range(100))
    assert all(one.is_complete for one in tap.flows)


def test_answers_out_of_order_change_no_field() -> None:
    """OBI #3039: tables decoded in the order of completion give the fields of other requests."""
    both = Http2()
    for stream in (1, 3, 5):
        both.ask(stream, f"/path-{stream}")
    for stream in (5, 1, 3):
        both.answer(stream, 200 + stream)
    assert both.matched() == [("/path-5", 205, True), ("/path-1", 201, True), ("/path-3", 203, True)]


def test_each_connection_and_direction_has_a_table_of_its_own() -> None:
    """ECapture #744: the table of one connection was split over workers, and mixed with those of others."""
    tap = Tap()
    keys = [KEY._replace(pointer=number) for number in range(4)]
    tables = {key: (hpack.Encoder(), hpack.Encoder()) for key in keys}
    for key in keys:
        tap.call("write", PREFACE + frame(4, 0, 0), key=key)
    for stream in (1, 3, 5):
        for key, (requests, responses) in tables.items():
            path = f"/{key.pointer}/{stream - stream % 4}"  # the third is sent by its index
            block = requests.encode([(":method", "GET"), (":path", path), ("x-id", path)])
            tap.call("write", frame(HEADERS, END_HEADERS | END_STREAM, stream, block), key=key)
            block = responses.encode([(":status", str(201 + key.pointer)), ("x-id", "answer" + path)])
            tap.call("read", frame(HEADERS, END_HEADERS | END_STREAM, stream, block), key=key)
    assert matched(tap) == [
        (f"/{number}/{part}", 201 + number, True) for part in (0, 0, 4) for number in range(4)
    ]  # fmt: skip
    assert tap.table.stats.unknown_fields == 0


@pytest.mark.parametrize("captured", [16_383, 16_384, 16_385, 20_000])
def test_frames_behind_what_was_captured_of_a_call_are_found_again(captured: int) -> None:
    """ECapture #740: calls were cut, and the rest of the connection could not be read."""
    both = Http2()
    both.ask(1, "/1")
    both.answer(1, 200, 0)
    body = frame(DATA, 0, 1, b"x" * 16_384) + frame(DATA, END_STREAM, 1, b"y" * 16_384)
    both.tap.call("read", body, captured=captured)
    both.ask(3, "/2")
    both.answer(3, 204)
    both.tap.table.close(99)
    cut, after = sorted(both.tap.flows, key=lambda one: one.path or "")
    assert (after.path, after.status, after.is_complete) == ("/2", 204, True)
    # Where the head of the second frame is there, the rest is known to be body.
    is_whole = captured >= 16_384 + 18
    assert (cut.path, cut.is_complete, cut.response_bytes == 2 * 16_384) == ("/1", is_whole, is_whole)
    assert both.tap.table.stats.gaps == (not is_whole)


def test_what_comes_after_a_reset_is_no_flow_of_its_own() -> None:
    both = Http2()
    both.ask(1, "/cancelled")
    both.tap.call("write", frame(RST_STREAM, 0, 1, (8).to_bytes(4, "big")))
    both.answer(1, 200, 0)  # it was on its way
    both.answer(1, 200)
    both.ask(3, "/next")
    both.answer(3)
    assert both.matched() == [("/cancelled", None, False), ("/next", 200, True)]
    assert both.tap.table.stats.joined_late == 0


def test_trailers_of_a_request_whose_response_is_over_are_no_flow() -> None:
    both = Http2()
    both.tap.call("write", frame(HEADERS, END_HEADERS, 1, both.block("/up")))
    both.answer(1, 413)
    both.tap.call("write", frame(HEADERS, END_HEADERS | END_STREAM, 1, both.requests.encode([("x-sum", "1")])))
    both.tap.table.close(99)
    assert both.matched() == [("/up", 413, True)]


def test_a_promised_response_is_no_flow_and_its_fields_are_in_the_table() -> None:
    both = Http2()
    both.ask(1, "/page")
    promise = both.responses.encode([(":method", "GET"), (":path", "/style.css"), ("x-id", "id-1")])
    both.tap.call("read", frame(PUSH_PROMISE, END_HEADERS, 1, (2).to_bytes(4, "big") + promise))
    both.answer(2)
    both.answer(1)
    both.tap.table.close(99)
    assert both.matched() == [("/page", 200, True)]
    assert both.tap.table.stats.unknown_fields == 0


@pytest.mark.parametrize(
    "between",
    [
        frame(DATA, 0, 1, b"x"),
        frame(RST_STREAM, 0, 1, bytes(4)),
        frame(HEADERS, END_HEADERS, 3, b"\x88"),
        frame(CONTINUATION, END_HEADERS, 3, b"\x88"),
        frame(6, 0, 0, bytes(8)),
    ],
)
def test_what_stands_within_a_header_block_loses_the_table(between: bytes) -> None:
    """A part of a block that is passed over would leave a table that is not the peer's: fields would be guessed."""
    both = Http2()
    block = both.block("/secret-1")
    both.tap.call("write", frame(HEADERS, END_STREAM, 1, block[:5]) + between)
    assert both.tap.table.stats.resyncs == 1
    both.ask(3, "/secret-1")  # by index
    both.answer(3)
    assert {one.path for one in both.tap.flows if one.status == 200} == {UNKNOWN}


def test_a_flood_of_continuation_frames_is_bounded() -> None:
    both = Http2()
    both.tap.call("write", frame(HEADERS, END_STREAM, 1, b"\x00\x01a\x7f"))
    for _ in range(2000):
        both.tap.call("write", frame(CONTINUATION, 0, 1, b"a" * 1000))
    assert both.tap.table.stats.resyncs >= 1
    assert both.tap.table._held <= 256 << 10


def test_a_table_as_large_as_its_sender_wants_is_counted() -> None:
    """Each connection may have a table; a thousand of the largest are more than all of them may have together."""
    tap = Tap(max_bytes=1 << 20)
    for number in range(40):
        encoder, key = hpack.Encoder(), KEY._replace(pointer=number)
        encoder.header_table_size = 1 << 20
        tap.call("write", PREFACE + frame(4, 0, 0), key=key)
        fields = [(":method", "GET"), (":path", "/"), *((f"x-{n}", "v" * 2000) for n in range(50))]
        block = encoder.encode(fields, huffman=False)
        tap.call("write", frame(HEADERS, END_HEADERS | END_STREAM, 1, block), key=key)
    assert tap.table._held <= 1 << 20
    assert tap.table.stats.dropped > 20


@pytest.mark.parametrize("size", [0, 64, 4096, 65_536])
def test_a_table_that_changes_its_size_changes_no_field(size: int) -> None:
    both = Http2()
    both.ask(1, "/before")
    both.requests.header_table_size = size
    both.ask(3, "/after")
    both.requests.header_table_size = 4096
    both.ask(5, "/after")
    for stream in (1, 3, 5):
        both.answer(stream)
    assert both.matched() == [("/before", 200, True), ("/after", 200, True), ("/after", 200, True)]
    assert both.tap.table.stats.unknown_fields == 0


@pytest.mark.parametrize(
    "block",
    [
        b"\x82\x84\x41\x84\xff\xff\xff\xff",  # a Huffman code without an end (RFC 7541, section 5.2)
        b"\x80",  # index 0
        b"\xff" + b"\xff" * 200,  # a number without an end
        b"\x40\x7f\xff\xff\xff\xff\x0f",  # a name longer than all there is
    ],
)
def test_a_block_that_is_none_loses_the_table_and_guesses_nothing(block: bytes) -> None:
    both = Http2()
    both.ask(1, "/known")
    both.tap.call("write", frame(HEADERS, END_HEADERS | END_STREAM, 3, block))
    assert both.tap.table.stats.resyncs == 1
    both.ask(5, "/known")
    both.answer(5)
    assert [one.path for one in both.tap.flows] == [UNKNOWN]


@pytest.mark.parametrize("padding", [0, 1, 200])
def test_padding_and_priority_are_no_fields_and_no_body(padding: int) -> None:
    both = Http2()
    payload = bytes([padding]) + bytes(4) + b"\x0f" + both.block("/padded") + bytes(padding)
    both.tap.call("write", frame(HEADERS, END_HEADERS | END_STREAM | PADDED | PRIORITY, 1, payload))
    both.tap.call("write", frame(2, 0, 1, bytes(5)))
    both.answer(1, 200, 0)
    both.tap.call("read", frame(DATA, END_STREAM | PADDED, 1, bytes([padding]) + b"body" + bytes(padding)))
    assert both.tap.shown() == [("client", "GET", "/padded", 200, 4, True)]


def test_padding_longer_than_its_frame_loses_the_table() -> None:
    both = Http2()
    both.tap.call("write", frame(HEADERS, END_HEADERS | END_STREAM | PADDED, 1, b"\xc8" + both.block("/x")))
    assert both.tap.table.stats.resyncs == 1


def test_a_stream_whose_data_was_lost_is_not_complete() -> None:
    both = Http2()
    both.ask(1, "/big")
    both.answer(1, 200, 0)
    both.tap.pass_unseen("read", 5000)
    both.tap.call("read", frame(4, 1, 0) + frame(DATA, END_STREAM, 1, b"rest"))
    both.ask(3, "/next")
    both.answer(3)
    assert [(path, is_complete) for path, _, is_complete in both.matched()] == [("/big", False), ("/next", True)]


def test_streams_without_an_end_are_bounded_and_their_late_answers_no_flows() -> None:
    both = Http2()
    for number in range(MAX_STREAMS + 10):
        both.ask(2 * number + 1)
    assert both.tap.table.stats.dropped == 10
    for number in range(10):
        both.answer(2 * number + 1)
    assert len(both.tap.flows) == 10
    assert all(one.status is None and not one.is_complete for one in both.tap.flows)


def test_goaway_ends_no_stream_that_goes_on() -> None:
    both = Http2()
    both.ask(1, "/last")
    both.ask(3, "/refused")
    both.tap.call("read", frame(7, 0, 0, (1).to_bytes(4, "big") + bytes(4)))
    both.answer(1)
    both.tap.table.end(KEY, 99)
    assert both.matched() == [("/last", 200, True), ("/refused", None, False)]


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x00\x00\x01" + (1).to_bytes(4, "big") + (0).to_bytes(4, "big") + bytes(6),  # yamux: window, opens 1
        b"\x00\x00\x00\x00" + (1).to_bytes(4, "big") + (6).to_bytes(4, "big") + b"\x01\x00\x00\x00\x00\x01",
        frame(HEADERS, 0, 1),
        frame(HEADERS, END_HEADERS, 2, b"\x88"),
        frame(HEADERS, END_HEADERS, 1, b"\x40\x04NAME\x01v"),
        frame(HEADERS, END_HEADERS, 1, b"\x40\x02\x00\x01\x01v"),
    ],
)
def test_frames_that_are_not_http2_are_not_taken_for_it(data: bytes) -> None:
    """OBI #932, #2706: yamux or random bytes became spans."""
    assert not looks_like_frames(data)


@given(st.lists(st.binary(min_size=9, max_size=200), max_size=40))
def test_random_calls_of_a_connection_are_no_flows(calls: list[bytes]) -> None:
    """Bytes that nothing was meant by: a flow needs a whole header block in a sound frame."""
    tap = Tap()
    for data in calls:
        tap.call("read", b"\x17" + data)
    tap.table.close(99)
    assert tap.flows == []


# ---- loss ------------------------------------------------------------------------------------------


def _conversation(number: int) -> list[tuple[Direction, bytes]]:
    """40 requests, one after the other or up to five at once; each response says whose it is by its length."""
    calls: list[tuple[Direction, bytes]] = []
    if number == 0:
        for n in range(40):
            calls += [("write", REQUEST % n), ("read", RESPONSE % (n, b"z" * n))]
        return calls
    ends = Ends()
    for first in range(0, 40, 5):
        streams = [ends.ask(f"/{n}") for n in range(first, first + 5)]
        calls.append(("write", ends.to_server()))
        for n, stream in zip(range(first, first + 5), streams, strict=True):
            ends.answer(stream, b"z" * n)
            calls.append(("read", ends.to_client()))
    return calls


@pytest.mark.parametrize("number", [0, 1])
@given(lost=st.sets(st.integers(0, 79), max_size=30))
def test_whatever_is_lost_no_response_is_given_to_another_request(number: int, lost: set[int]) -> None:
    tap, calls = Tap(), _conversation(number)
    for at, (direction, data) in enumerate(calls):
        if at in lost:
            tap.pass_unseen(direction, len(data))
        else:
            tap.call(direction, data)
    tap.table.close(999)
    seen = len(calls) - len(lost & set(range(len(calls))))
    assert tap.table.stats.calls == seen
    for flow in tap.flows:
        if flow.path is not None and flow.path != UNKNOWN and flow.is_complete:
            assert flow.response_bytes == int(flow.path[1:])
    paths = [flow.path for flow in tap.flows if flow.path not in (None, UNKNOWN)]
    assert len(paths) == len(set(paths))
    if not lost:
        assert len(tap.flows) == 40
        assert all(flow.is_complete for flow in tap.flows)
    stats = tap.table.stats
    assert stats.flows == len(tap.flows)
    assert stats.incomplete == sum(not flow.is_complete for flow in tap.flows)


# ---- identities ------------------------------------------------------------------------------------


def test_two_processes_with_equal_pointers_are_two_connections() -> None:
    tap = Tap()
    others = [
        KEY,
        KEY._replace(process=KEY.process._replace(pid=101)),
        KEY._replace(process=KEY.process._replace(start_ns=9)),
    ]
    for number, key in enumerate(others):
        tap.call("write", REQUEST % number, key=key)
    for number, key in reversed(list(enumerate(others))):
        tap.call("read", RESPONSE % (number, b"z" * number), key=key)
    assert [(one.path, one.response_bytes) for one in tap.flows] == [("/2", 2), ("/1", 1), ("/0", 0)]


def test_the_end_of_a_process_leaves_the_connections_of_others() -> None:
    tap, other = Tap(), KEY._replace(process=KEY.process._replace(pid=101))
    tap.call("write", REQUEST % 1)
    tap.call("write", REQUEST % 2, key=other)
    tap.table.end_process(KEY.process, 9)
    tap.call("read", RESPONSE % (0, b""), key=other)
    assert matched(tap) == [("/1", None, False), ("/2", 200, True)]


def test_exec_ends_the_connections_of_the_program_before_and_not_those_of_the_next() -> None:
    """That a process exec'd is reported after the next program's first calls."""
    tap, again = Tap(key=KEY._replace(born_ns=10)), KEY._replace(born_ns=30)
    tap.call("write", REQUEST % 1)
    tap.call("write", REQUEST % 2, key=again)
    tap.table.end_process(KEY.process, 40, born_before_ns=20)
    tap.call("read", RESPONSE % (0, b""), key=again)
    assert matched(tap) == [("/1", None, False), ("/2", 200, True)]


def test_times_that_run_backwards_give_no_negative_durations() -> None:
    table_flows: list[Flow] = []
    table = FlowTable(table_flows.append)
    for direction, data, time_ns in (("write", REQUEST % 1, 100), ("read", RESPONSE % (0, b""), 50)):
        table.take(Chunk(KEY, direction, data, len(data), 0, 0, time_ns, 0, PEER))  # type: ignore[arg-type]
    assert [(one.ttfb_ns, one.duration_ns) for one in table_flows] == [(0, 0)]
