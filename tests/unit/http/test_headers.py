"""Header fields that were named are in flows, in events, and nothing else is."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import hpack
import pytest
from msgspec.structs import replace

from sowatch.agent.settings import load_settings
from sowatch.http import http1
from sowatch.http.capture import HttpFlow
from sowatch.http.flows import FlowTable
from sowatch.http.http2 import PREFACE, UNKNOWN
from sowatch.model.errors import ConfigError, UsageError
from sowatch.model.events import Process
from sowatch.model.header_names import MAX_NAMES, MAX_VALUE, NEVER_KEPT, header_names
from sowatch.model.lines import decode, to_json
from unit.http.test_faults import END_HEADERS, END_STREAM, HEADERS, frame
from unit.http.test_flows import KEY, Tap

SECRETS = b"Authorization: Bearer s3cret\r\nCookie: a=s3cret\r\nProxy-Authorization: s3cret\r\nX-Other: s3cret\r\n"
REQUEST = b"GET /1 HTTP/1.1\r\nHost: a\r\nX-Request-ID: r-1\r\naccept: a/b\r\nAccept: c/d\r\n" + SECRETS + b"\r\n"
RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nSet-Cookie: a=s3cret\r\nServer: ours\r\n\r\n"
NAMES = ("X-Request-Id", "accept", "server")


def exchange(tap: Tap, *, size: int = 1 << 20) -> None:
    """A request and its response, in calls of so many bytes."""
    for direction, data in (("write", REQUEST), ("read", RESPONSE)):
        for at in range(0, len(data), size):
            tap.call(direction, data[at : at + size])


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_headers_that_were_named_are_in_the_flow_and_no_others(size: int) -> None:
    tap = Tap(headers=NAMES)
    exchange(tap, size=size)
    (flow,) = tap.flows
    assert flow.request_headers == (("x-request-id", "r-1"), ("accept", "a/b, c/d"))
    assert flow.response_headers == (("server", "ours"),)
    assert "s3cret" not in repr(flow)


def test_no_header_is_in_a_flow_unless_it_was_named() -> None:
    tap = Tap()
    exchange(tap)
    assert (tap.flows[0].request_headers, tap.flows[0].response_headers) == ((), ())


@pytest.mark.parametrize("name", sorted(NEVER_KEPT))
def test_headers_with_secrets_are_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    for written in (name, name.title(), f" {name} "):
        with pytest.raises(UsageError, match=rf"the header {name} is never kept: .*\. Leave it out; docs/privacy\.md"):
            FlowTable(print, headers=("accept", written))
    (path := tmp_path / "c.toml").write_text(f"[http]\nheaders = ['accept', '{name.upper()}']\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=f"headers.*the header {name} is never kept"):
        load_settings(str(path), environment={})


@pytest.mark.parametrize("name", ["", "a b", ":path", "x:", "é", "a\r\nb", "a" + "\0"])
def test_what_is_no_name_of_a_header_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"is no name of a header\. Write one as x-request-id\."):
        header_names([name])


def test_more_names_than_every_flow_may_have_are_refused() -> None:
    assert len(header_names(f"x-{number}" for number in range(MAX_NAMES))) == MAX_NAMES
    with pytest.raises(UsageError, match=r"33 headers are named\. Name 32 at most\."):
        header_names(f"x-{number}" for number in range(MAX_NAMES + 1))


@pytest.mark.parametrize(("length", "kept"), [(MAX_VALUE, MAX_VALUE), (MAX_VALUE + 1, MAX_VALUE + 1), (9000, 1025)])
def test_a_long_value_is_cut_and_says_so(length: int, kept: int) -> None:
    tap = Tap(headers=["accept"])
    tap.call("write", b"GET / HTTP/1.1\r\nAccept: %s\r\n\r\n" % (b"v" * length))
    tap.call("read", RESPONSE)
    ((_, value),) = tap.flows[0].request_headers
    assert len(value) == kept
    assert value.endswith("…") == (length > MAX_VALUE)


def test_headers_of_waiting_requests_count_for_what_is_held() -> None:
    held = []
    for names in ((), ("accept",)):
        tap = Tap(headers=names)
        tap.call("write", 2 * (b"GET / HTTP/1.1\r\nAccept: %s\r\n\r\n" % (b"v" * 1000)))
        held.append(tap.table._held)
    assert held[1] - held[0] >= 1000


def http2(tap: Tap, encoders: tuple[Any, Any], stream: int, *, with_preface: bool) -> None:
    requests, responses = encoders
    fields = [(":method", "GET"), (":path", "/"), (":scheme", "https"), ("x-request-id", "r-2"), ("cookie", "s3cret")]
    block = requests.encode(fields)
    start = PREFACE + frame(4, 0, 0) if with_preface else b""
    tap.call("write", start + frame(HEADERS, END_HEADERS | END_STREAM, stream, block))
    for status, more in (("103", [("server", "early")]), ("200", [("server", "ours"), ("set-cookie", "s3cret")])):
        block = responses.encode([(":status", status), *more])
        tap.call("read", frame(HEADERS, END_HEADERS | (END_STREAM if status == "200" else 0), stream, block))


def test_headers_of_http2_are_those_of_the_final_response() -> None:
    tap = Tap(headers=NAMES)
    http2(tap, (hpack.Encoder(), hpack.Encoder()), 1, with_preface=True)
    (flow,) = tap.flows
    assert flow.request_headers == (("x-request-id", "r-2"),)
    assert flow.response_headers == (("server", "ours"),)
    assert "s3cret" not in repr(flow)


def test_a_header_that_may_have_been_sent_before_the_watch_is_unknown() -> None:
    encoders = hpack.Encoder(), hpack.Encoder()
    http2(Tap(), encoders, 1, with_preface=True)
    tap = Tap(headers=NAMES)
    http2(tap, encoders, 3, with_preface=False)
    (flow,) = tap.flows
    assert dict(flow.request_headers) == dict.fromkeys(header_names(NAMES), UNKNOWN)


def test_an_event_has_headers_only_where_some_were_named(schema: Any) -> None:
    tap = Tap(headers=NAMES)
    tap.call("write", REQUEST.replace(b"r-1", b"caf\xe9"))
    tap.call("read", RESPONSE)
    found = HttpFlow(tap.flows[0], Process(KEY.process.pid, KEY.process.start_ns), None)
    line = json.loads(to_json(found.event(0, has_headers=True), 1))
    schema(line)
    assert line["request_headers"]["x-request-id"] == "caf\\xe9"
    assert line["response_headers"] == {"server": "ours"}
    event = found.event(0, has_headers=True)
    assert decode(to_json(event, 1)) == replace(event, time_ns=0)
    line = json.loads(to_json(found.event(0), 1))
    schema(line)
    assert not {"request_headers", "response_headers"} & set(line)


def test_heads_that_were_parsed_leave_no_secrets_in_memory() -> None:
    tap = Tap(headers=NAMES)
    exchange(tap)
    reached: list[Any] = [http1, tap.table]
    seen: set[int] = set()
    while reached:
        one = reached.pop()
        if id(one) in seen or isinstance(one, type) or (isinstance(one, ModuleType) and one is not http1):
            continue
        seen.add(id(one))
        assert not (isinstance(one, bytes | bytearray | str) and "s3cret" in repr(one))
        reached += gc.get_referents(one) if not isinstance(one, FunctionType) else []
    assert len(http1._PARSED) >= 2
