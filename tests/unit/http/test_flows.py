"""Flows out of what a tap sees: requests matched with responses, and what is not known said so."""

from __future__ import annotations

from typing import Any

import h2.config
import h2.connection
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import asdict

from sowatch.http.flows import Chunk, ConnectionKey, Direction, Flow, FlowTable, Peer
from sowatch.http.http2 import UNKNOWN
from sowatch.model.identity import ProcessId

KEY = ConnectionKey(ProcessId(100, 5_000), 0xABC)
PEER = Peer("127.0.0.1", 443)


class Tap:
    """Feeds a table as the program's ring would, and keeps what comes out."""

    def __init__(self, key: ConnectionKey = KEY, **options: Any) -> None:
        self.flows: list[Flow] = []
        self.table = FlowTable(self.flows.append, **options)
        self.key = key
        self.offsets: dict[tuple[ConnectionKey, str], int] = {}
        self.now = 0

    def call(
        self,
        direction: Direction,
        data: bytes,
        *,
        captured: int | None = None,
        peer: Peer | None = PEER,
        key: ConnectionKey | None = None,
    ) -> int:
        key = key or self.key
        self.now += 1
        offset = self.offsets.get((key, direction), 0)
        self.offsets[key, direction] = offset + len(data)
        return self.table.take(Chunk(key, direction, data[:captured], len(data), 0, offset, self.now, 7, peer, 40_000))

    def pass_unseen(self, direction: Direction, size: int) -> None:
        """Bytes that pass while nobody looks."""
        self.offsets[self.key, direction] = self.offsets.get((self.key, direction), 0) + size

    def shown(self) -> list[tuple[Any, ...]]:
        return [(one.side, one.method, one.path, one.status, one.response_bytes, one.is_complete) for one in self.flows]


def other(direction: Direction) -> Direction:
    return "read" if direction == "write" else "write"


REQUEST = b"GET /%d HTTP/1.1\r\nHost: host.test\r\n\r\n"
RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s"


@pytest.mark.parametrize(("direction", "side"), [("write", "client"), ("read", "server")])
def test_the_side_is_told_by_who_sends_the_request(direction: Direction, side: str) -> None:
    tap = Tap()
    tap.call(direction, REQUEST % 1)
    tap.call(other(direction), RESPONSE % (3, b"abc"))
    (flow,) = tap.flows
    assert (flow.side, flow.protocol, flow.method, flow.path, flow.status) == (side, "HTTP/1.1", "GET", "/1", 200)
    assert (flow.authority, flow.peer, flow.local_port, flow.site) == ("host.test", PEER, 40_000, 7)
    assert (flow.begin_ns, flow.first_byte_ns, flow.end_ns) == (1, 2, 2)
    assert (flow.ttfb_ns, flow.duration_ns) == (1, 1)


def test_requests_that_are_sent_ahead_are_answered_in_order() -> None:
    tap = Tap()
    tap.call("read", REQUEST % 1 + REQUEST % 2 + REQUEST % 3)
    tap.call("write", RESPONSE % (1, b"a") + RESPONSE % (2, b"bb"))
    tap.call("write", RESPONSE % (3, b"ccc"))
    assert tap.shown() == [("server", "GET", f"/{n}", 200, n, True) for n in (1, 2, 3)]


def test_every_request_of_a_connection_that_is_kept_alive() -> None:
    """OBI #2262: only the first was reported."""
    tap = Tap()
    for number in range(50):
        tap.call("write", REQUEST % number)
        tap.call("read", RESPONSE % (1, b"x"))
    assert [one.path for one in tap.flows] == [f"/{number}" for number in range(50)]


def test_a_stream_of_events_has_its_first_and_last_byte_apart() -> None:
    """OBI #2267."""
    tap = Tap()
    tap.call("write", REQUEST % 1)
    tap.call("read", b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(5):
        tap.call("read", b"6\r\ndata:\n\r\n")
    assert tap.flows == []
    tap.call("read", b"0\r\n\r\n")
    (flow,) = tap.flows
    assert (flow.first_byte_ns, flow.end_ns, flow.response_bytes, flow.is_complete) == (2, 8, 30, True)


def test_an_interim_response_is_none() -> None:
    tap = Tap()
    tap.call("write", b"POST /up HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
    tap.call("read", b"HTTP/1.1 100 Continue\r\n\r\n")
    tap.call("write", b"ab")
    tap.call("read", RESPONSE % (0, b""))
    (flow,) = tap.flows
    assert (flow.request_bytes, flow.status, flow.is_complete) == (2, 200, True)


def test_the_response_to_head_has_no_body() -> None:
    tap = Tap()
    tap.call("write", b"HEAD /h HTTP/1.1\r\n\r\n")
    tap.call("read", b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    tap.call("write", REQUEST % 2)
    tap.call("read", RESPONSE % (1, b"x"))
    assert tap.shown() == [("client", "HEAD", "/h", 200, 0, True), ("client", "GET", "/2", 200, 1, True)]


@pytest.mark.parametrize(
    ("request_head", "response_head", "status"),
    [
        (
            b"GET /ws HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
            101,
        ),
        (b"CONNECT other.test:443 HTTP/1.1\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n", 200),
    ],
)
def test_an_upgrade_ends_the_flows(request_head: bytes, response_head: bytes, status: int) -> None:
    tap = Tap()
    tap.call("write", request_head)
    tap.call("read", response_head)
    tap.call("write", REQUEST % 1)
    tap.call("read", RESPONSE % (1, b"x"))
    for direction in ("read", "write"):
        tap.call(direction, b"\x16\x03\x01\0\0")
    assert [(one.status, one.is_complete) for one in tap.flows] == [(status, True)]
    assert tap.table.stats.resyncs == 0


def test_a_proxy_is_asked_for_a_host() -> None:
    tap = Tap(keeps_query=True)
    tap.call("write", b"GET http://other.test:80/path?q=1 HTTP/1.1\r\nHost: proxy\r\n\r\n")
    tap.call("read", RESPONSE % (0, b""))
    assert (tap.flows[0].authority, tap.flows[0].path) == ("other.test:80", "/path?q=1")


def test_a_response_whose_request_passed_before_is_one_of_unknown_parts() -> None:
    tap = Tap()
    tap.pass_unseen("read", 500)
    tap.call("write", RESPONSE % (1, b"x"))
    tap.call("read", REQUEST % 2)
    tap.call("write", RESPONSE % (1, b"x"))
    first, second = tap.flows
    assert (first.method, first.path, first.status, first.duration_ns, first.is_complete) == (
        None,
        None,
        200,
        None,
        False,
    )
    assert (second.method, second.path, second.is_complete) == ("GET", "/2", True)
    assert tap.table.stats.joined_late >= 1


def test_joining_in_the_middle_of_a_body_finds_the_next_message() -> None:
    tap = Tap()
    tap.pass_unseen("read", 10_000)
    tap.call("read", b"rest of a body which has GET / HTTP/1.1\r\n\r\n in it")
    tap.call("write", REQUEST % 1)
    tap.call("read", RESPONSE % (0, b""))
    assert tap.shown() == [("client", "GET", "/1", 200, 0, True)]


def test_a_body_that_was_not_captured_is_counted_to_the_byte() -> None:
    tap = Tap()
    tap.call("write", REQUEST % 1)
    spared = tap.call("read", RESPONSE % (1_000_000, b"x" * 100))
    head = len(RESPONSE % (1_000_000, b""))
    assert spared == head + 1_000_000
    tap.pass_unseen("read", 999_000)
    tap.call("read", b"y" * 900, captured=0)
    (flow,) = tap.flows
    assert (flow.response_bytes, flow.is_complete) == (1_000_000, True)
    assert (tap.table.stats.gaps, tap.table.stats.resyncs) == (0, 0)


def test_a_lost_call_is_a_gap_and_said_so() -> None:
    tap = Tap()
    tap.call("write", REQUEST % 1)
    tap.call("read", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
    tap.pass_unseen("read", 1000)
    tap.call("read", b"5\r\nworld\r\n0\r\n\r\n")
    tap.call("write", REQUEST % 2)
    tap.call("read", RESPONSE % (1, b"x"))
    assert tap.shown() == [("client", "GET", "/1", 200, 5, False), ("client", "GET", "/2", 200, 1, True)]
    assert (tap.table.stats.gaps, tap.table.stats.resyncs, tap.table.stats.incomplete) == (1, 1, 1)


def test_an_unknown_peer_is_none_and_counted() -> None:
    tap = Tap()
    tap.call("write", REQUEST % 1, peer=None)
    tap.call("read", RESPONSE % (0, b""), peer=None)
    assert tap.flows[0].peer is None
    assert tap.table.stats.unknown_peers == 1


def test_connections_of_one_process_are_told_apart() -> None:
    tap = Tap()
    keys = [KEY._replace(pointer=n) for n in range(4)]
    for number, key in enumerate(keys):
        tap.call("write", REQUEST % number, key=key, peer=Peer("10.0.0.1", number))
    for key in reversed(keys):
        tap.call("read", RESPONSE % (0, b""), key=key, peer=None)
    assert [(one.path, one.peer and one.peer.port) for one in tap.flows] == [(f"/{n}", n) for n in (3, 2, 1, 0)]


def test_a_pointer_that_is_used_again_is_another_connection() -> None:
    """DD #38069: what the last connection left must not meet the next; also where the end of the last was lost."""
    tap, again = Tap(), KEY._replace(born_ns=2)
    tap.call("write", REQUEST % 1)
    tap.call("read", REQUEST % 2, key=again)
    tap.call("write", RESPONSE % (0, b""), key=again)
    assert tap.shown() == [("server", "GET", "/2", 200, 0, True)]
    tap.table.close(9)
    assert tap.shown()[1:] == [("client", "GET", "/1", None, 0, False)]


def test_a_connection_that_ends_hands_out_what_is_under_way() -> None:
    tap = Tap()
    tap.call("write", REQUEST % 1)
    tap.table.end(KEY, 9)
    assert tap.shown() == [("client", "GET", "/1", None, 0, False)]
    assert len(tap.table) == 0


def test_who_writes_no_more_still_reads_the_response() -> None:
    """GnuTLS: gnutls_bye(GNUTLS_SHUT_WR) after the request."""
    tap = Tap()
    tap.call("write", REQUEST % 1)
    tap.table.shut(KEY, tap.now)
    tap.call("read", RESPONSE % (3, b"abc"))
    assert tap.shown() == [("client", "GET", "/1", 200, 3, True)]
    assert tap.table.stats.joined_late == 0


def test_a_body_without_a_length_ends_where_its_writer_writes_no_more() -> None:
    tap = Tap()
    tap.call("read", REQUEST % 1)
    tap.call("write", b"HTTP/1.1 200 OK\r\n\r\nbody")
    tap.table.shut(KEY, 1_000)
    assert tap.shown() == [("server", "GET", "/1", 200, 4, True)]
    tap.table.end(KEY, 2_000)
    assert len(tap.flows) == 1
    assert tap.flows[0].end_ns == 1_000


def test_what_waits_for_its_rest_is_bounded_over_all_connections() -> None:
    tap = Tap(max_bytes=100_000)
    for number in range(50):
        tap.call("write", b"GET /" + b"x" * 10_000, key=KEY._replace(pointer=number))
    assert len(tap.table) == 9
    assert tap.table.stats.dropped == 41
    for number in range(41, 50):
        tap.call("write", b" HTTP/1.1\r\n\r\n", key=KEY._replace(pointer=number))
        tap.call("read", RESPONSE % (0, b""), key=KEY._replace(pointer=number))
    for number in range(100, 109):
        tap.call("write", b"GET /" + b"x" * 10_000, key=KEY._replace(pointer=number))
    # What was answered waits no more, so there is room again.
    assert tap.table.stats.dropped == 41


@pytest.mark.parametrize("keeps_query", [False, True])
def test_a_query_is_kept_only_where_that_is_asked_for(keeps_query: bool) -> None:
    tap = Tap(keeps_query=keeps_query)
    tap.call("write", b"GET /path?token=1 HTTP/1.1\r\n\r\n")
    tap.call("read", RESPONSE % (0, b""))
    ends, other_key = Ends(), KEY._replace(pointer=2)
    stream = ends.ask("/two?token=1")
    tap.call("write", ends.to_server(), key=other_key)
    ends.answer(stream, b"")
    tap.call("read", ends.to_client(), key=other_key)
    query = "?token=1" if keeps_query else ""
    assert [one.path for one in tap.flows] == [f"/path{query}", f"/two{query}"]


def test_what_is_no_http_is_left_alone_and_counted() -> None:
    tap = Tap()
    for _ in range(40):
        tap.call("write", b"*1\r\n$4\r\nPING\r\n")
        tap.call("read", b"+PONG\r\n")
    tap.table.close(99)
    assert tap.flows == []
    assert tap.table.stats.undecoded == 1


def test_connections_are_bounded() -> None:
    tap = Tap(max_connections=10)
    for number in range(100):
        tap.call("write", REQUEST % number, key=KEY._replace(pointer=number))
    assert len(tap.table) == 10
    assert tap.table.stats.dropped == 90


# ---- HTTP/2 ----------------------------------------------------------------------------------------


class Ends:
    """A client and a server of the h2 library, and the bytes that pass between them."""

    def __init__(self) -> None:
        self.client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        self.server = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        self.client.initiate_connection()
        self.server.initiate_connection()
        self.next = 1

    def ask(self, path: str, body: bytes = b"") -> int:
        stream, self.next = self.next, self.next + 2
        fields = [
            (":method", "POST"),
            (":path", path),
            (":scheme", "https"),
            (":authority", "host.test"),
            ("x-same", "a" * 30),
        ]
        self.client.send_headers(stream, fields, end_stream=not body)
        if body:
            self.client.send_data(stream, body, end_stream=True)
        return stream

    def answer(self, stream: int, body: bytes, trailers: list[tuple[str, str]] | None = None) -> None:
        self.server.send_headers(stream, [(":status", "201"), ("server", "x" * 20)], end_stream=False)
        self.server.send_data(stream, body, end_stream=trailers is None)
        if trailers is not None:
            self.server.send_headers(stream, trailers, end_stream=True)

    def to_server(self) -> bytes:
        data: bytes = self.client.data_to_send()
        self.server.receive_data(data)
        return data

    def to_client(self) -> bytes:
        data: bytes = self.server.data_to_send()
        self.client.receive_data(data)
        return data


def test_streams_are_matched_by_their_number() -> None:
    """OBI #3291: with two streams under way nothing was reported."""
    ends, tap = Ends(), Tap()
    streams = [ends.ask(f"/{number}", b"body" * number) for number in range(5)]
    tap.call("read", ends.to_server())
    for stream in reversed(streams):
        ends.answer(stream, b"x" * stream)
    tap.call("write", ends.to_client())
    assert tap.shown() == [("server", "POST", f"/{n}", 201, 2 * n + 1, True) for n in (4, 3, 2, 1, 0)]
    assert [one.request_bytes for one in tap.flows] == [16, 12, 8, 4, 0]
    assert {one.protocol for one in tap.flows} == {"HTTP/2"}
    assert {one.authority for one in tap.flows} == {"host.test"}


def test_the_status_of_grpc_is_in_the_trailers() -> None:
    ends, tap = Ends(), Tap()
    stream = ends.ask("/pkg.Service/Method", b"\0\0\0\0\0")
    tap.call("write", ends.to_server())
    ends.answer(stream, b"\0\0\0\0\0", [("grpc-status", "5"), ("grpc-message", "no")])
    tap.call("read", ends.to_client())
    (flow,) = tap.flows
    assert (flow.side, flow.path, flow.status, flow.grpc_status) == ("client", "/pkg.Service/Method", 201, 5)


def test_a_connection_that_was_joined_late_guesses_nothing() -> None:
    """Beyla #1530, OBI #2772."""
    ends, tap = Ends(), Tap()
    first = ends.ask("/early")
    tap.pass_unseen("read", len(ends.to_server()))
    ends.answer(first, b"x")
    tap.pass_unseen("write", len(ends.to_client()))
    second = ends.ask("/early")
    tap.call("read", ends.to_server())
    ends.answer(second, b"xy")
    tap.call("write", ends.to_client())
    (flow,) = tap.flows
    assert (flow.side, flow.method, flow.path, flow.status, flow.response_bytes) == ("server", "POST", UNKNOWN, None, 2)
    assert tap.table.stats.unknown_fields > 0
    assert tap.table.stats.joined_late > 0


@pytest.mark.parametrize(("length", "is_complete"), [("4", True), ("5", False), (None, False)])
def test_a_stream_whose_client_gives_it_up_is_complete_if_its_length_was_there(
    length: str | None, is_complete: bool
) -> None:
    """Curl resets a stream once it has the body, before hypercorn ends it by a frame without data."""
    ends, tap = Ends(), Tap()
    stream = ends.ask("/")
    tap.call("write", ends.to_server())
    fields = [(":status", "200"), *([("content-length", length)] if length else [])]
    ends.server.send_headers(stream, fields)
    ends.server.send_data(stream, b"body")
    tap.call("read", ends.to_client())
    last_ns = tap.now
    ends.client.reset_stream(stream)
    tap.call("write", ends.to_server())
    assert tap.shown() == [("client", "POST", "/", 200, 4, is_complete)]
    assert tap.flows[0].end_ns == (last_ns if is_complete else tap.now)


def test_a_stream_that_was_reset_is_not_complete() -> None:
    ends, tap = Ends(), Tap()
    stream = ends.ask("/", b"body")
    tap.call("write", ends.to_server())
    ends.client.reset_stream(stream)
    tap.call("write", ends.to_server())
    assert tap.shown() == [("client", "POST", "/", None, 0, False)]


# ---- any cut gives the same ------------------------------------------------------------------------


def conversations() -> list[list[tuple[Direction, bytes]]]:
    pipelined: list[tuple[Direction, bytes]] = [
        ("write", b"".join(REQUEST % n for n in range(3))),
        ("read", b"".join(RESPONSE % (n, b"z" * n) for n in range(3))),
        ("write", b"BREW /pot HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"),
        ("read", b"HTTP/1.1 418 I'm a teapot\r\nTransfer-Encoding: chunked\r\n\r\na\r\n0123456789\r\n0\r\n\r\n"),
    ]
    ends = Ends()
    streams = [ends.ask(f"/{n}", b"b" * 50 * n) for n in range(3)]
    multiplexed: list[tuple[Direction, bytes]] = [("read", ends.to_server())]
    for stream in streams:
        ends.answer(stream, b"c" * 40 * stream, [("grpc-status", "0")])
    multiplexed.append(("write", ends.to_client()))
    return [pipelined, multiplexed]


def flows_of(calls: list[tuple[Direction, bytes]]) -> list[dict[str, Any]]:
    tap = Tap()
    for direction, data in calls:
        tap.call(direction, data)
    tap.table.close(tap.now)
    without_times = ("begin_ns", "first_byte_ns", "end_ns")
    assert tap.table.stats.resyncs == 0
    return [{name: value for name, value in asdict(one).items() if name not in without_times} for one in tap.flows]


@pytest.mark.parametrize("number", [0, 1])
def test_every_byte_by_itself_gives_the_same_flows(number: int) -> None:
    calls = conversations()[number]
    cut = [(direction, data[at : at + 1]) for direction, data in calls for at in range(len(data))]
    assert flows_of(cut) == flows_of(calls)
    assert len(flows_of(calls)) == 4 - number


@given(st.sampled_from([0, 1]), st.data())
def test_any_cut_gives_the_same_flows(number: int, data: st.DataObject) -> None:
    calls = conversations()[number]
    cut: list[tuple[Direction, bytes]] = []
    for direction, whole in calls:
        cuts = sorted(data.draw(st.sets(st.integers(1, len(whole) - 1), max_size=20)))
        cut += [(direction, whole[a:b]) for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert flows_of(cut) == flows_of(calls)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["read", "write"]),
            st.one_of(
                st.binary(max_size=60), st.sampled_from([REQUEST % 1, RESPONSE % (3, b"abc"), conversations()[1][0][1]])
            ),
            st.integers(0, 80),
            st.booleans(),
        ),
        max_size=30,
    )
)
def test_whatever_passes_is_no_error(calls: list[tuple[Direction, bytes, int, bool]]) -> None:
    tap = Tap(max_connections=4)
    for number, (direction, data, captured, is_lost) in enumerate(calls):
        if is_lost:
            tap.pass_unseen(direction, captured)
        tap.call(direction, data, captured=captured, key=KEY._replace(pointer=number % 6) if is_lost else None)
    tap.table.close(99)
    assert len(tap.table) == 0
